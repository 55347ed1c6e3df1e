"""The tensor-parallel plan against the published parameter names, and parts against the whole."""

from __future__ import annotations

import pytest
import torch

from contentv.base.errors import UserError
from contentv.engine.plans import MMDIT_PLAN
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.parallel.tensor import Split, matches, part_sizes, take_part

# column layers with their biases: q, k, v of both streams, two first linears; four row weights
SPLIT_PER_BLOCK = 2 * 6 + 2 * 2 + 4
LAST_BLOCK_LACKS = 4  # to_add_out's weight; ff_context's first weight and bias, and second weight


def model(layers: int = 3) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(MMDiTConfig(num_layers=layers))


def test_every_weight_of_attention_and_feed_forward_is_split_and_nothing_else() -> None:
    dims = {name: MMDIT_PLAN.dim_of(name) for name, _ in model().named_parameters()}
    split = {name: dim for name, dim in dims.items() if dim is not None}
    assert len(split) == 3 * SPLIT_PER_BLOCK - LAST_BLOCK_LACKS
    assert {n for n, d in split.items() if d == 1} == {
        n for n in dims if n.endswith((".to_out.0.weight", ".to_add_out.weight", ".net.2.weight"))
    }
    assert not any("norm" in n or "embed" in n or n.startswith("proj_out") for n in split)
    for name in ("to_out.0", "to_add_out", "ff.net.2", "ff_context.net.2"):
        assert dims[f"transformer_blocks.0.{'' if 'ff' in name else 'attn.'}{name}.bias"] is None


def test_the_gradients_of_all_norms_of_queries_and_keys_are_summed() -> None:
    norms = [n for n, _ in model().named_modules() if ".attn.norm_" in n]
    assert len(norms) == 12
    assert all(matches(n, MMDIT_PLAN.partial) for n in norms)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_make_up_the_whole(parts: int) -> None:
    whole = torch.arange(48.0).view(6, 8)
    for dim in (0, 1):
        sizes = part_sizes(whole.shape[dim], parts)
        assert torch.equal(torch.cat([take_part(whole, Split(dim, sizes, i)) for i in range(parts)], dim), whole)


def test_heads_are_dealt_out_whole_and_as_evenly_as_they_go() -> None:
    assert part_sizes(38 * 64, 2, 64) == (19 * 64, 19 * 64)
    assert part_sizes(38 * 64, 4, 64) == (640, 640, 576, 576)  # 10, 10, 9, 9
    assert part_sizes(9728, 4) == (2432,) * 4
    with pytest.raises(UserError, match="2432 features do not divide into 39 parts") as error:
        part_sizes(38 * 64, 39, 64)
    assert "at most 38" in error.value.remedy
