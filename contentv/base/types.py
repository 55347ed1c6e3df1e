"""The records that travel between packages, and the protocols their parts satisfy.

Letters: latents `b c t h w` on the latent grid, video `b c T H W` in pixels, text `b l d` (`l` text tokens).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Bucket(NamedTuple):
    """Clips of one shape: frames, height and width in pixels."""

    frames: int
    height: int
    width: int

    @property
    def name(self) -> str:
        """The folder name of the bucket's shards, such as `f17_h96_w96`."""
        return f"f{self.frames}_h{self.height}_w{self.width}"

    @classmethod
    @functools.lru_cache(maxsize=1024)  # asked for every micro-batch
    def parse(cls, name: str) -> Bucket:
        """Returns the bucket written as `f<frames>_h<height>_w<width>`.

        Raises:
            ValueError: the name has another form.
        """
        parts = name.split("_")
        if len(parts) != 3 or [p[:1] for p in parts] != ["f", "h", "w"] or not all(p[1:].isdigit() for p in parts):
            raise ValueError(f'bucket "{name}" is not of the form f<frames>_h<height>_w<width>, such as f17_h96_w96')
        return cls(*(int(p[1:]) for p in parts))


class TokenCounts(NamedTuple):
    """Numbers of video and text tokens of the whole joint sequence (video first), before any split."""

    video: int
    text: int


@dataclass
class TextCond:
    """Encoded captions: one vector per text token and one pooled vector per caption."""

    tokens: Float[Tensor, "b l d"]
    pooled: Float[Tensor, "b p"]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> TextCond:
        """Returns a copy on `device` (and in `dtype`)."""
        return TextCond(self.tokens.to(device, dtype), self.pooled.to(device, dtype))

    def __getitem__(self, rows: slice) -> TextCond:
        return TextCond(self.tokens[rows], self.pooled[rows])

    def expand(self, b: int) -> TextCond:
        """Returns `b` rows, all equal to this record's single row."""
        return TextCond(self.tokens.expand(b, -1, -1), self.pooled.expand(b, -1))


@dataclass
class Batch:
    """A micro-batch of equally shaped clips.

    `latents` are in model space, (raw - mean) / std. `motion` and `visual` are scores in [0, 1], NaN where a clip has
    none. `sample_index` is the position of each sample in the run's global order (samples of all steps before + place),
    the key of all its random draws: it is the same on every layout. `global_samples` is the number of clips of the
    whole optimiser step, over all ranks and micro-batches: the divisor of its loss. `loss_weight` is a factor of each
    clip's loss, with mean one over the clips of the step; None is one for all.
    """

    keys: list[str]
    captions: list[str]
    bucket: Bucket
    latents: Float[Tensor, "b c t h w"]
    text: TextCond
    motion: Float[Tensor, "b"]
    visual: Float[Tensor, "b"]
    sample_index: Int[Tensor, "b"]
    global_samples: int
    loss_weight: Float[Tensor, "b"] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with its large tensors on `device`; scores and indices stay on the CPU, for the draws."""
        return replace(self, latents=self.latents.to(device), text=self.text.to(device))


@dataclass
class StoredBatch:
    """A micro-batch as it was read: latents and text in their stored dtype, latents before mean and std.

    Half the bytes of a `Batch` where the dataset is bf16, in memory and on the way to the device, which does the
    arithmetic: nothing but `to` makes a `Batch` of it. The fields that have the same names mean the same.

    Attributes:
        latents_mean: one number a channel, shape (1, c, 1, 1, 1), fp32; likewise latents_std.
    """

    keys: list[str]
    captions: list[str]
    bucket: Bucket
    latents: Float[Tensor, "b c t h w"]
    text: TextCond
    motion: Float[Tensor, "b"]
    visual: Float[Tensor, "b"]
    sample_index: Int[Tensor, "b"]
    global_samples: int
    latents_mean: Float[Tensor, "1 c 1 1 1"]
    latents_std: Float[Tensor, "1 c 1 1 1"]
    loss_weight: Float[Tensor, "b"] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on `device`, latents in model space, latents and text in fp32."""
        latents = self.latents.to(device).to(torch.float32)
        return Batch(
            self.keys, self.captions, self.bucket,
            (latents - self.latents_mean.to(device)) / self.latents_std.to(device),
            TextCond(self.text.tokens.to(device).float(), self.text.pooled.to(device).float()),
            self.motion, self.visual, self.sample_index, self.global_samples, self.loss_weight,
        )  # fmt: skip


@dataclass(frozen=True)
class ReaderRank:
    """Which part of every global batch a reader delivers: data-parallel rank and degree."""

    rank: int = 0
    world: int = 1


def _no_one(what: str) -> None:
    """The barrier of a process that is alone."""


@dataclass(frozen=True)
class Peers:
    """The processes that share one job in parts: this one's rank, how many there are, and how they wait for each other.

    `barrier(what)` returns when every process has called it with the same words, and raises where one of them failed.
    """

    rank: int = 0
    world: int = 1
    barrier: Callable[[str], None] = _no_one


@dataclass
class LossOutput:
    """A loss as a sum and the number of samples in it; the caller divides by the global number of samples.

    Metrics and tallies are detached sums over the samples. Metrics are single numbers, of which the means over a step
    are logged; tallies have any shape, and their sums over all steps since the last logged one are.
    """

    loss_sum: Float[Tensor, ""]
    samples: int
    metrics: dict[str, Tensor] = field(default_factory=dict)
    tallies: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class VelocityModel(Protocol):
    """Predicts the velocity (b c t h w) of noisy latents from a timestep in [0, 1000], text tokens and pooled text."""

    def __call__(
        self,
        noisy_latents: Float[Tensor, "b c t h w"],
        timestep: Float[Tensor, "b"],
        text_tokens: Float[Tensor, "b l d"],
        text_pooled: Float[Tensor, "b p"],
    ) -> Float[Tensor, "b c t h w"]: ...


@runtime_checkable
class Objective(Protocol):
    """A batch and a model to a loss. `step` is the optimiser step, a key of the random draws."""

    def __call__(self, model: VelocityModel, batch: Batch, step: int) -> LossOutput: ...


@runtime_checkable
class Stateful(Protocol):
    """Something whose progress survives a restart, as a small JSON-compatible dict."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class BatchSource(Stateful, Protocol):
    """A resumable stream of optimiser steps: each item is this rank's micro-batches of one global batch.

    It is endless unless every source has a budget of epochs; it then ends on all ranks at the same step.
    `quarantined` is the number of damaged samples met here.
    """

    @property
    def quarantined(self) -> int: ...

    def __iter__(self) -> Iterator[list[StoredBatch]]: ...
