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
from dataclasses import dataclass, replace
from typing import Any

import torch

from contentv.base.types import TokenCounts
from contentv.engine.plans import MMDIT_PLAN
from contentv.engine.zero_config import PERSIST_BELOW, deepspeed_config
from contentv.models.cost import activation_bytes, activation_bytes_per_block
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.parallel.mesh import ParallelConfig
from contentv.parallel.ulysses import padded_part

MAX_LIVE = MAX_REUSE = 1_000_000_000  # DeepSpeed's defaults, which the engine leaves: whole weights kept under ZeRO-3
SUB_GROUP = 1_000_000_000  # weights that ZeRO-3 updates at once
WORKING_WIDTHS = 3  # gradients of a layer's feed-forward over what it has freed by then, in widths per token
SPLIT_WIDTHS = 14  # of a layer's 20 widths, those that tensor ranks hold a part of: heads and hidden layers
QKV_WIDTHS, EXCHANGES = 3, 4  # an all-to-all of q, k, v: stacked, sent, received, joined
FREED_WIDTHS = 11  # what the layer has let go of when the exchange of its backward pass runs


@dataclass(frozen=True)
class Layout:
    """How a stage runs: the degrees, ZeRO, and clips per forward."""

    sp: int = 1
    tp: int = 1
    zero_stage: int = 3
    offload: str = "none"
    recompute: str = "none"
    micro_batch: int = 1

    def parallel(self) -> ParallelConfig:
        """Returns the same as `contentv train` takes it."""
        return ParallelConfig(
            sp=self.sp, tp=self.tp, zero_stage=self.zero_stage, offload=self.offload, recompute=self.recompute
        )

    def words(self) -> str:
        """Returns the overrides of `contentv train` that ask for it."""
        return (
            f"parallel.sp={self.sp} parallel.tp={self.tp} parallel.zero_stage={self.zero_stage} "
            f"parallel.offload={self.offload} parallel.recompute={self.recompute} "
            f"train.micro_batch_size={self.micro_batch}"
        )


@dataclass(frozen=True)
class Job:
    """What is trained, on what kind of device: all that memory and time depend on beside the layout.

    Attributes:
        trained: trained weights of a LoRA; 0 = the whole model is trained.
        resident_bytes: frozen models on every device (RLHF's VAE and reward model).
        frame_bytes: activations of a decoded and scored frame, per clip (RLHF).
        reference: RLHF keeps a frozen copy of the model.
        graded: forward passes whose activations are kept at once: 1, or RLHF's grad steps and guidance.
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

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def weights_per_rank(model: MMDiTConfig, tp: int) -> int:
    """Returns the weights of the fullest of `tp` tensor ranks: of attention whole heads, of feed-forwards a part."""
    return _counts(tuple(vars(model).values()), tp)[0]


def small_weights(model: MMDiTConfig, tp: int) -> int:
    """Returns how many of them are in tensors that ZeRO-3 keeps whole on every rank, being small."""
    return _counts(tuple(vars(model).values()), tp)[1]


@functools.cache
def _counts(model: tuple[Any, ...], tp: int) -> tuple[int, int]:
    """Returns all weights of the fullest tensor rank, and those in small tensors."""
    config = MMDiTConfig(*model)
    sizes = []
    for size, in_attention, is_split in _parameters(model):
        units = config.num_attention_heads if in_attention else 4 * config.inner_dim
        sizes.append(size // units * padded_part(units, tp) if is_split else size)
    return sum(sizes), sum(size for size in sizes if size < PERSIST_BELOW)


@functools.cache
def _parameters(model: tuple[Any, ...]) -> list[tuple[int, bool, bool]]:
    """Returns of each parameter its elements, whether it is the attention's, and whether tensor ranks split it."""
    with torch.device("meta"):
        named = MMDiT(MMDiTConfig(*model)).named_parameters()
    return [(p.numel(), ".attn." in name, MMDIT_PLAN.dim_of(name) is not None) for name, p in named]


def local_tokens(tokens: TokenCounts, sp: int) -> TokenCounts:
    """Returns the tokens of one sequence rank, padding included."""
    return TokenCounts(padded_part(tokens.video, sp), padded_part(tokens.text, sp))


def head_padding(model: MMDiTConfig, layout: Layout) -> float:
    """Returns heads of the fullest rank over those of the average one: 38 heads over 8 sequence ranks count as 40."""
    heads = padded_part(model.num_attention_heads, layout.tp)
    return padded_part(heads, layout.sp) * layout.sp * layout.tp / model.num_attention_heads


