"""Tensor parallelism by plan: which linear layers hold a part of their outputs, and which a part of their inputs.

A column layer has some of the output features (whole heads, for the attention), a row layer some of the input
features; between the two nothing is exchanged. Two all-reduces per pair: one of the row layer's output, one of the
column layer's input gradient. A row layer's bias is added once, after the sum. All else is replicated; a replicated
weight that sees only this rank's features (the per-head norms) has its gradient summed over the ranks.

Source: Shoeybi et al. 2019 (arXiv 1909.08053, Megatron-LM).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from contentv.base.errors import UserError
from contentv.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
from contentv.parallel.mesh import Mesh


@dataclass(frozen=True)
class TensorPlan:
    """Names of modules as shell patterns: column layers, row layers, and modules with partial gradients."""

    column: tuple[str, ...]
    row: tuple[str, ...]
    partial: tuple[str, ...] = ()

    def dim_of(self, name: str) -> int | None:
        """Returns the dimension in which the parameter `name` is split, or None where it is replicated."""
        module, _, kind = name.rpartition(".")
        if matches(module, self.column):
            return 0
        if matches(module, self.row) and kind == "weight":
            return 1
        return None


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a module's name fits any of the patterns."""
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def take_part(full: Tensor, dim: int, index: int, parts: int) -> Tensor:
    """Returns part `index` of `parts` equal parts of a tensor along `dim` (a view).

    Raises:
        UserError: it does not divide.
    """
    if full.shape[dim] % parts != 0:
        raise UserError(
            f"a weight of {tuple(full.shape)} does not divide into {parts} parts along dim {dim}",
            where="parallel.tp",
            remedy=f"use a tensor-parallel degree that divides {full.shape[dim]}",
        )
    size = full.shape[dim] // parts
    return full.narrow(dim, index * size, size)


def mark(parameter: nn.Parameter) -> nn.Parameter:
    """Returns the parameter, marked as a part of a larger one: counted on every tensor rank in the gradient norm."""
    parameter.model_parallel = True  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


class ColumnLinear(nn.Module):
    """A linear layer with this rank's part of the output features of `whole`."""

    def __init__(self, whole: nn.Linear, mesh: Mesh) -> None:
        super().__init__()
        assert mesh.tp_group is not None
        self.group = mesh.tp_group
        self.weight = _part(whole.weight, 0, mesh)
        self.bias = None if whole.bias is None else _part(whole.bias, 0, mesh)

    def forward(self, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        return functional.linear(enter_tensor_parallel(x, self.group), self.weight, self.bias)


class RowLinear(nn.Module):
    """A linear layer with this rank's part of the input features of `whole`; its output is the sum over the ranks."""

    def __init__(self, whole: nn.Linear, mesh: Mesh) -> None:
        super().__init__()
        assert mesh.tp_group is not None
        self.group = mesh.tp_group
        self.weight = _part(whole.weight, 1, mesh)
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.detach().clone())

    def forward(self, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        out = leave_tensor_parallel(functional.linear(x, self.weight), self.group)
        return out if self.bias is None else out + self.bias


def _part(whole: Tensor, dim: int, mesh: Mesh) -> nn.Parameter:
    part = take_part(whole.detach(), dim, mesh.tp_rank, mesh.tp).clone(memory_format=torch.contiguous_format)
    return mark(nn.Parameter(part, requires_grad=whole.requires_grad))


def apply_plan(model: nn.Module, plan: TensorPlan, mesh: Mesh) -> dict[str, int]:
    """Replaces the plan's layers by their parts, in place, and returns the split dimension of each split parameter.

    Names of parameters do not change.

    Args:
        model: the whole model, with the same weights on every rank.
        plan: which layers.
        mesh: this rank's place.

    Raises:
        UserError: a weight does not divide.
    """
    if mesh.tp == 1:
        return {}
    assert mesh.tp_group is not None
    layers: Mapping[str, nn.Module] = dict(model.named_modules())
    dims: dict[str, int] = {}
    for name, module in layers.items():
        kind = ColumnLinear if matches(name, plan.column) else RowLinear if matches(name, plan.row) else None
        if kind is not None:
            if not isinstance(module, nn.Linear):
                raise TypeError(f"the tensor-parallel plan names {name}, which is no linear layer: {type(module)}")
            parent, _, leaf = name.rpartition(".")
            setattr(layers[parent], leaf, kind(module, mesh))
    sum_partial_gradients(model, plan, mesh)
    for name, _ in model.named_parameters():
        dim = plan.dim_of(name)
        if dim is not None:
            dims[name] = dim
    return dims


def sum_partial_gradients(model: nn.Module, plan: TensorPlan, mesh: Mesh) -> None:
    """Has the gradients of the plan's partial modules summed over the tensor ranks, from now on.

    `apply_plan` does it. Whoever replaces the model's parameters afterwards has to do it again: hooks stay behind with
    the old ones.
    """
    if mesh.tp == 1:
        return
    assert mesh.tp_group is not None
    for name, module in model.named_modules():
        if matches(name, plan.partial):
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    on_gradient: Callable[..., Any] = parameter.register_hook
                    on_gradient(partial(_summed, group=mesh.tp_group))


def _summed(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = grad.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
