"""Raw scores to [0, 1]: ranks against their definition, the other forms against their formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from data_factory import SMALL, build, fill, writer
from hypothesis import given, settings
from hypothesis import strategies as st

from contentv.base.errors import UserError
from contentv.data import Normaliser, refit_quality
from contentv.data.quality import ScoreStatistics, write_quality


def normaliser(values: list[float], mode: str = "quantile") -> Normaliser:
    return Normaliser({"s": {"visual_raw": ScoreStatistics.fit(values)}}, mode)


def test_quantile_is_the_percentile_rank() -> None:
    values = np.random.default_rng(0).lognormal(size=5_000)
    scores = normaliser(list(values)).apply_many("s", "visual_raw", values)
    exact = (values[:, None] > values[None, :]).mean(axis=1)
    assert np.abs(scores - exact).max() < 0.006
    assert abs(scores.mean() - 0.5) < 0.002
    assert scores.min() == 0.0
    assert scores.max() == 1.0


def test_ties_get_the_middle_of_their_ranks() -> None:
    values = [0.0] * 300 + [1.0] * 100
    n = normaliser(values)
    assert n.apply("s", "visual_raw", 0.0) == pytest.approx(0.375, abs=0.01)
    assert n.apply("s", "visual_raw", 1.0) == pytest.approx(0.875, abs=0.01)
    assert normaliser([4.0]).apply("s", "visual_raw", 4.0) == 0.5
    assert normaliser([4.0] * 9).apply("s", "visual_raw", 4.0) == 0.5


@pytest.mark.parametrize("mode", ["quantile", "minmax", "zsigmoid"])
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    queries=st.lists(st.floats(-1e7, 1e7), min_size=2, max_size=20),
)
def test_every_form_rises_and_stays_in_range(mode: str, values: list[float], queries: list[float]) -> None:
    scores = normaliser(values, mode).apply_many("s", "visual_raw", np.sort(np.array(queries + values)))
    assert scores.min() >= 0.0
    assert scores.max() <= 1.0
    assert (np.diff(scores) >= -1e-9).all()


def test_minmax_and_zsigmoid_follow_their_formulas() -> None:
    values = list(np.random.default_rng(1).normal(3.0, 2.0, 4_000))
    low, high = np.quantile(values, [0.01, 0.99])
    assert normaliser(values, "minmax").apply("s", "visual_raw", 3.5) == pytest.approx((3.5 - low) / (high - low))
    assert normaliser(values, "minmax").apply("s", "visual_raw", low - 1) == 0.0
    z = (3.5 - np.mean(values)) / np.std(values)
    assert normaliser(values, "zsigmoid").apply("s", "visual_raw", 3.5) == pytest.approx(1 / (1 + math.exp(-z)))


def test_missing_scores_stay_missing_and_unknown_sources_are_errors(tmp_path: Path) -> None:
    n = normaliser([1.0, 2.0])
    assert math.isnan(n.apply("s", "visual_raw", None))
    assert math.isnan(n.apply("s", "visual_raw", math.nan))
    assert math.isnan(n.apply("unknown", "visual_raw", None))
    with pytest.raises(UserError, match="unknown"):
        n.apply("unknown", "visual_raw", 1.0)
    with pytest.raises(UserError, match="rank"):
        Normaliser({}, "rank")
    with pytest.raises(UserError, match=r"quality\.json"):
        Normaliser.load(tmp_path)
    (tmp_path / "quality.json").write_text('{"version": 1, "sources": {"s": {"visual_raw": {"count": 3}}}}')
    with pytest.raises(UserError, match="not valid"):
        Normaliser.load(tmp_path)


def test_sources_have_their_own_ranks(tmp_path: Path) -> None:
    write_quality(
        tmp_path, [("dim", i / 100, None) for i in range(101)] + [("bright", 10.0 + i, 1.0) for i in range(101)]
    )
    n = Normaliser.load(tmp_path)
    assert n.apply("dim", "visual_raw", 0.5) == pytest.approx(0.5)
    assert n.apply("bright", "visual_raw", 60.0) == pytest.approx(0.5)
    assert json.loads((tmp_path / "quality.json").read_text())["sources"]["dim"]["motion_raw"]["count"] == 0


def test_refit_restores_quality_json_from_the_shards(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 15})
    with writer(path) as target:
        fill(target, 6, first=15, source="shows")
    fitted = (path / "quality.json").read_bytes()
    shards = {p: p.stat().st_mtime_ns for p in path.rglob("*.tar")}
    (path / "quality.json").unlink()
    refit_quality(path)
    assert (path / "quality.json").read_bytes() == fitted
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*.tar")} == shards
    n = Normaliser.load(path)
    assert 0.0 < n.apply("shows", "visual_raw", 3.0) < 1.0
