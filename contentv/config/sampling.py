"""Prompts to videos: loads a checkpoint with its VAE and text encoders, samples by Euler with guidance, writes MP4s."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from contentv.base import device as devices
from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.base.rng import keyed_normal
from contentv.base.types import Bucket, TextCond
from contentv.config.inputs import existing_folder, resolve_weights
from contentv.config.schema import SampleConfig
from contentv.curation.video_io import write_mp4
from contentv.diffusion.solver import euler_sample, euler_sigmas, guided
from contentv.models.io import read_transformer
from contentv.models.mmdit import MMDiT
from contentv.models.text import TextStack
from contentv.models.vae import VideoVAE
from contentv.train.manifest import StageManifest

STREAM = "sample_noise"


@dataclass(frozen=True)
class Sampler:
    """Everything that turns prompts into videos."""

    model: MMDiT
    vae: VideoVAE
    text: TextStack
    bucket: Bucket
    fps: float
    shift: float
    device: torch.device

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], indices: Sequence[int], config: SampleConfig) -> Tensor:
        """Returns videos (b, T, H, W, 3), uint8 on the CPU; the noise of video i is keyed by (seed, indices[i])."""
        shape = self.vae.latent_shape(self.bucket)
        noise = keyed_normal(shape, config.seed, 0, list(indices), STREAM).to(self.device)
        text = self._encode(list(prompts))
        negative = self._encode([config.negative_prompt]).expand(len(prompts))
        velocity = guided(self.model, text, negative, config.guidance_scale)
        latents = euler_sample(velocity, noise, euler_sigmas(config.steps, self.shift).to(self.device))
        # One video at a time: the decoder's activations are the peak of the whole sampler.
        videos = [self.vae.decode(self.vae.denormalize(z[None].float()))[0] for z in latents]
        return torch.stack([to_uint8(video) for video in videos])

    def _encode(self, prompts: list[str]) -> TextCond:
        return self.text.encode(prompts).to(self.device)


def to_uint8(video: Tensor) -> Tensor:
    """Returns a video (c T H W) in [-1, 1] as (T, H, W, c) uint8 on the CPU."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()


def build_sampler(config: SampleConfig) -> Sampler:
    """Returns the sampler of a checkpoint; the size, frame rate and shift are the trained ones unless given.

    Raises:
        UserError: a part is missing, or its fingerprint is not the one the checkpoint was trained with.
    """
    device = devices.select(config.device)
    weights = resolve_weights(config.checkpoint, config.weights, "checkpoint")
    if weights.folder is None:
        raise UserError("checkpoint=none has no weights", where="checkpoint", remedy="name a trained run")
    trained = weights.manifest
    root = Path(config.checkpoint)
    vae = VideoVAE.from_folder(_part(config.vae.path, trained.vae_path, root / "vae", "vae.path"))
    text = TextStack.from_folder(_part(config.text.path, trained.text_path, root, "text.path"))
    _check_fingerprint("VAE", vae.fingerprint, trained.vae_fingerprint, "vae.path")
    _check_fingerprint("text encoder", text.fingerprint, trained.text_fingerprint, "text.path")
    shift = config.shift or trained.shift
    if not shift:
        raise UserError("the shift this checkpoint was trained with is unknown", where="shift", remedy="give shift=")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = read_transformer(weights.folder, dtype=dtype).to(device).eval()
    if model.config.joint_attention_dim != text.token_width:
        raise UserError(
            f"the text encoder is {text.token_width} wide, the model takes {model.config.joint_attention_dim}",
            where="text.path", remedy="name the encoders the model was trained with",
        )  # fmt: skip
    return Sampler(
        model,
        vae.to(device),
        text.to(device),
        _bucket(config, trained, vae),
        config.fps or trained.fps or 24.0,
        shift,
        device,
    )


def _part(asked: str, trained: str, beside: Path, key: str) -> Path:
    for candidate in (asked, trained):
        if candidate:
            return existing_folder(candidate, key, "the folder this checkpoint was trained with")
    if beside.is_dir():
        return beside
    raise UserError(f"{key} is not set and not known from the checkpoint", where=key, remedy=f"give {key}=DIR")


def _check_fingerprint(what: str, found: str, trained: str, key: str) -> None:
    if trained and found != trained:
        raise UserError(
            f"this {what} ({found}) is not the one the checkpoint was trained with ({trained})", where=key,
            remedy="name the folder that the dataset was curated with",
        )  # fmt: skip


def _bucket(config: SampleConfig, trained: StageManifest, vae: VideoVAE) -> Bucket:
    known = max(
        (Bucket.parse(name) for name in trained.buckets), key=lambda b: b.frames * b.height * b.width, default=None
    )
    sizes = [config.frames, config.height, config.width]
    if known is not None:
        sizes = [asked or size for asked, size in zip(sizes, known, strict=True)]
    if 0 in sizes:
        raise UserError(
            "the size is not known from the checkpoint", where="frames", remedy="give frames=, height=, width="
        )
    bucket = Bucket(*sizes)
    step = vae.spatial_factor * 2
    if bucket.frames % vae.temporal_factor != 1 % vae.temporal_factor:
        low = (bucket.frames - 1) // vae.temporal_factor * vae.temporal_factor + 1
        raise UserError(
            f"frames={bucket.frames} is not of the form {vae.temporal_factor}k+1", where="frames",
            remedy=f"use frames={max(low, 1)} or frames={low + vae.temporal_factor}",
        )  # fmt: skip
    for key, value in (("height", bucket.height), ("width", bucket.width)):
        if value % step:
            raise UserError(
                f"{key}={value} is not a multiple of {step}",
                where=key,
                remedy=f"use {key}={max(step, value // step * step)}",
            )
    return bucket


def read_prompts(config: SampleConfig) -> list[str]:
    """Returns the prompts of `prompt=` or of the file `prompts=`, one a line, empty lines left out."""
    if bool(config.prompt) == bool(config.prompts):
        raise UserError(
            "give one of prompt= and prompts=", where="contentv sample", remedy='prompt="a red circle" or prompts=FILE'
        )
    if config.prompt:
        return [config.prompt]
    path = Path(config.prompts)
    if not path.is_file():
        raise UserError(f'"{path}" is not a file', where="prompts", remedy="name a text file with one prompt a line")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise UserError("the file holds no prompt", where=f"prompts={path}", remedy="write one prompt a line")
    return [line for line in lines if line]


def sample_to_files(config: SampleConfig) -> list[Path]:
    """Samples this rank's share of the prompts and returns the files written; under torchrun every rank calls it."""
    prompts = read_prompts(config)
    out = Path(config.out)
    if len(prompts) > 1 and out.suffix == ".mp4":
        raise UserError(f"{len(prompts)} prompts need a folder", where=f"out={out}", remedy="use out=DIR")
    folder = out.parent if out.suffix == ".mp4" else out
    folder.mkdir(parents=True, exist_ok=True)
    sampler = build_sampler(config)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mine = list(range(rank, len(prompts), world))
    started, written = time.perf_counter(), []
    for first in range(0, len(mine), config.batch_size):
        indices = mine[first : first + config.batch_size]
        videos = sampler.sample([prompts[i] for i in indices], indices, config)
        for index, video in zip(indices, videos, strict=True):
            path = out if out.suffix == ".mp4" else folder / f"{index:05d}.mp4"
            write_mp4(video.numpy(), path, sampler.fps)
            written.append(path)
        get_logger().info("%d/%d prompts, %.1f s", first + len(indices), len(mine), time.perf_counter() - started)
    return written
