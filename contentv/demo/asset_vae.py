"""Trains the demo's small video VAE: a real `AutoencoderKLWan`, 8x in space and 4x in time, on synthetic clips.

What matters of its latents is that a diffusion model learns them easily: every channel near unit variance, channels
little correlated, smooth in space (a latent averaged over 2x2 cells must decode to the small picture), and a decoder
that forgives noise. PSNR comes second.
"""

from __future__ import annotations

import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from jaxtyping import Float
from torch import Tensor, nn

from contentv.base.log import get_logger
from contentv.curation.synth_world import VARIANTS, render_clip, sample_spec
from contentv.demo.asset_optim import Schedule

# (frames, side in px, clips in a step, weight in the mix): mostly 1 + 4 frames, which teach all the decoder knows
MIX = ((5, 64, 8, 0.55), (9, 64, 4, 0.2), (1, 64, 16, 0.08), (5, 96, 4, 0.12), (17, 96, 1, 0.05))
STILLS = (1, 64, 16, 1.0)  # what the first part of the training sees: colours and places come before motion


@dataclass
class VAETraining:
    """How the VAE is trained: wall time in minutes, share of it on stills, rates, weights of the loss's terms, seed."""

    minutes: float = 26.0
    stills_share: float = 0.15
    muon_lr: float = 0.012
    adam_lr: float = 3e-3
    kl_weight: float = 1e-4
    spread_weight: float = 0.02
    decoder_noise: float = 0.2
    small_share: float = 0.15
    ema: float = 0.99
    export_minutes: float = 4.0
    seed: int = 0


def new_vae() -> AutoencoderKLWan:
    """Returns an untrained VAE: 16 channels, pixels taken in patches of 2 x 2 (four times less work than without)."""
    return AutoencoderKLWan(
        base_dim=12,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def _resample_whole(self: WanResample, x: Tensor, feat_cache: object = None, feat_idx: object = None) -> Tensor:
    """The block's result for a whole clip at once; diffusers feeds it chunk by chunk, which is several times slower."""
    if self.mode == "upsample3d" and x.shape[2] > 1:
        b, c, t, h, w = x[:, :, 1:].shape
        tail = self.time_conv(x[:, :, 1:]).reshape(b, 2, c, t, h, w)
        x = torch.cat([x[:, :, :1], tail.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)], 2)
    b, c, t, h, w = x.shape
    y = self.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
    x = y.view(b, t, *y.shape[1:]).transpose(1, 2)
    if self.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
    return x


