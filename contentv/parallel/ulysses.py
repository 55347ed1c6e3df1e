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


def padded_part(n: int, parts: int, unit: int = 1) -> int:
    """Returns the tokens (or heads) of one part when n are padded to divide into `parts` of whole units."""
    return -(-n // (parts * unit)) * unit


def block_counts(tokens: TokenCounts, parts: int, ring: int, unit: int = 1) -> list[TokenCounts]:
    """Returns the video and text tokens, without padding, of every place in the ring.

    Each stream is padded to divide by `parts` ranks; what is padding lies on the last of them.

    Args:
        tokens: the whole sequence's counts.
        parts: all ranks that share the sample.
        ring: blocks, each of parts / ring ranks; divides `parts`.
        unit: what a rank's tokens are a multiple of.
    """

    def of_block(n: int, index: int) -> int:
        size = padded_part(n, parts, unit) * (parts // ring)
        return min(max(n - index * size, 0), size)

    return [TokenCounts(of_block(tokens.video, i), of_block(tokens.text, i)) for i in range(ring)]


class Ulysses:
    """The three seams of the model for the ranks that share a sample; the attention is the object itself.

    Args:
        group: those ranks, in the order of their tokens.
        attend: the attention of whole sequences over some heads; not used where there is a ring.
        head_group: the neighbours that exchange heads for tokens; all of `group` by default, and None in a ring whose
            places are single ranks.
        ring_group: one rank of each such neighbourhood, or None where there is only one.
        unit: what the tokens of every rank are padded to a multiple of, in each stream.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        attend: Attend,
        head_group: dist.ProcessGroup | None = None,
        ring_group: dist.ProcessGroup | None = None,
        unit: int = 1,
    ) -> None:
        self.group, self.ring_group = group, ring_group
        self.head_group = group if ring_group is None else head_group
        self.parts, self.part, self.unit = dist.get_world_size(group), dist.get_rank(group), unit
        self.ring = 1 if ring_group is None else dist.get_world_size(ring_group)
        self.ulysses = self.parts // self.ring
        self.attend_whole = attend

    @property
    def attend(self) -> Attend:
        """The attention of the model: this object."""
        return self

    def split_tokens(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n_local d"]:
        """Returns this rank's tokens of `x`, which every rank has; the last ranks' are padded with zeros."""
        local = padded_part(x.shape[1], self.parts, self.unit)
        own = x[:, self.part * local : (self.part + 1) * local]
        return functional.pad(own, (0, 0, 0, local - own.shape[1]))

    def merge_tokens(self, x: Float[Tensor, "b n_local d"], n: int) -> Float[Tensor, "b n d"]:
        """Returns all n tokens on every rank; see `gather_tokens` for what that means for gradients."""
        return gather_tokens(x, n, self.group)

    def __call__(
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
        received = self._exchanged(self.by_heads(torch.stack([q, k, v])))
        own_q, own_k, own_v = self.of_block(received, tokens).unbind(0)
        return self.attend_block(own_q, own_k, own_v, tokens)[:, :, : q.shape[2]]

    def by_heads(self, x: Float[Tensor, "n b s_local heads dh"]) -> Float[Tensor, "U n b s_local heads_local dh"]:
        """Returns what each rank of the head group is to have: some heads of this rank's tokens."""
        heads = padded_part(x.shape[3], self.ulysses)
        x = functional.pad(x, (0, 0, 0, heads * self.ulysses - x.shape[3]))
        return torch.unflatten(x, 3, (self.ulysses, heads)).movedim(3, 0)

    def of_block(
        self, received: Float[Tensor, "U n b s_local heads_local dh"], tokens: TokenCounts
    ) -> Float[Tensor, "n b s heads_local dh"]:
        """Returns the block's tokens, without padding, from those of its ranks."""
        local, block = self._counts(tokens)
        parts = (received[:, :, :, : local.video], received[:, :, :, local.video :])
        joined = [part.movedim(0, 2).flatten(2, 3) for part in parts]  # n b (U n_local) heads_local dh
        return torch.cat([joined[0][:, :, : block.video], joined[1][:, :, : block.text]], dim=2)

    def attend_block(
        self,
        q: Float[Tensor, "b s heads_local dh"],
        k: Float[Tensor, "b s heads_local dh"],
        v: Float[Tensor, "b s heads_local dh"],
        tokens: TokenCounts,
    ) -> Float[Tensor, "b s_local heads dh"]:
        """Returns the attention at this rank's tokens, padded heads included, from the block's for its heads."""
        if self.ring_group is None:
            out = self.attend_whole(q, k, v, tokens)
        else:
            lengths = [sum(counts) for counts in block_counts(tokens, self.parts, self.ring, self.unit)]
            out = ring_attention(q, k, v, lengths, self.ring_group)
        local, block = self._counts(tokens)
        streams = []
        for stream, n, size in zip((out[:, : block.video], out[:, block.video :]), block, local, strict=True):
            stream = functional.pad(stream, (0, 0, 0, 0, 0, size * self.ulysses - n))
            # U b n_local heads_local dh
            streams.append(torch.unflatten(stream, 1, (self.ulysses, size)).movedim(1, 0))
        received = self._exchanged(torch.cat(streams, dim=2))  # row p: rank p's heads
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _exchanged(self, send: Tensor) -> Tensor:
        return send if self.head_group is None else all_to_all(send, self.head_group)

    def _counts(self, tokens: TokenCounts) -> tuple[TokenCounts, TokenCounts]:
        """Returns the tokens of a rank, with padding, and of this rank's block, without."""
        local = TokenCounts(*(padded_part(n, self.parts, self.unit) for n in tokens))
        return local, block_counts(tokens, self.parts, self.ring, self.unit)[self.part // self.ulysses]
