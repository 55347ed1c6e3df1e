"""Reading any stretch of a stored parameter, against slicing the whole by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from contentv.engine.partition import Entry, Fragment, Partition
from contentv.parallel.mesh import Mesh
from contentv.parallel.tensor import Split, part_sizes, take_part

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((6, 4), None), ((6, 4), 0), ((6, 4), 1), ((8,), None), ((8,), 0), ((4, 2, 3, 1), None), ((5, 3), 0), ((3, 5), 1)],
)
def test_every_stretch_of_every_split(shape: tuple[int, ...], dim: int | None, tmp_path: Path) -> None:
    whole = torch.arange(float(math.prod(shape))).view(shape)
    safetensors.torch.save_file({"w": whole}, tmp_path / "w.safetensors")
    tp = 1 if dim is None else 2
    with safetensors.safe_open(tmp_path / "w.safetensors", framework="pt") as f:
        for rank in range(tp):
            split = None if dim is None else Split(dim, part_sizes(shape[dim], tp), rank)
            local = whole if split is None else take_part(whole, split)
            n = local.numel()
            for start, end in itertools.combinations(range(n + 1), 2):
                entry = Entry("w", tuple(local.shape), split, Fragment(1, 3, start, end - start))
                partition = Partition([entry], Mesh(tp=tp, rank=rank), CPU)
                assert partition.whole_shape(entry) == shape
                flats = [torch.zeros(2), torch.full((n + 5,), -1.0)]
                partition.fill(entry, flats, f.get_slice("w"))
                want = torch.full((n + 5,), -1.0)
                want[3 : 3 + end - start] = local.reshape(-1)[start:end]
                assert torch.equal(flats[1], want)


def test_a_rank_without_any_of_a_parameter_reads_nothing() -> None:
    entry = Entry("w", (3,), None, Fragment(0, 0, 3, 0))
    flats = [torch.zeros(2)]
    Partition([entry], Mesh(), CPU).fill(entry, flats, None)
    assert torch.equal(flats[0], torch.zeros(2))


def test_writers_are_dealt_out() -> None:
    partition = Partition([], Mesh(dp=3), CPU)
    assert [partition.writer(i) for i in range(5)] == [0, 1, 2, 0, 1]
