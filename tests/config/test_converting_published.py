"""What leaves `convert`, read by diffusers, transformers and stand-ins of the published classes; docs/weights.md."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import published_pipeline as published
import pytest
import small_weights as small
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from small_weights import IMAGE, VAE, bits, job, stored, write_checkpoint, write_run
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

from contentv.cli.main import main
from contentv.config.converting import convert
from contentv.curation.video_io import read_video
from contentv.models.io import write_transformer
from contentv.models.mmdit import MMDiT
from contentv.models.text import TextStack
from contentv.models.vae import VideoVAE
from contentv.train.manifest import StageManifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_of_published_widths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    published.write_encoders(root / "text")
    run = root / "run"
    torch.manual_seed(4)
    write_transformer(MMDiT(published.SHAPE), run / "export" / "ema", published.SHAPE)
    StageManifest(
        "sft", asdict(published.SHAPE), shift=5.0, weights={"ema": "export/ema"}, vae_path=str(VAE),
        text_path=str(root / "text"), vae_fingerprint=VideoVAE.from_folder(VAE).fingerprint,
        text_fingerprint=TextStack.from_folder(root / "text").fingerprint,
    ).write(run)  # fmt: skip
    return run


def test_the_published_pipeline_loads_the_whole_folder(
    run_of_published_widths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.install(monkeypatch)
    to = convert(job(run_of_published_widths, tmp_path / "to", max_shard_gb=2e-4))
    assert len(list((to / "transformer").glob("*.safetensors"))) > 2
    assert len(list((to / "text_encoder_3").glob("*.safetensors"))) > 1
    transformer, report = published.SD3Transformer3DModel.from_pretrained(
        to, subfolder="transformer", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    vae = AutoencoderKLWan.from_pretrained(to, subfolder="vae")
    pipeline = published.ContentVPipeline.from_pretrained(to, vae=vae, transformer=transformer)
    assert bits(pipeline.transformer.state_dict()) == bits(stored(run_of_published_widths / "export" / "ema"))
    assert type(pipeline.transformer) is published.SD3Transformer3DModel
    assert pipeline.scheduler.config.shift == 5.0
    assert pipeline.scheduler.config.use_dynamic_shifting is False
    assert (type(pipeline.vae).__name__, pipeline.vae.config.z_dim) == ("AutoencoderKLWan", 16)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipeline, part).float()
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt("a red circle", None, None, do_classifier_free_guidance=False)
    ours = TextStack.from_folder(to).encode(["a red circle"])
    assert tokens.shape == (1, 333, 4096)
    assert pooled.shape == (1, 2048)
    torch.testing.assert_close(tokens, ours.tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, ours.pooled, rtol=0, atol=1e-5)
    # and back: what the published class saves is ours to read
    transformer.save_pretrained(tmp_path / "saved")
    again = convert(job(tmp_path / "saved", tmp_path / "again", layout="transformer"))
    assert bits(stored(again)) == bits(stored(to / "transformer"))


def test_every_part_loads_by_its_own_class(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    to = convert(job(tmp_path / "run", tmp_path / "to"))
    model, report = SD3Transformer2DModel.from_pretrained(to / "transformer", output_loading_info=True)
    assert list(report["missing_keys"]) == ["pos_embed.pos_embed"]
    assert not report["unexpected_keys"]
    assert model.config.num_layers == 2
    vae = AutoencoderKLWan.from_pretrained(to / "vae").float().state_dict()
    truth = AutoencoderKLWan.from_pretrained(VAE).float().state_dict()
    assert bits(vae) == bits(truth)
    text = CLIPTextModelWithProjection.from_pretrained(to / "text_encoder").state_dict()
    assert bits(text) == bits(CLIPTextModelWithProjection.from_pretrained(IMAGE / "text_encoder").state_dict())
    caption = "a red circle moving left"
    assert AutoTokenizer.from_pretrained(to / "tokenizer")(caption) == AutoTokenizer.from_pretrained(
        IMAGE / "tokenizer"
    )(caption)
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(to / "scheduler").config.shift == 5.0


def test_t5_is_copied(run_of_published_widths: Path, tmp_path: Path) -> None:
    to = convert(job(run_of_published_widths, tmp_path / "to"))
    source = run_of_published_widths.parent / "text" / "text_encoder_3"
    found = T5EncoderModel.from_pretrained(to / "text_encoder_3").state_dict()
    assert bits(found) == bits(T5EncoderModel.from_pretrained(source).state_dict())


def test_an_exported_folder_samples_what_its_run_samples(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    convert(job(tmp_path / "run", tmp_path / "to"))
    size = ["frames=5", "height=32", "width=32", "steps=2", "prompt=a red circle", "device=cpu", "fps=8"]
    videos = []
    for name in ("run", "to"):
        out = tmp_path / f"{name}.mp4"
        assert main(["sample", f"checkpoint={tmp_path / name}", f"out={out}", *size]) == 0
        videos.append(read_video(out).frames)
    assert np.array_equal(*videos)
    assert videos[0].shape == (5, 32, 32, 3)


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(bash|python)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def test_every_command_of_the_page_on_weights_works(
    run_of_published_widths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "contentv").symlink_to(ROOT / "contentv")
    (tmp_path / "SD35").symlink_to(IMAGE)
    (tmp_path / "WAN").mkdir()
    (tmp_path / "WAN" / "vae").symlink_to(VAE)
    (tmp_path / "RUN").symlink_to(run_of_published_widths)
    states = write_run(tmp_path / "demo-out" / "run" / "rlhf")
    write_checkpoint(tmp_path / "demo-out" / "run" / "rlhf" / "checkpoints" / "step-00000016", states)
    found = blocks((ROOT / "docs" / "weights.md").read_text(encoding="utf-8"))
    assert [kind for kind, _ in found].count("bash") >= 3
    commands = 0
    for kind, text in found:
        if kind == "python":
            exec(compile(text, "docs/weights.md", "exec"), {})
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            commands += 1
            if words[0] == "contentv":
                assert main(words[1:]) == 0, line
            else:
                subprocess.run(words, check=True, timeout=60)
    assert commands >= 9
    assert bits(stored(tmp_path / "outputs" / "weights" / "raw" / "transformer")) == bits(
        {name: t.to(torch.bfloat16) for name, t in states["raw"].items()}
    )
    assert "not trained on video yet" in (tmp_path / "START" / "README.md").read_text()
    assert read_video(tmp_path / "outputs" / "weights" / "circle.mp4").frames.shape == (17, 80, 80, 3)
    assert torch.equal(
        stored(tmp_path / "START" / "transformer")["proj_out.bias"],
        stored(IMAGE / "transformer")["proj_out.bias"].to(torch.bfloat16),
    )


def test_links_and_caches_are_followed(tmp_path: Path) -> None:
    """The Hugging Face cache holds links to blobs: what is written must not."""
    write_run(tmp_path / "run")
    real: Any = convert(job(tmp_path / "run", tmp_path / "real"))
    cache = tmp_path / "cache"
    for path in real.rglob("*"):
        target = cache / path.relative_to(real)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    to = convert(job(cache, tmp_path / "to"))
    assert not any(path.is_symlink() for path in to.rglob("*"))
    assert bits(stored(to / "transformer")) == bits(small.random_state(2))
