"""Seconds that ranks wait for each other in one micro-batch or step, and what of it hides behind the layers' work.

Bytes are those of contentv/parallel/traffic.py and of docs/parallelism.md. What leaves the machine goes over its
network. A ring of collectives over whole machines crosses it once for all of the group's devices in it, so that its
bandwidth is the smaller of a device's own and of its neighbours' network added up; keys and values that travel from
place to place have a device's own network alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from contentv.base.types import TokenCounts
from contentv.config.planning.layout import Job, Layout, head_padding, local_tokens, width_bytes
from contentv.config.planning.memory import weights_per_rank
from contentv.config.planning.options import ClusterConfig
from contentv.parallel.traffic import GRADIENT_BYTES, all_reduce_bytes, head_counts, ring_bytes
from contentv.parallel.ulysses import block_counts, padded_part

# Read or written for a number of a block's output, at bf16: its merging by tensor-wise passes in fp32, and the adding
# up of three gradients.
MERGE_BYTES, GATHER_BYTES = 30, 80


@dataclass(frozen=True)
class Passes:
    """Passes of the whole model in a micro-batch: flow matching's one; RLHF's rollout has more.

    Attributes:
        forward: without gradients, the reference's among them.
        trained: with gradients.
    """

    forward: int = 0
    trained: int = 1


PLAIN = Passes()


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
    own = part * (inside - 1) / (cluster.exchange_bandwidth * 1e9 * cluster.link_efficiency)
    return max(own, part * (ranks - inside) / (cluster.inter_gb_s * 1e9 * cluster.link_efficiency))


def _repeated(layout: Layout) -> int:
    """Returns how often a trained pass runs the layers' forward part."""
    return 1 if layout.recompute == "none" else 2


def ulysses_bytes(job: Job, layout: Layout, tokens: TokenCounts) -> float:
    """Returns the bytes of a layer's all-to-alls, forward and backward, on one device and one micro-batch."""
    if layout.ulysses == 1:
        return 0.0
    width = width_bytes(job, layout, tokens) * head_padding(job.model, layout) / layout.tp
    return 4 * (1 + _repeated(layout)) * width


def ulysses_seconds(cluster: ClusterConfig, job: Job, layout: Layout, tokens: TokenCounts, passes: Passes) -> float:
    """Returns what a micro-batch waits for all-to-alls.

    On accelerators values and keys travel while keys and queries are projected, and their gradients likewise: half of
    the bytes, as far as that work lasts.
    """
    if layout.ulysses == 1:
        return 0.0
    units = passes.trained * (1 + _repeated(layout)) + passes.forward  # a forward pass and a backward pass: 4 widths
    sent = ulysses_bytes(job, layout, tokens) / (1 + _repeated(layout)) * units
    seconds = exchange_seconds(cluster, sent, layout.ulysses, layout.tp)
    if cluster.device != "cpu":
        # Two projections of 2 D^2 a token forward, with twice the work backward.
        projections = 2 * (passes.trained * (2 + _repeated(layout)) + passes.forward)
        rows = layout.micro_batch * sum(local_tokens(tokens, layout))
        rate = cluster.peak_flops(job.precision) * cluster.dense_efficiency * layout.tp
        seconds -= min(seconds / 2, cluster.overlap * projections * 2 * rows * job.model.inner_dim**2 / rate)
    return job.model.num_layers * seconds


