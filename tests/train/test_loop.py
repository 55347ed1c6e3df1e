"""The loop's order is a contract: checked with a recording engine, source and objective."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from contentv.base.errors import StoppedBySignalError, UserError
from contentv.base.types import Batch, Bucket, LossOutput, TextCond
from contentv.train.loop import LoopConfig, Progress, run


@dataclass
class Stats:
    grad_norm: float = 1.0
    lr: float = 0.1
    skipped: bool = False


class RecordingEngine:
    module = staticmethod(lambda *args: None)
    device = torch.device("cpu")

    def __init__(self, events: list[Any], skipped: bool = False) -> None:
        self.events, self.skipped = events, skipped

    def backward(self, loss_sum: torch.Tensor, global_samples: int) -> None:
        self.events.append(("backward", global_samples))

    def step(self) -> Stats:
        self.events.append("step")
        return Stats(skipped=self.skipped)

    def sum_over_data_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def any_rank(self, flag: bool) -> bool:
        return flag

    def gather_keys(self, keys: list[str]) -> list[str]:
        return keys


class Source:
    """Steps of 4 clips in 2 micro-batches, or of the given numbers of clips, and then no more."""

    quarantined = 3

    def __init__(self, events: list[Any], clips: list[int] | None = None) -> None:
        self.events, self.clips, self.cursor = events, clips, 0

    def __iter__(self):
        while self.clips is None or self.cursor < len(self.clips):
            self.events.append(f"fetch {self.cursor}")
            clips = 4 if self.clips is None else self.clips[self.cursor]
            self.cursor += 1
            yield [make_batch(clips) for _ in range(2)]

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]


class Recorder:
    def __init__(self, events: list[Any]) -> None:
        self.events, self.rows = events, []

    def ids(self, step: int, keys: list[str]) -> None:
        self.events.append(f"ids {step}")

    def row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def advance(self, step: int) -> None:
        pass


def make_batch(global_samples: int = 4) -> Batch:
    text = TextCond(torch.zeros(2, 3, 4), torch.zeros(2, 4))
    scores = torch.full((2,), 0.5)
    return Batch(
        ["a", "b"], ["", ""], Bucket(1, 16, 16), torch.zeros(2, 4, 1, 2, 2), text, scores, scores, torch.arange(2),
        global_samples,
    )  # fmt: skip


def objective(model: Any, batch: Batch, step: int) -> LossOutput:
    metrics = {"q1_sum": torch.tensor(6.0), "q1_count": torch.tensor(3.0), "sigma_sum": torch.tensor(1.0)}
    return LossOutput(torch.tensor(2.0), 2, metrics, {"cells": torch.tensor([[1.0, 2.0], [0.0, step]])})


def train(events: list[Any], config: LoopConfig, skipped: bool = False, fetch: Any = None) -> tuple[Progress, Recorder]:
    recorder, source = Recorder(events), fetch or Source(events)
    progress = run(
        RecordingEngine(events, skipped), source, objective, config, recorder, progress=Progress(),
        save=lambda p: events.append(f"save {p.step} cursor {source.cursor}"), tokens_per_clip=lambda b: 10,
    )  # fmt: skip
    return progress, recorder


def test_the_order_of_a_step_and_of_a_save() -> None:
    events: list[Any] = []
    progress, _ = train(events, LoopConfig(max_steps=3, global_batch_size=4, checkpoint_every=2, log_every=1))
    step = [("backward", 4), ("backward", 4), "step"]
    assert events == [
        "fetch 0", *step, "ids 1", "fetch 1", *step, "ids 2",
        "save 2 cursor 2", "fetch 2", *step, "ids 3", "save 3 cursor 3",
    ]  # fmt: skip
    assert (progress.step, progress.samples_seen, progress.tokens_seen) == (3, 12, 120)


def test_rows_are_means_over_the_global_batch() -> None:
    _, recorder = train([], LoopConfig(max_steps=2, global_batch_size=4, log_every=2))
    assert len(recorder.rows) == 1
    row = recorder.rows[0]
    assert row["loss"] == pytest.approx(1.0)  # 2 micro-batches x 2.0 over 4 samples
    assert row["q1"] == pytest.approx(2.0)  # sum / count
    assert row["sigma"] == pytest.approx(0.5)
    assert row["step"] == 2
    assert row["tokens_seen"] == 80
    assert row["mfu"] is None
    assert row["quarantined"] == 3


def test_tallies_add_up_over_all_steps_since_the_last_row() -> None:
    _, recorder = train([], LoopConfig(max_steps=5, global_batch_size=4, log_every=2))
    assert [row["step"] for row in recorder.rows] == [2, 4, 5]
    assert [row["cells"] for row in recorder.rows] == [  # two micro-batches a step; steps 0, 1 | 2, 3 | 4
        [[4.0, 8.0], [0.0, 2.0]], [[4.0, 8.0], [0.0, 10.0]], [[2.0, 4.0], [0.0, 8.0]],
    ]  # fmt: skip


def test_steps_count_the_clips_that_they_have() -> None:
    """Under a token budget steps differ in clips: losses, counters and rows follow the step's own number."""
    events: list[Any] = []
    progress, recorder = train(
        events, LoopConfig(max_steps=3, global_batch_size=4, log_every=1), fetch=Source(events, [4, 12, 8])
    )
    assert [e[1] for e in events if e[0] == "backward"] == [4, 4, 12, 12, 8, 8]
    assert [row["loss"] for row in recorder.rows] == pytest.approx([1.0, 4 / 12, 4 / 8])
    assert [row["samples_seen"] for row in recorder.rows] == [4, 16, 24]
    assert (progress.samples_seen, progress.tokens_seen) == (24, 240)


@pytest.mark.parametrize(("every", "saves"), [(0, ["save 2 cursor 2"]), (2, ["save 2 cursor 2"])])
def test_data_that_are_used_up_end_the_stage_in_order(every: int, saves: list[str]) -> None:
    events: list[Any] = []
    config = LoopConfig(max_steps=9, global_batch_size=4, checkpoint_every=every, log_every=5)
    progress, recorder = train(events, config, fetch=Source(events, [4, 4]))
    assert progress.step == 2
    assert [e for e in events if str(e).startswith("save")] == saves, "the final state is saved, once"
    assert [row["step"] for row in recorder.rows] == [2], "the last step is logged"


def test_data_too_few_for_a_step_are_the_users_to_mend() -> None:
    events: list[Any] = []
    with pytest.raises(UserError, match="too few samples"):
        train(events, LoopConfig(max_steps=9, global_batch_size=4), fetch=Source(events, []))
    assert not [e for e in events if str(e).startswith("save")]


def test_a_signal_saves_before_the_next_batch_and_stops() -> None:
    events: list[Any] = []

    class Interrupted(Source):
        def __iter__(self):
            for item in super().__iter__():
                os.kill(os.getpid(), signal.SIGUSR1)
                yield item

    with pytest.raises(StoppedBySignalError, match="step 1"):
        train(events, LoopConfig(max_steps=5, global_batch_size=4, checkpoint_every=0), fetch=Interrupted(events))
    assert events[-1] == "save 1 cursor 1"
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_too_many_steps_without_finite_gradients_stop_the_run() -> None:
    with pytest.raises(UserError, match="3 steps in a row"):
        train([], LoopConfig(max_steps=9, global_batch_size=4, max_skipped_steps=3), skipped=True)


@pytest.mark.parametrize(
    ("key", "value"), [("max_steps", 0), ("log_every", 0), ("precision", "fp8"), ("micro_batch_size", -1)]
)
def test_impossible_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"train.{key}"):
        LoopConfig(**{key: value})
