"""Seconds of a training step: operations at the rates of the cluster, and bytes at its bandwidths.

Operations are those of contentv/models/cost.py: one formula, everywhere. Bytes a device sends, with S tokens of a
clip, width D, n weights of a tensor rank, b clips of a micro-batch, e bytes of a number:

    Ulysses      8 b (S / sp) D e a layer, forward and backward; half as much again where the forward pass is done twice
    tensor       6 all-reduces of b (S / sp) D e a layer (2 forward, 4 backward); 8 where it is done twice
    ZeRO-3       3 n e a micro-batch: weights gathered twice, gradients scattered
    ZeRO-1, -2   gradients reduced and weights gathered: 3 n e a step (ZeRO-2: gradients every micro-batch)

What leaves the machine goes over its network. A ring over whole machines crosses it once for all of the group's
devices in it, so that group's bandwidth is the smaller of a device's own and of its neighbours' network added up.
"""

from __future__ import annotations

from dataclasses import dataclass

from contentv.base.types import TokenCounts
from contentv.config.planning.memory import Job, Layout, head_padding, local_tokens, weights_per_rank
from contentv.config.planning.options import ClusterConfig
from contentv.models.cost import flops_per_step
from contentv.models.mmdit import flops_per_forward

UPDATE_BYTES = 52  # read or written for a weight's AdamW step and average by tensor-wise passes, at fp32: see the docs
HOST_BYTES = 6  # bf16 gradient to the host and bf16 weight back, and the norm's reading of the gradient


@dataclass(frozen=True)
class Operations:
    """Operations of one clip: as MFU counts them, and as executed, attention apart."""

    model: int
    attention: int
    dense: int


def operations(job: Job, layout: Layout, tokens: TokenCounts) -> Operations:
    """Returns the operations of one clip's forward and backward pass; padded heads and recompute are executed."""
    model = flops_per_step(job.model, tokens)
    executed = flops_per_step(job.model, tokens, layout.recompute)
    forward = job.model.num_layers * 4 * sum(tokens) ** 2 * job.model.inner_dim
    attention = forward * (4 if layout.recompute == "full" else 3)
    return Operations(model, int(attention * head_padding(job.model, layout)), executed - attention)


@dataclass(frozen=True)
class Rollout:
    """What RLHF adds to a step, in forward passes of the whole model: none for flow matching.

    Attributes:
        forward: passes without gradients, the reference's among them.
        trained: passes with gradients, in place of flow matching's one.
    """

    forward: int = 0
    trained: int = 1


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step by part, and what comes of it."""

    parts: dict[str, float]
    model_flops: float  # of all devices, without recompute
    clips: int

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())

    @property
    def communication(self) -> float:
        """Those spent waiting for other devices."""
        return sum(self.parts[name] for name in ("Ulysses", "tensor parallelism", "ZeRO, not hidden"))


def ring_bandwidth(cluster: ClusterConfig, ranks: int, stride: int) -> float:
    """Returns bytes a second of a ring over `ranks` devices that lie `stride` apart.

    Args:
        cluster: the machines.
        ranks: devices of the group.
        stride: 1 = neighbours.
    """
    own = cluster.intra_gb_s * 1e9 * cluster.link_efficiency
    if ranks * stride <= cluster.devices_per_node:
        return own
    inside = max(1, min(ranks, cluster.devices_per_node // stride))
    return min(own, inside * cluster.inter_gb_s * 1e9 * cluster.link_efficiency)


def exchange_seconds(cluster: ClusterConfig, sent: float, ranks: int, stride: int) -> float:
    """Returns the time of an all-to-all in which each device sends `sent` bytes in equal parts to all of the group."""
    inside = max(1, min(ranks, cluster.devices_per_node // stride))
    part = sent / ranks
    own = part * (inside - 1) / (cluster.intra_gb_s * 1e9 * cluster.link_efficiency)
    return max(own, part * (ranks - inside) / (cluster.inter_gb_s * 1e9 * cluster.link_efficiency))


def ulysses_bytes(job: Job, layout: Layout, tokens: TokenCounts) -> float:
    """Returns the bytes of a layer's all-to-alls, forward and backward, on one device and one micro-batch."""
    width = layout.micro_batch * sum(local_tokens(tokens, layout.sp)) * job.model.inner_dim * job.dtype.itemsize
    return (8 if layout.recompute == "none" else 12) * width * head_padding(job.model, layout) / layout.tp


