"""Weighing clips by their scores, and looking at the scores of a dataset."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_factory import SMALL, VAE, build, source

from contentv.base.errors import UserError
from contentv.base.types import BatchSource, Bucket, ReaderRank, StoredBatch, TextCond
from contentv.data import DatasetInfo
from contentv.data.config import DataConfig
from contentv.data.quality import write_quality
from contentv.data.weighting import KeepWeighted
from contentv.diffusion.tqd import keep_probability


def batch(motion: torch.Tensor, visual: torch.Tensor, whole: int) -> StoredBatch:
    b, ones = len(motion), torch.ones(1, 2, 1, 1, 1)
    text = TextCond(torch.zeros(b, 3, 4), torch.zeros(b, 4))
    return StoredBatch(
        [f"k{i}" for i in range(b)], [""] * b, Bucket(1, 16, 16), torch.zeros(b, 2, 1, 2, 2), text, motion, visual,
        torch.arange(b), whole, ones, ones,
    )  # fmt: skip


class Steps:
    """A source of the given steps."""

    quarantined = 3

    def __init__(self, steps: list[list[StoredBatch]]) -> None:
        self.steps, self.state = steps, {"cursor": 0}

    def __iter__(self):
        return iter(self.steps)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_weights_have_mean_one_over_the_global_batch_on_every_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    motion, visual = torch.rand(8, generator=generator), torch.rand(8, generator=generator)
    motion[3] = math.nan
    keep = torch.maximum(motion, visual)
    keep[3] = 1.0
    expected = keep / keep.mean()
    assert float(expected.mean()) == pytest.approx(1)
    for ranks, micro in ((1, 8), (1, 2), (2, 4), (4, 1)):
        local = 8 // ranks
        found = []
        for rank in range(ranks):
            starts = range(rank * local, (rank + 1) * local, micro)
            step = [batch(motion[i : i + micro], visual[i : i + micro], 8) for i in starts]
            weighted = KeepWeighted(Steps([step]), keep_probability, lambda x: keep.sum().view(1))
            found += [b.to(torch.device("cpu")).loss_weight for b in next(iter(weighted))]
        torch.testing.assert_close(torch.cat(found), expected)


def test_the_sum_over_ranks_is_of_this_ranks_clips() -> None:
    asked: list[float] = []

    def total(x: torch.Tensor) -> torch.Tensor:
        asked.append(float(x))
        return x + 2.5

    motion = torch.tensor([0.25, 0.5])
    weighted = KeepWeighted(Steps([[batch(motion, motion, 6), batch(motion, motion, 6)]]), keep_probability, total)
    first, _ = next(iter(weighted))
    assert asked == [1.5]
    torch.testing.assert_close(first.loss_weight, motion / (4.0 / 6))


def test_a_step_of_worthless_clips_has_weights_of_zero_and_the_place_is_the_sources() -> None:
    inner = Steps([[batch(torch.zeros(2), torch.zeros(2), 2)]])
    weighted = KeepWeighted(inner, keep_probability, lambda x: x)
    assert isinstance(weighted, BatchSource)
    assert next(iter(weighted))[0].loss_weight.tolist() == [0.0, 0.0]
    weighted.load_state_dict({"cursor": 5})
    assert (inner.state, weighted.state_dict(), weighted.quarantined) == ({"cursor": 5}, {"cursor": 5}, 3)


def test_census_has_the_scores_the_batches_have(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 24})
    reading = source(path, reader=ReaderRank(), global_batch_size=24, micro_batch_size=24)
    census, whole = reading.census(), next(reading)[0]
    for found, exact in ((census.motion, whole.motion), (census.visual, whole.visual)):
        np.testing.assert_array_equal(np.sort(found.numpy()), np.sort(exact.numpy()))
    assert census.outside == 0
    # quality.json of other clips: raw visual scores are 0..6, motion 0..10
    write_quality(path, [("films", float(i % 4), float(i)) for i in range(11)])
    entries = [i for i in range(24) if i % 7 > 3]
    assert source(path).census().outside == len(entries)
    assert DatasetInfo.load(path).vae == VAE


def test_a_large_dataset_is_looked_at_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contentv.data.census.LOOKED_AT", 10)
    assert len(source(build(tmp_path / "d", {SMALL: 24})).census().motion) == 10


def test_dropping_and_weighing_at_once_is_refused() -> None:
    with pytest.raises(UserError, match="two forms of one thing"):
        DataConfig(quality_dropout=True, quality_weight=True)
    with pytest.raises(UserError, match="quality_scope"):
        DataConfig(quality_scope="world")
