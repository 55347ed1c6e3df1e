"""The training loop.

The order of a step is a contract:
  1. save, if due (the state saved is that *before* the step, so the data cursor is the next unread batch);
  2. stop, if a signal has arrived on any rank (the state has just been saved);
  3. fetch this rank's micro-batches of the next global batch;
  4. forward and backward, micro-batch by micro-batch;
  5. clip and step the optimiser, then the EMA;
  6. ledger, and metrics if due.
The loop knows interfaces alone: a source of batches, an objective and an engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from contentv.base import device as devices
from contentv.base.errors import StoppedBySignalError, UserError
from contentv.base.log import get_logger
from contentv.base.types import BatchSource, Bucket, LossOutput, Objective
from contentv.train.stop import StopSignal


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class LoopConfig:
    """How long, how large, how often."""

    max_steps: int = _doc(1000, "optimiser steps of the stage; 1 or more")
    precision: str = _doc("bf16", "bf16 (fp32 master weights) | fp32")
    global_batch_size: int = _doc(32, "clips per optimiser step over all ranks; see global_tokens")
    micro_batch_size: int = _doc(0, "clips per forward on a rank; 0 = as many as max_tokens allows")
    max_tokens: int = _doc(0, "most video tokens per forward on a rank, when micro_batch_size=0; 0 = no limit")
    global_tokens: int = _doc(
        0,
        "video tokens per optimiser step over all ranks: of a bucket, a step takes as many times global_batch_size "
        "clips as fit, at least once, in micro-batches larger by the same factor; 0 = global_batch_size clips of all",
    )
    seed: int = _doc(0, "seed of the data order and of all draws")
    checkpoint_every: int = _doc(500, "steps between checkpoints; 0 = only at the end")
    keep_checkpoints: int = _doc(2, "newest checkpoints kept; 0 = all")
    resume: str = _doc(
        "auto", "auto (go on from the newest checkpoint of out=) | none (start anew) | a checkpoint folder"
    )
    log_every: int = _doc(10, "steps between rows of metrics.jsonl")
    max_skipped_steps: int = _doc(10, "stop after this many steps in a row without finite gradients")

    def __post_init__(self) -> None:
        for key, low in (("max_steps", 1), ("global_batch_size", 1), ("micro_batch_size", 0), ("max_tokens", 0),
                         ("global_tokens", 0), ("checkpoint_every", 0), ("keep_checkpoints", 0), ("log_every", 1),
                         ("max_skipped_steps", 1)):  # fmt: skip
            value = getattr(self, key)
            if value < low:
                raise UserError(
                    f"train.{key}={value} is not possible", where=f"train.{key}", remedy=f"use {low} or more"
                )
        if self.precision not in ("bf16", "fp32"):
            raise UserError(
                f"train.precision={self.precision} is unknown", where="train.precision", remedy="use bf16 or fp32"
            )


@runtime_checkable
class Engine(Protocol):
    """What the loop needs of the engine."""

    module: Any
    device: torch.device

    def backward(self, loss_sum: Tensor, global_samples: int) -> None: ...

    def step(self) -> Any: ...

    def sum_over_data_ranks(self, values: Tensor) -> Tensor: ...

    def any_rank(self, flag: bool) -> bool: ...

    def gather_keys(self, keys: list[str]) -> list[str]: ...


@runtime_checkable
class RunRecorder(Protocol):
    """What the loop tells about itself."""

    def ids(self, step: int, keys: list[str]) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...

    def advance(self, step: int) -> None: ...


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0


@dataclass
class StepTimes:
    """Wall-clock seconds since the last logged row."""

    started: float = field(default_factory=time.perf_counter)
    data_wait_s: float = 0.0
    steps: int = 0
    tokens: int = 0


@dataclass
class Sums:
    """What the micro-batches of a step add up to; the tallies go on adding up until they are logged."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    tallies: dict[str, Tensor] = field(default_factory=dict)

    def add(self, output: LossOutput) -> None:
        """Counts one micro-batch."""
        metrics = {"loss": output.loss_sum.detach(), **output.metrics}
        for sums, values in ((self.metrics, metrics), (self.tallies, output.tallies)):
            for name, value in values.items():
                sums[name] = sums[name] + value if name in sums else value


