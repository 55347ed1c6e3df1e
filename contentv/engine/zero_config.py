"""What DeepSpeed is told, without importing it: its configuration, and its view of the ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from contentv.parallel.mesh import Mesh, ParallelConfig

BUCKET_BYTES = 100_000_000  # ours: some ms on any link, so that a collective's start-up does not count
LIVE_SHARE = 1 / 32  # ours: of the device's memory, for whole weights that wait for the backward pass
LIVE_LAYERS = 2  # at least: the one that is computed and the one that arrives
LIVE_UNKNOWN = 1_000_000_000  # DeepSpeed's own, where the device's memory is the host's
_LAYER = re.compile(r"(.*blocks\.\d+)\.|(.*)\.[^.]+$")


@dataclass(frozen=True)
class WeightSizes:
    """Elements of one tensor rank's weights: what DeepSpeed's buckets and limits are derived from.

    Attributes:
        total: all weights.
        trained: those with gradients.
        tensor: the largest tensor's.
        layer: the largest layer's: a block, or a module outside of the blocks.
        vector: the longest vector's: biases, norms.
    """

    total: int
    trained: int
    tensor: int
    layer: int
    vector: int


def weight_sizes(shapes: Mapping[str, tuple[int, ...]], trained: Collection[str] | None = None) -> WeightSizes:
    """Returns the sizes of weights.

    Args:
        shapes: by name, as this tensor rank has them.
        trained: the names of those with gradients; None = all.
    """
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    layers: dict[str, int] = {}
    for name, size in numel.items():
        match = _LAYER.match(name)
        layer = name if match is None else match[1] or match[2]
        layers[layer] = layers.get(layer, 0) + size
    return WeightSizes(
        total=sum(numel.values()),
        trained=sum(numel[name] for name in (numel if trained is None else trained)),
        tensor=max(numel.values()),
        layer=max(layers.values()),
        vector=max((size for name, size in numel.items() if len(shapes[name]) == 1), default=0),
    )


class Ranks:
    """What DeepSpeed asks about groups: tensor ranks are model ranks, all others are data ranks."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_group(self) -> Any:
        return self._mesh.tp_group

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        return self._mesh.zero_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.zero_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.zero


def zero_limits(sizes: WeightSizes, itemsize: int, memory_bytes: int = 0) -> dict[str, int]:
    """Returns the elements of DeepSpeed's buckets, and of the weights that ZeRO-3 keeps whole, each with its reason.

    Args:
        sizes: of the weights on a tensor rank.
        itemsize: bytes of a weight.
        memory_bytes: of the device; 0 = unknown.
    """
    bucket = max(BUCKET_BYTES // itemsize, sizes.tensor)  # a gradient that no bucket holds is copied on its own
    live = max(int(memory_bytes * LIVE_SHARE) // itemsize, LIVE_LAYERS * sizes.layer) if memory_bytes else LIVE_UNKNOWN
    return {
        "reduce_bucket_size": min(bucket, max(sizes.trained, 1)),
        "allgather_bucket_size": min(bucket, sizes.total),
        # While a layer is computed the next arrives. What is fetched earlier only waits.
        "stage3_prefetch_bucket_size": min(max(bucket, sizes.layer), sizes.total),
        # Whole weights that wait for the backward pass need not be gathered again, but take the activations' room.
        "stage3_max_live_parameters": live,
        # A weight waits if it is used again before as many others are: more of them could not live.
        "stage3_max_reuse_distance": live,
        # Vectors stay whole on every rank: a collective for some thousand numbers is all start-up. Matrices never do.
        "stage3_param_persistence_threshold": sizes.vector,
    }


def deepspeed_config(
    parallel: ParallelConfig, precision: str, device: torch.device, sizes: WeightSizes, *,
    grad_clip: float = 0.0, micro_batch_size: int = 1, memory_bytes: int = 0, persist_below: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Returns DeepSpeed's configuration, derived from ours and from the model: users never write it.

    Args:
        parallel: ZeRO stage, offload, hpZ.
        precision: bf16 or fp32.
        device: where the model runs.
        sizes: of the weights on this rank before ZeRO.
        grad_clip: largest global gradient norm; 0 = no clipping.
        micro_batch_size: samples of a forward pass; for its books.
        memory_bytes: of the device; 0 = unknown.
        persist_below: weights of fewer elements are not partitioned by ZeRO-3; None = the vectors.
    """
    limits = zero_limits(sizes, 2 if precision == "bf16" else 4, memory_bytes)
    if persist_below is not None:
        limits["stage3_param_persistence_threshold"] = max(persist_below - 1, 0)
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": device.type != "cpu" and parallel.zero_stage >= 2,
        **{key: value for key, value in limits.items() if parallel.zero_stage == 3 or not key.startswith("stage3_")},
    }
    if parallel.hpz > 1:
        zero["zero_hpz_partition_size"] = parallel.hpz
    if parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type != "cpu"}
    if parallel.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": device.type != "cpu"}
    return {
        "train_micro_batch_size_per_gpu": max(micro_batch_size, 1),
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # `step` is the boundary, after any number of micro-batches
        "gradient_clipping": grad_clip,
        "steps_per_print": 1 << 62,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": zero,
    }
