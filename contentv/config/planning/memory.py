"""Bytes on one device, part by part, of a training step as the engine runs it.

What is counted where, and how each formula was found, is written in docs/planning.md. In short: n weights of a tensor
rank, P ranks that ZeRO splits over (dp x sp), e bytes of a number in the compute dtype.

A step has three moments of most memory, and the device needs the largest:
  turn     the forward pass has ended: all activations, whole weights in use (ZeRO-3), what a layer works with;
  reduce   gradients are being reduced: buckets and, before the last bucket, still most of the activations;
  update   the optimiser's step: fp32 gradients and AdamW's temporary tensors, no activations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from contentv.base.types import TokenCounts
from contentv.config.planning.activations import (
    exchange_bytes,
    kept_activations,
    offloaded_activations,
    ring_buffer_bytes,
    working_bytes,
)
from contentv.config.planning.layout import Job, Layout
from contentv.engine.plans import MMDIT_PLAN
from contentv.engine.zero_config import WeightSizes, deepspeed_config, weight_sizes
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.parallel.traffic import head_counts
from contentv.parallel.ulysses import padded_part

SUB_GROUP = 1_000_000_000  # weights that ZeRO-3 updates at once: DeepSpeed's default, which the engine leaves


def weights_per_rank(model: MMDiTConfig, tp: int) -> int:
    """Returns the weights of the fullest of `tp` tensor ranks: of attention whole heads, of feed-forwards a part."""
    return _rank_sizes(model, tp).total


def small_weights(model: MMDiTConfig, tp: int) -> int:
    """Returns how many of them are in tensors that ZeRO-3 keeps whole on every rank: none longer than a vector."""
    return _sizes(tuple(vars(model).values()), tp)[1]


def _rank_sizes(model: MMDiTConfig, tp: int) -> WeightSizes:
    return _sizes(tuple(vars(model).values()), tp)[0]


@functools.cache
def _sizes(model: tuple[Any, ...], tp: int) -> tuple[WeightSizes, int]:
    """Returns the sizes of a tensor rank's weights, and how many are in tensors no longer than a vector."""
    shapes = _shapes(model, tp)
    sizes = weight_sizes(shapes)
    return sizes, sum(n for n in map(math.prod, shapes.values()) if n <= sizes.vector)


