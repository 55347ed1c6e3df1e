"""Talking to other ranks: starting up, and collectives whose backward passes are written out.

Of autograd through collectives only four are needed: all-to-all (its own inverse), the gather of tokens whose
gradient every rank has in full, and tensor parallelism's pair of identity and all-reduce.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contentv.base import device as devices
from contentv.base.network import choose_interface

DEFAULT_TIMEOUT_S = 1800.0


def start(device: torch.device, timeout_s: float = DEFAULT_TIMEOUT_S) -> tuple[int, int]:
    """Returns (rank, world size) after making the default process group; a second call changes nothing.

    Reads torchrun's environment; a process that was not started by torchrun becomes a world of one.

    Args:
        device: this process's device; chooses the backend (nccl, hccl, gloo).
        timeout_s: seconds a collective may take before the run is torn down.
    """
    if not dist.is_initialized():
        backend, timeout = devices.backend(device), datetime.timedelta(seconds=timeout_s)
        device_id = device if device.type == "cuda" else None
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            choose_interface(backend)
            dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # libraries below ask for it
            dist.init_process_group(
                backend,
                store=torch._C._distributed_c10d.HashStore(),
                rank=0,
                world_size=1,
                timeout=timeout,
                device_id=device_id,
            )
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    """Waits until every rank has come here; nothing to wait for in a process that joined no group."""
    if dist.is_initialized():
        dist.barrier()


def stop() -> None:
    """Leaves the default process group, if there is one; without it NCCL warns of leaked resources at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns (P, ...): every rank's `x`, of one shape, on every rank."""
    size = dist.get_world_size(group)
    out = x.new_empty((size * x.numel(),))
    # torch 2.13 renamed the collective and warns at every call of the old name.
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(out, x.contiguous().view(-1), group=group)
    return out.view(size, *x.shape)


def scatter_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns row p of the sum of all ranks' `x` (P, ...) on rank p."""
    out = x.new_empty(x.shape[1:])
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # as in `gather`
    call(out.view(-1), x.contiguous().view(-1), group=group)
    return out


@torch.no_grad()
def equalize(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Copies rank 0's values of the tensors to all ranks, one tensor at a time.

    Args:
        tensors: the same shapes in the same order on every rank; overwritten.
        device: where the backend wants its tensors.
    """
    for tensor in tensors:
        value = tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)
        dist.broadcast(value, 0)
        tensor.copy_(value)


class _AllToAll(torch.autograd.Function):
    """Sends row p of (P, ...) to rank p and receives its row; the same exchange carries the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchange(grads[0], ctx.group), None


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns (P, ...) whose row p is this rank's row of rank p's `x`, differentiable.

    Args:
        x: (P, ...), row p for rank p of the group of P ranks; same shape on all.
        group: the ranks.
    """
    apply: Callable[..., Tensor] = _AllToAll.apply
    return apply(x, group)


class _GatherTokens(torch.autograd.Function):
    """Joins the ranks' tokens; the gradient of this rank's tokens is its slice of the (replicated) gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.local = dist.get_rank(group), x.shape[1]
        return gather(x, group).transpose(0, 1).flatten(1, 2)[:, :n].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        first = ctx.rank * ctx.local
        own = grads[0][:, first : first + ctx.local]
        missing = ctx.local - own.shape[1]  # tokens of padding, which do not matter
        return torch.nn.functional.pad(own, (0, 0, 0, missing)).contiguous(), None, None


def gather_tokens(x: Tensor, n: int, group: dist.ProcessGroup) -> Tensor:
    """Returns the first n of all ranks' tokens (b, n, d), whole on every rank.

    Differentiable under one condition, which holds for a loss computed from the whole output: every rank computes the
    same loss from the result. The gradient of a token then exists on all ranks, and only its owner passes it on.

    Args:
        x: (b, n_local, d), this rank's tokens; n_local is the same on all ranks.
        n: tokens without padding.
        group: the ranks, in the order of their tokens.
    """
    apply: Callable[..., Tensor] = _GatherTokens.apply
    return apply(x, n, group)


class _Enter(torch.autograd.Function):
    """Identity; the gradients of the ranks' parts are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Leave(torch.autograd.Function):
    """Sums the ranks' parts; the gradient is the same for each part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def enter_tensor_parallel(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns `x`, used by every tensor rank for a part of the result: its gradients are summed over the ranks."""
    apply: Callable[..., Tensor] = _Enter.apply
    return apply(x, group)


def leave_tensor_parallel(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the sum of the tensor ranks' `x`; each gets the whole gradient."""
    apply: Callable[..., Tensor] = _Leave.apply
    return apply(x, group)


def gather_json(value: Any, group: dist.ProcessGroup | None, device: torch.device) -> list[Any]:
    """Returns every rank's `value`, in the order of the ranks, on every rank.

    Args:
        value: anything JSON can hold; sent as text, never as a pickle.
        group: the ranks; None = all, or this process alone where there are no others.
        device: where the backend wants its tensors.
    """
    if not dist.is_initialized():
        return [json.loads(json.dumps(value))]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    counts = gather(torch.tensor([len(text)], device=device), group).flatten().tolist()
    padded = torch.zeros(max(counts), dtype=torch.uint8, device=device)
    padded[: len(text)] = text
    rows = gather(padded, group).cpu()
    return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(rows, counts, strict=True)]


def sum_over(values: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Returns the sum of the ranks' `values`, on the CPU; one collective however many values there are."""
    total = values.detach().to(device, copy=True)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total.cpu()


def any_of(flag: bool, device: torch.device) -> bool:
    """Returns whether `flag` is set on any rank of the world; the same answer on all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    value = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.cpu())
