"""Where each parameter's numbers live: fragments of this rank's flat tensors, and how they make up a parameter.

ZeRO keeps fp32 master weights and optimiser states as a few flat tensors per rank. A `Fragment` says which stretch of
a flattened parameter lies where in them; everything of the same layout (master weights, both Adam moments, the moving
average) is reached through the same fragments, whatever the ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contentv.parallel.collectives import gather
from contentv.parallel.mesh import Mesh
from contentv.parallel.tensor import Split


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter, at `offset` of this rank's flat tensor `flat`."""

    flat: int
    offset: int
    start: int
    numel: int


@dataclass(frozen=True)
class Entry:
    """A parameter: its shape on this tensor rank, how tensor ranks split it, and our fragment."""

    name: str
    shape: tuple[int, ...]
    split: Split | None
    fragment: Fragment


class Partition:
    """The parameters of one model over one mesh.

    Args:
        entries: the parameters, in the same order on every rank.
        mesh: this rank's place.
        device: where collectives want their tensors.
    """

    def __init__(self, entries: Sequence[Entry], mesh: Mesh, device: torch.device) -> None:
        self.entries = list(entries)
        self.by_name = {e.name: e for e in self.entries}
        self.mesh = mesh
        self.device = device

    def whole_shape(self, entry: Entry) -> tuple[int, ...]:
        """Returns the parameter's shape before tensor ranks split it."""
        split = entry.split
        if split is None:
            return entry.shape
        return tuple(sum(split.sizes) if d == split.dim else n for d, n in enumerate(entry.shape))

    def numel(self) -> int:
        """Returns the number of weights of the whole model."""
        return sum(math.prod(self.whole_shape(e)) for e in self.entries)

    def writer(self, index: int) -> int:
        """Returns the rank that writes parameter `index`: they are dealt out one by one."""
        return index % self.mesh.world

    def local(self, entry: Entry, flats: Sequence[Tensor]) -> Tensor:
        """Returns this rank's stretch of a parameter, a 1-d view into its flat tensors (possibly empty)."""
        f = entry.fragment
        return flats[f.flat].detach().narrow(0, f.offset, f.numel)

    @torch.no_grad()
    def set_local(self, entry: Entry, flats: Sequence[Tensor], value: Tensor) -> None:
        """Copies this rank's stretch of `value`, the parameter on this tensor rank, into its flat tensors."""
        f = entry.fragment
        self.local(entry, flats).copy_(value.reshape(-1)[f.start : f.start + f.numel])

    @torch.no_grad()
    def gather(self, entry: Entry, flats: Sequence[Tensor], to: int | None = None) -> Tensor | None:
        """Returns the whole parameter in fp32 on rank `to` (on every rank if None), None elsewhere. Collective.

        Args:
            entry: the parameter.
            flats: this rank's flat tensors of the state wanted.
            to: global rank that needs it.
        """
        mesh, split = self.mesh, entry.split
        if to is not None and split is None and to % mesh.tp != mesh.tp_rank:
            return None  # replicated over tensor ranks: those of the receiver's are enough
        f = entry.fragment
        whole = torch.zeros(math.prod(entry.shape), dtype=torch.float32, device=self.device)
        whole[f.start : f.start + f.numel] = self.local(entry, flats).to(self.device)
        self._sum_bits(whole, None if to is None else mesh.rank_of(to // mesh.tp, mesh.tp_rank))
        if to is not None and mesh.zero_rank != to // mesh.tp:
            return None
        value = whole.view(entry.shape)
        if split is not None and mesh.tp > 1:
            value = self._join(value, split)
        return value if to is None or to == mesh.rank else None

    def _sum_bits(self, whole: Tensor, to: int | None) -> None:
        """Adds the ranks' disjoint stretches as integers: exact bit for bit, signs of zeros and NaNs included."""
        if self.mesh.zero_group is None or self.mesh.zero == 1:
            return
        bits = whole.view(torch.int32)
        if to is None:
            dist.all_reduce(bits, group=self.mesh.zero_group)
        else:
            dist.reduce(bits, to, group=self.mesh.zero_group)

    def _join(self, part: Tensor, split: Split) -> Tensor:
        assert self.mesh.tp_group is not None
        widest = list(part.shape)
        widest[split.dim] = max(split.sizes)
        if split.size < max(split.sizes):  # a collective wants one shape
            padded = part.new_zeros(widest)
            padded.narrow(split.dim, 0, split.size).copy_(part)
            part = padded
        parts = gather(part, self.mesh.tp_group).unbind(0)
        return torch.cat([p.narrow(split.dim, 0, n) for p, n in zip(parts, split.sizes, strict=True)], split.dim)

    @torch.no_grad()
    def fill(self, entry: Entry, flats: Sequence[Tensor], stored: Any) -> None:
        """Copies this rank's stretch of a stored whole parameter into its flat tensors, reading no more than needed.

        Args:
            entry: the parameter.
            flats: this rank's flat tensors of the state that is read.
            stored: the whole parameter; a tensor, or anything sliced like one (safetensors' slices).
        """
        f, shape = entry.fragment, entry.shape
        if f.numel == 0:
            return
        row = math.prod(shape[1:])
        first, last = f.start // row, -(-(f.start + f.numel) // row)
        split = entry.split
        if split is None:
            piece = stored[first:last]
        elif split.dim == 0:
            piece = stored[split.start + first : split.start + last]
        else:
            piece = stored[first:last, split.start : split.start + split.size]
        values = piece.reshape(-1)[f.start - first * row :][: f.numel]
        self.local(entry, flats).copy_(values)


def fragments_of(optimizer: Any, name_of: Callable[[Any], str], rank: int) -> tuple[dict[str, Fragment], list[Tensor]]:
    """Returns each parameter's fragment by name, and the flat fp32 master weights, of DeepSpeed's optimiser objects.

    Args:
        optimizer: a ZeRO-1/2, ZeRO-3 or bf16 (ZeRO-1) optimiser of DeepSpeed 0.19.
        name_of: a parameter's name.
        rank: this rank's place in the ZeRO group.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _stage3_fragments(optimizer, name_of, rank), optimizer.fp32_partitioned_groups_flat
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    else:
        groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    found = {}
    for group in groups:
        for parameter in group:
            link = parameter._hp_mapping
            if link is None:
                found[name_of(parameter)] = Fragment(0, 0, 0, 0)
                continue
            there, here = link.hp_fragment_address, link.lp_fragment_address
            found[name_of(parameter)] = Fragment(link.param_group_index, there.start, here.start, here.numel)
    return found, flats


def _stage3_fragments(optimizer: Any, name_of: Callable[[Any], str], rank: int) -> dict[str, Fragment]:
    found = {}
    for flat, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()  # the same on all ranks: the last ranks' are padded
            numel = max(0, min(size, parameter.ds_numel - rank * size))
            found[name_of(parameter)] = Fragment(flat, offset, min(rank * size, parameter.ds_numel), numel)
            offset += size
    return found
