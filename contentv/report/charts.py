"""Charts as inline SVG: lines, bars, histograms, densities, a scatter with quadrants; the page's CSS colours them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contentv.report import axes
from contentv.report.axes import Scale
from contentv.report.markup import Html, coordinate, join, number, short, tag

NUM_COLOURS = 6
MAX_POINTS = 500  # a series is thinned to about this many points before it is drawn


@dataclass(frozen=True)
class Series:
    """One named line: x and y of equal length; values that are not finite are left out.

    Args:
        name: shown in the legend.
        x: positions.
        y: values.
        base: drawn grey and broad, as what the others are compared with.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    base: bool = False

    def points(self, *, log_y: bool = False) -> list[tuple[float, float]]:
        """Returns the drawable points."""
        pairs = zip(self.x, self.y, strict=True)
        return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    y_label: str = "",
    log_y: bool = False,
    smooth: bool = False,
    note: str = "",
) -> Html:
    """Returns a figure with one line for each series.

    Args:
        title: heading of the figure.
        series: the lines; at most six are told apart by colour and dash.
        x_label: name of the horizontal axis.
        y_label: name and unit of the vertical axis.
        log_y: logarithmic vertical axis; values <= 0 cannot be shown there and are counted in the caption.
        smooth: draws a running mean, and under it, for up to two lines, the values themselves, thin.
        note: a sentence under the chart.
    """
    drawn = [(i, s, s.points(log_y=log_y)) for i, s in enumerate(series)]
    drawn = [d for d in drawn if d[2]]
    if not drawn:
        return empty_chart(title, "nothing to draw: no finite values were logged")
    x = axes.x_fit(p[0] for _, _, points in drawn for p in points)
    y = axes.y_fit((p[1] for _, _, points in drawn for p in points), log=log_y)
    lines = [_line(points, x, y, _style(i, s), smooth=smooth, raw=len(drawn) <= 2) for i, s, points in drawn]
    left_out = sum(len(s.x) - len(s.points(log_y=log_y)) for s in series)
    notes = [note] if note else []
    if left_out:
        why = "not finite, or not above zero" if log_y else "not finite"
        notes.append(f"{left_out:,} value{'s' * (left_out > 1)} could not be drawn ({why}).")
    label = f"{title}: " + "; ".join(f"{s.name} from {number(p[0][1])} to {number(p[-1][1])}" for _, s, p in drawn)
    body = join([axes.frame(x, y, x_label, y_label), axes.plot_area(*lines)])
    names = [(s.name, _style(i, s)) for i, s, _ in drawn] if len(series) > 1 else []
    return figure(title, label, body, legend=names, note=" ".join(notes))


def density_curves(
    title: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str, base: str = "base"
) -> Html:
    """Returns probability densities over [0, 1]; the curve named `base` lies grey and broad under the others.

    A density may grow without bound at the ends, so the axis stops at 1.1 times the 98th percentile of all values.
    """
    found = [Series(name, x, y, base=name == base) for name, (x, y) in curves.items()]
    drawn = [(i, s, s.points()) for i, s in enumerate(found) if s.points()]
    if not drawn:
        return empty_chart(title, "nothing to draw: no densities were given")
    values = sorted(p[1] for _, _, points in drawn for p in points)
    top = max(values[int(0.98 * (len(values) - 1))] * 1.1, 1e-6)
    x = axes.x_fit([0.0, 1.0, *(p[0] for _, _, points in drawn for p in points)])
    y = Scale(0.0, top, axes.HEIGHT - axes.BOTTOM, axes.TOP)
    under_first = sorted(drawn, key=lambda d: not d[1].base)
    lines = [tag("path", class_=f"line {_style(i, s)}", d=_path(points, x, y)) for i, s, points in under_first]
    body = join([axes.frame(x, y, x_label, "density"), axes.plot_area(*lines)])
    note = f"The axis ends at {number(top)}; the highest value is {number(values[-1])}." if values[-1] > top else ""
    return figure(title, title, body, legend=[(s.name, _style(i, s)) for i, s, _ in drawn], note=note)