def ring_seconds(
    cluster: ClusterConfig, job: Job, layout: Layout, tokens: TokenCounts, passes: Passes, attention_s: float
) -> float:  # fmt: skip
    """Returns what a micro-batch waits for keys and values that travel round the ring, and what merging them takes.

    A block travels while the one before is worked on: of R blocks, R - 1 can hide. The last block's gradients reach
    their owner when all work is done.

    Args:
        cluster, job, layout, tokens, passes: as everywhere.
        attention_s: the micro-batch's attention on one device.
    """
    if layout.ring == 1:
        return 0.0
    heads, ring, size = head_counts(job.model.num_attention_heads, layout.tp)[0], layout.ring, job.dtype.itemsize
    both, gradients, block = (
        layout.micro_batch * n
        for n in _ring_load(tokens, heads, job.model.attention_head_dim, layout.sp, ring, size, layout.token_unit)
    )
    forward = (both - gradients) / 2
    last = gradients / (ring - 1)
    sent = passes.trained * (both + (_repeated(layout) - 1) * forward - last) + passes.forward * forward
    crosses = ring * layout.ulysses * layout.tp > cluster.devices_per_node
    bandwidth = (cluster.inter_gb_s if crosses else cluster.intra_gb_s) * 1e9 * cluster.link_efficiency
    behind = cluster.overlap * attention_s * (ring - 1) / ring
    waited = max(0.0, job.model.num_layers * sent / bandwidth - behind)
    merged = MERGE_BYTES * passes.forward + (MERGE_BYTES * _repeated(layout) + GATHER_BYTES) * passes.trained
    merging = merged * ring * block / (cluster.memory_gb_s * 1e9)
    return waited + job.model.num_layers * (passes.trained * last / bandwidth + merging)


@functools.cache
def _ring_load(
    tokens: TokenCounts, heads: int, head_dim: int, sp: int, ring: int, size: int, unit: int
) -> tuple[int, int, int]:
    """Returns of one clip and layer all bytes that the first place sends, gradients', and the numbers of its output."""
    lengths = [sum(counts) for counts in block_counts(tokens, sp, ring, unit)]
    width = padded_part(heads, sp // ring) * head_dim
    gradients = 2 * (sum(lengths) - lengths[0]) * width * max(size, GRADIENT_BYTES)
    return ring_bytes(tokens, heads, head_dim, sp, ring, size, unit=unit), gradients, lengths[0] * width


def tensor_seconds(cluster: ClusterConfig, job: Job, layout: Layout, tokens: TokenCounts, passes: Passes) -> float:
    """Returns what a micro-batch waits for tensor ranks: all-reduces, or gathers and scatters that send as much."""
    if layout.tp == 1:
        return 0.0
    padded = local_tokens(tokens, layout)
    handed = all_reduce_bytes(padded, job.model.inner_dim, 1, layout.tp, job.dtype.itemsize) * layout.micro_batch
    units = passes.trained * (1 + _repeated(layout)) + passes.forward  # half of them are the forward pass's
    sent = handed / 2 * units * 2 * (layout.tp - 1) / layout.tp
    return job.model.num_layers * sent / ring_bandwidth(cluster, layout.tp, 1)


def zero_bytes(
    job: Job, layout: Layout, dp: int, accumulation: int, passes: Passes = PLAIN
) -> tuple[float, float]:  # fmt: skip
    """Returns what a rank sends in ZeRO's collectives of a step: among all ranks, and among hpZ's neighbours."""
    ranks = dp * layout.sp
    whole, size = weights_per_rank(job.model, layout.tp), job.dtype.itemsize
    trained = min(job.trained, whole) if job.trained else whole
    again = 0.0
    if layout.zero_stage == 3:
        again = passes.trained * whole  # gathered for the backward pass: with hpZ from the second copy
        per_micro, per_step = (passes.trained + passes.forward) * whole + trained, 0
    elif layout.zero_stage == 2:
        per_micro, per_step = trained, trained
    else:
        per_micro, per_step = 0, 3 * trained  # an all-reduce, sent twice, and the gathering of new weights
    far = accumulation * (per_micro + (again if layout.hpz == 1 else 0)) + per_step
    near = accumulation * again if layout.hpz > 1 else 0.0
    return size * far * (ranks - 1) / ranks, size * near * (layout.hpz - 1) / layout.hpz


def zero_seconds(
    cluster: ClusterConfig, job: Job, layout: Layout, dp: int, accumulation: int, passes: Passes = PLAIN
) -> float:  # fmt: skip
    """Returns seconds of ZeRO's collectives of a step, were nothing hidden."""
    far, near = zero_bytes(job, layout, dp, accumulation, passes)
    waiting = far / ring_bandwidth(cluster, dp * layout.sp, layout.tp)
    return waiting + near / ring_bandwidth(cluster, layout.hpz, layout.tp)