def _shapes(model: tuple[Any, ...], tp: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight of the fullest tensor rank."""
    config, shapes = MMDiTConfig(*model), {}
    for name, whole in _whole_shapes(model).items():
        shape, dim = list(whole), MMDIT_PLAN.dim_of(name)
        if dim is not None:
            heads = head_counts(config.num_attention_heads, tp)[0]
            shape[dim] = heads * config.attention_head_dim if ".attn." in name else padded_part(shape[dim], tp)
        shapes[name] = tuple(shape)
    return shapes


@functools.cache
def _whole_shapes(model: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in MMDiT(MMDiTConfig(*model)).named_parameters()}


@dataclass(frozen=True)
class Memory:
    """Bytes of one device by part at its fullest moment, and of its host (offload), for one device.

    `exchange` is what an all-to-all or the ring holds at once, in `parts` or before.
    """

    parts: dict[str, int]
    moment: str
    host: int
    exchange: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def device_memory(job: Job, layout: Layout, dp: int, tokens: TokenCounts, accumulation: int = 1) -> Memory:
    """Returns what a device holds at the fullest moment of a step.

    Args:
        job: what is trained.
        layout: how.
        dp: data-parallel degree.
        tokens: of a clip, before any split.
        accumulation: micro-batches of a step on a rank.
    """
    ranks, size, stage = dp * layout.sp, job.dtype.itemsize, layout.zero_stage
    n = weights_per_rank(job.model, layout.tp)
    trained = (job.trained or n) if job.trained < n else n
    settings = _settings(job, layout, trained)
    part, per_rank = -(-trained // ranks), -(-n // ranks)
    on_host = layout.offload != "none"
    states = _states(job, part)
    away = offloaded_activations(job, layout, tokens) * job.graded
    fixed = {
        "weights": 0 if layout.offload == "all" else size * (per_rank if stage == 3 else n),
        "second copy of the weights": size * n // layout.hpz if layout.hpz > 1 else 0,
        "batch": layout.micro_batch * _batch_bytes(job.model, tokens),
        "frozen models": job.resident_bytes + _reference(job, layout, n, ranks),
        **({} if on_host else states),
    }
    gradients = _gradients(job, layout, trained, part)
    turning = _turning(job, layout, tokens, settings, ranks)
    turning["activations kept"] -= away
    moments = {
        "turn": {**turning, "gradients": 0 if stage < 3 and accumulation == 1 else gradients},
        "reduce": _reducing(job, layout, settings, turning, trained, ranks) | {"gradients": gradients},
        "update": {"gradients": gradients if stage == 3 else 0,
                   "gradient buckets": size * int(settings["reduce_bucket_size"]) if stage == 3 else 0,
                   "optimiser's temporary tensors": _updating(job, part, stage, on_host)},
    }  # fmt: skip
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    host = sum(states.values()) + 12 * part if on_host else 0
    host += size * (per_rank + part) if layout.offload == "all" else 0
    exchange = max(exchange_bytes(job, layout, tokens), ring_buffer_bytes(job, layout, tokens))
    return Memory({**fixed, **moments[moment]}, moment, host + away, exchange)


def _states(job: Job, part: int) -> dict[str, int]:
    """Returns what the optimiser keeps of the weights it updates on a rank."""
    states = {"master weights fp32": 4 * part, "Adam moments fp32": 8 * part}
    return states | ({"moving average fp32": 4 * part} if job.ema else {})


def _gradients(job: Job, layout: Layout, trained: int, part: int) -> int:
    """Returns the gradients that are kept until the update; under ZeRO-3 with offload they go to the host at once."""
    if layout.zero_stage == 3 and layout.offload != "none":
        return 0
    return job.dtype.itemsize * (trained if layout.zero_stage == 1 else part)


def _turning(job: Job, layout: Layout, tokens: TokenCounts, settings: dict[str, Any], ranks: int) -> dict[str, int]:
    """Returns what is there when the forward pass has ended."""
    gathered, arriving = _gathered(job, layout, settings, ranks)
    gathered *= 2 if job.reference else 1  # the reference of RLHF keeps its own whole weights
    kept = kept_activations(job, layout, tokens) * job.graded + job.frame_bytes * layout.micro_batch
    return {
        "activations kept": kept, "working set of a layer": working_bytes(job, layout, tokens),
        "gradient buckets": _buckets(job, layout, settings), "gathered weights": gathered + arriving,
    }  # fmt: skip


def _buckets(job: Job, layout: Layout, settings: dict[str, Any]) -> int:
    """Returns the buckets of gradients: two where one is filled while the other is sent."""
    two = bool(settings["overlap_comm"]) and layout.zero_stage < 3
    return job.dtype.itemsize * int(settings["reduce_bucket_size"]) * (2 if two else 1)


def _reducing(
    job: Job, layout: Layout, settings: dict[str, Any], turning: dict[str, int], trained: int, ranks: int
) -> dict[str, int]:  # fmt: skip
    """Returns what is there when the first bucket of gradients is reduced: of the turn, what is not yet worked off."""
    bucket = int(settings["reduce_bucket_size"])
    # Copies interleave the ranks' parts; gloo copies once more.
    copies = (2 if job.device == "cpu" else 1) if layout.zero_stage == 3 else int(layout.zero_stage == 2 and ranks > 1)
    left = {name: int(held * max(0.0, 1 - bucket / trained)) for name, held in turning.items()}
    return left | {"gradient buckets": turning["gradient buckets"] + copies * bucket * job.dtype.itemsize}


def _batch_bytes(model: MMDiTConfig, tokens: TokenCounts) -> int:
    """Returns a clip's latents, noise, noisy latents, target, velocity, and text before and after dropout, in fp32."""
    latents = tokens.video * model.patch_size**2 * model.in_channels
    return 4 * (5 * latents + 2 * (tokens.text * model.joint_attention_dim + model.pooled_projection_dim))


def _settings(job: Job, layout: Layout, trained: int) -> dict[str, Any]:
    """Returns DeepSpeed's ZeRO settings as the engine derives them."""
    # To torch without torch_npu there is no such device; the settings only differ between the CPU and accelerators.
    device = torch.device("cpu" if job.device == "cpu" else "cuda")
    sizes = replace(_rank_sizes(job.model, layout.tp), trained=trained)
    config = deepspeed_config(layout.parallel(), job.precision, device, sizes, memory_bytes=job.memory_bytes)
    settings: dict[str, Any] = config["zero_optimization"]
    return settings


def _gathered(job: Job, layout: Layout, settings: dict[str, Any], ranks: int) -> tuple[int, int]:
    """Returns whole weights that live at the turn under ZeRO-3, and the buffer of the gathering that is under way."""
    if layout.zero_stage < 3 or (ranks == 1 and layout.offload != "all"):
        return 0, 0  # a partition of one is the whole weight
    size, small, sizes = job.dtype.itemsize, small_weights(job.model, layout.tp), _rank_sizes(job.model, layout.tp)
    large = sizes.total - small
    # A weight is kept when it is used again within the reuse distance, there and back.
    reused = int(settings["stage3_max_reuse_distance"]) // 2
    live = min(large, int(settings["stage3_max_live_parameters"]), reused + sizes.layer)
    return size * (live + small), size * min(large, int(settings["stage3_prefetch_bucket_size"]))


def _reference(job: Job, layout: Layout, n: int, ranks: int) -> int:
    """Returns the frozen reference of RLHF: split like the trained model."""
    if not job.reference:
        return 0
    if layout.zero_stage < 3:
        return job.dtype.itemsize * n
    return 0 if layout.offload == "all" else job.dtype.itemsize * -(-n // ranks)


def _updating(job: Job, part: int, stage: int, on_host: bool) -> int:
    """Returns fp32 gradients and AdamW's temporary tensors: two on the CPU, one where torch fuses over tensors."""
    if on_host:
        return 0
    return (4 + (8 if job.device == "cpu" else 4)) * (min(part, SUB_GROUP) if stage == 3 else part)
