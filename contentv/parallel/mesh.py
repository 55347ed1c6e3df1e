"""Which rank does what: dp x sp x tp, with tensor ranks next to each other, then sequence ranks, then data ranks.

    rank = (dp_rank * sp + sp_rank) * tp + tp_rank,    sp_rank = ring_rank * ulysses + ulysses_rank

The tp ranks of a sample talk most, so they are neighbours (one machine); then come the ranks that exchange heads, then
the ring, which only ever talks to the next place; dp ranks talk least. What a layout may be is decided here alone
(`check_layout`), before any process group is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch.distributed as dist

from contentv.base.errors import UserError
from contentv.base.types import ReaderRank

ZERO_STAGES = (1, 2, 3)
OFFLOADS = ("none", "optimizer", "all")
RECOMPUTES = ("none", "selective", "full")
EXCHANGES = ("auto", "joined", "overlapped")


@dataclass
class ParallelConfig:
    """How the work is split; the data-parallel degree follows from the number of processes."""

    sp: int = field(
        default=1, metadata={"help": "ranks that share one sample's tokens, >= 1; any number of heads and tokens"}
    )
    tp: int = field(
        default=1, metadata={"help": "ranks that share every layer's weights by whole heads, from 1 to the heads"}
    )
    zero_stage: int = field(
        default=3, metadata={"help": "1 splits optimizer states over dp x sp ranks, 2 also gradients, 3 also weights"}
    )
    offload: str = field(default="none", metadata={"help": "none | optimizer | all: what is kept in host memory"})
    recompute: str = field(
        default="none",
        metadata={"help": "activations recomputed in the backward pass: none | selective (all but attention) | full"},
    )
    ring: int = field(
        default=1,
        metadata={"help": "places of the ring that keys and values travel, a divisor of sp; sp / ring ranks at each "
                          "place exchange heads (Ulysses). 1 = no ring"},
    )  # fmt: skip
    exchange: str = field(
        default="auto",
        metadata={"help": "Ulysses' q, k and v: joined in one all-to-all | overlapped, each in its own, under way "
                          "while the next is projected | auto = overlapped on accelerators"},
    )  # fmt: skip
    sequence_norms: bool = field(
        default=False,
        metadata={"help": "tensor ranks also share the tokens between the layers: norms, modulations, residual stream; "
                          "needs tp > 1"},
    )  # fmt: skip
    offload_activations: bool = field(
        default=False,
        metadata={"help": "what recomputed layers keep waits in pinned host memory for the backward pass; needs "
                          "recompute=selective or full"},
    )  # fmt: skip
    hpz: int = field(
        default=1,
        metadata={"help": "neighbouring ranks, as of one node, that keep a second copy of the weights among them after "
                          "the forward pass (ZeRO++'s hpZ): a divisor of dp x sp; needs zero_stage=3. 1 = none"},
    )  # fmt: skip
    compile: bool = field(
        default=False, metadata={"help": "compile each layer with torch.compile; the attention runs between its parts"}
    )

    def __post_init__(self) -> None:
        for key in ("sp", "tp", "ring", "hpz"):
            if getattr(self, key) < 1:
                raise UserError(f"parallel.{key}={getattr(self, key)}", where=f"parallel.{key}", remedy="use 1 or more")
        for key, allowed in (
            ("zero_stage", ZERO_STAGES), ("offload", OFFLOADS), ("recompute", RECOMPUTES), ("exchange", EXCHANGES),
        ):  # fmt: skip
            value = getattr(self, key)
            if value not in allowed:
                names = ", ".join(str(a) for a in allowed)
                raise UserError(
                    f"parallel.{key}={value} is unknown", where=f"parallel.{key}", remedy=f"use one of {names}"
                )
        if self.offload == "all" and self.zero_stage != 3:
            raise UserError(
                f"parallel.offload=all keeps the weights in host memory, parallel.zero_stage={self.zero_stage} cannot",
                where="parallel.offload, parallel.zero_stage",
                remedy="use parallel.zero_stage=3, or parallel.offload=optimizer",
            )
        if self.offload_activations and self.recompute == "none":
            raise UserError(
                "parallel.offload_activations=true with parallel.recompute=none would move twenty times the bytes",
                where="parallel.offload_activations, parallel.recompute",
                remedy="use parallel.recompute=selective or full, or parallel.offload_activations=false",
            )
        if self.hpz > 1 and self.zero_stage != 3:
            raise UserError(
                f"parallel.hpz={self.hpz} copies divided weights, and parallel.zero_stage={self.zero_stage} has none",
                where="parallel.hpz, parallel.zero_stage",
                remedy="use parallel.zero_stage=3, or parallel.hpz=1",
            )
        if self.sequence_norms and self.tp == 1:
            raise UserError(
                "parallel.sequence_norms=true divides tokens among tensor ranks, and parallel.tp=1 has none",
                where="parallel.sequence_norms, parallel.tp",
                remedy="use parallel.tp=2 or more, or parallel.sequence_norms=false",
            )


@dataclass(frozen=True)
class Mesh:
    """This process's place among dp x sp x tp ranks, and the groups it talks to (None in a single process).

    `sp_group`, `tp_group` and `dp_group` vary one of the three coordinates; `zero_group` holds all dp x sp ranks of
    one tp rank: those over which the optimiser's states, the gradients and the weights are partitioned. Of the sp ranks
    of a sample, `ulysses_group` holds those at one place of the ring and `ring_group` one at each place; the first is
    None where every place is a single rank, the second where there is no ring. `exchange` and `sequence_norms` are the
    keys of these names.
    """

    dp: int = 1
    sp: int = 1
    tp: int = 1
    rank: int = 0
    dp_group: dist.ProcessGroup | None = None
    sp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    zero_group: dist.ProcessGroup | None = None
    ring: int = 1
    ulysses_group: dist.ProcessGroup | None = None
    ring_group: dist.ProcessGroup | None = None
    exchange: str = "auto"
    sequence_norms: bool = False

    @property
    def ulysses(self) -> int:
        """Ranks at one place of the ring: sp / ring."""
        return self.sp // self.ring

    @property
    def token_unit(self) -> int:
        """Parts that a sequence rank's tokens are divided into once more: the tensor ranks, with sequence norms."""
        return self.tp if self.sequence_norms else 1

    @property
    def world(self) -> int:
        """All ranks."""
        return self.dp * self.sp * self.tp

    @property
    def zero(self) -> int:
        """Ranks over which ZeRO partitions: dp x sp."""
        return self.dp * self.sp

    @property
    def tp_rank(self) -> int:
        """Place among the ranks that share the weights."""
        return self.rank % self.tp

    @property
    def sp_rank(self) -> int:
        """Place among the ranks that share the tokens."""
        return self.rank // self.tp % self.sp

    @property
    def dp_rank(self) -> int:
        """Place among the ranks that have different samples."""
        return self.rank // (self.tp * self.sp)

    @property
    def zero_rank(self) -> int:
        """Place in the zero group."""
        return self.rank // self.tp

    @property
    def reader(self) -> ReaderRank:
        """Which part of a global batch this rank reads: the same for all sp x tp ranks of a sample."""
        return ReaderRank(self.dp_rank, self.dp)

    def rank_of(self, zero_rank: int, tp_rank: int) -> int:
        """Returns the global rank of a place in the zero group and one in the tp group."""
        return zero_rank * self.tp + tp_rank

    def describe(self) -> str:
        """Returns the layout in words, such as `8 ranks = dp 2 x sp 4 (ring 2 x ulysses 2) x tp 1`."""
        inner = f" (ring {self.ring} x ulysses {self.ulysses})" if self.ring > 1 else ""
        norms = " (sequence norms)" if self.sequence_norms else ""
        return f"{self.world} ranks = dp {self.dp} x sp {self.sp}{inner} x tp {self.tp}{norms}"


