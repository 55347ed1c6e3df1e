"""Image features by a CLIP-class vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from contentv.base.errors import UserError
from contentv.curation.scoring.model_folder import load_model, read_json, require_folder, resized, three_numbers

_KINDS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")


class ClipTower:
    """CLIP's vision model with its projection, or SigLIP's vision model with its pooling head.

    Args:
        model: of transformers, in evaluation mode.
        mean, std: of the pixels in [0, 1] that the model expects, per colour.
        crop: cuts the middle square out of wide pictures; False squeezes them.
    """

    def __init__(self, model: Any, mean: Float[Tensor, "3 1 1"], std: Float[Tensor, "3 1 1"], crop: bool) -> None:
        self._model = model
        self._mean, self._std, self._crop = mean, std, crop
        self._size = int(model.config.image_size)

    @classmethod
    def from_folder(cls, path: str | Path, device: str, key: str) -> ClipTower:
        """Returns the tower stored in a transformers folder.

        Args:
            path: config.json, preprocessor_config.json and safetensors weights of a CLIP or SigLIP model, or of its
                vision part.
            device: where it runs.
            key: that named the folder, for messages.

        Raises:
            UserError: the folder is no such model, or incomplete.
        """
        folder = require_folder(path, key, "a CLIP vision model")
        kind = read_json(folder / "config.json").get("model_type")
        if kind not in _KINDS:
            raise UserError(
                f"model_type is {kind}", where=str(folder / "config.json"), remedy=f"use one of {', '.join(_KINDS)}"
            )
        pixels = read_json(folder / "preprocessor_config.json")
        mean, std = (
            three_numbers(pixels, name, folder / "preprocessor_config.json") for name in ("image_mean", "image_std")
        )
        model = _load(folder, kind).to(device)
        return cls(model, mean, std, crop=bool(pixels.get("do_center_crop", kind.startswith("clip"))))

    @torch.inference_mode()
    def features(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> Float[np.ndarray, "n d"]:
        """Returns one L2-normalised vector per picture (RGB)."""
        pixels = torch.stack([self._prepare(picture) for picture in pictures]).to(self._model.device)
        output = self._model(pixel_values=pixels)
        vectors = output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output
        return functional.normalize(vectors.float(), dim=-1).cpu().numpy()

    def _prepare(self, picture: UInt8[np.ndarray, "H W 3"]) -> Float[Tensor, "3 size size"]:
        size = self._size
        height, width = picture.shape[:2]
        if self._crop:
            short = min(height, width)
            height, width = size * height // short, size * width // short
        else:
            height, width = size, size
        pixels = resized(picture, height, width)
        top, left = (height - size) // 2, (width - size) // 2
        return (pixels[:, top : top + size, left : left + size] - self._mean) / self._std


def _load(folder: Path, kind: str) -> Any:
    if kind.startswith("siglip"):
        return load_model(transformers.SiglipVisionModel, folder)
    if kind == "clip_vision_model":
        return load_model(transformers.CLIPVisionModelWithProjection, folder)
    whole: Any = transformers.CLIPConfig.from_pretrained(folder, local_files_only=True)
    # In the whole model's file the vision part often keeps the default width; the projection's true one is beside it.
    whole.vision_config.projection_dim = whole.projection_dim
    return load_model(transformers.CLIPVisionModelWithProjection, folder, config=whole.vision_config)
