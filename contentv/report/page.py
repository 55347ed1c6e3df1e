"""The page around the charts: one HTML file with its style inside, nothing loaded from anywhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contentv.report.charts import interval_bar
from contentv.report.markup import Html, join, number, tag
from contentv.report.style import STYLE

# Forbids scripts and every fetch, so a report that was mailed around cannot call anywhere, whatever its texts hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """Returns a whole HTML document.

    Args:
        title: the heading, and the title of the browser's tab.
        subtitle: one line under it.
        sections: finished pieces of markup, in order.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    header = tag("header", tag("h1", title), tag("p", subtitle))
    body = tag("body", tag("main", header, *sections))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def write_page(path: Path, document: str) -> Path:
    """Writes the document beside its place and renames it, so that a reader never sees half of it; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(document, encoding="utf-8")
    os.replace(beside, path)
    return path


def section(title: str, *children: str, lead: str = "") -> Html:
    """Returns a titled part of the page; `lead` is a sentence under the title."""
    return tag("section", tag("h2", title), *([tag("p", lead, class_="lead")] if lead else []), *children)


def charts(*figures: str) -> Html:
    """Returns figures side by side, as many as fit."""
    return tag("div", *figures, class_="charts")


def card(name: str, value: str, detail: str = "", drawing: Html | None = None) -> Html:
    """Returns one headline number."""
    parts = [tag("div", name, class_="name"), tag("div", value, class_="number")]
    if drawing is not None:
        parts.append(drawing)
    if detail:
        parts.append(tag("div", detail, class_="detail"))
    return tag("div", *parts, class_="card")


def share_card(
    name: str, value: float, interval: Sequence[float] | None, chance: float | None = None, note: str | None = None
) -> Html:
    """Returns a headline share in [0, 1] with its 95 % interval the level that guessing would reach, and a note."""
    facts = [f"95 % interval {interval[0]:.1%} to {interval[1]:.1%}" if interval else "no interval given"]
    if chance is not None:
        facts.append(f"guessing {chance:.1%}")
    if note:
        facts.append(note)
    drawing = interval_bar(value, interval[0], interval[1], chance) if interval else None
    return card(name, f"{value:.1%}", ", ".join(facts), drawing)


def cards(*found: str) -> Html:
    """Returns headline numbers side by side."""
    return tag("div", *found, class_="cards")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Html:
    """Returns a table; numbers and percentages are aligned right, `Html` cells go in as they are."""
    if not rows:
        return tag("p", "nothing to show", class_="empty")
    numeric = [any(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    head = tag("tr", *(tag("th", name, class_="n" if n else None) for name, n in zip(columns, numeric, strict=True)))
    body = [
        tag("tr", *(tag("td", _cell(cell), class_="n" if n else None) for cell, n in zip(row, numeric, strict=True)))
        for row in rows
    ]
    inner = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="panel scroll")


def facts(values: Mapping[str, str]) -> Html:
    """Returns names and values in columns, for long lists such as a configuration."""
    rows = [tag("div", tag("span", name), tag("span", value)) for name, value in values.items()]
    return tag("div", tag("div", *rows, class_="columns"), class_="panel")


def verdict_chips(verdict: Mapping[str, Any]) -> Html:
    """Returns right / wrong marks for true and false entries, and name and value for the others; None is left out."""
    chips = []
    for name, value in verdict.items():
        if isinstance(value, bool):
            text = f"✓ {name} right" if value else f"✗ {name} wrong"
            chips.append(tag("span", text, class_=f"chip {'good' if value else 'bad'}"))
        elif value is not None:
            chips.append(tag("span", f"{name.replace('_', ' ')} {number(value)}", class_="chip"))
    return join(chips)


def _is_number(cell: Any) -> bool:
    if isinstance(cell, str):
        return cell.endswith("%")
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def _cell(cell: Any) -> str:
    return cell if isinstance(cell, str) else number(cell)
