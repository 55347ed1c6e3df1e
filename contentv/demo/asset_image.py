"""Trains the demo's text-to-image model, an SD3 folder in small, which the demo's video model starts from.

It lives on the latents of another VAE (2D), so taking it over means what it means at full size: new latents, old words.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from contentv.base.log import get_logger
from contentv.curation.synth_captions import caption_of
from contentv.curation.synth_world import render_clip, sample_spec
from contentv.demo.asset_optim import Schedule
from contentv.demo.asset_text import SIDE_PX, WIDTH, to_unit, tokenize
from contentv.demo.asset_vae import reconstruction_loss, spread_loss


@dataclass
class ImageTraining:
    """How the image parts are trained: wall time in minutes, number of scenes, batch, rates, seed."""

    vae_minutes: float = 4.0
    model_minutes: float = 12.0
    scenes: int = 4000
    batch: int = 32
    muon_lr: float = 0.012
    adam_lr: float = 2e-3
    model_weight_decay: float = 0.1  # keeps the weights about as large as new ones: large ones hardly learn anew
    ema: float = 0.99
    seed: int = 0


@dataclass(frozen=True)
class Pictures:
    """Scenes' first frames in [-1, 1], each with one caption."""

    frames: Float[Tensor, "b 3 H W"]
    captions: list[str]


def draw_pictures(rng: np.random.Generator, n: int) -> Pictures:
    """Returns `n` frames: half with a picture's caption, half with a clip's: so words of motion are known."""
    pictures, captions = [], []
    for _ in range(n):
        spec = sample_spec(rng)
        pictures.append(render_clip(spec, 1, SIDE_PX)[0])
        captions.append(caption_of(spec, picture=bool(rng.random() < 0.5)))
    return Pictures(to_unit(pictures), captions)


def new_image_vae() -> AutoencoderKL:
    """Returns an untrained 2D VAE: 8x, 16 channels, no quantisation convolutions, as SD3's."""
    blocks = 4
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(16, 24, 32, 32), layers_per_block=1, latent_channels=16, norm_num_groups=8,
        sample_size=SIDE_PX, use_quant_conv=False, use_post_quant_conv=False, force_upcast=False,
    )  # fmt: skip


def new_image_model() -> SD3Transformer2DModel:
    """Returns an untrained transformer of the demo's size: 4 layers, 4 heads of 32."""
    return SD3Transformer2DModel(
        sample_size=SIDE_PX // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=WIDTH, caption_projection_dim=128, pooled_projection_dim=WIDTH,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip


def train_image_vae(pictures: Pictures, config: ImageTraining) -> tuple[AutoencoderKL, float]:
    """Trains for `config.vae_minutes`; returns the VAE, its scaling and shift measured, and the last PSNR in dB."""
    torch.manual_seed(config.seed)
    vae = new_image_vae()
    schedule = Schedule(vae, config.muon_lr, config.adam_lr)
    started, psnr = time.monotonic(), 0.0
    while (share := (time.monotonic() - started) / 60.0 / config.vae_minutes) < 1.0:
        frames = pictures.frames[torch.randint(len(pictures.frames), (16,))]
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(frames).latent_dist.mode().float()
            output = vae.decode(mean + 0.1 * torch.randn_like(mean)).sample.float()
        spread = spread_loss(mean[:, :, None]) / mean.shape[1]
        loss = reconstruction_loss(output[:, :, None], frames[:, :, None]) + 0.02 * spread
        schedule.step(loss, share)
        psnr = 0.95 * psnr + 0.05 * -10.0 * float(((output.detach() - frames) / 2).square().mean().log10())
        if schedule.steps % 100 == 0:
            get_logger().info(f"image vae step {schedule.steps} share {share:.2f} psnr {psnr:.2f}")
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.frames[:512].split(64)])
    scaling, shift = 1.0 / float(latents.std()), float(latents.mean())
    vae.register_to_config(scaling_factor=round(scaling, 4), shift_factor=round(shift, 4))
    return vae.eval(), psnr


