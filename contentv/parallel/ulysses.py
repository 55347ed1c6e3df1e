"""Sequence parallelism: every rank holds a part of the tokens of one sample.

The ranks are a grid of ring x ulysses. Before the attention an all-to-all among `ulysses` neighbours turns
(tokens / P, heads) into (tokens / ring, heads / ulysses) for q, k and v together, and after it another turns the output
back. Where there is a ring, keys and values then travel round it (`contentv.parallel.ring`).

Neither tokens nor heads need divide: both are padded with zeros. Padded heads cost their share of the attention and are
dropped after it; padded tokens are cut away before it, so no mask is needed and the result is exact.

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
from contentv.parallel.ring import ring_attention

Attend = Callable[[Tensor, Tensor, Tensor, TokenCounts], Tensor]


def padded_part(n: int, parts: int) -> int:
    """Returns the tokens (or heads) of one part when n are padded to divide by `parts`."""
    return -(-n // parts)


def block_counts(tokens: TokenCounts, parts: int, ring: int) -> list[TokenCounts]:
    """Returns the video and text tokens, without padding, of every place in the ring.

    Each stream is padded to divide by `parts` ranks; what is padding lies on the last of them.

    Args:
        tokens: the whole sequence's counts.
        parts: all ranks that share the sample.
        ring: blocks, each of parts / ring ranks; divides `parts`.
    """

    def of_block(n: int, index: int) -> int:
        size = padded_part(n, parts) * (parts // ring)
        return min(max(n - index * size, 0), size)

    return [TokenCounts(of_block(tokens.video, i), of_block(tokens.text, i)) for i in range(ring)]


class Ulysses:
    """The three seams of the model for the ranks that share a sample.

    Args:
        group: those ranks, in the order of their tokens.
        attend: the attention of whole sequences over some heads; not used where there is a ring.
        head_group: the neighbours that exchange heads for tokens; all of `group` by default, and None in a ring whose
            places are single ranks.
        ring_group: one rank of each such neighbourhood, or None where there is only one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        attend: Attend,
        head_group: dist.ProcessGroup | None = None,
        ring_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.group, self.ring_group = group, ring_group
        self.head_group = group if ring_group is None else head_group
        self.parts, self.part = dist.get_world_size(group), dist.get_rank(group)
        self.ring = 1 if ring_group is None else dist.get_world_size(ring_group)
        self.ulysses = self.parts // self.ring
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
        heads, local = q.shape[2], TokenCounts(*(padded_part(n, self.parts) for n in tokens))
        blocks = block_counts(tokens, self.parts, self.ring)
        block = blocks[self.part // self.ulysses]
        q, k, v = self._to_heads(torch.stack([q, k, v]), local, block).unbind(0)
        if self.ring_group is None:
            out = self.attend_whole(q, k, v, tokens)
        else:
            out = ring_attention(q, k, v, [sum(counts) for counts in blocks], self.ring_group)
        return self._to_tokens(out, local, block, heads)

    def _to_heads(
        self, qkv: Float[Tensor, "three b s_local heads dh"], local: TokenCounts, block: TokenCounts
    ) -> Float[Tensor, "three b s heads_local dh"]:
        """Returns q, k and v of the block's tokens, without padding, for this rank's heads."""
        heads = padded_part(qkv.shape[3], self.ulysses)
        qkv = functional.pad(qkv, (0, 0, 0, heads * self.ulysses - qkv.shape[3]))
        send = torch.unflatten(qkv, 3, (self.ulysses, heads)).movedim(3, 0)  # U three b s_local heads_local dh
        received = send if self.head_group is None else all_to_all(send, self.head_group)  # row p: rank p's tokens
        parts = (received[:, :, :, : local.video], received[:, :, :, local.video :])
        joined = [part.movedim(0, 2).flatten(2, 3) for part in parts]  # three b (U n_local) heads_local dh
        return torch.cat([joined[0][:, :, : block.video], joined[1][:, :, : block.text]], dim=2)

    def _to_tokens(
        self, out: Float[Tensor, "b s heads_local dh"], local: TokenCounts, block: TokenCounts, heads: int
    ) -> Float[Tensor, "b s_local heads dh"]:
        """Returns all heads of this rank's tokens; `heads` without padding."""
        streams = []
        for stream, n, size in zip((out[:, : block.video], out[:, block.video :]), block, local, strict=True):
            stream = functional.pad(stream, (0, 0, 0, 0, 0, size * self.ulysses - n))
            # U b n_local heads_local dh
            streams.append(torch.unflatten(stream, 1, (self.ulysses, size)).movedim(1, 0))
        send = torch.cat(streams, dim=2)
        received = send if self.head_group is None else all_to_all(send, self.head_group)  # row p: rank p's heads
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :heads]