def single_process_mesh() -> Mesh:
    """Returns the mesh of one process, without any group."""
    return Mesh()


def legal_layouts(heads: int, world: int) -> list[tuple[int, int]]:
    """Returns every (sp, tp) that `world` ranks and `heads` attention heads allow."""
    tps = [t for t in range(1, min(world, heads) + 1) if world % t == 0]
    return [(s, t) for t in tps for s in range(1, world // t + 1) if (world // t) % s == 0]


def check_layout(heads: int, world: int, sp: int, tp: int, ring: int = 1) -> None:
    """Returns if the layout is possible; needs no process group, so it fails before any rank waits for another.

    Heads need divide by nothing: tensor ranks hold unequal numbers of whole heads, and sequence ranks pad theirs.

    Args:
        heads: attention heads of the model.
        world: processes.
        sp: sequence-parallel degree.
        tp: tensor-parallel degree.
        ring: places of the ring among the sp ranks.

    Raises:
        UserError: it is not; the message names the fields and the nearest layouts that are.
    """
    problem, where = "", ""
    if sp < 1 or tp < 1 or ring < 1:
        problem, where = f"sp={sp}, tp={tp} and ring={ring} must be 1 or more", "parallel.sp, parallel.tp"
    elif world % (sp * tp) != 0:
        problem = f"{world} processes do not divide into groups of sp x tp = {sp} x {tp} = {sp * tp}"
        where = "parallel.sp, parallel.tp"
    elif tp > heads:
        problem, where = f"{heads} attention heads are too few for tp={tp} ranks, which hold whole ones", "parallel.tp"
    elif sp % ring != 0:
        problem, where = f"sp={sp} ranks do not divide into a ring of {ring} places", "parallel.ring, parallel.sp"
    if not problem:
        return

    def distance(layout: tuple[int, int]) -> float:
        return abs(math.log(layout[0] / max(sp, 1))) + abs(math.log(layout[1] / max(tp, 1)))

    nearest = sorted(legal_layouts(heads, world), key=distance)[:3]
    choices = " or ".join(_keys(s, t, max(ring, 1)) for s, t in nearest)
    raise UserError(problem, where=where, remedy=f"use {choices} with {world} processes")


def _keys(sp: int, tp: int, ring: int) -> str:
    """Returns the keys of a layout, with the ring nearest to the one wanted; none is named where none was wanted."""
    if ring > 1:
        ring = min((r for r in range(1, sp + 1) if sp % r == 0), key=lambda r: abs(math.log(r / ring)))
        return f"parallel.sp={sp} parallel.ring={ring} parallel.tp={tp}"
    return f"parallel.sp={sp} parallel.tp={tp}"


def build_mesh(config: ParallelConfig, world_size: int, rank: int, *, heads: int | None = None) -> Mesh:
    """Returns this rank's mesh; every rank must call it, since it makes the process groups.

    Args:
        config: the degrees.
        world_size: processes; a single one needs no process groups and gets none.
        rank: this process.
        heads: attention heads of the model, to refuse an impossible layout early.

    Raises:
        UserError: the layout is not possible.
    """
    sp, tp, ring = config.sp, config.tp, config.ring
    check_layout(heads if heads is not None else tp, world_size, sp, tp, ring)
    dp, ulysses = world_size // (sp * tp), sp // ring
    if not dist.is_initialized():
        if world_size > 1:
            raise RuntimeError("call contentv.parallel.collectives.start before build_mesh")
        return single_process_mesh()

    def at(d: int, s: int, t: int) -> int:
        return (d * sp + s) * tp + t

    of_sample = [(d, t) for d in range(dp) for t in range(tp)]
    places = [[at(d, r * ulysses + u, t) for u in range(ulysses)] for d, t in of_sample for r in range(ring)]
    rings = [[at(d, r * ulysses + u, t) for r in range(ring)] for d, t in of_sample for u in range(ulysses)]
    sp_group = _own_group([[at(d, s, t) for s in range(sp)] for d, t in of_sample], rank)
    return Mesh(
        dp, sp, tp, rank,
        dp_group=_own_group([[at(d, s, t) for d in range(dp)] for s in range(sp) for t in range(tp)], rank),
        sp_group=sp_group,
        tp_group=_own_group([[at(d, s, t) for t in range(tp)] for d in range(dp) for s in range(sp)], rank),
        zero_group=_own_group([[at(d, s, t) for d in range(dp) for s in range(sp)] for t in range(tp)], rank),
        ring=ring,
        ulysses_group=sp_group if ring == 1 else _own_group(places, rank) if ulysses > 1 else None,
        ring_group=_own_group(rings, rank) if ring > 1 else None,
        exchange=config.exchange,
        sequence_norms=config.sequence_norms,
    )  # fmt: skip


def _own_group(rows: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Returns the group of the row with `rank` in it; every rank makes every group, as torch demands."""
    mine: dist.ProcessGroup | None = None
    for row in rows:
        group = dist.new_group(row)
        if rank in row:
            mine = group
    if mine is None:
        raise RuntimeError(f"rank {rank} is in none of {rows}")
    return mine
