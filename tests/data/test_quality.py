"""Raw scores to [0, 1]: ranks against their definition, the other forms against their formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_factory import SMALL, build, fill, meta, tensors, writer
from hypothesis import given, settings
from hypothesis import strategies as st

from contentv.base.errors import UserError
from contentv.data import Normaliser, refit_quality
from contentv.data.quality import ScoreStatistics, drifted, write_quality


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


def test_corpus_scope_ranks_all_sources_together(tmp_path: Path) -> None:
    dim, bright = [i / 100 for i in range(101)], [10.0 + i for i in range(303)]
    write_quality(tmp_path, [("dim", x, 1.0) for x in dim] + [("bright", x, 1.0) for x in bright])
    everything = np.array(dim + bright)
    n = Normaliser.load(tmp_path, scope="corpus")
    for source, raw in (("dim", 0.5), ("bright", 60.0)):
        assert n.apply(source, "visual_raw", raw) == pytest.approx((everything < raw).mean(), abs=0.01)
    low, high = np.quantile(everything, [0.01, 0.99])
    assert Normaliser.load(tmp_path, "minmax", "corpus").apply("dim", "visual_raw", 0.5) == pytest.approx(
        max(0.0, (0.5 - low) / (high - low)), abs=1e-9
    )
    with pytest.raises(UserError, match="no statistics"):
        n.apply("unknown", "visual_raw", 1.0)
    with pytest.raises(UserError, match=r"data\.quality_scope"):
        Normaliser.load(tmp_path, scope="world")
    record = json.loads((tmp_path / "quality.json").read_text())
    del record["corpus"]  # as older versions wrote it
    (tmp_path / "quality.json").write_text(json.dumps(record))
    assert Normaliser.load(tmp_path).apply("dim", "visual_raw", 0.5) == pytest.approx(0.5)
    with pytest.raises(UserError, match=r"quality\.json is not valid"):
        Normaliser.load(tmp_path, scope="corpus")


def test_drift_is_told_when_new_clips_fall_outside(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    old, same, moved = rng.normal(0, 1, 2000), rng.normal(0, 1, 500), rng.normal(2.0, 1, 500)
    n = Normaliser({"s": {"motion_raw": ScoreStatistics.fit(old)}})
    assert n.drift("s", "motion_raw", same) == ""
    low, high = np.quantile(old, [0.01, 0.99])
    share = ((moved < low) | (moved > high)).mean()
    assert share > 0.2
    sentence = n.drift("s", "motion_raw", np.append(moved, math.nan))
    assert sentence.startswith(f'motion_raw of source "s": {share:.0%} of 500 new clips lie outside')
    assert n.drift("s", "motion_raw", moved[:49]) == ""
    assert n.drift("other", "motion_raw", moved) == ""
    assert drifted(tmp_path, [("s", 1.0, 1.0)]) == []  # no quality.json, nothing to compare with
    write_quality(tmp_path, [("s", None, x) for x in old])
    rows = [("s", None, x) for x in [*old, *moved]]
    assert drifted(tmp_path, rows, known=2000) == [n.drift("s", "motion_raw", moved)]
    assert drifted(tmp_path, rows, known=2500) == []


def test_adding_clips_of_another_kind_is_told_and_refits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("contentv.data.writer.get_logger", lambda: SimpleNamespace(warning=told.append))
    path = build(tmp_path / "d", {SMALL: 60})
    with writer(path) as target:
        fill(target, 60, first=60)
    assert told == []
    with writer(path) as target:
        for i in range(120, 180):
            strange = {**meta(i), "visual_raw": 50.0 + i, "motion_raw": None}
            target.add(f"new-{i}", strange, **tensors(i), bucket=SMALL)
    assert len(told) == 1
    assert 'visual_raw of source "films": 100% of 60 new clips lie outside 0 .. 6' in told[0]
    assert "quality.json is fitted again" in told[0]
    assert Normaliser.load(path).apply("films", "visual_raw", 200.0) > 0.8
    write_quality(path, [("films", float(i % 4), 1.0) for i in range(100)])  # of other clips
    share = (sum(i % 7 > 3 for i in range(120)) + 60) / 180
    sentence = f'visual_raw of source "films": {share:.0%} of 180 new clips lie outside 0 .. 3'
    assert sentence in " ".join(refit_quality(path))
    assert refit_quality(path) == []
