"""Charts against hand-made truth: where points land, what is left out, which ticks are chosen."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from contentv.report import axes, charts
from contentv.report.axes import Scale
from contentv.report.charts import Series
from contentv.report.dataset import BOTH, CLEAN_LOOKING, MOTION_RICH, NEITHER, correlation, quadrant, ranks
from contentv.report.markup import Html, duration, join, number, short, size, tag


def paths(figure: str) -> list[list[tuple[float, float]]]:
    """Returns the points of every line of a chart, without the key samples of its legend."""
    found = re.findall(r'<path class="line[^"]*" d="M([^"]+)"', figure)
    return [[tuple(map(float, p.split())) for p in d.split("L")] for d in found]  # type: ignore[misc]


def test_scale_maps_ends_and_middle() -> None:
    assert [Scale(0.0, 10.0, 100.0, 200.0)(v) for v in (0.0, 5.0, 10.0)] == [100.0, 150.0, 200.0]
    log = Scale(0.01, 100.0, 0.0, 4.0, log=True)
    assert [log(v) for v in (0.01, 0.1, 1.0, 100.0)] == pytest.approx([0.0, 1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 937, [0, 200, 400, 600, 800]), (-0.6, 0.05, [-0.6, -0.4, -0.2, 0])],
)
def test_linear_ticks(low: float, high: float, expected: list[float]) -> None:
    assert axes.linear_ticks(float(low), float(high)) == pytest.approx(expected)


def test_log_ticks() -> None:
    assert axes.log_ticks(1e-3, 1e3) == pytest.approx([1e-3, 1e-2, 0.1, 1, 10, 100, 1000])
    assert axes.log_ticks(0.1, 2.5) == pytest.approx([0.1, 0.2, 0.5, 1, 2])
    assert axes.log_ticks(0.51, 0.58) == pytest.approx(axes.linear_ticks(0.51, 0.58))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=6), st.booleans())
def test_every_value_lies_inside_its_scale(values: list[float], log: bool) -> None:
    if log:
        values = [abs(v) + 1e-9 for v in values]
    scale = axes.fit(values, 250.0, 10.0, log=log)
    for value in values:
        assert 10.0 - 1e-6 <= scale(value) <= 250.0 + 1e-6
    assert len(scale.ticks()) <= 20
    assert all(10.0 - 1 <= scale(t) <= 250.0 + 1 for t in scale.ticks())


def test_line_chart_places_its_points() -> None:
    (line,) = paths(charts.line_chart("t", [Series("a", [0.0, 5.0, 10.0], [0.0, 1.0, 0.5])]))
    left, right = axes.LEFT, axes.WIDTH - axes.RIGHT
    assert [x for x, _ in line] == pytest.approx([left, (left + right) / 2, right])
    heights = [y for _, y in line]
    assert heights[0] == pytest.approx(axes.HEIGHT - axes.BOTTOM)  # zero stands on the axis
    assert heights[0] - heights[2] == pytest.approx((heights[0] - heights[1]) / 2, abs=0.02)


def test_line_chart_on_a_log_axis_spaces_decades_evenly_and_counts_what_it_cannot_draw() -> None:
    figure = charts.line_chart(
        "t", [Series("a", [0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 10.0, 100.0, 0.0, math.nan])], log_y=True
    )
    (line,) = paths(figure)
    assert len(line) == 3
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.02)
    assert "2 values could not be drawn (not finite, or not above zero)." in figure


def test_charts_without_values_say_so() -> None:
    nothing = [math.nan, math.inf]
    assert "nothing to draw" in charts.line_chart("t", [Series("a", [0.0, 1.0], nothing)])
    assert "nothing to draw" in charts.line_chart("t", [])
    assert "none of the 2 values is a number" in charts.histogram("t", nothing, x_label="x")
    assert "no values" in charts.bar_chart("t", {})
    assert "no densities" in charts.density_curves("t", {}, x_label="x")


def test_smooth_lines_follow_the_mean() -> None:
    x = [float(i) for i in range(300)]
    noisy = [(a, 1.0 + (0.5 if i % 2 else -0.5)) for i, a in enumerate(x)]
    middle = charts.running_mean(noisy)[20:-20]
    assert max(abs(v - 1.0) for _, v in middle) < 0.03
    assert {v for _, v in charts.running_mean([(a, 2.0) for a in x])} == {2.0}


def test_thinning_keeps_spikes_and_order() -> None:
    points = [(float(i), math.sin(i / 300)) for i in range(20_000)]
    points[7777] = (7777.0, 50.0)
    points[12_345] = (12_345.0, -50.0)
    kept = charts.thin(points)
    assert len(kept) <= charts.MAX_POINTS + 2
    assert points[7777] in kept
    assert points[12_345] in kept
    assert kept == sorted(kept)


def test_histogram_counts_like_numpy() -> None:
    values = np.random.default_rng(0).normal(size=500).tolist()
    figure = charts.histogram("t", [*values, math.nan], x_label="x", bins=12)
    hints = [int(n.replace(",", "")) for n in re.findall(r"<title>[^<]*: ([\d,]+)</title>", figure)]
    assert hints == np.histogram(values, bins=12)[0].tolist()
    assert "1 without a value" in figure


def test_density_axis_is_cut_at_poles_and_says_so() -> None:
    x = [i / 200 for i in range(1, 200)]
    figure = charts.density_curves(
        "t", {"pole": (x, [1.0] * 197 + [50.0, 1000.0]), "base": (x, [1.0] * 199)}, x_label="s"
    )
    assert "The axis ends at 1.1; the highest value is 1,000." in figure
    assert figure.index('class="line base" d=') < figure.index('class="line c0" d=')  # the base lies under the others


@pytest.mark.parametrize(
    ("motion", "visual", "name"),
    [(0.9, 0.1, MOTION_RICH), (0.1, 0.9, CLEAN_LOOKING), (0.5, 0.5, BOTH), (0.4, 0.4, NEITHER)],
)
def test_quadrants(motion: float, visual: float, name: str) -> None:
    assert quadrant(motion, visual) == name


def test_ranks_equal_scipys() -> None:
    values = np.random.default_rng(1).integers(0, 20, 101).astype(float).tolist()
    expected = (scipy_stats.rankdata(values) - 1) / 100
    found = ranks([values[0], math.nan, *values[1:]])
    assert math.isnan(found.pop(1))
    assert found == pytest.approx(expected.tolist())


def test_correlation_equals_scipys_with_its_interval() -> None:
    draw = np.random.default_rng(2)
    a = draw.normal(size=200)
    b = -0.4 * a + draw.normal(size=200)
    found = correlation([*a.tolist(), math.nan], [*b.tolist(), 1.0])
    assert found is not None
    expected = scipy_stats.pearsonr(a, b)
    interval = expected.confidence_interval(0.95)
    assert found == pytest.approx((expected.statistic, interval.low, interval.high, 200), abs=1e-4)


def test_correlation_of_too_little_is_none() -> None:
    assert correlation([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]) is None
    assert correlation([0.5] * 9, [float(i) for i in range(9)]) is None


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<b>", Html("<i></i>"), title='"&') == '<p title="&quot;&amp;">&lt;b&gt;<i></i></p>'
    assert join(["a<b", tag("br")]) == "a&lt;b<br>"
    assert tag("video", muted=True, loop=False, poster=None, class_="x", aria_label="y") == (
        '<video muted class="x" aria-label="y"></video>'
    )


def test_numbers_for_people() -> None:
    assert [number(v) for v in (1234567, 0.12345, 12345.6, 3e-5, 0.0, None, math.nan)] == (
        ["1,234,567", "0.1235", "12,346", "3.00e-05", "0", "n/a", "not a number"]
    )
    assert [short(v) for v in (1500.0, 2e9, 3e-5, 0.25, -40_000.0)] == ["1.5k", "2G", "3e-5", "0.25", "-40k"]
    assert [duration(v) for v in (8.44, 200.2, 7500.0)] == ["8.44 s", "3 min 20 s", "2 h 05 min"]
    assert [size(v) for v in (512.0, 1536.0, 5.0 * 2**40)] == ["512 B", "1.5 KiB", "5.12e+03 GiB"]