def kept_activations(job: Job, layout: Layout, tokens: TokenCounts, recompute: str | None = None) -> int:
    """Returns the bytes that the forward pass of a micro-batch keeps on one device."""
    recompute = layout.recompute if recompute is None else recompute
    local, model, fused = local_tokens(tokens, layout.sp), job.model, job.device == "cuda"
    # Under ZeRO-3 DeepSpeed's linear keeps its input as it lies: no copies where a larger batch would need them.
    one_by_one = layout.zero_stage == 3
    clips = 1 if one_by_one else layout.micro_batch
    kept = activation_bytes(model, local, job.dtype, recompute, batch=clips, fused_norms=fused)
    kept *= layout.micro_batch if one_by_one else 1
    width = layout.micro_batch * sum(local) * model.inner_dim * job.dtype.itemsize
    attended = {"none": 4.0, "selective": 1.0, "full": 0.0}[recompute]  # widths that lie by heads: q, k, v and output
    kept += int(model.num_layers * width * attended * (head_padding(model, layout) - 1))
    if layout.sp > 1 and recompute == "none":
        # The output by heads is kept beside that by tokens; the CPU's attention copies k and v out of the received.
        kept += model.num_layers * width * (1 if job.device != "cpu" else 3)
    if recompute == "none":
        kept -= int(model.num_layers * _split_bytes(job, layout, width) * (1 - 1 / layout.tp))
    elif recompute == "selective":
        kept -= int(model.num_layers * width * (1 - 1 / layout.tp))
    return kept


def _split_bytes(job: Job, layout: Layout, width: int) -> int:
    """Returns what of one layer's activations tensor ranks divide among them."""
    plain = 0 if job.device == "cuda" else 2 * (8 - job.dtype.itemsize) * width // job.dtype.itemsize
    return SPLIT_WIDTHS * width + (plain if job.model.qk_norm is not None else 0)


