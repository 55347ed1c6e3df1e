"""Tokens shared by tensor ranks between the layers' linear parts, where each would hold and norm the same ones.

Between a row layer and the next column layer, tensor ranks all have the same tokens. With sequence norms each keeps its
part of them: the row layer's sum is scattered instead of given to all, residual stream, norms and modulations work on
the part, and the parts are gathered where the next column layers read them. A gather and a scatter send together what
one all-reduce does.

A replicated weight then sees this rank's tokens alone, so that its gradient is summed over the ranks. Not so the
modulations' weights, a third of the model: the gradient of their output, one vector a clip, is summed instead.

Source: Korthikanti et al. 2022 (arXiv 2205.05198, Megatron-LM's sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from contentv.base.types import TokenCounts
from contentv.parallel.collectives import gather, gather_tokens, scatter_sum
from contentv.parallel.ulysses import Attend, Ulysses, padded_part


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return gather(x, group).transpose(0, 1).flatten(1, 2)


def _scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return scatter_sum(torch.unflatten(x, 1, (dist.get_world_size(group), -1)).transpose(0, 1), group)


class _Gather(torch.autograd.Function):
    """Joins the ranks' tokens; every rank uses all of them for a part of the result, so their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scattered(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    """Sums the ranks' parts of the result, and leaves each rank its own tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.group), None


def gather_parts(x: Float[Tensor, "b n_part d"], group: dist.ProcessGroup) -> Float[Tensor, "b n d"]:
    """Returns the tokens of all tensor ranks, of which each computes a part of the features: gradients are summed."""
    apply: Callable[..., Tensor] = _Gather.apply
    return apply(x, group)


def scatter_parts(x: Float[Tensor, "b n d"], group: dist.ProcessGroup) -> Float[Tensor, "b n_part d"]:
    """Returns this rank's tokens of the sum of the tensor ranks' `x`; n divides by the ranks."""
    apply: Callable[..., Tensor] = _Scatter.apply
    return apply(x, group)


class SequenceNorms:
    """The three seams of the model for tensor ranks that share tokens, alone or as each rank of a `Ulysses`.

    Args:
        group: the tensor ranks, in the order of their tokens.
        attend: the attention of whole sequences over some heads; not used with `ulysses`.
        ulysses: the seams of the sequence ranks, whose parts divide by the tensor ranks; None without any.
    """

    def __init__(self, group: dist.ProcessGroup, attend: Attend, ulysses: Ulysses | None = None) -> None:
        self.group, self.ulysses, self.attend_whole = group, ulysses, attend
        self.parts, self.part = dist.get_world_size(group), dist.get_rank(group)
        self.attend: Attend = self.attend_gathered if ulysses is None else ulysses

    def split_tokens(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n_part d"]:
        """Returns this rank's tokens of `x`, which every rank has; the last ranks' are padded with zeros."""
        if self.ulysses is not None:
            x = self.ulysses.split_tokens(x)
        size = padded_part(x.shape[1], self.parts)
        own = x[:, self.part * size : (self.part + 1) * size]
        return functional.pad(own, (0, 0, 0, size - own.shape[1]))

    def merge_tokens(self, x: Float[Tensor, "b n_part d"], n: int) -> Float[Tensor, "b n d"]:
        """Returns all n tokens on every rank; see `gather_tokens` for what that means for gradients."""
        if self.ulysses is None:
            return gather_tokens(x, n, self.group)
        return self.ulysses.merge_tokens(gather_tokens(x, self.parts * x.shape[1], self.group), n)

    def attend_gathered(
        self,
        q: Float[Tensor, "b s heads dh"],
        k: Float[Tensor, "b s heads dh"],
        v: Float[Tensor, "b s heads dh"],
        tokens: TokenCounts,
    ) -> Float[Tensor, "b s heads dh"]:
        """Returns the attention over the tokens, whose padding takes no part in it.

        Args:
            q, k, v: the gathered video tokens, then the text tokens, each with its padding.
            tokens: their counts without padding.
        """
        sizes = [padded_part(n, self.parts) * self.parts for n in tokens]
        if sum(sizes) == sum(tokens):
            return self.attend_whole(q, k, v, tokens)
        q, k, v = (torch.cat([x[:, : tokens.video], x[:, sizes[0] : sizes[0] + tokens.text]], dim=1) for x in (q, k, v))
        streams = torch.split(self.attend_whole(q, k, v, tokens), list(tokens), dim=1)
        padded = [functional.pad(x, (0, 0, 0, 0, 0, n - x.shape[1])) for x, n in zip(streams, sizes, strict=True)]
        return torch.cat(padded, dim=1)
