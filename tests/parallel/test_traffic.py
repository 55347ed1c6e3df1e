"""The formulas of bytes against those that tests/dist compares with what torch.distributed is handed."""

from __future__ import annotations

import counting
import pytest
import torch

from contentv.base.types import TokenCounts
from contentv.models.mmdit import MMDiTConfig
from contentv.parallel.mesh import Mesh
from contentv.parallel.traffic import (
    all_reduce_bytes,
    all_to_all_bytes,
    head_counts,
    head_overhead,
    ring_bytes,
    sequence_norms_bytes,
)

TOKENS = TokenCounts(video=41_472, text=333)


@pytest.mark.parametrize(("sp", "ring"), [(1, 1), (4, 1), (8, 1), (4, 2), (8, 2), (4, 4), (16, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(sp: int, ring: int, dtype: torch.dtype) -> None:
    for sp_rank in range(sp):
        counted = counting.attention_formula(TOKENS, (1, 38, 64), sp, ring, sp_rank, dtype)
        place = sp_rank // (sp // ring)
        assert all_to_all_bytes(TOKENS, 38, 64, sp, ring, dtype.itemsize) == counted.get("all_to_all_single", 0)
        assert ring_bytes(TOKENS, 38, 64, sp, ring, dtype.itemsize, place) == counted.get("isend", 0)


def test_tensor_ranks_of_a_whole_model() -> None:
    config = MMDiTConfig()
    for sp, tp in ((1, 2), (4, 2), (2, 4)):
        counted = counting.model_formula(config, TOKENS, 1, Mesh(sp=sp, tp=tp))["all_reduce"]
        last_text = 3 * -(-TOKENS.text // sp) * config.inner_dim * 4
        norms = 4 * config.num_layers * 64 * 4
        assert config.num_layers * all_reduce_bytes(TOKENS, config.inner_dim, sp, tp, 4) == counted + last_text - norms


def test_sequence_norms() -> None:
    config = MMDiTConfig()
    for sp, tp in ((1, 2), (4, 2), (2, 4)):
        counted = counting.model_formula(config, TOKENS, 1, Mesh(sp=sp, tp=tp, sequence_norms=True))
        last_text = 3 * counting.part_size(TOKENS.text, sp, tp) * config.inner_dim * 4
        ours = config.num_layers * sequence_norms_bytes(TOKENS, config.inner_dim, sp, tp, 4)
        assert ours == counted["reduce_scatter"] + last_text


def test_heads() -> None:
    assert head_counts(38, 4) == [10, 10, 9, 9]
    assert [head_counts(6, tp) for tp in (1, 2, 4)] == [[6], [3, 3], [2, 2, 1, 1]]
    assert head_overhead(38, 1, 1) == 1
    assert head_overhead(38, 4, 1) == head_overhead(38, 8, 1) == head_overhead(38, 2, 2) == pytest.approx(40 / 38)
    assert head_overhead(38, 16, 1) == pytest.approx(48 / 38)