def working_bytes(job: Job, layout: Layout, tokens: TokenCounts) -> int:
    """Returns what a layer's backward pass holds beside what was kept: gradients, or the all-to-all's buffers."""
    local = local_tokens(tokens, layout.sp)
    width = layout.micro_batch * sum(local) * job.model.inner_dim * job.dtype.itemsize
    working = WORKING_WIDTHS * width
    if layout.sp > 1:
        working = max(working, exchange_bytes(job, layout, tokens) - FREED_WIDTHS * width // layout.tp)
    if layout.recompute != "none":
        last = replace(layout, recompute="none")
        block = activation_bytes_per_block(
            job.model, local, job.dtype, "none", batch=1, fused_norms=job.device == "cuda"
        ) * layout.micro_batch  # fmt: skip
        block -= int(_split_bytes(job, last, width) * (1 - 1 / layout.tp))
        working += block - width  # the layer's input was kept
    return working


def exchange_bytes(job: Job, layout: Layout, tokens: TokenCounts) -> int:
    """Returns the buffers of one all-to-all of q, k and v; 0 without sequence parallelism."""
    if layout.sp == 1:
        return 0
    width = layout.micro_batch * sum(local_tokens(tokens, layout.sp)) * job.model.inner_dim * job.dtype.itemsize
    return int(EXCHANGES * QKV_WIDTHS * width * head_padding(job.model, layout) / layout.tp)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device by part at its fullest moment, and of its host (offload), for one device."""

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
    frozen = n - trained if job.trained else 0
    total = trained + frozen
    settings = _settings(job, layout, total, trained)
    part, per_rank = -(-trained // ranks), -(-total // ranks)
    host_update, host_weights = layout.offload != "none", layout.offload == "all"
    states = {"master weights fp32": 4 * part, "Adam moments fp32": 8 * part}
    if job.ema:
        states["moving average fp32"] = 4 * part
    gradients = size * (trained if stage == 1 else part)
    bucket = size * int(settings["reduce_bucket_size"])
    gathered, transient = _gathered(job, layout, settings, total, ranks)
    gathered *= 2 if job.reference else 1  # the reference of RLHF keeps its own whole weights
    fixed = {
        "weights": 0 if host_weights else size * (per_rank if stage == 3 else total),
        "batch": layout.micro_batch * _batch_bytes(job.model, tokens),
        "frozen models": job.resident_bytes + _reference(job, layout, n, ranks),
        **({} if host_update else states),
    }
    kept = kept_activations(job, layout, tokens) * job.graded + job.frame_bytes * layout.micro_batch
    work, activations = working_bytes(job, layout, tokens), "activations kept"
    reducing, beyond = (
        _reducing(job, layout, bucket, ranks),
        max(0.0, 1 - int(settings["reduce_bucket_size"]) / trained),
    )
    overlapped = bool(settings["overlap_comm"]) and stage < 3
    held = bucket * (2 if overlapped else 1)
    early = gradients if stage == 3 or accumulation > 1 else 0
    if stage == 3 and host_update:
        early = 0
        gradients = 0
    moments = {
        "turn": {activations: kept, "working set of a layer": work, "gradients": early, "gradient buckets": held,
                 "gathered weights": gathered + transient},
        "reduce": {activations: int(kept * beyond), "working set of a layer": int(work * beyond),
                   "gradients": gradients, "gradient buckets": held + reducing,
                   "gathered weights": int(gathered * beyond)},
        "update": {"gradients": gradients if stage == 3 else 0, "gradient buckets": bucket if stage == 3 else 0,
                   "optimiser's temporary tensors": _updating(job, part, stage, host_update)},
    }  # fmt: skip
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    host = (sum(states.values()) + 12 * part if host_update else 0) + (size * (per_rank + part) if host_weights else 0)
    return Memory({**fixed, **moments[moment]}, moment, host, exchange_bytes(job, layout, tokens))


def _batch_bytes(model: MMDiTConfig, tokens: TokenCounts) -> int:
    """Returns a clip's latents, noise, noisy latents, target, velocity, and text before and after dropout, in fp32."""
    latents = tokens.video * model.patch_size**2 * model.in_channels
    return 4 * (5 * latents + 2 * (tokens.text * model.joint_attention_dim + model.pooled_projection_dim))


def _settings(job: Job, layout: Layout, total: int, trained: int) -> dict[str, Any]:
    """Returns DeepSpeed's ZeRO settings as the engine derives them."""
    # To torch without torch_npu there is no such device; the settings only differ between the CPU and accelerators.
    device = torch.device("cpu" if job.device == "cpu" else "cuda")
    config = deepspeed_config(layout.parallel(), job.precision, device, total, trained_numel=trained)
    settings: dict[str, Any] = config["zero_optimization"]
    return settings


def _gathered(job: Job, layout: Layout, settings: dict[str, Any], total: int, ranks: int) -> tuple[int, int]:
    """Returns whole weights that live at the turn under ZeRO-3, and the buffer of the gathering that is under way."""
    if layout.zero_stage < 3:
        return 0, 0
    size = job.dtype.itemsize
    small = small_weights(job.model, layout.tp)
    if ranks == 1 and layout.offload != "all":
        return 0, 0  # a partition of one is the whole weight
    large = total - small
    # A weight is kept when it is used again within the reuse distance, there and back.
    reused = int(settings.get("stage3_max_reuse_distance", MAX_REUSE)) // 2
    live = min(large, int(settings.get("stage3_max_live_parameters", MAX_LIVE)), reused + total // job.model.num_layers)
    return size * (live + small), size * min(large, int(settings["stage3_prefetch_bucket_size"]))


def _reference(job: Job, layout: Layout, n: int, ranks: int) -> int:
    """Returns the frozen reference of RLHF: split like the trained model."""
    if not job.reference:
        return 0
    if layout.zero_stage < 3:
        return job.dtype.itemsize * n
    return 0 if layout.offload == "all" else job.dtype.itemsize * -(-n // ranks)


def _reducing(job: Job, layout: Layout, bucket: int, ranks: int) -> int:
    """Returns the copies that a bucket's reduction makes: to interleave the ranks' parts; gloo copies once more."""
    if layout.zero_stage == 3:
        return bucket * (2 if job.device == "cpu" else 1)
    return bucket if layout.zero_stage == 2 and ranks > 1 else 0


def _updating(job: Job, part: int, stage: int, on_host: bool) -> int:
    """Returns fp32 gradients and AdamW's temporary tensors: two on the CPU, one where torch fuses over tensors."""
    if on_host:
        return 0
    return (4 + (8 if job.device == "cpu" else 4)) * (min(part, SUB_GROUP) if stage == 3 else part)
