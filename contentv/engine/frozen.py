"""A model that is only evaluated, over the ranks of the engine, such as the reference of RLHF."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from contentv.base.types import VelocityModel
from contentv.engine.parallelize import parallelize
from contentv.engine.partitioner import forget_second_copies, initialize, make_room, with_groups
from contentv.engine.plans import MMDIT_PLAN
from contentv.engine.weights import Weights, fill, partitioned_places, settle, whole_places
from contentv.engine.zero import dtype_of, memory_bytes
from contentv.engine.zero_config import deepspeed_config, weight_sizes
from contentv.parallel.mesh import Mesh, ParallelConfig
from contentv.parallel.tensor import TensorPlan


class FrozenModel:
    """A model that is only evaluated; its output has no gradient."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @torch.no_grad()
    def __call__(self, noisy_latents: Tensor, timestep: Tensor, text_tokens: Tensor, text_pooled: Tensor) -> Tensor:
        out: Tensor = self._run(noisy_latents, timestep, text_tokens, text_pooled)
        return out


def frozen_model(
    model: nn.Module,
    mesh: Mesh,
    parallel: ParallelConfig,
    precision: str,
    device: torch.device,
    *,
    weights: Weights | None = None,
    plan: TensorPlan = MMDIT_PLAN,
    persist_below: int | None = None,
) -> VelocityModel:
    """Returns `model` as a frozen reference, such as RLHF's: split like the trained model, partitioned under ZeRO-3.

    Every rank must call it equally often, like the trained model.

    Args:
        model: the model, on the meta device with `weights`; else the whole model. It is taken over.
        mesh, parallel, precision, device: those of the engine.
        weights: the whole parameters by name, the same on every rank: tensors, or anything sliced like one.
        plan: how tensor ranks split the model.
        persist_below: weights of fewer elements are not partitioned; None = the vectors are not.

    Raises:
        ValueError: the weights are not those of the model.
    """
    mesh = with_groups(mesh, device)
    weights = settle(model, weights, mesh, device)
    splits = parallelize(model, mesh, device=device, plan=plan)
    model.requires_grad_(False).eval()
    settings = dataclasses.replace(parallel, offload="all" if parallel.offload == "all" else "none", compile=False)
    sizes = weight_sizes({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    config = deepspeed_config(
        settings, precision, device, sizes, memory_bytes=memory_bytes(device), persist_below=persist_below
    )
    config["zero_optimization"].pop("offload_optimizer", None)
    make_room(model, mesh, parallel, dtype_of(precision), device, config)
    parameters = dict(model.named_parameters())
    if parallel.zero_stage < 3:
        fill(weights, whole_places(parameters, splits, mesh, device))
        return FrozenModel(model)
    inner = initialize(model, mesh, settings, config, device)
    fill(weights, partitioned_places(parameters, splits, mesh, device))
    forget_second_copies(model)
    return FrozenModel(inner)
