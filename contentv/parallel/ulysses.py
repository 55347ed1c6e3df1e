"""Sequence parallelism: every rank holds a part of the tokens, and for the attention all tokens of a part of the heads.

Before the attention one all-to-all turns (tokens / P, heads) into (tokens, heads / P) for q, k and v together; after
it another turns the output back. Neither tokens nor heads need divide by P: both are padded with zeros. Padded heads
cost their share of the attention and are dropped after it; padded tokens are cut away before it, so no mask is needed
and the result is exact.

Source: Jacobs et al. 2023 (arXiv 2309.14509, DeepSpeed-Ulysses).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from contentv.base.types import TokenCounts
from contentv.parallel.collectives import all_to_all, gather_tokens

Attend = Callable[[Tensor, Tensor, Tensor, TokenCounts], Tensor]


def padded_part(n: int, parts: int) -> int:
    """Returns the tokens (or heads) of one part when n are padded to divide by `parts`."""
    return -(-n // parts)


class Ulysses:
    """The three seams of the model for one sequence group.

    Args:
        group: the ranks that share one sample, in the order of their tokens.
        attend: the attention of whole sequences over some heads.
    """

    def __init__(self, group: dist.ProcessGroup, attend: Attend) -> None:
        self.group = group
        self.parts = dist.get_world_size(group)
        self.part = dist.get_rank(group)
        self.attend_whole = attend

    def split_tokens(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n_local d"]:
        """Returns this rank's tokens of `x`, which every rank has; the last ranks' are padded with zeros."""
        n = x.shape[1]
        local = padded_part(n, self.parts)
        own = x[:, self.part * local : (self.part + 1) * local]
        return functional.pad(own, (0, 0, 0, local - own.shape[1]))

    def merge_tokens(self, x: Float[Tensor, "b n_local d"], n: int) -> Float[Tensor, "b n d"]:
        """Returns all n tokens on every rank; see `gather_tokens` for what that means for gradients."""
        return gather_tokens(x, n, self.group)

    def attend(
        self,
        q: Float[Tensor, "b s_local heads dh"],
        k: Float[Tensor, "b s_local heads dh"],
        v: Float[Tensor, "b s_local heads dh"],
        tokens: TokenCounts,
    ) -> Float[Tensor, "b s_local heads dh"]:
        """Returns the attention of all ranks' tokens at this rank's tokens, for all heads.

        Args:
            q, k, v: this rank's video tokens, then its text tokens.
            tokens: the whole sequence's counts, without padding.
        """
        heads = q.shape[2]
        q, k, v = self._to_heads(torch.stack([q, k, v]), tokens).unbind(0)
        out = self.attend_whole(q, k, v, tokens)
        return self._to_tokens(out, tokens, heads)

    def _to_heads(
        self, qkv: Float[Tensor, "three b s_local heads dh"], tokens: TokenCounts
    ) -> Float[Tensor, "three b s heads_local dh"]:
        """Returns q, k and v of the whole sequence for this rank's heads."""
        heads = padded_part(qkv.shape[3], self.parts)
        qkv = functional.pad(qkv, (0, 0, 0, heads * self.parts - qkv.shape[3]))
        send = torch.unflatten(qkv, 3, (self.parts, heads)).movedim(3, 0)  # P three b s_local heads_local dh
        received = all_to_all(send, self.group)  # row p: rank p's tokens
        video = padded_part(tokens.video, self.parts)
        parts = (received[:, :, :, :video], received[:, :, :, video:])
        joined = [part.movedim(0, 2).flatten(2, 3) for part in parts]  # three b (P n_local) heads_local dh
        return torch.cat([joined[0][:, :, : tokens.video], joined[1][:, :, : tokens.text]], dim=2)

    def _to_tokens(
        self, out: Float[Tensor, "b s heads_local dh"], tokens: TokenCounts, heads: int
    ) -> Float[Tensor, "b s_local heads dh"]:
        """Returns all heads of this rank's tokens; `heads` without padding."""
        streams = []
        for stream, n in zip((out[:, : tokens.video], out[:, tokens.video :]), tokens, strict=True):
            local = padded_part(n, self.parts)
            stream = functional.pad(stream, (0, 0, 0, 0, 0, local * self.parts - n))
            streams.append(torch.unflatten(stream, 1, (self.parts, local)).movedim(1, 0))  # P b n_local heads_local dh
        received = all_to_all(torch.cat(streams, dim=2), self.group)  # row p: rank p's heads
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :heads]