def run(
    engine: Engine,
    source: BatchSource,
    objective: Objective,
    config: LoopConfig,
    recorder: RunRecorder,
    *,
    progress: Progress,
    save: Callable[[Progress], None],
    tokens_per_clip: Callable[[Bucket], int],
    flops_per_clip: Callable[[Bucket], int] | None = None,
    peak_flops: float = 0.0,
    stage: str = "",
) -> Progress:
    """Trains until `config.max_steps`, or until the data are used up, and returns the final progress, which is saved.

    Args:
        save: writes a checkpoint of the given progress; called on every rank.
        tokens_per_clip: video tokens of one clip of a bucket.
        flops_per_clip: training FLOP of one clip; with `peak_flops` (all ranks together, per second) gives the MFU.

    Raises:
        StoppedBySignalError: a signal arrived and the state has been saved.
        UserError: too many steps in a row had no finite gradients.
    """
    batches = iter(source)
    times, flops, skipped, saved_at = StepTimes(), 0, 0, progress.step
    sums, clips, stats = Sums(), 0, None
    with StopSignal() as stop:
        while progress.step < config.max_steps:
            stopping = engine.any_rank(stop.received != 0)
            due = config.checkpoint_every > 0 and progress.step % config.checkpoint_every == 0
            if (due or stopping) and progress.step != saved_at:
                save(progress)
                saved_at = progress.step
            if stopping:
                raise StoppedBySignalError(f"stopped at step {progress.step}; run the same command again to go on")
            waiting = time.perf_counter()
            micro_batches = next(batches, None)
            times.data_wait_s += time.perf_counter() - waiting
            if micro_batches is None:  # on all ranks at once: the order is the same everywhere
                data_used_up(progress.step, config.max_steps, stage)
                if times.steps:  # not logged yet
                    row = summarize(engine, sums, clips, source.quarantined)
                    recorder.row({"stage": stage, **measure(engine, progress, stats, times, flops, peak_flops), **row})
                break
            clips = micro_batches[0].global_samples
            sums.metrics = {}
            for batch in micro_batches:
                output = objective(engine.module, batch.to(engine.device), progress.step)
                engine.backward(output.loss_sum, clips)
                sums.add(output)
            stats = engine.step()
            progress.step += 1
            progress.samples_seen += clips
            tokens = tokens_per_clip(micro_batches[0].bucket) * clips
            progress.tokens_seen += tokens
            times.tokens += tokens
            times.steps += 1
            flops += flops_per_clip(micro_batches[0].bucket) * clips if flops_per_clip else 0
            skipped = skipped + 1 if stats.skipped else 0
            recorder.ids(progress.step, engine.gather_keys([key for batch in micro_batches for key in batch.keys]))
            if skipped >= config.max_skipped_steps:
                raise UserError(
                    f"{skipped} steps in a row had no finite gradients; the last checkpoint is untouched",
                    where=f"{stage} step {progress.step}",
                    remedy="look at these steps' samples in ledger.jsonl, lower optim.lr, or use train.precision=fp32",
                )
            if progress.step % config.log_every == 0 or progress.step == config.max_steps:
                row = summarize(engine, sums, clips, source.quarantined)
                recorder.row({"stage": stage, **measure(engine, progress, stats, times, flops, peak_flops), **row})
                times, flops, sums = StepTimes(), 0, Sums()
            else:
                recorder.advance(progress.step)
    if progress.step != saved_at or progress.step == config.max_steps:
        save(progress)
    return progress


def data_used_up(step: int, max_steps: int, stage: str) -> None:
    """Says that the stage ends before its last step.

    Raises:
        UserError: it would end before its first.
    """
    if step == 0:
        raise UserError(
            "the sources hold too few samples, or data.source_max_epochs is too low, for one global batch",
            where=stage, remedy="use a smaller train.global_batch_size, or raise data.source_max_epochs",
        )  # fmt: skip
    get_logger().info(
        "%s ends at step %d of %d: every source has been seen as often as data.source_max_epochs allows",
        stage or "the stage", step, max_steps,
    )  # fmt: skip


def summarize(engine: Engine, sums: Sums, global_samples: int, quarantined: int = 0) -> dict[str, Any]:
    """Returns the means over the global batch of the metrics, and the tallies (one reduction for all of them).

    A metric `x_sum` beside `x_count` becomes the mean `x`; others are divided by the clips of the step. Tallies are
    nested lists. `quarantined` is the number of damaged samples that all data ranks have met since they started.
    """
    names, tallied = sorted(sums.metrics), sorted(sums.tallies)
    tensors = [sums.metrics[name] for name in names] + [sums.tallies[name] for name in tallied]
    bad = torch.tensor([float(quarantined)], device=engine.device)
    parts = [*(tensor.float().flatten() for tensor in tensors), bad]
    summed = engine.sum_over_data_ranks(torch.cat(parts)).split([part.numel() for part in parts])
    values = {name: float(value) for name, value in zip(names, summed, strict=False)}
    row: dict[str, Any] = {"quarantined": float(summed[-1])}
    for name, value in values.items():
        if name.endswith("_count"):
            continue
        count = values.get(f"{name.removesuffix('_sum')}_count") if name.endswith("_sum") else None
        if count is None:
            row[name.removesuffix("_sum")] = value / global_samples
        elif count > 0:
            row[name.removesuffix("_sum")] = value / count
    for name, tally in zip(tallied, summed[len(names) :], strict=False):
        row[name] = tally.view(sums.tallies[name].shape).tolist()
    return row


def measure(
    engine: Engine, progress: Progress, stats: Any, times: StepTimes, flops: int, peak_flops: float
) -> dict[str, Any]:
    """Returns the row's counters and speeds, averaged over the steps since the last row."""
    devices.synchronize(engine.device)
    seconds = max(time.perf_counter() - times.started, 1e-9)
    return {
        "step": progress.step,
        "grad_norm": float(stats.grad_norm),
        "lr": float(stats.lr),
        "skipped": bool(stats.skipped),
        "samples_seen": progress.samples_seen,
        "tokens_seen": progress.tokens_seen,
        "step_s": seconds / times.steps,
        "data_wait_s": times.data_wait_s / times.steps,
        "tokens_per_s": times.tokens / seconds,
        "mfu": flops / seconds / peak_flops if peak_flops else None,
        "peak_memory_bytes": devices.peak_memory_bytes(engine.device),
    }
