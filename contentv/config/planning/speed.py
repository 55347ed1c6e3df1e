"""Seconds of a training step: operations at the rates of the cluster, and bytes at its bandwidths.

Operations are those of contentv/models/cost.py: one formula, everywhere. What ranks wait for each other is counted in
`links`. What is not modelled: data that is waited for, checkpoints, stragglers, and that small matrices run slower.
"""

from __future__ import annotations

from dataclasses import dataclass

from contentv.base.types import TokenCounts
from contentv.config.planning.activations import offloaded_activations
from contentv.config.planning.layout import Job, Layout, head_padding
from contentv.config.planning.links import PLAIN, Passes, ring_seconds, tensor_seconds, ulysses_seconds, zero_seconds
from contentv.config.planning.memory import weights_per_rank
from contentv.config.planning.options import ClusterConfig
from contentv.models.cost import flops_per_step
from contentv.models.mmdit import flops_per_forward

UPDATE_BYTES = 52  # read or written for a weight's AdamW step and average by tensor-wise passes, at fp32: see the docs
HOST_BYTES = 6  # bf16 gradient to the host and bf16 weight back, and the norm's reading of the gradient
WAITS = ("Ulysses, not hidden", "ring", "tensor parallelism", "ZeRO, not hidden")


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
        return sum(self.parts[name] for name in WAITS)


def step_time(
    cluster: ClusterConfig, job: Job, layout: Layout, dp: int, tokens: TokenCounts, accumulation: int,
    passes: Passes = PLAIN,
) -> StepTime:  # fmt: skip
    """Returns the seconds of one optimiser step.

    Args:
        cluster: bandwidths and rates.
        job: what is trained.
        layout: how.
        dp: data-parallel degree.
        tokens: of a clip, before any split.
        accumulation: micro-batches of a step on a rank.
        passes: RLHF's, in place of flow matching's one.
    """
    attention, dense = _computing(cluster, job, layout, tokens, passes)
    layers = attention + dense
    parts = {
        "layers": layers,
        "Ulysses, not hidden": ulysses_seconds(cluster, job, layout, tokens, passes),
        "ring": ring_seconds(cluster, job, layout, tokens, passes, attention),
        "tensor parallelism": tensor_seconds(cluster, job, layout, tokens, passes),
        "activations to the host, not hidden": max(0.0, _offloading(cluster, job, layout, tokens)
                                                   - cluster.overlap * layers),
        "fixed": job.model.num_layers * cluster.overhead_ms / 1000,
    }  # fmt: skip
    parts = {name: accumulation * seconds for name, seconds in parts.items()}
    zero = zero_seconds(cluster, job, layout, dp, accumulation, passes)
    parts["ZeRO, not hidden"] = max(0.0, zero - cluster.overlap * parts["layers"])
    parts["optimiser"] = _updating(cluster, job, layout, dp)
    clips, forward = dp * layout.micro_batch * accumulation, flops_per_forward(job.model, tokens)
    counted = flops_per_step(job.model, tokens) * passes.trained + forward * passes.forward
    return StepTime(parts, float(counted * clips), clips)


def _computing(
    cluster: ClusterConfig, job: Job, layout: Layout, tokens: TokenCounts, passes: Passes
) -> tuple[float, float]:
    """Returns seconds of a device's attention and of all its other work in one micro-batch."""
    counted, peak = operations(job, layout, tokens), cluster.peak_flops(job.precision)
    share = layout.micro_batch / (layout.sp * layout.tp)
    forward = flops_per_forward(job.model, tokens)
    scores = job.model.num_layers * 4 * sum(tokens) ** 2 * job.model.inner_dim
    attention = passes.trained * counted.attention + passes.forward * scores * head_padding(job.model, layout)
    dense = passes.trained * counted.dense + passes.forward * (forward - scores)
    return (share * attention / (peak * cluster.attention_efficiency),
            share * dense / (peak * cluster.dense_efficiency))  # fmt: skip


def _offloading(cluster: ClusterConfig, job: Job, layout: Layout, tokens: TokenCounts) -> float:
    """Returns seconds of a micro-batch's activations on their way to the host and back, were nothing hidden."""
    return 2 * job.graded * offloaded_activations(job, layout, tokens) / (cluster.host_link_gb_s * 1e9)


def _updating(cluster: ClusterConfig, job: Job, layout: Layout, dp: int) -> float:
    """Returns seconds of the optimiser: bound by memory, the device's or with offload the host's and the link."""
    whole = weights_per_rank(job.model, layout.tp)
    part = (min(job.trained, whole) if job.trained else whole) / (dp * layout.sp)
    if layout.offload == "none":
        return UPDATE_BYTES * part / (cluster.memory_gb_s * 1e9)
    link = HOST_BYTES * part / (cluster.host_link_gb_s * 1e9)
    return link + UPDATE_BYTES * part * cluster.devices_per_node / (cluster.host_memory_gb_s * 1e9)
