"""The demo's shipped models load with the published classes from their folders, and do what they were trained for."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, SD3Transformer2DModel
from transformers import AutoConfig, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from contentv.curation.synth_captions import MOVING, every_caption, prompt
from contentv.curation.synth_world import COLOURS, DIRECTIONS, SHADES, render_clip, sample_spec
from contentv.demo.asset_reward import FAULTS, spoil
from contentv.demo.asset_text import MAX_TOKENS, score, to_unit, tokenize
from contentv.demo.asset_vae import WholeClip, new_vae
from contentv.demo.classifier import classify
from contentv.demo.make_assets import ASSETS, main

cv2.setNumThreads(1)  # its threads wait for each other on a busy machine
TEXT = ASSETS / "image_model"


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(ASSETS / "vae", torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reward() -> tuple[CLIPModel, CLIPTokenizer]:
    folder = ASSETS / "reward"
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(folder)


def test_all_together_are_small_and_without_pickles() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6 * 2**20
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".md"}


def test_readme_names_every_folder() -> None:
    text = (ASSETS / "README.md").read_text()
    assert all(f"`{path.name}/`" in text for path in ASSETS.iterdir() if path.is_dir())


@torch.no_grad()
def test_vae_round_trip_is_still_read_right(vae: AutoencoderKLWan) -> None:
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(8):
        spec = sample_spec(rng)
        clip = render_clip(spec, 9, 64)
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        latents = vae.encode(video).latent_dist.mode()
        assert latents.shape == (1, 16, 3, 8, 8)
        again = ((vae.decode(latents).sample[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        assert 10 * np.log10(255**2 / np.square(again.astype(float) - clip).mean()) > 22
        colour, direction, _ = classify(again)
        hits += [colour == spec.colour, direction == spec.direction]
    assert np.mean(hits) > 0.9


@torch.no_grad()
def test_latents_have_the_mean_and_spread_the_config_says(vae: AutoencoderKLWan) -> None:
    rng = np.random.default_rng(1)
    clips = np.stack([render_clip(sample_spec(rng), 5, 64) for _ in range(24)])
    video = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    rows = vae.encode(video).latent_dist.mode().transpose(0, 1).flatten(1)
    unit = (rows - torch.tensor(vae.config.latents_mean)[:, None]) / torch.tensor(vae.config.latents_std)[:, None]
    assert unit.mean(1).abs().max() < 0.5
    assert unit.std(1).min() > 0.6
    assert unit.std(1).max() < 1.5


@torch.no_grad()
def test_whole_clip_training_pass_equals_diffusers_chunks() -> None:
    torch.manual_seed(0)
    model = new_vae().eval()
    video = torch.randn(1, 3, 9, 16, 16)
    mean = model.encode(video).latent_dist.mode()
    decoded = model.decode(mean).sample
    whole = WholeClip(model)
    torch.testing.assert_close(whole.encode(video)[0], mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole.decode(mean).clamp(-1, 1), decoded, atol=1e-5, rtol=1e-4)


def test_tokenizer_knows_the_grammar_and_spells_the_rest() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(TEXT / "tokenizer")
    ids = tokenize(tokenizer, every_caption())
    assert tokenizer.model_max_length == MAX_TOKENS == ids.shape[1]
    assert (ids[:, -1] == tokenizer.eos_token_id).all()
    assert len({tuple(row) for row in ids.tolist()}) == len(every_caption())
    assert tokenizer("a red zebra").input_ids[1:3] == tokenizer("a red circle").input_ids[1:3]
    assert tokenizer.eos_token_id not in tokenizer("çédille 42!").input_ids[:-1]


@torch.no_grad()
@pytest.mark.parametrize("part", ["pooled", "tokens"])
def test_text_encoder_separates_colour_and_direction_linearly(part: str) -> None:
    """A ridge read-out fitted on three templates and circles reads the other templates and squares right."""
    encoder = CLIPTextModelWithProjection.from_pretrained(TEXT / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(TEXT / "tokenizer")
    words = [{"colour": c, "direction": d, "shade": s} for c in COLOURS for d in DIRECTIONS for s in SHADES]

    def features(templates: tuple[str, ...], shape: str) -> torch.Tensor:
        captions = [template.format(shape=shape, **row) for template in templates for row in words]
        output = encoder(input_ids=tokenize(tokenizer, captions), output_hidden_states=True)
        rows = output.text_embeds if part == "pooled" else output.hidden_states[-2].mean(1)
        return torch.cat([rows, torch.ones(len(rows), 1)], 1)

    learnt, asked = features(MOVING[:3], "circle"), features(MOVING[3:], "square")
    for names, key in ((list(COLOURS), "colour"), (list(DIRECTIONS), "direction")):
        label = torch.tensor([names.index(row[key]) for row in words])
        target = torch.eye(4)[label].repeat(3, 1)
        weights = torch.linalg.solve(learnt.T @ learnt + 0.1 * torch.eye(learnt.shape[1]), learnt.T @ target)
        assert ((asked @ weights).argmax(1) == label.repeat(2)).float().mean() > 0.95


def test_reward_prefers_right_colours_and_falls_with_every_fault(reward: tuple[CLIPModel, CLIPTokenizer]) -> None:
    clip, tokenizer = reward
    rng = np.random.default_rng(2)
    specs = [sample_spec(rng) for _ in range(16)]
    frames = to_unit([render_clip(s, 1, 96)[0] for s in specs])
    ids = tokenize(tokenizer, [prompt(s.colour, s.shape, s.direction, s.shade) for s in specs])
    others = [next(c for c in COLOURS if c != s.colour) for s in specs]
    wrong = tokenize(tokenizer, [prompt(o, s.shape, s.direction, s.shade) for o, s in zip(others, specs, strict=True)])
    with torch.no_grad():
        base = score(clip, frames, ids)
        assert (base > score(clip, frames, wrong)).float().mean() > 0.9
        noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
        for fault in FAULTS:
            means = [float(score(clip, spoil(frames, fault, level, noise), ids).mean()) for level in (0.0, 0.5, 1.0)]
            assert means[0] > means[1] > means[2], fault
    frames.requires_grad_(True)
    score(clip, frames, ids).sum().backward()
    assert frames.grad is not None
    assert frames.grad.abs().amax((1, 2, 3)).min() > 0


def test_image_model_is_an_sd3_folder_of_the_demos_size() -> None:
    folder = ASSETS / "image_model"
    index = json.loads((folder / "model_index.json").read_text())
    model = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    config = model.config
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (4, 4, 32)
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None:
            assert (folder / name).is_dir()
    assert AutoConfig.from_pretrained(folder / "text_encoder").projection_dim == config.pooled_projection_dim == 64
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["shift"] == 3.0


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--part", "reward"]) == 2