@torch.no_grad()
def encode_captions(
    encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Returns the penultimate states (n, l, d) and the projected pooled vectors (n, p)."""
    output = encoder(input_ids=tokenize(tokenizer, captions), output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Pictures) -> Float[Tensor, "b 16 h w"]:
    """Returns the latents, shifted and scaled."""
    parts = [vae.encode(part).latent_dist.mode() for part in pictures.frames.split(64)]
    return (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor


def train_image_model(
    latents: Float[Tensor, "b 16 h w"], text: tuple[Tensor, Tensor], null: tuple[Tensor, Tensor], config: ImageTraining
) -> tuple[SD3Transformer2DModel, float]:
    """Trains by flow matching for `config.model_minutes`; returns the running average and the last loss.

    Args:
        latents: of all pictures.
        text: states and pooled vectors of their captions.
        null: those of the empty caption, shown in one case of ten.
    """
    torch.manual_seed(config.seed)
    model, average = new_image_model(), new_image_model()
    average.load_state_dict(model.state_dict())
    schedule = Schedule(model, config.muon_lr, config.adam_lr, weight_decay=config.model_weight_decay)
    started, shown = time.monotonic(), 2.0
    while (share := (time.monotonic() - started) / 60.0 / config.model_minutes) < 1.0:
        rows = torch.randint(len(latents), (config.batch,))
        drop = torch.rand(config.batch) < 0.1
        tokens = torch.where(drop[:, None, None], null[0], text[0][rows])
        pooled = torch.where(drop[:, None], null[1], text[1][rows])
        clean, noise = latents[rows], torch.randn(config.batch, *latents.shape[1:])
        sigma = torch.randn(config.batch).sigmoid()[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model((1 - sigma) * clean + sigma * noise, tokens, pooled, 1000 * sigma.flatten()).sample
        loss = (velocity.float() - (noise - clean)).square().mean()
        schedule.step(loss, share)
        decay = min(config.ema, (schedule.steps + 1) / (schedule.steps + 10))
        with torch.no_grad():
            for kept, value in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(value, 1.0 - decay)
        shown = 0.97 * shown + 0.03 * float(loss)
        if schedule.steps % 50 == 0:
            get_logger().info(f"image model step {schedule.steps} share {share:.2f} loss {shown:.4f}")
    return average.eval(), shown


@torch.no_grad()
def sample_pictures(
    model: SD3Transformer2DModel, vae: AutoencoderKL, text: tuple[Tensor, Tensor], null: tuple[Tensor, Tensor],
    seed: int, steps: int = 16, guidance: float = 3.0,
) -> Float[Tensor, "b 3 H W"]:  # fmt: skip
    """Returns one picture in [-1, 1] per row of `text`, by Euler steps with guidance."""
    n = len(text[0])
    latents = torch.randn(n, 16, SIDE_PX // 8, SIDE_PX // 8, generator=torch.Generator().manual_seed(seed))
    line = torch.linspace(1.0, 0.0, steps + 1)
    sigmas = 3.0 * line / (1.0 + 2.0 * line)
    tokens = torch.cat([text[0], null[0].expand(n, -1, -1)])
    pooled = torch.cat([text[1], null[1].expand(n, -1)])
    for now, then in itertools.pairwise(sigmas):
        both = model(latents.repeat(2, 1, 1, 1), tokens, pooled, (1000 * now).expand(2 * n)).sample
        told, untold = both.chunk(2)
        latents = latents + (then - now) * (untold + guidance * (told - untold))
    picture: Tensor = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    return picture.clamp(-1.0, 1.0)


def write_image_model(folder: Path, model: SD3Transformer2DModel, vae: AutoencoderKL | None) -> None:
    """Writes, beside the text encoder and tokenizer, what else an SD3 pipeline folder has, in fp16.

    Without `vae` its place is null in model_index.json.
    """
    new = new_image_model()
    new.load_state_dict(model.state_dict())
    new.half().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    if vae is not None:
        vae.half().save_pretrained(folder / "vae")
        vae.float()
    index = {
        "_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.1",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": [None, None], "tokenizer_2": [None, None],
        "text_encoder_3": [None, None], "tokenizer_3": [None, None],
        "vae": ["diffusers", "AutoencoderKL"] if vae is not None else [None, None],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