def histogram(title: str, values: Sequence[float], *, x_label: str, bins: int = 30, note: str = "") -> Html:
    """Returns the number of values in each of `bins` equal intervals between the lowest and the highest."""
    finite = [v for v in values if math.isfinite(v)]
    missing = len(values) - len(finite)
    if not finite:
        return empty_chart(title, "no values" if not values else f"none of the {len(values):,} values is a number")
    low, high = min(finite), max(finite)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = [0] * bins
    for value in finite:
        counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    x = Scale(low, high, axes.LEFT, axes.WIDTH - axes.RIGHT)
    y = axes.y_fit([0.0, float(max(counts))])
    edge = [low + (high - low) * i / bins for i in range(bins + 1)]
    width = x(edge[1]) - x(edge[0]) - 1.0
    bars = []
    for i, count in enumerate(counts):
        hint = tag("title", f"{short(edge[i])} to {short(edge[i + 1])}: {count:,}")
        top = y(float(count))
        bars.append(tag("rect", hint, class_="bar", x=x(edge[i]) + 0.5, y=top, width=width, height=y(0.0) - top))
    notes = [note] if note else []
    if missing:
        notes.append(f"{missing:,} without a value are left out.")
    body = join([axes.frame(x, y, x_label, "count"), *bars])
    label = f"{title}: {len(finite):,} values from {number(min(finite))} to {number(max(finite))}"
    return figure(title, label, body, note=" ".join(notes))


def bar_chart(title: str, values: Mapping[str, float], *, unit: str = "", note: str = "") -> Html:
    """Returns one horizontal bar for each named value, in the given order."""
    if not values:
        return empty_chart(title, "no values")
    top = max([*values.values(), 1e-12])
    row, name_width, value_width = 26.0, 150.0, 80.0
    room = axes.WIDTH - name_width - value_width
    parts: list[Html] = []
    for i, (name, value) in enumerate(values.items()):
        y = 6 + i * row
        shown = name if len(name) <= 24 else name[:23] + "…"
        length = max(room * value / top, 1.0)
        parts.append(tag("text", shown, class_="name", x=name_width - 8, y=y + 15, text_anchor="end"))
        parts.append(tag("rect", class_="bar", x=name_width, y=y + 3, width=length, height=row - 9, rx=2))
        text = f"{number(value)} {unit}".strip()
        parts.append(tag("text", text, class_="name", x=name_width + length + 7, y=y + 15))
    label = f"{title}: " + ", ".join(f"{k} {number(v)}" for k, v in values.items())
    return figure(title, label, join(parts), note=note, height=12 + row * len(values))


def scatter(
    title: str,
    groups: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    counts: Mapping[str, int],
    split: float = 0.5,
    note: str = "",
) -> Html:
    """Returns a scatter over the unit square, cut into quadrants at `split`.

    Args:
        title: heading of the figure.
        groups: points of each quadrant, in the order right-bottom, left-top, right-top, left-bottom.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        counts: how many there are in each quadrant, which may be more than are drawn.
        split: where the quadrants meet, on both axes.
        note: a sentence under the chart.
    """
    total = sum(counts.values())
    if not total:
        return empty_chart(title, "no clip has both scores")
    x = Scale(0.0, 1.0, axes.LEFT, axes.WIDTH - axes.RIGHT)
    y = Scale(0.0, 1.0, axes.HEIGHT - axes.BOTTOM, axes.TOP)
    parts: list[Html] = [axes.frame(x, y, x_label, y_label)]
    for i, points in enumerate(groups.values()):
        dots = "".join(f"M{coordinate(x(a))} {coordinate(y(b))}h0" for a, b in points)
        parts.append(tag("path", class_=f"dots c{i}", d=dots))
    parts.append(tag("line", class_="split", x1=x(split), x2=x(split), y1=y(0.0), y2=y(1.0)))
    parts.append(tag("line", class_="split", x1=x(0.0), x2=x(1.0), y1=y(split), y2=y(split)))
    corners = [(1.0, 0.0, "end", -8.0), (0.0, 1.0, "start", 16.0), (1.0, 1.0, "end", 16.0), (0.0, 0.0, "start", -8.0)]
    for name, (a, b, anchor, drop) in zip(groups, corners, strict=True):
        text = f"{name}  {counts[name]:,} ({counts[name] / total:.0%})"
        at = x(a) + (6 if anchor == "start" else -6)
        parts.append(tag("text", text, class_="corner", x=at, y=y(b) + drop, text_anchor=anchor))
    label = f"{title}: " + ", ".join(f"{name} {counts[name]}" for name in groups)
    return figure(title, label, join(parts), note=note)


