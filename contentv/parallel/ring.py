"""Ring attention: every rank keeps its queries, and keys and values travel round the ring, block by block.

Each rank merges the attention over the blocks as they come by their log-sum-exps, which is exact; in the backward pass
keys and values travel once more, and the gradients of a block travel behind it, from rank to rank, home to its owner.
Blocks are sent at their true lengths, so that padding takes no part and no mask is needed, and the order of the keys
does not matter. The block of the next step travels while this one's is worked on.

With R ranks, n_i tokens at rank i and m = b heads dh, rank i sends 2 m (n - n_(i+1)) elements forward; backward as many
again, and 2 m (n - n_i) of gradients, which are summed and sent in at least fp32.

Source: Liu et al. 2023 (arXiv 2310.01889, Ring Attention).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from contentv_kernels import attention_part, attention_part_backward
from jaxtyping import Float
from torch import Tensor


class _Passing:
    """A block on its way: what this rank sends to the next, and where the previous rank's arrives."""

    def __init__(self, send: Tensor, arriving: Tensor, group: dist.ProcessGroup) -> None:
        self._send, self._arriving = send, arriving  # both must live until the transfer has ended
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        operations = []
        if send.numel() > 0:  # a rank without tokens has an empty block, which is not sent
            operations.append(dist.P2POp(dist.isend, send, group=group, group_peer=(rank + 1) % size))
        if arriving.numel() > 0:
            operations.append(dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % size))
        self._work = dist.batch_isend_irecv(operations) if operations else []

    def arrive(self) -> Tensor:
        """Returns the block of the previous rank when it is here."""
        for work in self._work:
            work.wait()
        return self._arriving


def _block_like(kv: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    return kv.new_empty((2, kv.shape[1], length, *kv.shape[3:]), dtype=dtype)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the attention over two disjoint sets of keys, and its log-sum-exp, from those of each."""
    total = torch.logaddexp(lse, part_lse)
    old, new = ((x - total).exp().transpose(1, 2)[..., None] for x in (lse, part_lse))
    return out * old + part * new, total


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], group: dist.ProcessGroup
    ) -> Tensor:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        wide = torch.promote_types(q.dtype, torch.float32)
        out: Tensor | None = None
        lse = torch.empty(0)
        kv = torch.stack([k, v])
        for step in range(size):
            passing = None
            if step < size - 1:
                passing = _Passing(kv, _block_like(kv, lengths[(rank - step - 1) % size], kv.dtype), group)
            if q.shape[1] > 0 and kv.shape[2] > 0:
                part, part_lse = attention_part(q, kv[0], kv[1])
                out, lse = (part.to(wide), part_lse) if out is None else _merge(out, lse, part, part_lse)
            if passing is not None:
                kv = passing.arrive()
        result = torch.empty_like(q) if out is None else out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.lengths, ctx.group = lengths, group
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grad, lengths, group = grads[0].contiguous(), ctx.lengths, ctx.group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        wide = torch.promote_types(q.dtype, torch.float32)
        kv = torch.stack([k, v])
        grad_q = torch.zeros_like(q, dtype=wide)
        own = returning = None
        for step in range(size):
            # At step s this rank works on the block of rank - s; gradients of it come from the rank before, if that
            # was not its owner, and go on to the next. The owner adds its own part at last.
            passing, following = None, lengths[(rank - step - 1) % size]
            if step < size - 1:
                passing = _Passing(kv, _block_like(kv, following, kv.dtype), group)
            grad_kv = torch.zeros_like(kv, dtype=wide)
            if q.shape[1] > 0 and kv.shape[2] > 0:
                part_q, part_k, part_v = attention_part_backward(grad, q, kv[0], kv[1], out, lse)
                grad_q += part_q
                grad_kv[0], grad_kv[1] = part_k, part_v
            if step == 0:
                own = grad_kv
            else:
                if returning is not None:
                    grad_kv += returning.arrive()
                returning = _Passing(grad_kv, _block_like(kv, following, wide), group)
            if passing is not None:
                kv = passing.arrive()
        assert own is not None
        if returning is not None:
            own += returning.arrive()
        return grad_q.to(q.dtype), own[0].to(k.dtype), own[1].to(v.dtype), None, None


def ring_attention(
    q: Float[Tensor, "b s heads dh"],
    k: Float[Tensor, "b s heads dh"],
    v: Float[Tensor, "b s heads dh"],
    lengths: Sequence[int],
    group: dist.ProcessGroup,
) -> Float[Tensor, "b s heads dh"]:
    """Returns the attention of this rank's queries over the keys of all ranks, differentiable. Collective.

    Args:
        q, k, v: this rank's tokens, without padding; there may be none.
        lengths: tokens of each rank, in the order of the group.
        group: the ranks.

    Raises:
        ValueError: the tokens are not as many as `lengths` says.
    """
    if q.shape[1] != lengths[dist.get_rank(group)] or len(lengths) != dist.get_world_size(group):
        raise ValueError(f"{q.shape[1]} tokens at rank {dist.get_rank(group)} of a ring of {list(lengths)}")
    apply: Callable[..., Tensor] = _RingAttention.apply
    return apply(q, k, v, tuple(lengths), group)
