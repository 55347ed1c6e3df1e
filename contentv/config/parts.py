"""What stands beside a transformer in a pipeline: found, checked against the model and its manifest, and written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.config.inputs import check_fingerprint, existing_folder
from contentv.config.schema import ConvertConfig
from contentv.config.sources import Source
from contentv.models.folders import read_json
from contentv.models.pipeline_folder import (
    MODEL_INDEX,
    VAE_CLASS,
    copy_files,
    copy_licences,
    text_files,
    vae_files,
    write_model_index,
    write_scheduler,
)
from contentv.models.text import TextStack
from contentv.models.vae import VideoVAE


@dataclass(frozen=True)
class Parts:
    """What goes beside the transformer of a pipeline: a VAE, the folder of text encoders, the scheduler's shift."""

    vae: Path
    text: Path
    shift: float

    def size(self) -> int:
        """Returns the bytes of the files that `write` copies."""
        groups = [vae_files(self.vae), *text_files(self.text).values()]
        return sum(path.stat().st_size for group in groups for path in group)

    def write(self, folder: Path, root: Path) -> None:
        """Writes all of a pipeline folder but its transformer.

        Args:
            folder: the pipeline's.
            root: the folder whose licences are copied anyway.
        """
        copy_files(vae_files(self.vae), folder / "vae")
        for name, files in text_files(self.text).items():
            copy_files(files, folder / name)
            copy_licences(self.text / name, folder / name)
        copy_licences(self.vae, folder / "vae")
        for part, target in ((self.vae.parent, "vae"), (self.text, "text_encoder")):
            if (part / MODEL_INDEX).is_file() and part.resolve() != root.resolve():
                copy_licences(part, folder / target)
        write_scheduler(folder, self.shift)
        write_model_index(folder)


def find_parts(source: Source, config: ConvertConfig) -> Parts:
    """Returns the VAE, the text encoders and the shift of a pipeline, checked against the model and its manifest.

    Raises:
        UserError: one is unknown, damaged, does not fit the model, or is not the one it was trained with.
    """
    trained, root = source.manifest, source.root
    what = "the VAE the model was trained on"
    vae_folder = _part("vae.path", config.vae.path or trained.vae_path, root / "vae", root / "vae", what)
    if not config.vae.path and not trained.vae_path:
        found = read_json(vae_folder / "config.json").get("_class_name")
        if found != VAE_CLASS:
            raise UserError(
                f"the VAE of this folder is an image VAE ({found}), and ContentV needs {VAE_CLASS}", where="vae.path",
                remedy="give vae.path=DIR, such as Wan 2.1's vae folder, or layout=transformer",
            )  # fmt: skip
    what = "the folder with the model's text_encoder/ and tokenizer/"
    text_root = _part("text.path", config.text.path or trained.text_path, root / "text_encoder", root, what)
    shift = config.shift or trained.shift
    if not shift:
        raise UserError(
            "the shift these weights were trained with is unknown", where="shift",
            remedy="give shift= (SD3.5-Large was published with 3), or layout=transformer",
        )  # fmt: skip
    if config.shift and trained.shift and config.shift != trained.shift:
        get_logger().warning("shift=%g is not the trained one, %g", config.shift, trained.shift)
    vae_files(vae_folder)
    text_files(text_root)
    _check_vae(VideoVAE.from_folder(vae_folder), source)
    _check_text(TextStack.from_folder(text_root, None), source)
    return Parts(vae_folder, text_root, shift)


def _part(key: str, known: str, sign: Path, beside: Path, what: str) -> Path:
    if known:
        return existing_folder(known, key, what)
    if not sign.is_dir():
        raise UserError(
            "is not set, and not known from what is converted", where=key,
            remedy=f"give {key}=DIR, {what}, or layout=transformer",
        )  # fmt: skip
    return beside


def _check_vae(vae: VideoVAE, source: Source) -> None:
    channels, trained = source.weights.config.in_channels, source.manifest.vae_fingerprint
    if vae.latent_channels != channels:
        raise UserError(
            f"this VAE has {vae.latent_channels} latent channels, the model takes {channels}", where="vae.path",
            remedy="name the VAE that the model was trained on",
        )  # fmt: skip
    check_fingerprint("VAE", vae.fingerprint, trained, "vae.path")


def _check_text(text: TextStack, source: Source) -> None:
    model, trained = source.weights.config, source.manifest.text_fingerprint
    for what, found, needed in (
        ("tokens", text.token_width, model.joint_attention_dim),
        ("pooled vectors", text.pooled_width, model.pooled_projection_dim),
    ):
        # Without T5, diffusers pads the CLIP states with zeros to the model's width.
        padded = what == "tokens" and text.t5 is None and found < needed
        if found != needed and not padded:
            raise UserError(
                f"the {what} of these text encoders are {found} wide, the model takes {needed}", where="text.path",
                remedy="name the text encoders that the model was trained with",
            )  # fmt: skip
    check_fingerprint("text encoder", text.fingerprint, trained, "text.path")
