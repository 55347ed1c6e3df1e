"""Reward models: how well frames fit their captions, as a number whose gradient reaches the frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel
from transformers.utils.logging import disable_progress_bar

from contentv.base.errors import UserError
from contentv.models.folders import read_json

# A bar for every encoder that is read would tear the training's own progress bar.
disable_progress_bar()


class RewardModel(Protocol):
    """Anything that scores frames against captions."""

    def score(self, frames: Float[Tensor, "b 3 H W"], captions: list[str]) -> Float[Tensor, "b"]:
        """Returns one score per frame, higher is better, differentiable in the frames.

        Args:
            frames: pixels in [-1, 1]; values outside are allowed.
            captions: one per frame.
        """
        ...


class CLIPReward(nn.Module):
    """A CLIP model's image-text similarity, as PickScore and HPS use it: exp(logit_scale) cos(image, text).

    Args:
        model: transformers' CLIP model; it is put in evaluation mode and its weights take no gradients.
        tokenizer: the model's tokenizer.
        mean, std: of the pixels in [0, 1] that the model expects, per colour.
        crop: cuts the middle square out of wide frames, as the model's own preprocessing does; False squeezes them.

    Sources: Radford et al. 2021 (CLIP), Kirstain et al. 2023 (PickScore).
    """

    def __init__(
        self, model: CLIPModel, tokenizer: Any, mean: tuple[float, ...], std: tuple[float, ...], crop: bool = True
    ) -> None:
        super().__init__()
        untyped: Any = model
        self.model: Any = untyped.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.crop = crop
        self.size = int(self.model.config.vision_config.image_size)
        self.max_tokens = int(self.model.config.text_config.max_position_embeddings)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_folder(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> CLIPReward:
        """Returns the reward model stored in a transformers folder, on the CPU.

        Args:
            path: holds a CLIPModel in safetensors, its tokenizer and preprocessor_config.json.
            dtype: to compute in.

        Raises:
            UserError: the folder is no such model, or incomplete.
        """
        folder = Path(path)
        pixels = read_json(folder / "preprocessor_config.json")
        statistics = [pixels.get(key) for key in ("image_mean", "image_std")]
        if not all(
            isinstance(s, list) and len(s) == 3 and all(isinstance(x, (int, float)) for x in s) for s in statistics
        ):
            raise UserError(
                "no three numbers in image_mean or image_std",
                where=str(folder / "preprocessor_config.json"),
                remedy="fetch the file again",
            )
        untyped: Any = CLIPModel
        try:
            model, report = untyped.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, dtype=dtype, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"cannot be read ({error})", where=str(folder), remedy="use a CLIP folder with safetensors weights"
            ) from error
        if report["missing_keys"]:
            raise UserError(
                f"tensors are missing, such as {min(report['missing_keys'])}",
                where=str(folder),
                remedy="use a complete folder of one CLIP model",
            )
        mean, std = (tuple(float(x) for x in s or ()) for s in statistics)
        return cls(model, tokenizer, mean, std, crop=bool(pixels.get("do_center_crop", True))).to(dtype)

    def score(self, frames: Float[Tensor, "b 3 H W"], captions: list[str]) -> Float[Tensor, "b"]:
        """Returns exp(logit_scale) times the cosine of frame and caption, differentiable in the frames.

        Args:
            frames: pixels in [-1, 1]; values outside are clamped and take no gradient.
            captions: one per frame; what exceeds the model's text length is cut.

        Raises:
            ValueError: the numbers of frames and captions differ.
        """
        if len(captions) != frames.shape[0]:
            raise ValueError(f"{frames.shape[0]} frames but {len(captions)} captions")
        images = self.model.vision_model(pixel_values=self.preprocess(frames)).pooler_output
        image = functional.normalize(self.model.visual_projection(images), dim=-1)
        with torch.no_grad():
            text = functional.normalize(self._encode_text(captions), dim=-1)
        scores: Tensor = self.model.logit_scale.exp() * (image * text).sum(dim=-1)
        return scores

    def preprocess(self, frames: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 size size"]:
        """Returns the frames at the model's size and in its units.

        Args:
            frames: pixels in [-1, 1].
        """
        height, width = frames.shape[2:]
        size = (self.size, self.size)
        if self.crop:
            short = min(height, width)
            size = (self.size * height // short, self.size * width // short)
        pixels = (frames.to(self.mean.dtype).clamp(-1, 1) + 1) / 2
        pixels = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        top, left = (size[0] - self.size) // 2, (size[1] - self.size) // 2
        pixels = pixels[:, :, top : top + self.size, left : left + self.size]
        return (pixels.clamp(0, 1) - self.mean) / self.std

    def _encode_text(self, captions: list[str]) -> Tensor:
        batch = self.tokenizer(
            captions, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        ids, mask = (batch[key].to(self.mean.device) for key in ("input_ids", "attention_mask"))
        states = self.model.text_model(input_ids=ids, attention_mask=mask)
        text: Tensor = self.model.text_projection(states.pooler_output)
        return text
