"""Transformer folders: written for and by diffusers, one file and several, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from contentv.base.errors import UserError
from contentv.models.io import (
    adapt_image_transformer,
    load_whole,
    open_transformer,
    read_config,
    read_transformer,
    write_transformer,
)
from contentv.models.mmdit import MMDiT, MMDiTConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = MMDiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=12, pooled_projection_dim=10
)


def make_model(seed: int = 0) -> MMDiT:
    torch.manual_seed(seed)
    return MMDiT(CONFIG)


def make_image_model(**changes: object) -> SD3Transformer2DModel:
    torch.manual_seed(1)
    options: dict[str, object] = {
        "sample_size": 8, "pos_embed_max_size": 6, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
        "joint_attention_dim": 12, "caption_projection_dim": 32, "pooled_projection_dim": 10, "qk_norm": "rms_norm",
    }  # fmt: skip
    return SD3Transformer2DModel(**{**options, **changes})


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_round_trip(tmp_path: Path) -> None:
    model = make_model()
    write_transformer(model, tmp_path, CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    read = read_transformer(tmp_path, config_check=CONFIG)
    assert_same(read.state_dict(), model.state_dict())
    assert read.config == CONFIG
    assert all(p.requires_grad for p in read.parameters())
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "SD3Transformer3DModel"
    low = read_transformer(tmp_path, torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def test_shards_from_a_stream_in_any_order(tmp_path: Path) -> None:
    state = make_model().state_dict()
    write_transformer(reversed(list(state.items())), tmp_path, CONFIG, dtype=torch.bfloat16, max_shard_bytes=20_000)
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {p.name for p in tmp_path.glob("*.safetensors")}
    assert len(files) > 5
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in state.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert_same(read_transformer(tmp_path).state_dict(), {k: v.to(torch.bfloat16) for k, v in state.items()})
    # A later save in one file may not leave the old ones to be read.
    write_transformer(make_model(3), tmp_path, CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    assert_same(read_transformer(tmp_path).state_dict(), make_model(3).state_dict())


def test_diffusers_reads_what_we_write(tmp_path: Path) -> None:
    model = make_model()
    write_transformer(model, tmp_path, CONFIG, max_shard_bytes=50_000)
    truth, report = SD3Transformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert list(report["missing_keys"]) == ["pos_embed.pos_embed"]
    assert list(report["unexpected_keys"]) == []
    state = truth.state_dict()
    del state["pos_embed.pos_embed"]
    assert_same(state, model.state_dict())


@pytest.mark.parametrize("shard", ["10GB", "60KB"])
def test_we_read_what_diffusers_writes(tmp_path: Path, shard: str) -> None:
    truth = make_image_model()
    truth.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / WEIGHTS).exists() == (shard == "10GB")
    expected = truth.state_dict()
    del expected["pos_embed.pos_embed"]
    assert_same(read_transformer(tmp_path, config_check=CONFIG).state_dict(), expected)
    assert_same(load_whole(adapt_image_transformer(tmp_path)).state_dict(), expected)
    assert list(open_transformer(tmp_path).tensors) == list(read_transformer(tmp_path).state_dict())


def test_adaptation_can_start_the_ends_anew(tmp_path: Path) -> None:
    truth = make_image_model()
    truth.save_pretrained(tmp_path)
    wider = MMDiTConfig(2, 2, 16, in_channels=8, out_channels=8, joint_attention_dim=12, pooled_projection_dim=10)
    with pytest.raises(UserError, match=r"in_channels 16 \(wanted 8\)"):
        adapt_image_transformer(tmp_path, wider)
    model = load_whole(adapt_image_transformer(tmp_path, wider, reinit_io=True, seed=4))
    for name, tensor in model.state_dict().items():
        if name.startswith("proj_out."):
            assert tensor.abs().max() == 0
        elif name.startswith("pos_embed."):
            assert tensor.shape[1:] in ((8, 2, 2), ())
        else:
            assert torch.equal(tensor, truth.state_dict()[name])
    assert model.pos_embed.proj.weight.std() > 0
    again = load_whole(adapt_image_transformer(tmp_path, wider, reinit_io=True, seed=5))
    assert not torch.equal(again.pos_embed.proj.weight, model.pos_embed.proj.weight)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    write_transformer(make_model(), tmp_path, CONFIG)
    state = load_file(tmp_path / WEIGHTS)
    state["proj_in.weight"] = state.pop("proj_out.weight")
    state["context_embedder.bias"] = torch.zeros(3)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(UserError) as caught:
        read_transformer(tmp_path)
    for part in ("missing: proj_out.weight", "unknown: proj_in.weight", "of another shape: context_embedder.bias"):
        assert part in str(caught.value)


def test_writing_the_wrong_tensors_is_refused(tmp_path: Path) -> None:
    state = make_model().state_dict()
    with pytest.raises(ValueError, match=r"proj_in\.weight"):
        write_transformer({**state, "proj_in.weight": torch.zeros(1)}, tmp_path, CONFIG)
    del state["norm_out.linear.bias"]
    with pytest.raises(ValueError, match=r"not given: norm_out\.linear\.bias"):
        write_transformer(state, tmp_path, CONFIG)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(UserError, match="no such file"):
        read_transformer(tmp_path)


def test_other_models_are_refused(tmp_path: Path) -> None:
    write_transformer(make_model(), tmp_path, CONFIG)
    with pytest.raises(UserError, match=r"num_layers 2 \(wanted 3\)"):
        read_transformer(tmp_path, config_check=MMDiTConfig(3, 2, 16, joint_attention_dim=12, pooled_projection_dim=10))
    edit(tmp_path, dual_attention_layers=[0])
    with pytest.raises(UserError, match="dual attention"):
        read_config(tmp_path)
    edit(tmp_path, dual_attention_layers=[], caption_projection_dim=64)
    with pytest.raises(UserError, match="caption_projection_dim 64"):
        read_config(tmp_path)
    edit(tmp_path, caption_projection_dim=32, num_layers="2")
    with pytest.raises(UserError, match="num_layers"):
        read_config(tmp_path)
    edit(tmp_path, _class_name="FluxTransformer2DModel")
    with pytest.raises(UserError, match="FluxTransformer2DModel"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(UserError, match="unreadable"):
        read_config(tmp_path)


def test_defaults_of_sd3_without_qk_norm(tmp_path: Path) -> None:
    make_image_model(qk_norm=None).save_pretrained(tmp_path)
    assert read_config(tmp_path).qk_norm is None
    config = json.loads((tmp_path / "config.json").read_text())
    del config["qk_norm"], config["patch_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).qk_norm is None
    assert not any("norm_q" in name for name in read_transformer(tmp_path).state_dict())


def test_pickles_and_damaged_files_are_refused(tmp_path: Path) -> None:
    write_transformer(make_model(), tmp_path, CONFIG)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        read_transformer(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        read_transformer(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(UserError, match=r"\.\./x"):
        read_transformer(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_transformer(tmp_path)
