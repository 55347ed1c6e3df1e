"""What DeepSpeed is asked to do to a model before it trains: the one module that imports it.

Weights get room for this rank's partitions alone. With hpZ, `hpz` neighbours hold a second partition of every weight
among them, made when a weight is let go of after the forward pass and thrown away when the weights change: the backward
pass gathers from neighbours, and a weight crosses the network twice a step, there and as a gradient, instead of thrice.

Source: Wang et al. 2023 (arXiv 2306.10209, ZeRO++), hpZ.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from contentv.base.errors import UserError
from contentv.engine.weights import give_back, hollow, replace_parameters
from contentv.engine.zero_config import Ranks
from contentv.parallel.collectives import start
from contentv.parallel.mesh import Mesh, ParallelConfig, build_mesh

DEPRECATED = ("all_gather_into_tensor", "reduce_scatter_tensor")


def import_deepspeed(device: torch.device) -> Any:
    """Returns the deepspeed module, told which accelerator it runs on and to keep quiet."""
    os.environ["DS_ACCELERATOR"] = device.type
    for name in DEPRECATED:  # names of torch that DeepSpeed still uses: one line per collective otherwise
        warnings.filterwarnings("ignore", message=f"`torch.distributed.{name}` is deprecated", category=FutureWarning)
    import deepspeed

    # On the CPU it would compile a C++ all-reduce at start-up, for a minute, that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def make_room(
    model: nn.Module, mesh: Mesh, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device,
    config: dict[str, Any],
) -> None:  # fmt: skip
    """Gives a model of shapes memory for its values, which are zeros: under ZeRO-3 for this rank's partition alone.

    Raises:
        UserError: `parallel.hpz` does not divide the ranks.
    """
    for name, buffer in model.named_buffers():
        model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer.to(device)
    if parallel.zero_stage < 3:
        replace_parameters(model, lambda parameter: torch.zeros(parameter.shape, dtype=dtype, device=device))
        return
    replace_parameters(model, lambda parameter: hollow(parameter, dtype, device))
    deepspeed = import_deepspeed(device)
    zero_init = deepspeed.zero.partition_parameters
    _share_second_copies(mesh, parallel, deepspeed.utils.groups)

    class Partitioner(zero_init.Init):  # type: ignore[name-defined]
        """DeepSpeed's, for weights that have no values yet: none is ever whole, and none is sent around."""

        def _zero_init_param(self, parameter: Any) -> None:
            self._convert_to_deepspeed_param(parameter)
            size = -(-parameter.ds_numel // self.dp_world_size)
            part: Any = torch.zeros(size, dtype=dtype, device=self.remote_device)
            part = zero_init.get_accelerator().pin_memory(part) if self.pin_memory else part
            part.ds_numel, part.final_location = size, None
            part.status = zero_init.PartitionedParamStatus.AVAILABLE
            parameter.ds_tensor, parameter.ds_numel_aligned = part, size * self.dp_world_size
            self._partition_param(parameter)  # which only lets go of the hollow one; a second copy would be of zeros
            parameter.ds_status = zero_init.ZeroParamStatus.NOT_AVAILABLE

    Partitioner(
        module=model, data_parallel_group=mesh.zero_group, config_dict_or_path=config, mpu=Ranks(mesh),
        zero_param_parallel_group=deepspeed.utils.groups._get_zero_param_intra_parallel_group(),
    )  # fmt: skip


def _share_second_copies(mesh: Mesh, parallel: ParallelConfig, groups: Any) -> None:
    """Tells DeepSpeed which ranks share a second copy of the weights, if any do: neighbours in the ZeRO group.

    DeepSpeed itself would count tensor ranks in, and keeps the group of the engine before this one.
    """
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if mesh.zero % parallel.hpz != 0:
        raise UserError(
            f"parallel.hpz={parallel.hpz} does not divide {mesh.zero} ranks (dp {mesh.dp} x sp {mesh.sp})",
            where="parallel.hpz",
            remedy="use the devices of a node, divided by parallel.tp, or parallel.hpz=1",
        )
    if parallel.hpz == 1:
        return
    for tp_rank in range(mesh.tp):  # every rank makes every group, as torch demands
        for first in range(0, mesh.zero, parallel.hpz):
            group = dist.new_group([mesh.rank_of(first + i, tp_rank) for i in range(parallel.hpz)])
            if tp_rank == mesh.tp_rank and 0 <= mesh.zero_rank - first < parallel.hpz:
                groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group


def initialize(
    model: nn.Module, mesh: Mesh, parallel: ParallelConfig, config: dict[str, Any], device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:  # fmt: skip
    """Returns DeepSpeed's engine over a model that has room; without an optimiser it only gathers weights."""
    inner, *_ = import_deepspeed(device).initialize(model=model, optimizer=optimizer, config=config, mpu=Ranks(mesh))
    for module in model.modules() if parallel.compile else ():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):  # else compiled too, over and over
            hooks.update({key: torch.compiler.disable(hook) for key, hook in hooks.items()})
    give_back()  # DeepSpeed has moved the partitions into one buffer
    return inner


def forget_second_copies(model: nn.Module) -> None:
    """Throws hpZ's second partitions away, because the weights have changed."""
    for parameter in model.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]


def with_groups(mesh: Mesh, device: torch.device) -> Mesh:
    """Returns the mesh, with process groups of one rank each where a single process has none yet."""
    if mesh.zero_group is not None:
        return mesh
    if mesh.world != 1:
        raise ValueError(f"a mesh of {mesh.describe()} needs its process groups: make it with build_mesh")
    start(device)
    return build_mesh(ParallelConfig(), 1, 0)