def interval_bar(value: float, low: float, high: float, chance: float | None = None) -> Html:
    """Returns a small drawing of a share in [0, 1] with its interval, and where chance lies."""
    x = Scale(0.0, 1.0, 2.0, 198.0)
    parts = [
        tag("line", class_="track", x1=2, x2=198, y1=9, y2=9),
        tag("line", class_="interval", x1=x(low), x2=x(high), y1=9, y2=9),
        tag("circle", class_="value", cx=x(value), cy=9, r=5),
    ]
    if chance is not None:
        parts.append(tag("line", tag("title", "chance"), class_="chance", x1=x(chance), x2=x(chance), y1=2, y2=16))
    return tag("svg", *parts, class_="mini", viewBox="0 0 200 18", aria_hidden="true")


def empty_chart(title: str, why: str) -> Html:
    """Returns a figure that says why it is empty."""
    return tag("figure", tag("figcaption", title), tag("p", why, class_="empty"), class_="chart")


def figure(
    title: str,
    label: str,
    body: Html,
    *,
    legend: Sequence[tuple[str, str]] = (),
    note: str = "",
    height: float = axes.HEIGHT,
) -> Html:
    """Returns a titled figure around a drawing of the standard width; `legend` holds (name, style class)."""
    parts = [tag("figcaption", title)]
    if legend:
        keys = [tag("span", _swatch(style), name, class_="key") for name, style in legend]
        parts.append(tag("div", *keys, class_="legend"))
    box = f"0 0 {axes.WIDTH:g} {height:g}"
    parts.append(tag("svg", body, viewBox=box, role="img", aria_label=label))
    if note:
        parts.append(tag("p", note, class_="note"))
    return tag("figure", *parts, class_="chart")


def _swatch(style: str) -> Html:
    line = tag("line", class_=f"line {style}", x1=1, x2=23, y1=5, y2=5)
    return tag("svg", line, class_="swatch", viewBox="0 0 24 10", aria_hidden="true")


def _style(index: int, series: Series) -> str:
    return "base" if series.base else f"c{index % NUM_COLOURS}"


def _line(points: Sequence[tuple[float, float]], x: Scale, y: Scale, style: str, *, smooth: bool, raw: bool) -> Html:
    if len(points) == 1:
        return tag("circle", class_=f"dot {style}", cx=x(points[0][0]), cy=y(points[0][1]), r=3.5)
    if not smooth or len(points) < 12:
        return tag("path", class_=f"line {style}", d=_path(thin(points), x, y))
    values = [tag("path", class_=f"line raw {style}", d=_path(thin(points), x, y))] if raw else []
    return join([*values, tag("path", class_=f"line {style}", d=_path(thin(running_mean(points)), x, y))])


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{coordinate(x(a))} {coordinate(y(b))}" for a, b in points)


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns centred means over about a fifteenth of the points (at least five of them)."""
    half = max(2, len(points) // 30)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    result = []
    for i, (place, _) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        result.append((place, (sums[high] - sums[low]) / (high - low)))
    return result


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Returns about `limit` points that keep the lowest and highest value of every stretch, so no spike is lost."""
    if len(points) <= limit:
        return list(points)
    width = math.ceil(2 * len(points) / limit)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        kept.extend(sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}))
    return kept
