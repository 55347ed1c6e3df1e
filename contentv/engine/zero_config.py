"""What DeepSpeed is told, without importing it: its configuration, and its view of the ranks."""

from __future__ import annotations

from typing import Any

import torch

from contentv.parallel.mesh import Mesh, ParallelConfig

BUCKET_ELEMENTS = 50_000_000
PERSIST_BELOW = 100_000  # smaller weights stay whole on every rank under ZeRO-3


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


def deepspeed_config(
    parallel: ParallelConfig, precision: str, device: torch.device, numel: int, *,
    grad_clip: float = 0.0, trained_numel: int | None = None, micro_batch_size: int = 1,
    persist_below: int = PERSIST_BELOW,
) -> dict[str, Any]:  # fmt: skip
    """Returns DeepSpeed's configuration, derived from ours: users never write it.

    Args:
        parallel: ZeRO stage and offload.
        precision: bf16 or fp32.
        device: where the model runs.
        numel: weights on this rank before ZeRO; buckets need not be larger.
        grad_clip: largest global gradient norm; 0 = no clipping.
        trained_numel: those of them that have gradients; None = all.
        micro_batch_size: samples of a forward pass; for its books.
        persist_below: weights of fewer elements are not partitioned by ZeRO-3.
    """
    overlap = device.type != "cpu" and parallel.zero_stage >= 2
    bucket = min(BUCKET_ELEMENTS, max(numel, 1))
    reduce_bucket = min(bucket, max(numel if trained_numel is None else trained_numel, 1))
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": overlap,
        "reduce_bucket_size": reduce_bucket,
        "allgather_bucket_size": bucket,
    }
    if parallel.zero_stage == 3:
        zero |= {"stage3_param_persistence_threshold": persist_below, "stage3_prefetch_bucket_size": bucket}
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
