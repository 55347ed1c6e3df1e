"""Places in the mesh, and layouts that are refused before any process waits for another."""

from __future__ import annotations

import itertools

import pytest

from contentv.base.errors import UserError
from contentv.base.types import ReaderRank
from contentv.parallel.mesh import (
    Mesh,
    ParallelConfig,
    build_mesh,
    check_layout,
    legal_layouts,
    single_process_mesh,
)


def test_tensor_ranks_are_neighbours_then_sequence_then_data() -> None:
    order = list(itertools.product(range(2), range(3), range(4)))  # dp, sp, tp: the last varies fastest
    for rank, place in enumerate(order):
        mesh = Mesh(dp=2, sp=3, tp=4, rank=rank)
        assert (mesh.dp_rank, mesh.sp_rank, mesh.tp_rank) == place
        assert mesh.rank_of(mesh.zero_rank, mesh.tp_rank) == rank
        assert mesh.reader == ReaderRank(place[0], 2)
    assert (Mesh(dp=2, sp=3, tp=4).world, Mesh(dp=2, sp=3, tp=4).zero) == (24, 6)


def test_the_ring_is_outermost_among_the_sequence_ranks() -> None:
    ring, ulysses, tp = 2, 3, 2
    for rank, (_, place, u, t) in enumerate(itertools.product(range(2), range(ring), range(ulysses), range(tp))):
        mesh = Mesh(dp=2, sp=ring * ulysses, tp=tp, rank=rank, ring=ring)
        assert (mesh.sp_rank, mesh.tp_rank, mesh.ulysses) == (place * ulysses + u, t, ulysses)
    assert mesh.describe() == "24 ranks = dp 2 x sp 6 (ring 2 x ulysses 3) x tp 2"
    assert Mesh(sp=4).describe() == "4 ranks = dp 1 x sp 4 x tp 1"
    assert Mesh(sp=2, tp=2, sequence_norms=True).describe() == "4 ranks = dp 1 x sp 2 x tp 2 (sequence norms)"


@pytest.mark.parametrize(("sp", "ring", "advice"), [(4, 3, "parallel.sp=4 parallel.ring=4"), (1, 2, "parallel.sp=1")])
def test_a_ring_divides_the_sequence_ranks(sp: int, ring: int, advice: str) -> None:
    with pytest.raises(UserError, match=f"sp={sp} ranks do not divide into a ring of {ring} places") as error:
        check_layout(38, 8, sp, 1, ring)
    assert error.value.where == "parallel.ring, parallel.sp"
    assert advice in error.value.remedy
    for choice in error.value.remedy.removeprefix("use ").split(" with ")[0].split(" or "):
        keys = dict(part.removeprefix("parallel.").split("=") for part in choice.split())
        check_layout(38, 8, int(keys["sp"]), int(keys["tp"]), int(keys.get("ring", 1)))
    check_layout(38, 8, 4, 2, 2)


@pytest.mark.parametrize(
    ("heads", "world", "sp", "tp"),
    [(38, 1, 1, 1), (38, 8, 4, 2), (38, 8, 8, 1), (6, 4, 4, 1), (38, 256, 8, 2), (38, 8, 1, 4), (38, 32, 4, 8)],
)
def test_possible_layouts(heads: int, world: int, sp: int, tp: int) -> None:
    check_layout(heads, world, sp, tp)
    assert (sp, tp) in legal_layouts(heads, world)


@pytest.mark.parametrize(
    ("heads", "world", "sp", "tp", "fields", "advice"),
    [
        (3, 8, 1, 4, "parallel.tp", "parallel.sp=1 parallel.tp=2"),
        (38, 8, 3, 1, "parallel.sp, parallel.tp", "parallel.sp=4 parallel.tp=1"),
        (4, 2, 2, 2, "parallel.sp, parallel.tp", "parallel.sp=2 parallel.tp=1"),
        (4, 2, 0, 1, "parallel.sp, parallel.tp", "parallel.sp=1 parallel.tp=1"),
    ],
)
def test_impossible_layouts_name_fields_and_neighbours(
    heads: int, world: int, sp: int, tp: int, fields: str, advice: str
) -> None:
    with pytest.raises(UserError) as error:
        check_layout(heads, world, sp, tp)
    assert error.value.where == fields
    assert advice in error.value.remedy
    for choice in error.value.remedy.removeprefix("use ").split(" or "):
        s, t = (int(part.rpartition("=")[2]) for part in choice.split(" with ")[0].split())
        check_layout(heads, world, s, t)


@pytest.mark.parametrize(
    "change", [{"sp": 0}, {"tp": -1}, {"ring": 0}, {"zero_stage": 0}, {"offload": "disk"}, {"recompute": "some"},
               {"offload": "all", "zero_stage": 2}, {"exchange": "later"}, {"sequence_norms": True},
               {"sequence_norms": True, "sp": 4}]
)  # fmt: skip
def test_settings_out_of_range_name_their_key(change: dict[str, object]) -> None:
    with pytest.raises(UserError) as error:
        ParallelConfig(**change)
    assert f"parallel.{next(iter(change))}" in error.value.where


def test_one_process_needs_no_groups() -> None:
    assert (single_process_mesh().world, single_process_mesh().zero_group) == (1, None)
    with pytest.raises(UserError, match="1 processes do not divide"):
        build_mesh(ParallelConfig(sp=2), 1, 0)
