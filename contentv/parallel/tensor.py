"""Tensor parallelism by plan: which linear layers hold a part of their outputs, and which a part of their inputs.

A column layer has some of the output features (whole heads, for the attention), a row layer some of the input
features; between the two nothing is exchanged. Two all-reduces per pair: one of the row layer's output, one of the
input's gradient, where column layers that read the same input share it. A row layer's bias is added once, after the
sum. All else is replicated; a replicated weight that sees only this rank's features (the per-head norms) has its
gradient summed over the ranks. With sequence norms, tensor ranks share the tokens as well: `sequence_norms`.

The parts need not be equal: a layer inside a module with a `head_dim` is dealt out by whole heads, the first ranks
having one more where they do not divide (38 heads over 4 ranks: 10, 10, 9, 9). No weight is padded, so checkpoints and
exports know nothing of it.

Source: Shoeybi et al. 2019 (arXiv 1909.08053, Megatron-LM).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from contentv.base.errors import UserError
from contentv.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
from contentv.parallel.mesh import Mesh
from contentv.parallel.sequence_norms import gather_parts, scatter_parts


@dataclass(frozen=True)
class TensorPlan:
    """Names of modules as shell patterns.

    Attributes:
        column, row: linear layers, split by outputs and by inputs.
        inputs: modules whose arguments are the tokens that column layers read, and nothing else does.
        partial: replicated modules that see only some of the heads.
        tokenwise: replicated modules that see tokens, with sequence norms only this rank's; row layers' biases do, too.
        modulations: replicated linear layers that yield one vector a clip, for all tokens.
    """

    column: tuple[str, ...]
    row: tuple[str, ...]
    inputs: tuple[str, ...]
    partial: tuple[str, ...] = ()
    tokenwise: tuple[str, ...] = ()
    modulations: tuple[str, ...] = ()

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


class Split(NamedTuple):
    """How tensor ranks divide a parameter: parts of these sizes along `dim`, of which this is that of `rank`."""

    dim: int
    sizes: tuple[int, ...]
    rank: int

    @property
    def start(self) -> int:
        """Where this rank's part begins in the whole."""
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        """This rank's part."""
        return self.sizes[self.rank]