def step_time(
    cluster: ClusterConfig, job: Job, layout: Layout, dp: int, tokens: TokenCounts, accumulation: int,
    rollout: Rollout = Rollout(),
) -> StepTime:  # fmt: skip
    """Returns the seconds of one optimiser step.

    Args:
        cluster: bandwidths and rates.
        job: what is trained.
        layout: how.
        dp: data-parallel degree.
        tokens: of a clip, before any split.
        accumulation: micro-batches of a step on a rank.
        rollout: RLHF's passes.
    """
    counted = operations(job, layout, tokens)
    peak = cluster.peak_flops(job.precision)
    share = layout.micro_batch / (layout.sp * layout.tp)
    forward = flops_per_forward(job.model, tokens)
    scores = job.model.num_layers * 4 * sum(tokens) ** 2 * job.model.inner_dim
    attention = rollout.trained * counted.attention + rollout.forward * scores * head_padding(job.model, layout)
    dense = rollout.trained * counted.dense + rollout.forward * (forward - scores)
    layers = accumulation * share * (
        attention / (peak * cluster.attention_efficiency) + dense / (peak * cluster.dense_efficiency)
    )  # fmt: skip
    again = 0 if layout.recompute == "none" else 1
    ulysses, tensor = _between_ranks(cluster, job, layout, tokens)
    zero = _zero_seconds(cluster, job, layout, dp, accumulation, rollout)
    parts = {
        "layers": layers,
        "Ulysses": accumulation * ulysses * (rollout.trained + rollout.forward * 4 / (8 + 4 * again)),
        "tensor parallelism": accumulation * tensor * (rollout.trained + rollout.forward * 2 / (6 + 2 * again)),
        "ZeRO, not hidden": max(0.0, zero - cluster.overlap * layers),
        "optimiser": _update_seconds(cluster, job, layout, dp),
        "fixed": accumulation * job.model.num_layers * cluster.overhead_ms / 1000,
    }
    clips = dp * layout.micro_batch * accumulation
    return StepTime(parts, float(counted.model * clips * rollout.trained + forward * clips * rollout.forward), clips)


def _between_ranks(cluster: ClusterConfig, job: Job, layout: Layout, tokens: TokenCounts) -> tuple[float, float]:
    """Returns seconds of the all-to-alls and of the tensor ranks' all-reduces of one micro-batch."""
    ulysses = tensor = 0.0
    if layout.sp > 1:
        sent = ulysses_bytes(job, layout, tokens)
        ulysses = job.model.num_layers * exchange_seconds(cluster, sent, layout.sp, layout.tp)
    if layout.tp > 1:
        width = layout.micro_batch * sum(local_tokens(tokens, layout.sp)) * job.model.inner_dim * job.dtype.itemsize
        sent = (6 if layout.recompute == "none" else 8) * 2 * width * (layout.tp - 1) / layout.tp
        tensor = job.model.num_layers * sent / ring_bandwidth(cluster, layout.tp, 1)
    return ulysses, tensor


def _zero_seconds(
    cluster: ClusterConfig, job: Job, layout: Layout, dp: int, accumulation: int, rollout: Rollout
) -> float:  # fmt: skip
    """Returns seconds of ZeRO's collectives of a step, were nothing hidden."""
    ranks = dp * layout.sp
    if ranks == 1:
        return 0.0
    whole, size = weights_per_rank(job.model, layout.tp), job.dtype.itemsize
    trained = min(job.trained, whole) if job.trained else whole
    per_step = 0.0
    if layout.zero_stage == 3:
        per_micro = (2 * rollout.trained + rollout.forward) * whole + trained
    elif layout.zero_stage == 2:
        per_micro, per_step = trained, trained
    else:
        per_micro, per_step = 0, 3 * trained  # an all-reduce, sent twice, and the gathering of new weights
    sent = size * (accumulation * per_micro + per_step) * (ranks - 1) / ranks
    return sent / ring_bandwidth(cluster, ranks, layout.tp)


def _update_seconds(cluster: ClusterConfig, job: Job, layout: Layout, dp: int) -> float:
    """Returns seconds of the optimiser: bound by memory, the device's or with offload the host's and the link."""
    whole = weights_per_rank(job.model, layout.tp)
    part = (min(job.trained, whole) if job.trained else whole) / (dp * layout.sp)
    if layout.offload == "none":
        return UPDATE_BYTES * part / (cluster.memory_gb_s * 1e9)
    link = HOST_BYTES * part / (cluster.host_link_gb_s * 1e9)
    return link + UPDATE_BYTES * part * cluster.devices_per_node / (cluster.host_memory_gb_s * 1e9)
