"""The study of routing: its clips, measures, statistics and theory against known values, and its runs known by row."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from tqd_study import design, driver, evaluation, figures, handover, report, summary
from tqd_study.clips import places, training_clips
from tqd_study.intervals import Interval
from tqd_study.measures import compare, sharpness_of, speed_of, wasserstein
from tqd_study.settings import Condition, Recipe, Run
from tqd_study.sprites import Traits, World, draw_traits, make_clips, render
from tqd_study.toy import Components, predict
from tqd_study.training import build_model, train

from contentv.diffusion.timesteps import TQD, Uniform

SMALL = Recipe(clips=64, steps=3, warmup_steps=1, batch=4, layers=1, heads=2, head_dim=16, samples=8, solver_steps=2)


def test_a_sprite_is_where_its_formula_says() -> None:
    world = World(rows=2, columns=16, frames=2, amplitude=3.0, detail=0.5, size=(1.0, 1.8), stripe=4.0)
    clip = render(world, Traits(*(torch.tensor([value]) for value in (15.0, 0.3, 1.5, 0.0))))
    x = 2 - (15.0 + 1.5 - 16)  # from the sprite, round the ring, to column 2 of the second frame
    line = math.exp(-(x**2) / (2 * 1.8**2)) * (3.0 + 0.5 * math.sqrt(2) * math.cos(2 * math.pi * x / 4.0 + 0.3))
    assert clip.shape == (1, 1, 2, 2, 16)
    assert float(clip[0, 0, 1, 0, 2]) == pytest.approx(math.exp(-0.125) * line, rel=1e-4)


def test_measures_find_the_traits() -> None:
    world = World()
    for kind in ("golden", "blurred", "static", "neither"):
        traits = draw_traits(world, kind, 50, seed=5)
        assert torch.allclose(speed_of(render(world, traits)), traits.speed, atol=1e-3)
    sharp, soft = (sharpness_of(make_clips(world, kind, 50, seed=5)).mean() for kind in ("golden", "blurred"))
    assert sharp > 5 * soft


def test_jitter_is_no_motion_and_noise_no_golden_clip() -> None:
    world = World()
    traits = draw_traits(world, "static", 8, seed=5)
    still = replace(traits, speed=torch.zeros(8))
    moved = [replace(still, start=still.start + (frame % 2)) for frame in range(world.frames)]
    jumping = torch.cat([render(world, trait)[:, :, :1] for trait in moved], dim=2)
    assert float(speed_of(jumping).max()) < 0.25
    golden = make_clips(world, "golden", 200, seed=5)
    assert compare(golden, golden)["golden_like"] == 1.0
    assert compare(golden, golden)["combined"] == pytest.approx(1.0)
    found = compare(torch.randn(golden.shape, generator=torch.Generator().manual_seed(0)), golden)
    assert found["golden_like"] < 0.05


def test_a_score_of_clips_that_fall_short_is_their_ratio_and_a_spread_costs() -> None:
    golden = torch.linspace(1, 2, 1001)
    assert 1 - wasserstein(golden * 0.4, golden) / 1.5 == pytest.approx(0.4, abs=1e-3)
    assert wasserstein(torch.full((500,), 1.5), golden) == pytest.approx(0.25, abs=1e-3)


def test_scores_are_ranks_in_the_corpus_of_four_kinds() -> None:
    clips = training_clips(replace(SMALL, clips=512), Condition(("blurred", "static")), seed=3)
    moving, sharp = slice(0, 256), slice(256, 512)
    assert clips.motion[moving].min() > 0.49
    assert clips.motion[sharp].max() < 0.51
    assert float(clips.visual[sharp].mean()) == pytest.approx(0.75, abs=0.03)
    assert float(clips.visual[moving].mean()) == pytest.approx(0.25, abs=0.03)
    swapped = training_clips(replace(SMALL, clips=512), Condition(("blurred", "static"), swap=True), seed=3)
    assert torch.equal(swapped.motion, clips.visual)
    assert torch.equal(swapped.latents, clips.latents)


def test_an_epoch_shows_every_clip_once_or_as_often_as_it_is_kept() -> None:
    clips = training_clips(replace(SMALL, clips=400), Condition(("blurred", "neither")), seed=3)
    seen = places(clips, drop=False, seed=1)
    assert sorted(next(seen) for _ in range(400)) == list(range(400))
    dropping = places(clips, drop=True, seed=1)
    counts = torch.bincount(torch.tensor([next(dropping) for _ in range(20_000)]), minlength=400).float()
    keep = torch.maximum(clips.motion, clips.visual)
    shares = counts / counts.sum() - keep / keep.sum()
    assert float(shares.abs().max()) < 0.2 / 400 * 2  # 50 visits a clip: a fifth is three deviations


def test_theory_gives_the_values_known_for_one_gap() -> None:
    gaps = {gap: (torch.tensor([0.5 + gap / 2]), torch.tensor([0.5 - gap / 2])) for gap in (-0.7, -0.3, 0.3, 0.7)}
    parts = Components(motion=5.0, detail=0.2, static=10**-0.5, blurred=10**-0.5)
    unrouted = predict(Uniform(), gaps[0.7], gaps[-0.7], parts)["combined"] ** 2
    assert unrouted == pytest.approx((1 + 0.1) / 2, abs=2e-3)  # the mixture's variance
    tqd = TQD(Uniform(), kappa_base=2.0, kappa_max=8.0)
    values = {gap: predict(tqd, gaps[gap], gaps[-gap], parts)["combined"] ** 2 for gap in (0.3, 0.7, -0.7)}
    assert values[0.3] == pytest.approx(0.822, abs=0.01)
    assert values[0.7] == pytest.approx(0.897, abs=0.01)
    assert values[-0.7] < 0.2
    still = Components(motion=math.sqrt(10), detail=math.sqrt(0.1), static=0.1, blurred=0.1)
    strong, mild = (
        predict(tqd, *((torch.tensor([0.5 + s * gap / 2]), torch.tensor([0.5 - s * gap / 2])) for s in (1, -1)), still)
        for gap in (0.9, 0.3)
    )
    assert strong["combined"] < mild["combined"]  # too strong a routing loses where the static set is too static


def test_an_interval_is_students() -> None:
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    ratio = Interval.of_ratio([2.0, 2.0], [1.0, 1.0])
    assert (ratio.mean, ratio.low) == (pytest.approx(2.0), pytest.approx(2.0))
    assert Interval.of_difference([3.0, 5.0], [1.0, 3.0]).mean == 2.0


def test_a_run_is_a_function_of_its_settings_and_is_known_by_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(SMALL, Condition(("blurred", "static"), "tqd", drop=True), seed=2)
    first, second = (train(run, driver.CPU)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    wanted = {"a": [run, replace(run, seed=3)], "b": [replace(run, gradients=True)]}
    monkeypatch.setattr(driver, "runs", lambda size: wanted)
    row = driver.row_of("a", run)
    (tmp_path / "2020-01-01_cpu_tqd-study.jsonl").write_text(json.dumps(row) + "\n")
    assert {(name, left.seed) for name, left in driver.missing(tmp_path)} == {("a", 3), ("b", 2)}
    assert len(row["golden_loss"]) == evaluation.BINS


def test_what_was_added_after_the_results_is_made_only_when_asked_for(tmp_path: Path) -> None:
    everything, first = driver.missing(tmp_path), driver.missing(tmp_path, added=False)
    assert {name for name, _ in everything} - {name for name, _ in first} == set(design.ADDED)
    assert len(first) == 90


def test_gradients_of_blurred_and_slowed_twins_are_compared_in_every_bin() -> None:
    twins = evaluation.degraded_twins(World(), 8)
    assert float((speed_of(twins["visual"]) - speed_of(twins["golden"])).abs().max()) < 1e-3
    assert float(speed_of(twins["motion"]).max()) < 0.3
    assert torch.allclose(sharpness_of(twins["motion"]), sharpness_of(twins["golden"]), rtol=0.2)


def test_no_two_runs_are_alike_and_the_first_are_whole_seeds_of_the_main_conditions() -> None:
    turns = design.in_turn(design.runs())
    settings = [json.dumps(run.settings()) for _, run in turns]
    assert len(set(settings)) == len(settings)
    assert [name for name, _ in turns[: len(design.MAIN)]] == list(design.MAIN)
    assert {run.seed for _, run in turns[: len(design.MAIN)]} == {0}


def test_a_handover_has_the_two_models_alone_at_its_ends() -> None:
    first, second = (build_model(SMALL, seed) for seed in (0, 1))
    for model in (first, second):
        torch.nn.init.normal_(model.proj_out.weight)  # a new model's velocity is nothing
    clips = {level: evaluation.sample(SMALL, first, second, level) for level in (1.0, 0.8, 0.0)}
    assert torch.equal(clips[0.0], evaluation.sample(SMALL, first))
    assert torch.equal(clips[1.0], evaluation.sample(SMALL, second))
    assert not torch.equal(clips[0.8], clips[0.0])
    assert not torch.equal(clips[0.8], clips[1.0])


def test_the_table_of_handovers_is_made_of_all_rows() -> None:
    row = handover.row_of(0, SMALL)
    entries = row["handovers"]
    for place, entry in enumerate(entries):
        entry["measured"] = {"speed": {"score": 0.5}, "sharpness": {"score": 0.25}, "combined": place / 100}
    lines = handover.table([row]).splitlines()
    assert len(lines) == 2 + len(handover.LEVELS)
    assert lines[2] == "| 1 | 0.500 | 0.250 | 0.000 | 0.500 | 0.250 | 0.080 |"
    assert lines[-1] == "| 0 | 0.500 | 0.250 | 0.070 | 0.500 | 0.250 | 0.150 |"


def test_the_larger_version_is_the_same_question() -> None:
    large = design.runs("large")
    assert set(design.MAIN) <= set(large)
    assert {name for name, some in large.items() if len(some) != 3} == set()
    assert all(
        run.settings() not in [r.settings() for r in design.runs()[name]] for name in large for run in large[name]
    )
    cut = replace(design.LARGE, clips=64, steps=2, warmup_steps=1, batch=2, layers=1, samples=4, solver_steps=2)
    row = driver.row_of("mixed tqd", replace(large["mixed tqd"][0], recipe=cut))
    assert set(row["measured"]) >= {"combined", "golden_like"}
    clips = {kind: make_clips(cut.world, kind, 50, seed=5) for kind in ("golden", "blurred", "static")}
    assert float(speed_of(clips["static"]).max()) < float(speed_of(clips["golden"]).min()) / 2
    assert float(sharpness_of(clips["blurred"]).mean()) < float(sharpness_of(clips["golden"]).mean()) / 4
    assert float(compare(clips["golden"], clips["golden"])["golden_like"]) == 1.0


def test_the_page_has_the_tables_of_the_rows() -> None:
    text = report.PAGE.read_text(encoding="utf-8")
    assert report.page(text, summary.rows_by_name()) == text, "run `python benchmarks/tqd_study --page-only`"


def fake_rows(scores: dict[str, float]) -> summary.Rows:
    """Rows of the whole design whose combined scores are the given ones, or 0.5, and vary a little over the seeds."""

    def row(name: str, seed: int) -> dict[str, object]:
        score = scores.get(name, 0.5) + 0.001 * (seed % 2)
        part = {"ratio": score, "score": score, "quantiles": [0.0] * 5}
        cosines = {"visual": [0.1 * i for i in range(10)], "motion": [0.5 + 0.001 * seed] * 10, "ceiling": [0.9] * 10}
        measured = {"speed": part, "sharpness": part, "presence": part, "combined": score, "golden_like": score}
        losses = [0.1 + 0.1 * i for i in range(10)]
        shown = [[[400] * 16] * 6] * evaluation.SHOWN
        return {"measured": measured, "golden_loss": losses, "shown": shown, "gradients": cosines}

    return {name: {run.seed: row(name, run.seed) for run in some} for name, some in design.runs().items()}


def test_verdicts_follow_from_the_scores() -> None:
    good = {"mixed tqd": 0.8, "golden": 0.85, "mixed reversed": 0.2, "mixed levels only": 0.7, "golden tqd": 0.85,
            "mixed tqd kappa_max=32": 0.82, "with neither drop only": 0.55, "mixed tqd detail=0.6": 0.6}  # fmt: skip
    found = [(claim[:2], holds) for claim, _, holds in summary.verdicts(fake_rows(good))]
    assert [claim for claim, _ in found] == ["H1", "H2", "H3", "H4", "H4", "H5", "H6", "H7", "H8", "H9", "H9"]
    assert [holds for _, holds in found] == [True] * 10 + [False]
    bad = {**good, "mixed tqd": 0.5, "mixed tqd kappa_max=128": 0.9}
    held = {claim[:2]: holds for claim, _, holds in summary.verdicts(fake_rows(bad))}
    assert not held["H1"]
    assert not held["H3"]
    assert not held["H7"]


def test_tables_and_figures_are_made_of_all_rows(tmp_path: Path) -> None:
    rows = fake_rows({"mixed tqd": 0.8})
    for name, table in summary.TABLES.items():
        text = table(rows)
        assert text != summary.NO_ROWS, name
        assert len({line.count("|") for line in text.splitlines()}) == 1, name
    assert {path.name for path in figures.draw_all(rows, tmp_path)} == set(figures.FIGURES)
    assert (tmp_path / "tqd_scores.svg").read_text().count("<circle") == 5 * len(design.MAIN) + 2 * len(design.CONTROLS)
    assert figures.links({name: {} for name in rows}) == "No figures yet."
