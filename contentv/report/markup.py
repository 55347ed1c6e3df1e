"""HTML as a type: text is escaped unless it was built here, so a caption can never become markup."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import Any

VOID_TAGS = frozenset({"meta", "img", "br"})


class Html(str):
    """A piece of finished markup; every other string is escaped when it is put into a page."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: Any) -> Html:
    """Returns one element.

    Args:
        name: element name.
        children: contents; `Html` goes in as it is, plain text is escaped.
        attributes: `class_` is written as `class`, other underscores as hyphens; True gives a bare attribute, None and
            False leave it out, floats are written with at most two decimals.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = "class" if key == "class_" else key.replace("_", "-")
        if isinstance(value, float):
            value = coordinate(value)
        parts.append(label if value is True else f'{label}="{html.escape(str(value), quote=True)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening) if name in VOID_TAGS else Html(f"{opening}{join(children)}</{name}>")


def join(children: Iterable[str]) -> Html:
    """Returns the pieces one after the other, plain text escaped."""
    return Html("".join(c if isinstance(c, Html) else html.escape(c, quote=True) for c in children))


def coordinate(value: float) -> str:
    """Returns a drawing coordinate with at most two decimals and no trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in {"-0", ""} else text


def number(value: Any) -> str:
    """Returns a number for people: about four significant digits, thousands separated; other values as text."""
    if value is None:
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.2e}"


def short(value: float) -> str:
    """Returns a number for an axis: 1500 -> 1.5k, 2e9 -> 2G, 3e-5 -> 3e-5."""
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{suffix}"
    if size == 0 or size >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float | int) -> str:
    """Returns seconds as 8.4 s, 3 min 20 s or 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float | int) -> str:
    """Returns bytes in the largest fitting unit of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    raise AssertionError("unreachable")
