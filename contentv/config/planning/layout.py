"""A layout as the plan weighs it, and what is trained with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from contentv.base.types import TokenCounts
from contentv.models.mmdit import MMDiTConfig
from contentv.parallel.mesh import ParallelConfig
from contentv.parallel.traffic import head_overhead
from contentv.parallel.ulysses import padded_part


@dataclass(frozen=True)
class Layout:
    """How a stage runs: the keys of `parallel.*`, and clips per forward."""

    sp: int = 1
    tp: int = 1
    zero_stage: int = 3
    offload: str = "none"
    recompute: str = "none"
    micro_batch: int = 1
    ring: int = 1
    sequence_norms: bool = False
    offload_activations: bool = False
    hpz: int = 1

    @property
    def ulysses(self) -> int:
        """Ranks that exchange heads: those at one place of the ring."""
        return self.sp // self.ring

    @property
    def token_unit(self) -> int:
        """What a sequence rank's tokens are padded to a multiple of."""
        return self.tp if self.sequence_norms else 1

    def parallel(self) -> ParallelConfig:
        """Returns the same as `contentv train` takes it."""
        return ParallelConfig(**{key: value for key, value in vars(self).items() if key != "micro_batch"})

    def words(self) -> str:
        """Returns the overrides of `contentv train` that ask for it."""
        keys = ["sp", "tp", "zero_stage", "offload", "recompute"]
        keys += [key for key in ("ring", "hpz") if getattr(self, key) > 1]
        keys += [key for key in ("sequence_norms", "offload_activations") if getattr(self, key)]
        values = [f"parallel.{key}={str(getattr(self, key)).lower()}" for key in keys]
        return " ".join([*values, f"train.micro_batch_size={self.micro_batch}"])


@dataclass(frozen=True)
class Job:
    """What is trained, on what kind of device: all that memory and time depend on beside the layout.

    Attributes:
        trained: trained weights of a LoRA; 0 = the whole model is trained.
        resident_bytes: frozen models on every device (RLHF's VAE and reward model).
        frame_bytes: activations of a decoded and scored frame, per clip (RLHF).
        reference: RLHF keeps a frozen copy of the model.
        graded: forward passes whose activations are kept at once: 1, or RLHF's grad steps and guidance.
        memory_bytes: of a device, from which ZeRO-3's limits follow; 0 on the CPU.
    """

    model: MMDiTConfig
    precision: str = "bf16"
    ema: bool = True
    device: str = "cuda"
    trained: int = 0
    resident_bytes: int = 0
    frame_bytes: int = 0
    reference: bool = False
    graded: int = 1
    memory_bytes: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def local_tokens(tokens: TokenCounts, layout: Layout) -> TokenCounts:
    """Returns the tokens of one sequence rank, padding included."""
    return TokenCounts(*(padded_part(n, layout.sp, layout.token_unit) for n in tokens))


def width_bytes(job: Job, layout: Layout, tokens: TokenCounts) -> int:
    """Returns the bytes of one number per channel of the model and token of one sequence rank's micro-batch."""
    return layout.micro_batch * sum(local_tokens(tokens, layout)) * job.model.inner_dim * job.dtype.itemsize


def head_padding(model: MMDiTConfig, layout: Layout) -> float:
    """Returns heads of the fullest rank over those of the average one: 38 heads over 8 ranks count as 40."""
    return head_overhead(model.num_attention_heads, layout.ulysses, layout.tp)
