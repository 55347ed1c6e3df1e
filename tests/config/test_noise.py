"""What a stage tells about its noise levels before the first step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from contentv.base.errors import UserError
from contentv.config.compose import load_config
from contentv.config.noise import watch_noise
from contentv.config.schema import TrainRoot
from contentv.data import DatasetSource
from contentv.data.census import ScoreCensus


class Source(DatasetSource):
    """A dataset with the given scores, and nothing else."""

    def __init__(self, census: Callable[[], ScoreCensus]) -> None:
        self.census = census


def stage(*overrides: str) -> TrainRoot:
    root = load_config("train", ["data.path=d", *overrides])
    assert isinstance(root, TrainRoot)
    return root


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    log = SimpleNamespace(
        info=lambda text, *values: lines.append(text % values), warning=lambda text, *v: lines.append(f"! {text % v}")
    )
    for module in ("contentv.config.noise", "contentv.train.noise_watch"):
        monkeypatch.setattr(f"{module}.get_logger", lambda: log)
    return lines


def scored(motion: list[float], visual: list[float], outside: int = 0) -> Source:
    return Source(lambda: ScoreCensus(torch.tensor(motion), torch.tensor(visual), outside))


def test_a_routed_stage_is_described_and_recorded(tmp_path: Path, told: list[str]) -> None:
    root = stage("timestep=tqd", "data.quality_dropout=true")
    assert watch_noise(root, scored([0.9, 0.2, math.nan], [0.4, 0.5, 0.3]), tmp_path) is not None
    record = json.loads((tmp_path / "noise_levels.json").read_text())
    assert (record["clips"], record["unscored"], record["keeping"]) == (3, 1, True)
    assert record["keep_rate"] == pytest.approx((0.9 + 0.5 + 1) / 3)
    assert len(told) == 1
    assert "of 3 clips looked at 1 lack a score" in told[0]


def test_warnings_of_starved_levels_stale_statistics_and_missing_scores(tmp_path: Path, told: list[str]) -> None:
    watch_noise(stage("timestep=tqd", "timestep.kappa_max=40"), scored([0.95, 0.05], [0.05, 0.95], outside=1), tmp_path)
    assert any(line.startswith("! sigma 0.") and "timestep.floor" in line for line in told)
    assert any("1 of 2 clips have scores beyond" in line for line in told)
    told.clear()
    watch_noise(stage("timestep=tqd"), scored([math.nan] * 2, [0.5] * 2), tmp_path)
    assert any("none of the clips has both scores" in line for line in told)


def test_other_laws_look_at_no_scores(tmp_path: Path, told: list[str]) -> None:
    def never() -> ScoreCensus:
        raise AssertionError

    assert watch_noise(stage("timestep=beta"), Source(never), tmp_path) is not None
    assert "Beta(alpha=1.5" in told[0]
    assert watch_noise(stage("stage=rlhf", "init=d"), Source(never), tmp_path) is None


def test_clips_without_scores_are_the_users_to_mend_if_refused(tmp_path: Path, told: list[str]) -> None:
    with pytest.raises(UserError, match="1 of 2 clips: missing=refuse") as caught:
        watch_noise(stage("timestep=tqd", "timestep.missing=refuse"), scored([0.5, math.nan], [0.5, 0.5]), tmp_path)
    assert caught.value.where == "data.path=d"
