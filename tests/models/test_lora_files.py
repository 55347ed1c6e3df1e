"""LoRA files: what diffusers and peft write and read, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from contentv.base.errors import UserError
from contentv.models.io import checked_source, load_whole
from contentv.models.lora import LoRA, LoRAConfig, add_lora, lora_names, merged, read_lora, save_lora, write_lora
from contentv.models.mmdit import MMDiT, MMDiTConfig

FILE = "pytorch_lora_weights.safetensors"
CONFIG = MMDiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=12, pooled_projection_dim=10
)
LORA = LoRAConfig(rank=3, alpha=4.5, targets=["to_q", "to_out.0", "add_k_proj", "ff_context.net.2", "norm1.linear"])
Q = "transformer_blocks.0.attn.to_q"
Parity = Callable[[str, str, float, float], None]


def make_image_model() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, pos_embed_max_size=6, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=10, qk_norm="rms_norm",
    )  # fmt: skip


def make_model(image_model: SD3Transformer2DModel) -> MMDiT:
    model = MMDiT(CONFIG)
    model.load_state_dict({n: t for n, t in image_model.state_dict().items() if n != "pos_embed.pos_embed"})
    return model


def randomize(parameters: dict[str, Tensor]) -> None:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 16, 1, 4, 6, generator=g), torch.tensor([40.0, 900.0]), torch.randn(2, 5, 12, generator=g),
        torch.randn(2, 10, generator=g),
    )  # fmt: skip


def run_ours(model: MMDiT, image_model: SD3Transformer2DModel) -> Tensor:
    table = image_model.pos_embed.cropped_pos_embed(4, 6)[0]
    model.positions = lambda t, rows, columns, dim: table
    with torch.no_grad():
        return model(*make_inputs())


def run_theirs(image_model: SD3Transformer2DModel) -> Tensor:
    latents, timestep, tokens, pooled = make_inputs()
    with torch.no_grad():
        return image_model(latents[:, :, 0], tokens, pooled, timestep).sample[:, :, None]


def run_merged(lora: LoRA, image_model: SD3Transformer2DModel) -> Tensor:
    source = checked_source(CONFIG, make_model(image_model).state_dict(), "a model")
    return run_ours(load_whole(merged(source, lora)), image_model)


def trained(folder: Path) -> tuple[MMDiT, Path]:
    model = make_model(make_image_model())
    add_lora(model, LORA, 0)
    parameters = {n: p for n, p in model.named_parameters() if n in lora_names(model)}
    randomize(parameters)
    return model, write_lora(parameters.items(), folder, LORA)


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def same(a: LoRA, b: LoRA) -> bool:
    values = all(torch.equal(a.tensors[n].read(), b.tensors[n].read()) for n in a.tensors)
    return set(a.tensors) == set(b.tensors) and values and a.ranks == b.ranks and a.scales == b.scales


@pytest.mark.parametrize("through", ["pipeline", "transformer"])
def test_diffusers_loads_ours(through: str, tmp_path: Path, parity: Parity) -> None:
    model, file = trained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE]
    image_model = make_image_model()
    ours, base = run_ours(model, image_model), run_theirs(image_model)
    if through == "pipeline":
        pipeline = StableDiffusion3Pipeline(
            transformer=image_model, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
            tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
        pipeline.load_lora_weights(tmp_path)
    else:
        image_model.load_lora_adapter(file, use_safetensors=True)  # without it diffusers overlooks the header
    assert image_model.peft_config["default_0"].lora_alpha == 4.5
    theirs = run_theirs(image_model)
    assert error(base, theirs) > 0.05
    parity(f"LoRA file, forward, one frame, fp32 (loaded by the {through})", "diffusers", error(ours, theirs), 1e-5)
    parity(
        "LoRA file merged, forward, one frame, fp32",
        "diffusers",
        error(run_merged(read_lora(file), make_image_model()), theirs),
        1e-5,
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model, file = trained(tmp_path)
    lora = read_lora(tmp_path)
    assert lora.config == LoRAConfig(3, 4.5, LORA.layers)
    assert (lora.scales[Q], lora.alpha(Q)) == (1.5, 4.5)
    live = {lora_names(model)[n]: p for n, p in model.named_parameters() if n in lora_names(model)}
    assert all(torch.equal(lora.tensors[name].read(), live[name]) for name in live)
    assert set(lora.tensors) == set(live)
    assert same(lora, read_lora(file))
    assert same(lora, read_lora(save_lora(lora, tmp_path / "again")))
    low = read_lora(save_lora(lora, tmp_path / "low", dtype=torch.bfloat16))
    assert {t.dtype for t in low.tensors.values()} == {torch.bfloat16}


def test_layers_may_differ_in_rank_and_alpha(tmp_path: Path, parity: Parity) -> None:
    lora = read_lora(trained(tmp_path)[1])
    tensors = {name: t.read() for name, t in lora.tensors.items()}
    k = "transformer_blocks.1.attn.add_k_proj"
    tensors[f"{k}.lora_A.weight"], tensors[f"{k}.lora_B.weight"] = torch.randn(5, 32), torch.randn(32, 5)
    odd = LoRA(tensors, {**lora.ranks, k: 5}, {**lora.scales, k: 0.4, Q: 10.0})
    read = read_lora(save_lora(odd, tmp_path))
    assert (read.ranks, read.scales) == (odd.ranks, odd.scales)
    image_model = make_image_model()
    image_model.load_lora_adapter(tmp_path / FILE, use_safetensors=True)
    found = error(run_merged(read, make_image_model()), run_theirs(image_model))
    parity("LoRA file with ranks and alphas by layer, merged, fp32", "diffusers", found, 1e-5)


def diffusers_lora(**options: Any) -> SD3Transformer2DModel:
    model = make_image_model()
    model.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["to_k", "ff.net.2"], **options}))
    randomize({n: p for n, p in model.named_parameters() if ".lora_" in n})
    return model


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 1.5), ({"use_rslora": True}, 3.0), ({"rank_pattern": {"to_k": 2}, "alpha_pattern": {"^to_k": 8}}, 1.5)],
    ids=["plain", "rslora", "patterns"],
)
def test_files_of_diffusers(options: dict[str, Any], scale: float, tmp_path: Path, parity: Parity) -> None:
    model = diffusers_lora(**{key: value for key, value in options.items() if key != "alpha_pattern"})
    model.save_lora_adapter(tmp_path)  # names without "transformer.", all of peft's options in the header
    lora = read_lora(tmp_path)
    assert lora.scales["transformer_blocks.0.ff.net.2"] == pytest.approx(scale)
    parity(f"LoRA file of diffusers ({', '.join(options) or 'plain'}), merged, fp32", "diffusers",
           error(run_merged(lora, make_image_model()), run_theirs(model)), 1e-5)  # fmt: skip


def test_files_of_the_pipeline_with_and_without_a_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = diffusers_lora()
    layers = {
        n.replace(".default.", "."): p.detach().contiguous() for n, p in model.named_parameters() if ".lora_" in n
    }
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "with", layers, transformer_lora_adapter_metadata={"r": 4, "lora_alpha": 6}
    )
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "without", layers)
    assert set(read_lora(tmp_path / "with").scales.values()) == {1.5}
    without = read_lora(tmp_path / "without")
    assert set(without.scales.values()) == {1.0}
    plain = make_image_model()
    plain.load_lora_adapter(tmp_path / "without" / FILE, use_safetensors=True)
    assert error(run_merged(without, make_image_model()), run_theirs(plain)) <= 1e-5


def test_files_of_peft(tmp_path: Path) -> None:
    plain = make_image_model()
    model = get_peft_model(plain, LoraConfig(r=4, lora_alpha=6, target_modules=["to_k", "ff.net.2"]))
    randomize({n: p for n, p in model.named_parameters() if ".lora_" in n})
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    lora = read_lora(tmp_path)
    assert set(lora.scales.values()) == {1.5}
    assert error(run_merged(lora, make_image_model()), run_theirs(plain)) <= 1e-5


def edited(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """Returns a copy of a good file with its tensors and header changed."""
    file = trained(folder)[1]
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    tensors = load_file(file)
    change(tensors, header)
    text = json.dumps(header) if isinstance(header, dict) and "raw" not in header else header["raw"]
    save_file(tensors, file, metadata={"lora_adapter_metadata": text})
    return file


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def test_alphas_as_tensors_and_older_names(tmp_path: Path) -> None:
    good = read_lora(trained(tmp_path / "good")[1])

    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        for name in list(tensors):
            new = name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
            tensors[new] = tensors.pop(name)
            tensors[new.split(".lora.")[0] + ".alpha"] = torch.tensor(4.5)
        header.clear()

    assert same(read_lora(edited(tmp_path / "old", change)), good)
    assert same(read_lora(edited(tmp_path / "live", renamed(".weight", ".default.weight"))), good)


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, header: tensors.update({f"transformer.{name}": value})


def say(**values: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, header: header.update({f"transformer.{key}": value for key, value in values.items()})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, h: t.update({"text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(3, 8)}), "text encoder"),
        (renamed("transformer.transformer_blocks", "lora_te1_text_model_encoder"), "text encoder"),
        (renamed("transformer.transformer_blocks.", "lora_unet_joint_blocks_"), "kohya"),
        (put(f"{Q}.lora_magnitude_vector", torch.ones(32)), "DoRA"),
        (put(f"{Q}.dora_scale", torch.ones(32)), "DoRA"),
        (put(f"{Q}.lokr_w1", torch.ones(3, 8)), "another kind of adapter"),
        (put(f"{Q}.hada_w1_a", torch.ones(3, 8)), "another kind of adapter"),
        (put(f"{Q}.lora_B.bias", torch.ones(32)), "biases"),
        (put("norm_out.diff", torch.ones(32)), "biases or norms"),
        (put("proj_out.weight", torch.ones(64, 32)), r"proj_out\.weight\" is no tensor of a LoRA"),
        (lambda t, h: t.pop(f"transformer.{Q}.lora_B.weight"), r"to_q\.lora_B\.weight\" is missing"),
        (lambda t, h: t.clear(), "no layer in it"),
        (put(f"{Q}.lora_B.weight", torch.ones(32, 4)), r"has \(3, 32\) and \(32, 4\)"),
        (put(f"{Q}.lora_A.weight", torch.ones(3, 32, 1, 1)), "LoRA of linear layers"),
        (put(f"{Q}.lora_A.weight", torch.ones(3, 32, dtype=torch.int8)), r"stored as torch\.int8"),
        (put("proj_out.alpha", torch.tensor(2.0)), r"proj_out\.alpha\" belongs to no layer"),
        (put(f"{Q}.alpha", torch.tensor(2.0)), r"alpha 2, and the header says 4\.5"),
        (put(f"{Q}.alpha", torch.ones(2)), r"alpha\" is no single number"),
        (say(use_dora=True), "use_dora=True: not plain LoRA"),
        (say(bias="all"), "bias=all"),
        (say(init_lora_weights="pissa"), "init_lora_weights=pissa"),
        (say(peft_type="LOKR"), "peft_type=LOKR"),
        (say(r=7), "has rank 3, and the header says 7"),
        (lambda t, h: h.pop("transformer.lora_alpha"), "no lora_alpha"),
        (say(lora_alpha="much"), "'much', no number"),
        (say(lora_alpha=float("inf")), "is inf"),
        (say(lora_alpha=0), r"is 0\.0"),
        (say(rank_pattern={"(a+)+$": 3}), "no name of a layer"),
        (say(rank_pattern=[3]), "rank_pattern"),
        (lambda t, h: h.update(raw="{"), "unreadable lora_adapter_metadata"),
        (lambda t, h: h.update(raw="[1]"), "not a JSON object"),
    ],
)
def test_other_files_are_refused_by_name(change: Callable[..., None], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_lora(edited(tmp_path, change))
    assert str(tmp_path) in str(caught.value)


def test_pickles_and_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pickles"
    folder.mkdir()
    (folder / "pytorch_lora_weights.bin").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    for path in (folder, folder / "pytorch_lora_weights.bin"):
        with pytest.raises(UserError, match=r"pytorch_lora_weights\.bin is a pickle.*\n.*safetensors"):
            read_lora(path)
    file = trained(tmp_path / "cut")[1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged weights"):
        read_lora(file)
    with pytest.raises(UserError, match="no such file or folder"):
        read_lora(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"no {FILE} in it"):
        read_lora(tmp_path / "empty")
    (tmp_path / "empty" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"there are diffusion_pytorch_model\.safetensors"):
        read_lora(tmp_path / "empty")
    with pytest.raises(UserError, match=r"model\.safetensors.*damaged"):
        read_lora(tmp_path / "empty" / "diffusion_pytorch_model.safetensors")


def test_what_is_not_a_whole_lora_is_not_written(tmp_path: Path) -> None:
    lora = read_lora(trained(tmp_path)[1])
    tensors = {name: t.read() for name, t in lora.tensors.items()}
    with pytest.raises(ValueError, match=r"\[3\], and the config says 4"):
        write_lora(tensors, tmp_path / "x", LoRAConfig(rank=4))
    with pytest.raises(ValueError, match="no tensor of a LoRA"):
        write_lora({**tensors, f"{Q}.base_layer.weight": torch.ones(32, 32)}, tmp_path / "x", LORA)
    del tensors[f"{Q}.lora_A.weight"]
    with pytest.raises(UserError, match=r"to_q\.lora_A\.weight\" is missing"):
        write_lora(tensors, tmp_path / "x", LORA)
    assert not (tmp_path / "x").exists()