def part_sizes(n: int, parts: int, unit: int = 1) -> tuple[int, ...]:
    """Returns n as `parts` sizes, as equal as whole units allow, larger ones first.

    Args:
        n: a multiple of `unit`.
        parts: at most the number of units.
        unit: what is never cut.

    Raises:
        UserError: there are fewer units than parts.
    """
    units = n // unit
    if units < parts or n % unit != 0:
        raise UserError(
            f"{n} features do not divide into {parts} parts of whole units of {unit}",
            where="parallel.tp",
            remedy=f"use a tensor-parallel degree of at most {max(units, 1)}",
        )
    return tuple(unit * (units // parts + (index < units % parts)) for index in range(parts))


def take_part(full: Tensor, split: Split) -> Tensor:
    """Returns one rank's part of a whole tensor (a view)."""
    return full.narrow(split.dim, split.start, split.size)


def mark(parameter: nn.Parameter) -> nn.Parameter:
    """Returns the parameter, marked as a part of a larger one: counted on every tensor rank in the gradient norm."""
    parameter.model_parallel = True  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


class ColumnLinear(nn.Module):
    """A linear layer with this rank's part of the output features of `whole`."""

    def __init__(self, whole: nn.Linear, split: Split) -> None:
        super().__init__()
        self.weight = _part(whole.weight, split)
        self.bias = None if whole.bias is None else _part(whole.bias, split)

    def forward(self, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        return functional.linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """A linear layer with this rank's part of the input features of `whole`; `leave` sums over the ranks."""

    def __init__(self, whole: nn.Linear, split: Split, leave: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.leave = leave
        self.weight = _part(whole.weight, split)
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.detach().clone())

    def forward(self, x: Float[Tensor, "b s i"]) -> Float[Tensor, "b s_left o"]:
        out = self.leave(functional.linear(x, self.weight))
        return out if self.bias is None else out + self.bias


def _part(whole: Tensor, split: Split) -> nn.Parameter:
    part = take_part(whole.detach(), split).clone(memory_format=torch.contiguous_format)
    return mark(nn.Parameter(part, requires_grad=whole.requires_grad))


def apply_plan(model: nn.Module, plan: TensorPlan, mesh: Mesh) -> dict[str, Split]:
    """Replaces the plan's layers by their parts, in place, and returns the split of each split parameter.

    Names of parameters do not change. What the ranks exchange is put around the layers.

    Args:
        model: the whole model, with the same weights on every rank.
        plan: which layers.
        mesh: this rank's place.

    Raises:
        UserError: a weight has fewer heads or features than there are ranks.
    """
    if mesh.tp == 1:
        return {}
    assert mesh.tp_group is not None
    enter, leave = (
        (gather_parts, scatter_parts) if mesh.sequence_norms else (enter_tensor_parallel, leave_tensor_parallel)
    )
    layers: Mapping[str, nn.Module] = dict(model.named_modules())
    splits: dict[str, Split] = {}
    for name, module in layers.items():
        if matches(name, plan.inputs):
            module.forward = _entered(module.forward, partial(enter, group=mesh.tp_group))
        if mesh.sequence_norms and matches(name, plan.modulations):
            module.forward = _summed_back(module.forward, mesh.tp_group)
        kind = ColumnLinear if matches(name, plan.column) else RowLinear if matches(name, plan.row) else None
        if kind is None:
            continue
        if not isinstance(module, nn.Linear):
            raise TypeError(f"the tensor-parallel plan names {name}, which is no linear layer: {type(module)}")
        n, dim = (module.out_features, 0) if kind is ColumnLinear else (module.in_features, 1)
        split = Split(dim, part_sizes(n, mesh.tp, _unit_of(name, layers)), mesh.tp_rank)
        parent, _, leaf = name.rpartition(".")
        left = partial(leave, group=mesh.tp_group)
        part = ColumnLinear(module, split) if kind is ColumnLinear else RowLinear(module, split, left)
        setattr(layers[parent], leaf, part)
        splits.update({f"{name}.{p}": split for p, _ in part.named_parameters() if plan.dim_of(f"{name}.{p}") == dim})
    sum_partial_gradients(model, plan, mesh)
    return splits


def _entered(forward: Callable[..., Any], enter: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Returns `forward` whose tensors enter the part of the model that ranks split."""

    @wraps(forward)
    def run(*args: Any) -> Any:
        return forward(*(enter(x) if isinstance(x, Tensor) else x for x in args))

    return run


def _summed_back(forward: Callable[..., Tensor], group: dist.ProcessGroup) -> Callable[..., Tensor]:
    """Returns `forward` whose output's gradient is summed: each rank has that of its tokens."""

    @wraps(forward)
    def run(x: Tensor) -> Tensor:
        return enter_tensor_parallel(forward(x), group)

    return run


def _unit_of(name: str, layers: Mapping[str, nn.Module]) -> int:
    """Returns the features that a layer is never cut within: a head's, inside a module that has heads."""
    while name:
        name = name.rpartition(".")[0]
        head_dim = getattr(layers[name], "head_dim", None)
        if isinstance(head_dim, int):
            return head_dim
    return 1


def sum_partial_gradients(model: nn.Module, plan: TensorPlan, mesh: Mesh) -> None:
    """Has the gradients of replicated weights that see a part of the features or tokens summed over the tensor ranks.

    `apply_plan` does it. Whoever replaces the model's parameters afterwards has to do it again: hooks stay behind with
    the old ones.
    """
    if mesh.tp == 1:
        return
    assert mesh.tp_group is not None
    patterns = plan.partial + (plan.tokenwise + plan.row if mesh.sequence_norms else ())
    for name, module in model.named_modules():
        if matches(name, patterns):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and plan.dim_of(f"{name}.{own}") is None:
                    on_gradient: Callable[..., Any] = parameter.register_hook
                    on_gradient(partial(_summed, group=mesh.tp_group))


def _summed(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = grad.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
