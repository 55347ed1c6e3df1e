"""`contentv curate`: joins the curation pipeline with the VAE, the text encoders and the shard writer."""

from __future__ import annotations

from pathlib import Path

from contentv.base import device as devices
from contentv.base.errors import UserError
from contentv.config.inputs import existing_folder
from contentv.config.schema import CurateRoot
from contentv.curation.curate import CurateReport, curate
from contentv.data import DatasetWriter, TextInfo, VaeInfo
from contentv.models.text import TextStack
from contentv.models.vae import VideoVAE


def vae_info(vae: VideoVAE) -> VaeInfo:
    """Returns what dataset.json records of a VAE."""
    return VaeInfo(
        fingerprint=vae.fingerprint,
        latents_mean=vae.latents_mean,
        latents_std=vae.latents_std,
        latent_channels=vae.latent_channels,
        temporal_factor=vae.temporal_factor,
        spatial_factor=vae.spatial_factor,
    )


def text_info(text: TextStack) -> TextInfo:
    """Returns what dataset.json records of the text encoders."""
    return TextInfo(
        fingerprint=text.fingerprint,
        token_width=text.token_width,
        pooled_width=text.pooled_width,
        num_tokens=text.num_tokens,
    )


def curate_dataset(root: CurateRoot) -> CurateReport:
    """Runs the curation a configuration describes and returns its report.

    Raises:
        UserError: an input, the VAE or the text encoders are missing, or a bucket does not fit the VAE.
    """
    existing_folder(root.input, "input", "a folder of video and image files")
    if not root.output:
        raise UserError("output is not set", where="output", remedy="name a folder for the dataset, output=DIR")
    vae_path = existing_folder(root.vae.path, "vae.path", "the folder of an AutoencoderKLWan")
    text_path = existing_folder(root.text.path, "text.path", "the folder of the text encoders")
    device = devices.select(root.device)
    vae = VideoVAE.from_folder(vae_path).to(device)
    text = TextStack.from_folder(text_path).to(device)
    with DatasetWriter(Path(root.output), vae_info(vae), text_info(text), text.encode([""])) as writer:
        return curate(root, vae, text, writer, device=device)
