"""Ulysses whose values and keys are on their way while keys and queries are projected.

One all-to-all of q, k and v together has to wait for all three. Here each is sent as soon as it is there, and waited
for where the attention begins. Going back, the gradients of all three leave as soon as the attention has them, and each
is waited for where its own projection begins, the queries' first: autograd goes through the model from the end. The
bytes are the same. On a CPU, where sending takes the cores that would compute, one exchange is the better choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from contentv.base.types import TokenCounts
from contentv.parallel.ulysses import Ulysses


class Exchange:
    """An all-to-all under way.

    Args:
        x: (P, ...), row p for rank p.
        group: the P ranks.
        heads: attention heads of what `x` was made of, without padding.
    """

    def __init__(self, x: Tensor, group: dist.ProcessGroup, heads: int) -> None:
        self.group, self.heads = group, heads
        self._work: Any = None
        begin: Callable[..., Tensor] = _Begin.apply
        self._arriving = begin(x, self)

    def send(self, x: Tensor) -> Tensor:
        """Returns where the ranks' rows will be after `wait`."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self._work = dist.all_to_all_single(out, x, group=self.group, async_op=True)
        return out

    def wait(self) -> None:
        """Returns when what was sent last has arrived; on an accelerator, has the work queued from now on wait."""
        self._work.wait()

    def arrive(self) -> Tensor:
        """Returns (P, ...), row p from rank p, differentiable."""
        arrive: Callable[..., Tensor] = _Arrive.apply
        return arrive(self._arriving, self)


class _Begin(torch.autograd.Function):
    """Sends; gradients, sent by `_Arrive`, are waited for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.send(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.wait()
        return grads[0], None


class _Arrive(torch.autograd.Function):
    """Waits; gradients are sent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.send(grads[0]), None


class OverlappedUlysses(Ulysses):
    """Ulysses to which values, keys and queries are given one by one, as soon as each is there.

    Its places must not be single ranks: they exchange nothing.
    """

    @torch.compiler.disable  # compiled code has no collectives that end later
    def begin(self, x: Float[Tensor, "b s_local heads dh"]) -> Exchange:
        """Returns `x` on its way from (this rank's tokens, all heads) to (the block's tokens, this rank's heads)."""
        assert self.head_group is not None
        return Exchange(self.by_heads(x[None]), self.head_group, x.shape[2])

    @torch.compiler.disable
    def __call__(
        self, q: Exchange, k: Exchange, v: Exchange, tokens: TokenCounts
    ) -> Float[Tensor, "b s_local heads dh"]:
        """Returns the attention of all ranks' tokens at this rank's tokens, for all heads.

        Args:
            q, k, v: from `begin`, in any order.
            tokens: the whole sequence's counts, without padding.
        """
        own_q, own_k, own_v = (self.of_block(x.arrive(), tokens)[0] for x in (q, k, v))
        return self.attend_block(own_q, own_k, own_v, tokens)[:, :, : q.heads]
