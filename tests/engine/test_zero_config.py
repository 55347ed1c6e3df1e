"""What DeepSpeed is told to gather, to reduce and to keep whole: by value, for three models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contentv.base.errors import UserError
from contentv.engine.zero_config import WeightSizes, deepspeed_config, weight_sizes, zero_limits
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.parallel.mesh import ParallelConfig

GIB = 1 << 30
TINY = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "joint_attention_dim": 64,
        "pooled_projection_dim": 64}  # fmt: skip
SMALL = {"num_layers": 10, "num_attention_heads": 8}
FULL: dict[str, Any] = {}


def sizes_of(config: dict[str, Any]) -> WeightSizes:
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(**config))
    return weight_sizes({name: tuple(p.shape) for name, p in model.named_parameters()})


@pytest.mark.parametrize("config", [TINY, SMALL, FULL], ids=["tiny", "small", "contentv_8b"])
def test_sizes_are_the_formulas(config: dict[str, Any]) -> None:
    d = MMDiTConfig(**config).inner_dim
    sizes = sizes_of(config)
    # Per stream: modulation 6 D (D + 1), attention 4 D (D + 1), feed-forward 8 D^2 + 5 D; four norms of heads.
    assert sizes.layer == 2 * (18 * d * d + 15 * d) + 4 * MMDiTConfig(**config).attention_head_dim
    modulation, text = 6 * d * d, d * MMDiTConfig(**config).joint_attention_dim
    assert (sizes.tensor, sizes.vector) == (max(modulation, text), 6 * d)
    with torch.device("meta"):
        assert sizes.total == sizes.trained == sum(p.numel() for p in MMDiT(MMDiTConfig(**config)).parameters())


def test_limits_of_the_full_model() -> None:
    found = zero_limits(sizes_of(FULL), 2, 64 * GIB)
    assert found == {
        "reduce_bucket_size": 50_000_000,  # 100 MB in bf16
        "allgather_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 212_999_680,  # one layer: 36 D^2 + 30 D + 4 x 64, D = 2432
        "stage3_max_live_parameters": GIB,  # 1/32 of the memory: 2 GiB in bf16
        "stage3_max_reuse_distance": GIB,
        "stage3_param_persistence_threshold": 14_592,  # 6 D
    }
    small_device = zero_limits(sizes_of(FULL), 2, 8 * GIB)
    assert small_device["stage3_max_live_parameters"] == 2 * 212_999_680  # no fewer than two layers
    assert zero_limits(sizes_of(FULL), 4)["reduce_bucket_size"] == 6 * 2432**2  # 100 MB in fp32 hold no modulation


def test_limits_of_small_models_are_the_models() -> None:
    for config in (TINY, SMALL):
        sizes = sizes_of(config)
        found = zero_limits(sizes, 2)
        assert found["reduce_bucket_size"] == min(50_000_000, sizes.total)
        assert found["stage3_prefetch_bucket_size"] == min(50_000_000, sizes.total)
        assert found["stage3_max_live_parameters"] > sizes.total
        assert found["stage3_param_persistence_threshold"] == 6 * MMDiTConfig(**config).inner_dim


def test_a_layer_is_a_block_whatever_wraps_it() -> None:
    shapes = {
        "base.transformer_blocks.0.attn.to_q.weight": (4, 4), "base.transformer_blocks.0.ff.net.2.bias": (4,),
        "base.transformer_blocks.10.ff.net.2.weight": (3, 3), "proj_out.weight": (5, 5), "proj_out.bias": (5,),
        "gate": (2,),
    }  # fmt: skip
    assert weight_sizes(shapes, ["proj_out.bias"]) == WeightSizes(total=61, trained=5, tensor=25, layer=30, vector=5)


def test_what_is_told() -> None:
    sizes = sizes_of(TINY)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def zero(parallel: ParallelConfig, device: torch.device = cpu, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = deepspeed_config(parallel, "bf16", device, sizes, **more)["zero_optimization"]
        return found

    assert not any(key.startswith("stage3_") for key in zero(ParallelConfig(zero_stage=2)))
    assert "zero_hpz_partition_size" not in zero(ParallelConfig())
    assert zero(ParallelConfig(hpz=8))["zero_hpz_partition_size"] == 8
    assert zero(ParallelConfig(), persist_below=2000)["stage3_param_persistence_threshold"] == 1999  # DeepSpeed: <=
    assert zero(ParallelConfig(), persist_below=0)["stage3_param_persistence_threshold"] == 0
    assert [zero(ParallelConfig(zero_stage=s), cuda)["overlap_comm"] for s in (1, 2, 3)] == [False, True, True]
    assert not zero(ParallelConfig(), cpu)["overlap_comm"]


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"offload_activations": True}, "parallel.offload_activations, parallel.recompute"),
        ({"hpz": 2, "zero_stage": 2}, "parallel.hpz, parallel.zero_stage"),
        ({"hpz": 0}, "parallel.hpz"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError) as refused:
        ParallelConfig(**keys)
    assert refused.value.where == where
