"""Memory of micro-batches: used again when nobody holds it, and never before."""

from __future__ import annotations

import struct

import pytest
import torch

from contentv.data.batch_rows import BatchRows, RowsPool
from contentv.data.sample import Layout

LAYOUTS = [
    Layout("latents", torch.bfloat16, (2, 3), 0, 12, 6),
    Layout("text_tokens", torch.float32, (2,), 12, 20, 2),
    Layout("text_pooled", torch.float16, (4,), 20, 28, 4),
]
HOLDS = {
    "all of it": lambda tensors: tensors,
    "one tensor": lambda tensors: tensors["text_pooled"],
    "a row": lambda tensors: tensors["latents"][1],
    "a view": lambda tensors: tensors["text_tokens"].view(-1)[1:2],
    "an array": lambda tensors: tensors["text_tokens"].numpy(),
    "what a graph has kept": lambda tensors: tensors["text_tokens"] * torch.ones(2, requires_grad=True),
}


def places(tensors: dict[str, torch.Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors.values()}


@pytest.mark.parametrize("held", HOLDS)
def test_memory_is_used_again_only_when_nobody_holds_it(held: str) -> None:
    pool = RowsPool()
    rows = pool.take(b"header", LAYOUTS, 3)
    tensors = rows.tensors()
    first = places(tensors)
    kept = HOLDS[held](tensors)
    del tensors
    pool.give_back(rows)
    other = pool.take(b"header", LAYOUTS, 3)
    assert not places(other.tensors()) & first
    pool.give_back(other)
    del kept, other, rows
    again = [pool.take(b"header", LAYOUTS, 3) for _ in range(2)]
    assert set().union(*(places(rows.tensors()) for rows in again)) >= first


def test_rows_of_another_count_or_header_are_not_taken() -> None:
    pool = RowsPool()
    rows = pool.take(b"header", LAYOUTS, 3)
    pool.give_back(rows)
    assert pool.take(b"header", LAYOUTS, 4) is not rows
    assert pool.take(b"redaeh", LAYOUTS, 3) is not rows
    assert pool.take(b"header", LAYOUTS, 3) is rows


def test_what_is_kept_is_bounded() -> None:
    pool = RowsPool(max_bytes=100)
    held = [pool.take(b"header", LAYOUTS, 1) for _ in range(5)]
    for rows in held:
        pool.give_back(rows)
    taken = [pool.take(b"header", LAYOUTS, 1) for _ in range(5)]
    assert sum(any(rows is one for one in held) for rows in taken) == 100 // (6 + 28)


@pytest.mark.parametrize(("name", "code"), [("latents", "<H"), ("text_tokens", "<I"), ("text_pooled", "<H")])
def test_rows_that_are_not_finite_are_found(name: str, code: str) -> None:
    infinite = {"latents": 0x7F80, "text_tokens": 0x7F800000, "text_pooled": 0x7C00}[name]
    sign = {"<H": 0x8000, "<I": 0x80000000}[code]
    size = struct.calcsize(code)
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    for bits, is_finite in [
        (infinite, False), (infinite + 1, False), (infinite | sign, False), ((infinite + 1) | sign, False),
        (infinite - 1, True), ((infinite - 1) | sign, True), (0, True), (sign, True),
    ]:  # fmt: skip
        rows = BatchRows(b"header", LAYOUTS, 4)
        for row in range(4):
            for part in rows.parts[row]:
                part[:] = bytes(len(part))
        part = rows.parts[2][LAYOUTS.index(layout)]
        part[size : 2 * size] = struct.pack(code, bits)
        value = rows.tensors()[name].view(4, -1)[2, 1]
        assert bool(value.isfinite()) is is_finite
        for asked in ([0, 1, 2, 3], [2], [1, 2]):
            assert rows.not_finite(asked) == ([] if is_finite else [2])
        assert rows.not_finite([0, 1, 3]) == []
