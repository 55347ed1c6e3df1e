"""Scales, ticks and the frame of a chart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from contentv.report.markup import Html, join, short, tag

WIDTH, HEIGHT = 520.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 16.0, 12.0, 44.0


@dataclass(frozen=True)
class Scale:
    """A map from data values in [low, high] to drawing coordinates in [start, end], linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        place = math.log10(value) if self.log else value
        return self.start + (place - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Returns round values inside the range."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` multiples of 1, 2 or 5 times a power of ten between two values."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) if abs(step) >= 1e-9 else i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten, with 2 and 5 times them under three decades; linear ticks in a short range."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if len(exponents) > 8:
        exponents = exponents[:: math.ceil(len(exponents) / 6)]
    factors = (1.0, 2.0, 5.0) if math.log10(high / low) < 3 else (1.0,)
    found = [f * 10.0**e for e in exponents for f in factors]
    inside = [v for v in found if low * 0.999 <= v <= high * 1.001]
    return inside if len(inside) >= 3 else linear_ticks(low, high)


def fit(values: Iterable[float], start: float, end: float, *, log: bool = False, pad: float = 0.05) -> Scale:
    """Returns the scale that holds all values with some room around them.

    Args:
        values: finite numbers, at least one; all positive when `log`.
        start: coordinate of the lowest value.
        end: coordinate of the highest value.
        log: logarithmic scale.
        pad: room at both ends as a part of the range.
    """
    found = list(values)
    low, high = min(found), max(found)
    if log:
        spread = max(math.log10(high / low), 0.1)
        return Scale(low * 10 ** (-pad * spread), high * 10 ** (pad * spread), start, end, log=True)
    if low == high:
        room = abs(high) / 2 or 1.0
        return Scale(0.0 if low >= 0 else low - room, high + room, start, end)
    room = pad * (high - low)
    bottom = 0.0 if 0 <= low < room else low - room  # a count or a share that starts at zero gets no room below it
    return Scale(bottom, high + room, start, end)


def x_fit(values: Iterable[float]) -> Scale:
    """Returns the horizontal scale of a plot, from edge to edge."""
    return fit(values, LEFT, WIDTH - RIGHT, pad=0.0)


def y_fit(values: Iterable[float], *, log: bool = False) -> Scale:
    """Returns the vertical scale of a plot; drawing coordinates grow downwards."""
    return fit(values, HEIGHT - BOTTOM, TOP, log=log)


def frame(x: Scale, y: Scale, x_label: str, y_label: str) -> Html:
    """Returns grid lines, tick labels and axis names."""
    parts: list[Html] = []
    for value in y.ticks():
        at = y(value)
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
        parts.append(tag("text", short(value), class_="tick", x=LEFT - 7, y=at + 4, text_anchor="end"))
    for value in x.ticks():
        at = x(value)
        parts.append(tag("line", class_="mark", x1=at, x2=at, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4))
        parts.append(tag("text", short(value), class_="tick", x=at, y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    base = HEIGHT - BOTTOM
    parts.append(tag("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", x_label, class_="label", x=middle, y=HEIGHT - 6, text_anchor="middle"))
    turn = f"translate(13 {(TOP + base) / 2:.0f}) rotate(-90)"
    parts.append(tag("text", y_label, class_="label", transform=turn, text_anchor="middle"))
    return join(parts)


def plot_area(*children: str) -> Html:
    """Returns the drawing clipped to the inside of the axes (a nested svg clips by itself, so no ids are needed)."""
    width, height = WIDTH - RIGHT - LEFT, HEIGHT - BOTTOM - TOP
    return tag(
        "svg", *children, x=LEFT, y=TOP, width=width, height=height, viewBox=f"{LEFT:g} {TOP:g} {width:g} {height:g}"
    )
