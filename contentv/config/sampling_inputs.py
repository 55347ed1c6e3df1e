"""What sampling starts from: a checkpoint, the VAE and the text encoders it was trained with, the clip to make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from contentv.base.errors import UserError
from contentv.base.types import Bucket
from contentv.config.inputs import check_fingerprint, existing_folder
from contentv.config.schema import SampleConfig
from contentv.config.sources import Source, open_source
from contentv.models.folders import fingerprint
from contentv.models.io import TransformerSource
from contentv.models.lora_files import read_lora
from contentv.models.lora_merge import merged
from contentv.models.text import T5_FOLDERS, TextStack
from contentv.models.vae import VideoVAE
from contentv.train.manifest import StageManifest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBED_ELEMENTS = 4096  # values of each weight that tell two checkpoints apart


@dataclass(frozen=True)
class SamplingInputs:
    """Checked parts; of the transformer's weights and the text encoders nothing has been read yet.

    Attributes:
        source: the transformer's weights, with the LoRA merged in, if there is one.
        trained: what is known of how they were trained.
        vae: on the CPU.
        text_path: the folder of the text encoders.
        bucket: frames, height and width of the videos.
        fps: of the files.
        shift: of the solver's noise levels.
        identity: tells these weights from others, JSON-compatible.
    """

    source: TransformerSource
    trained: StageManifest
    vae: VideoVAE
    text_path: Path
    bucket: Bucket
    fps: float
    shift: float
    identity: dict[str, Any]

    def settings(self, config: SampleConfig) -> dict[str, Any]:
        """Returns all that a video depends on but its prompt and seed, JSON-compatible.

        What changes no more than the rounding is left out: device, batch size, passes of guidance, processes, tiles.
        """
        return {
            **self.identity,
            "vae": self.vae.fingerprint,
            "text": self.trained.text_fingerprint or str(self.text_path.resolve()),
            "frames": self.bucket.frames, "height": self.bucket.height, "width": self.bucket.width, "fps": self.fps,
            "steps": config.steps, "shift": self.shift, "guidance_scale": config.guidance_scale,
            "precision": config.precision, "vae_precision": config.vae_precision,
        }  # fmt: skip

    def read_text(self) -> TextStack:
        """Returns the text encoders, on the CPU.

        Raises:
            UserError: they are not those the checkpoint was trained with, or of other widths.
        """
        model = self.source.config
        has_t5 = (self.text_path / T5_FOLDERS[0]).is_dir()
        # Without T5 the CLIP states alone are padded with zeros to the model's width.
        text = TextStack.from_folder(self.text_path, token_width=None if has_t5 else model.joint_attention_dim)
        check_fingerprint("text encoder", text.fingerprint, self.trained.text_fingerprint, "text.path")
        for what, ours, theirs in (
            ("tokens", text.token_width, model.joint_attention_dim),
            ("pooled vectors", text.pooled_width, model.pooled_projection_dim),
        ):
            if ours != theirs:
                raise UserError(
                    f"the text encoders' {what} are {ours} wide, the model takes {theirs}", where="text.path",
                    remedy="name the encoders the model was trained with",
                )  # fmt: skip
        return text


def open_inputs(config: SampleConfig) -> SamplingInputs:
    """Returns the parts a configuration names; size, frame rate and shift are the trained ones unless given.

    Raises:
        UserError: a part is missing, does not fit the others, or is not the one the checkpoint was trained with.
    """
    opened, source, identity = _open_weights(config)
    trained, root = opened.manifest, opened.root
    vae_path = _part(config.vae.path, trained.vae_path, root / "vae", root / "vae", "vae.path")
    text_path = _part(config.text.path, trained.text_path, root, root / "text_encoder", "text.path")
    shift = config.shift or trained.shift
    if not shift:
        raise UserError("the shift this checkpoint was trained with is unknown", where="shift", remedy="give shift=")
    vae = VideoVAE.from_folder(vae_path, DTYPES[config.vae_precision])
    check_fingerprint("VAE", vae.fingerprint, trained.vae_fingerprint, "vae.path")
    if vae.latent_channels != source.config.in_channels:
        raise UserError(
            f"the VAE's latents have {vae.latent_channels} channels, the model takes {source.config.in_channels}",
            where="vae.path", remedy="name the VAE the model was trained with",
        )  # fmt: skip
    vae.check_tile(config.vae_tile_px)
    bucket = _bucket(config, trained, vae, source.config.patch_size)
    return SamplingInputs(
        source, trained, vae, text_path, bucket, config.fps or trained.fps or 24.0, shift, identity
    )  # fmt: skip


def _open_weights(config: SampleConfig) -> tuple[Source, TransformerSource, dict[str, Any]]:
    source = open_source(config.checkpoint, config.weights, "checkpoint")
    lora = source.lora
    if source.manifest.stage == "sd3":
        raise UserError(
            "this is an image model: its positions and its VAE are not a video model's", where="checkpoint",
            remedy="train a video model from it (contentv train stage=image init=...), and name that run",
        )  # fmt: skip
    if config.lora and lora is not None:
        raise UserError(
            "this checkpoint is a LoRA already", where="lora",
            remedy="merge one of them first (contentv convert), and sample the result with the other",
        )  # fmt: skip
    if config.lora:
        lora = read_lora(config.lora)
    weights = source.weights
    identity = {"weights": identify(asdict(weights.config), weights.tensors), "lora": "", "lora_scale": 0.0}
    if lora is not None:
        identity |= {"lora": identify(dict(lora.scales), lora.tensors), "lora_scale": config.lora_scale}
        weights = merged(weights, lora, config.lora_scale, DTYPES[config.precision])
    return source, weights, identity


def identify(about: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Returns a fingerprint of the first values of every tensor; of large ones no more is read.

    Args:
        about: JSON-compatible facts that belong to them.
        tensors: name -> tensor, or anything sliced like one.
    """

    def first(tensor: Any) -> torch.Tensor:
        rows = max(1, PROBED_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
        part: torch.Tensor = tensor[:rows]
        return part.reshape(-1)[:PROBED_ELEMENTS]

    return fingerprint(about, [(name, first(tensor)) for name, tensor in tensors.items()])


def _part(asked: str, trained: str, beside: Path, sign: Path, key: str) -> Path:
    for candidate in (asked, trained):
        if candidate:
            return existing_folder(candidate, key, "the folder this checkpoint was trained with")
    if sign.is_dir():
        return beside
    raise UserError(f"{key} is not set and not known from the checkpoint", where=key, remedy=f"give {key}=DIR")


def _bucket(config: SampleConfig, trained: StageManifest, vae: VideoVAE, patch_size: int) -> Bucket:
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
    step = vae.spatial_factor * patch_size
    if bucket.frames % vae.temporal_factor != 1 % vae.temporal_factor:
        low = (bucket.frames - 1) // vae.temporal_factor * vae.temporal_factor + 1
        raise UserError(
            f"frames={bucket.frames} is not of the form {vae.temporal_factor}k+1", where="frames",
            remedy=f"use frames={max(low, 1)} or frames={low + vae.temporal_factor}",
        )  # fmt: skip
    for key, value in (("height", bucket.height), ("width", bucket.width)):
        if value % step:
            raise UserError(
                f"{key}={value} is not a multiple of {step}", where=key,
                remedy=f"use {key}={max(step, value // step * step)} or {key}={-(-value // step) * step}",
            )  # fmt: skip
    return bucket
