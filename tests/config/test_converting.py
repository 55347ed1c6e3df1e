"""Conversions: every source to every layout, to the bit, in bounded memory, and everything that is refused."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import diffusers
import pytest
import small_weights as small
import torch
import toy
import yaml
from safetensors.torch import load_file, save_file
from small_weights import IMAGE, SHAPE, VAE, bits, image_model, job, stored, write_checkpoint, write_run

from contentv.base.errors import UserError
from contentv.config.converting import convert
from contentv.models.io import open_transformer, read_transformer, write_transformer
from contentv.models.lora import LoRAConfig, lora_initial, write_lora
from contentv.models.stored import StoredTensor
from contentv.models.text import TextStack
from contentv.models.vae import VideoVAE
from contentv.parallel.mesh import ParallelConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


def refused(*arguments: Any, **values: Any) -> str:
    config = job(*arguments, **values)
    with pytest.raises(UserError) as caught:
        convert(config)
    to = Path(config.to)
    assert not to.exists() or not any(to.iterdir()) or config.overwrite
    assert not to.with_name(f"{to.name}.partial").exists()
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["10GB", "60KB"])
def test_round_trip_to_the_bit(tmp_path: Path, dtype: torch.dtype, shard: str) -> None:
    truth = bits(image_model(tmp_path / "sd3" / "transformer", dtype, shard))
    assert (tmp_path / "sd3" / "transformer" / WEIGHTS).exists() == (shard == "10GB")
    convert(job(tmp_path / "sd3", tmp_path / "one", layout="transformer", max_shard_gb=5e-5))
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    sizes = [path.stat().st_size for path in (tmp_path / "one").glob("*.safetensors")]
    assert max(sizes) < 50_000 + 8192  # the files are planned in the stored dtype, plus the header
    convert(job(tmp_path / "one", tmp_path / "two", vae=VAE, text=IMAGE, shift=3.0))
    convert(job(tmp_path / "two", tmp_path / "three", layout="transformer"))
    for folder in (tmp_path / "one", tmp_path / "two" / "transformer", tmp_path / "three"):
        assert bits(stored(folder)) == truth
        assert bits(read_transformer(folder).state_dict()) == truth
        config = json.loads((folder / "config.json").read_text())
        assert config["_class_name"] == "SD3Transformer3DModel"
        assert (config["num_layers"], config["joint_attention_dim"], config["qk_norm"]) == (2, 64, "rms_norm")


def test_dtypes(tmp_path: Path) -> None:
    state = image_model(tmp_path / "sd3")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        convert(job(tmp_path / "sd3", tmp_path / name, layout="transformer", dtype=name))
        assert bits(stored(tmp_path / name)) == bits({n: t.to(dtype) for n, t in state.items()})
    state["proj_out.bias"][3] = 7e4
    write_transformer(state, tmp_path / "loud", SHAPE)
    text = refused(tmp_path / "loud", tmp_path / "quiet", layout="transformer", dtype="fp16")
    assert "proj_out.bias" in text
    assert "bf16" in text


def test_a_run_becomes_a_pipeline_with_what_it_was_trained_with(tmp_path: Path) -> None:
    states = write_run(tmp_path / "run")
    to = convert(job(tmp_path / "run", tmp_path / "ema"))
    assert bits(stored(to / "transformer")) == bits(states["ema"])
    assert bits(stored(convert(job(tmp_path / "run", tmp_path / "raw", weights="raw")) / "transformer")) == bits(
        states["raw"]
    )
    assert json.loads((to / "scheduler" / "scheduler_config.json").read_text()) == {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0,
        "use_dynamic_shifting": False, "_diffusers_version": diffusers.__version__,
    }  # fmt: skip
    assert sorted(p.name for p in to.iterdir()) == [
        "README.md", "model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae",
    ]  # fmt: skip
    for path in (VAE / WEIGHTS, VAE / "config.json"):
        assert (to / "vae" / path.name).read_bytes() == path.read_bytes()
    for part in ("text_encoder", "tokenizer"):
        for path in (IMAGE / part).iterdir():
            assert (to / part / path.name).read_bytes() == path.read_bytes()
    assert VideoVAE.from_folder(to / "vae").fingerprint == VideoVAE.from_folder(VAE).fingerprint
    assert TextStack.from_folder(to).fingerprint == TextStack.from_folder(IMAGE).fingerprint
    card = (to / "README.md").read_text()
    for words in ("sft", "7 steps", "ema", "shift of the scheduler: 5", "f9_h64_w64", "Stability AI Community License"):
        assert words in card


def test_a_pipeline_keeps_its_own_parts_and_licences(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    first = convert(job(tmp_path / "run", tmp_path / "first"))
    (first / "LICENSE").write_text("terms")
    (first / "vae" / "NOTICE").write_text("of the vae")
    second = convert(job(first, tmp_path / "second"))
    third = convert(job(second / "transformer", tmp_path / "third"))  # its pipeline is found above it
    for folder in (second, third):
        assert (folder / "LICENSE").read_text() == "terms"
        assert (folder / "vae" / "NOTICE").read_text() == "of the vae"
        assert (folder / "transformer" / WEIGHTS).read_bytes() == (first / "transformer" / WEIGHTS).read_bytes()
        assert (folder / "model_index.json").read_bytes() == (first / "model_index.json").read_bytes()
        assert (folder / "scheduler" / "scheduler_config.json").read_text().count('"shift": 5.0') == 1


@pytest.fixture(scope="module")
def run_of_toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that was stopped after two checkpoints, written by the engine itself."""
    run = tmp_path_factory.mktemp("toy") / "run"
    run.mkdir()
    model = {**toy.SHAPE, "patch_size": 2, "qk_norm": "rms_norm"}
    config = {"model": model, "stage": {"name": "image"}, "timestep": {"shift": 2.0}, "init": "none"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    engine = toy.make_engine(ParallelConfig())
    truth: dict[str, Any] = {}
    for step in (1, 2):
        toy.train(engine, 1)
        engine.save(run / "checkpoints" / f"step-{step:08d}", {}, chunk_bytes=100_000)
    for which in ("ema", "raw"):
        truth[which] = dict(engine.state_tensors(ema=which == "ema"))
    engine.close()
    return run, truth


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_a_checkpoint(run_of_toy: tuple[Path, dict[str, Any]], tmp_path: Path, which: str) -> None:
    run, truth = run_of_toy
    checkpoint = run / "checkpoints" / "step-00000002"
    to = convert(job(checkpoint, tmp_path / "x", layout="transformer", weights=which))
    assert bits(stored(to)) == bits(truth[which])
    assert list(open_transformer(to).tensors) == list(truth[which])
    assert "step 2" in (to / "README.md").read_text()


def test_an_unfinished_run_is_taken_only_by_naming_its_checkpoint(
    run_of_toy: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, _ = run_of_toy
    text = refused(run, tmp_path / "x", layout="transformer")
    assert "not finished" in text
    assert f"from={run / 'checkpoints' / 'step-00000002'}" in text
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    victim = next((copy / "checkpoints" / "step-00000002").glob("ema-*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\1")
    assert "step-00000001" in refused(copy, tmp_path / "x", layout="transformer")
    assert victim.name in refused(copy / "checkpoints" / "step-00000002", tmp_path / "x", layout="transformer")
    convert(job(copy / "checkpoints" / "step-00000002", tmp_path / "raw", layout="transformer", weights="raw"))
    (copy / "config.yaml").rename(tmp_path / "config.yaml")
    assert "config.yaml" in refused(copy / "checkpoints" / "step-00000001", tmp_path / "x", layout="transformer")
    shutil.rmtree(copy / "checkpoints" / "step-00000001")
    (copy / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert "no complete checkpoint" in refused(copy, tmp_path / "x", layout="transformer")
    assert "no complete checkpoint" in refused(copy / "checkpoints" / "step-00000002", tmp_path / "x")


def lora_of(folder: Path, rank: int = 4, **changes: Any) -> dict[str, torch.Tensor]:
    config = LoRAConfig(rank=rank, alpha=2.0 * rank, **changes)
    torch.manual_seed(5)
    tensors = {name: 0.1 * torch.randn(t.shape) for name, t in lora_initial(config, SHAPE, 0).items()}
    write_lora(tensors, folder, config)
    return tensors


def test_a_lora_merged_unmerged_and_apart(tmp_path: Path) -> None:
    state = image_model(tmp_path / "base")
    lora = lora_of(tmp_path / "lora")
    common: dict[str, Any] = {"layout": "transformer", "lora": str(tmp_path / "lora")}
    found = stored(convert(job(tmp_path / "base", tmp_path / "merged", lora_scale=0.5, **common)))
    changed = 0
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        expected = tensor
        if f"{module}.lora_A.weight" in lora:
            a, b = lora[f"{module}.lora_A.weight"].double(), lora[f"{module}.lora_B.weight"].double()
            expected = (tensor.double() + 0.5 * 2.0 * b @ a).float()
            assert not torch.equal(found[name], tensor)
            changed += 1
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-7)
    assert changed == 2 * 4
    back = convert(job(tmp_path / "merged", tmp_path / "back", lora_scale=0.5, lora_mode="unmerge", **common))
    for name, tensor in stored(back).items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=2e-7)
    apart = convert(job(tmp_path / "base", tmp_path / "apart", lora_mode="apart", **common))
    assert bits(stored(apart)) == bits(state)
    kept = load_file(apart / "lora" / "pytorch_lora_weights.safetensors")
    assert bits(kept) == bits({f"transformer.{name}": t for name, t in lora.items()})
    low = convert(job(tmp_path / "base", tmp_path / "low", dtype="bf16", **common))
    assert {t.dtype for t in stored(low).values()} == {torch.bfloat16}


def test_a_run_that_trained_a_lora_brings_it(tmp_path: Path) -> None:
    state = image_model(tmp_path / "base")
    facts = {"base": str(tmp_path / "base"), "rank": 4, "alpha": 8.0}
    write_run(tmp_path / "run", lora=facts)
    for which in ("ema", "raw"):
        shutil.rmtree(tmp_path / "run" / "export" / which)
        lora_of(tmp_path / "run" / "export" / which)
    expected = convert(
        job(tmp_path / "base", tmp_path / "e", layout="transformer", lora=str(tmp_path / "run" / "export" / "ema"))
    )
    assert bits(stored(convert(job(tmp_path / "run", tmp_path / "m")) / "transformer")) == bits(stored(expected))
    apart = convert(job(tmp_path / "run", tmp_path / "a", lora_mode="apart"))
    assert bits(stored(apart / "transformer")) == bits(state)
    assert (apart / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert "apart already" in refused(tmp_path / "run", tmp_path / "x", lora_mode="unmerge")
    assert "already" in refused(tmp_path / "run", tmp_path / "x", lora=str(tmp_path / "run" / "export" / "ema"))
    shutil.rmtree(tmp_path / "base")
    assert "no longer" in refused(tmp_path / "run", tmp_path / "x")


def test_a_checkpoint_of_a_run_that_trains_a_lora(tmp_path: Path) -> None:
    state = image_model(tmp_path / "base")
    lora = lora_of(tmp_path / "lora")
    live = {name.replace(".weight", ".default.weight"): t for name, t in lora.items()}
    write_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    (tmp_path / "run" / "stage.json").unlink()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    facts = {"base": str(tmp_path / "base"), "rank": 4, "alpha": 8.0}
    write_checkpoint(checkpoint, {"raw": live, "ema": live}, lora=facts)
    options: dict[str, Any] = {"layout": "transformer"}
    expected = convert(job(tmp_path / "base", tmp_path / "e", lora=str(tmp_path / "lora"), **options))
    assert bits(stored(convert(job(checkpoint, tmp_path / "m", **options)))) == bits(stored(expected))
    apart = convert(job(checkpoint, tmp_path / "a", lora_mode="apart", weights="raw", **options))
    assert bits(stored(apart)) == bits(state)
    kept = load_file(apart / "lora" / "pytorch_lora_weights.safetensors")
    assert bits(kept) == bits({f"transformer.{name}": t for name, t in lora.items()})


def test_memory_is_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = image_model(tmp_path / "sd3", shard="60KB", num_layers=6)
    live, peak, reads = 0, 0, 0

    def free(size: int) -> None:
        nonlocal live
        live -= size

    def read(self: StoredTensor) -> torch.Tensor:
        nonlocal live, peak, reads
        value = original(self).clone()  # counted as if nothing were mapped
        live, reads = live + value.nbytes, reads + 1
        peak = max(peak, live)
        weakref.finalize(value.untyped_storage(), free, value.nbytes)
        return value

    original = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", read)
    convert(job(tmp_path / "sd3", tmp_path / "to", layout="transformer", max_shard_gb=1e-4))
    total, largest = sum(t.nbytes for t in state.values()), max(t.nbytes for t in state.values())
    assert reads == len(state)
    assert total > 8 * 100_000
    assert peak <= 2 * largest  # the one that is written and the one that is read
    assert live == 0


def test_wrong_tensors_are_named(tmp_path: Path) -> None:
    image_model(tmp_path / "sd3")
    path = tmp_path / "sd3" / WEIGHTS
    good = load_file(path)
    for changes, words in (
        ({"proj_out.bias": None}, "missing: proj_out.bias"),
        ({"extra.weight": torch.zeros(1)}, "unknown: extra.weight"),
        ({"proj_out.bias": torch.zeros(3)}, "of another shape: proj_out.bias"),
        ({"proj_out.bias": good["proj_out.bias"].int()}, "not of floating point: proj_out.bias"),
    ):
        state = {name: t for name, t in {**good, **changes}.items() if t is not None}
        save_file(state, path)
        assert words in refused(tmp_path / "sd3", tmp_path / "x", layout="transformer")
    save_file(good, path)
    path.write_bytes(path.read_bytes()[:-7])
    assert "damaged" in refused(tmp_path / "sd3", tmp_path / "x", layout="transformer")
    path.rename(tmp_path / "sd3" / "diffusion_pytorch_model.bin")
    assert "pickle" in refused(tmp_path / "sd3", tmp_path / "x", layout="transformer")


def test_models_that_contentv_is_not_are_refused(tmp_path: Path) -> None:
    image_model(tmp_path / "medium", dual_attention_layers=(0,))
    text = refused(tmp_path / "medium", tmp_path / "x", layout="transformer")
    assert "dual attention" in text
    assert "SD3.5 Large" in text
    assert "AutoencoderKLWan" in refused(VAE, tmp_path / "x", layout="transformer")
    assert "holds no transformer" in refused(IMAGE / "tokenizer", tmp_path / "x", layout="transformer")


def test_parts_that_are_missing_or_another_models_are_refused(tmp_path: Path) -> None:
    assert "vae.path" in refused(IMAGE, tmp_path / "x")
    image_pipeline = tmp_path / "image"
    shutil.copytree(IMAGE, image_pipeline)
    (image_pipeline / "vae").mkdir()
    (image_pipeline / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    text = refused(image_pipeline, tmp_path / "x")
    assert "image VAE" in text
    assert "vae.path=DIR" in text
    assert "text.path" in refused(IMAGE / "transformer", tmp_path / "x", vae=VAE, text=tmp_path / "nowhere")

    bare = tmp_path / "bare"
    shutil.copytree(IMAGE / "transformer", bare)
    assert "give text.path=DIR" in refused(bare, tmp_path / "x", vae=VAE)
    text = refused(bare, tmp_path / "x", vae=VAE, text=IMAGE)
    assert "shift" in text
    assert "unknown" in text

    write_run(tmp_path / "run", vae_fingerprint="0" * 32)
    assert "0" * 32 in refused(tmp_path / "run", tmp_path / "x")
    write_run(tmp_path / "run2", text_fingerprint="1" * 32)
    assert "1" * 32 in refused(tmp_path / "run2", tmp_path / "x")
    write_run(tmp_path / "run3", vae_path=str(tmp_path / "gone"))
    assert "gone" in refused(tmp_path / "run3", tmp_path / "x")

    image_model(tmp_path / "wide", pooled_projection_dim=80)
    assert "64 wide, the model takes 80" in refused(tmp_path / "wide", tmp_path / "x", vae=VAE, text=IMAGE, shift=3.0)
    image_model(tmp_path / "narrow", in_channels=4, out_channels=4)
    text = refused(tmp_path / "narrow", tmp_path / "x", vae=VAE, text=IMAGE, shift=3.0)
    assert "16 latent channels, the model takes 4" in text


def test_loras_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    image_model(tmp_path / "base")
    lora_of(tmp_path / "lora")
    options = {"layout": "transformer", "lora": str(tmp_path / "lora")}
    assert "scale" in refused(tmp_path / "base", tmp_path / "x", lora_mode="apart", lora_scale=0.5, **options)
    assert "no LoRA" in refused(tmp_path / "base", tmp_path / "x", layout="transformer", lora_mode="unmerge")
    assert "no LoRA" in refused(tmp_path / "base", tmp_path / "x", layout="transformer", lora_scale=2.0)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    other = {name.replace("attn.to_q", "attn.to_elsewhere"): t for name, t in tensors.items()}
    save_file(other, file)
    assert "to_elsewhere" in refused(tmp_path / "base", tmp_path / "x", **options)
    file.rename(file.with_suffix(".bin"))
    assert "pickle" in refused(tmp_path / "base", tmp_path / "x", **options)


def test_targets_that_would_cost_something_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_model(tmp_path / "sd3" / "transformer")
    with pytest.raises(UserError, match="to is not set"):
        convert(job(tmp_path / "sd3", "", layout="transformer"))
    for to in (tmp_path / "sd3", tmp_path, tmp_path / "sd3" / "inside"):
        with pytest.raises(UserError, match="would lie in the other"):
            convert(job(tmp_path / "sd3", to, layout="transformer", overwrite=True))
    done = convert(job(tmp_path / "sd3", tmp_path / "done", layout="transformer"))
    with pytest.raises(UserError, match="overwrite=true"):
        convert(job(tmp_path / "sd3", done, layout="transformer"))
    convert(job(tmp_path / "sd3", done, layout="transformer", dtype="bf16", overwrite=True))
    assert {t.dtype for t in stored(done).values()} == {torch.bfloat16}
    monkeypatch.setattr("contentv.config.converting.free_bytes", lambda path: 1000)
    assert "are free" in refused(tmp_path / "sd3", tmp_path / "x", layout="transformer")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused(tmp_path / "sd3", tmp_path / "x", layout="transformer")


def test_it_says_what_the_published_class_cannot_load_and_when_the_shift_changes(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    heard = small.warnings_of(lambda: convert(job(tmp_path / "run", tmp_path / "x", shift=2.0)))
    assert any("shift=2 is not the trained one, 5" in line for line in heard)
    assert any("joint_attention_dim 64" in line for line in heard)
    assert json.loads((tmp_path / "x" / "scheduler" / "scheduler_config.json").read_text())["shift"] == 2.0