class WholeClip(nn.Module):
    """The VAE applied to whole clips in one pass: the same numbers as diffusers' chunks, for training."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae
        for module in vae.modules():
            if isinstance(module, WanResample):
                module.forward = types.MethodType(_resample_whole, module)
        for parameter in vae.parameters():  # channels last: twice as fast on a CPU at these widths
            if parameter.dim() == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)

    def encode(
        self, video: Float[Tensor, "b 3 T H W"]
    ) -> tuple[Float[Tensor, "b c t h w"], Float[Tensor, "b c t h w"]]:
        """Returns the posterior's mean and log variance."""
        x = patchify(video, self.vae.config.patch_size).contiguous(memory_format=torch.channels_last_3d)
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(x)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-12.0, 4.0)

    def decode(self, latents: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 3 T H W"]:
        """Returns the video, not clamped."""
        return unpatchify(self.vae.decoder(self.vae.post_quant_conv(latents)), self.vae.config.patch_size).float()


def random_clips(rng: np.random.Generator, clips: int, frames: int, side: int) -> Float[Tensor, "b 3 T H W"]:
    """Returns freshly drawn clips of all variants in [-1, 1]."""
    pictures = []
    for _ in range(clips):
        variant = str(rng.choice(VARIANTS, p=(0.72, 0.07, 0.07, 0.07, 0.07)))
        pictures.append(render_clip(sample_spec(rng, variant=variant), frames, side))
    video = torch.from_numpy(np.stack(pictures)).permute(0, 4, 1, 2, 3).contiguous()
    return video.float() / 127.5 - 1.0


def reconstruction_loss(output: Float[Tensor, "b 3 T H W"], video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, ""]:
    """Returns L1 + L2 weighted towards saturated pixels (the object) plus L1 of the differences along T, H and W."""
    saturation = (video.amax(1, keepdim=True) - video.amin(1, keepdim=True)) / 2.0
    off = output - video
    loss = ((1.0 + 4.0 * saturation) * (off.abs() + off.square())).mean()
    for dim in (2, 3, 4):
        if video.shape[dim] > 1:
            loss = loss + 0.5 * off.diff(dim=dim).abs().mean()
    return loss


def spread_loss(mean: Float[Tensor, "b c t h w"]) -> Float[Tensor, ""]:
    """Returns how far the channels are from zero mean, unit variance and no correlation over the batch."""
    rows = mean.transpose(0, 1).flatten(1)
    centre = rows.mean(1, keepdim=True)
    rows = rows - centre
    covariance = rows @ rows.T / rows.shape[1]
    diagonal = covariance.diagonal()
    across = covariance - torch.diag(diagonal)
    return centre.square().sum() + (diagonal - 1.0).square().sum() + 0.2 * across.square().sum()


def _step_loss(
    model: WholeClip, video: Tensor, config: VAETraining, noise: float, small: bool
) -> tuple[Tensor, Tensor]:
    """Returns the whole loss and its reconstruction term for one batch."""
    mean, log_variance = model.encode(video)
    latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    latents = latents + noise * torch.rand(mean.shape[0], 1, 1, 1, 1) * torch.randn_like(mean)
    target = video
    if small:
        latents = F.avg_pool3d(latents, (1, 2, 2))
        target = F.avg_pool3d(video, (1, 2, 2))
    reconstruction = reconstruction_loss(model.decode(latents), target)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean() * mean.shape[1]
    loss = reconstruction + config.kl_weight * kl
    if video.shape[0] * video.shape[2] >= 16:  # too few positions tell nothing about the channels' spread
        loss = loss + config.spread_weight / mean.shape[1] * spread_loss(mean)
    return loss, reconstruction.detach()


@torch.no_grad()
def measure_spread(vae: AutoencoderKLWan, seed: int, clips: int = 48) -> tuple[list[float], list[float]]:
    """Returns each channel's mean and standard deviation over clips of the demo's two video shapes and stills."""
    rng = np.random.default_rng(seed)
    rows = []
    for frames, side in ((17, 96), (9, 64), (1, 64)):
        for _ in range(clips // 8):
            mean = vae.encode(random_clips(rng, 8, frames, side)).latent_dist.mode()
            rows.append(mean.transpose(0, 1).flatten(1))
    every = torch.cat(rows, 1)
    return [round(v, 4) for v in every.mean(1).tolist()], [round(v, 4) for v in every.std(1).tolist()]


def export_vae(state: dict[str, Tensor], folder: Path, seed: int) -> AutoencoderKLWan:
    """Writes a diffusers folder with latents_mean and latents_std measured; returns the VAE as written."""
    vae = new_vae()
    vae.load_state_dict({name: value.contiguous() for name, value in state.items()})
    vae.half().float().eval()  # what is measured is what the file holds
    mean, std = measure_spread(vae, seed + 1)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    written = new_vae()
    written.load_state_dict(vae.state_dict())
    written.register_to_config(latents_mean=mean, latents_std=std)
    written.half().save_pretrained(folder)
    return vae


def train_vae(folder: Path, config: VAETraining) -> AutoencoderKLWan:
    """Trains for `config.minutes` of wall time, exporting the running average now and then; returns the final VAE."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    model = WholeClip(new_vae())
    schedule = Schedule(model, config.muon_lr, config.adam_lr)
    average = {name: value.clone() for name, value in model.vae.state_dict().items()}
    started = last_export = time.monotonic()
    shown = 1.0
    while (share := (time.monotonic() - started) / 60.0 / config.minutes) < 1.0:
        young = share < config.stills_share
        frames, side, clips, _ = STILLS if young else MIX[int(rng.choice(len(MIX), p=[row[3] for row in MIX]))]
        video = random_clips(rng, clips, frames, side)
        noise = config.decoder_noise * min(1.0, 2.0 * share)
        small = not young and bool(rng.random() < config.small_share)
        with torch.autocast("cpu", torch.bfloat16):
            loss, reconstruction = _step_loss(model, video, config, noise, small)
        schedule.step(loss, share)
        decay = min(config.ema, (schedule.steps + 1) / (schedule.steps + 10))
        for name, value in model.vae.state_dict().items():
            average[name].lerp_(value, 1.0 - decay)
        shown = 0.97 * shown + 0.03 * float(reconstruction)
        if schedule.steps % 100 == 0:
            get_logger().info(f"vae step {schedule.steps} share {share:.2f} reconstruction {shown:.4f}")
        if (time.monotonic() - last_export) / 60.0 > config.export_minutes:
            last_export = time.monotonic()
            export_vae(average, folder, config.seed)
    return export_vae(average, folder, config.seed)
