"""Captions from a vision-language model of transformers in a local folder.

Models with a chat template are shown the frames as pictures of one message and asked the prompt. Older ones without a
template (BLIP, GIT) are shown the middle frame, and given the prompt only if it is not the default one, which is
written for models that follow instructions. Decoding is greedy: the same batches give the same captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import UInt8
from PIL import Image
from safetensors import SafetensorError

from contentv.base.errors import UserError
from contentv.base.log import log_once
from contentv.curation.captioner import (
    IMAGE_PROMPT,
    PROMPT,
    CaptionerConfig,
    CaptionRequest,
    answered,
    fit_side,
    question,
    spread_frames,
)
from contentv.curation.captions import CaptionError

MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")
PROBED_BYTES = 1 << 20  # of a file's start and end, for the fingerprint: weights have gigabytes


class LocalCaptioner:
    """Shows frames to a model, some clips at a time.

    Args:
        model: of transformers, with `generate`.
        processor: that belongs to it.
        config: what to ask.
        fingerprint: of the model's files.

    Attributes:
        fingerprint: of the model's files and the settings.
    """

    def __init__(self, model: Any, processor: Any, config: CaptionerConfig, fingerprint: str) -> None:
        self._model, self._processor, self._config = model, processor, config
        self._has_template = bool(getattr(processor, "chat_template", None))
        if not self._has_template:
            log_once(f"{config.path}: no chat template, so the captioner is shown the middle frame alone")
        asked = (config.prompt, config.image_prompt, config.frames, config.max_side_px, config.max_tokens)
        self.fingerprint = xxhash.xxh128_hexdigest(repr((fingerprint, asked)).encode())

    @classmethod
    def from_folder(cls, config: CaptionerConfig, device: torch.device) -> LocalCaptioner:
        """Returns the captioner of a folder; no code of the folder is run, and no pickle is read.

        Args:
            config: its `path` is the folder.
            device: to compute on; on the CPU in float32, elsewhere as the weights are stored.

        Raises:
            UserError: the folder is not there, incomplete, damaged, or needs code of its own.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = Path(config.path)
        if not (folder / "config.json").is_file():
            raise UserError(
                f'"{folder}" holds no model (config.json)', where="captioner.path",
                remedy="name the folder of a transformers vision-language model",
            )  # fmt: skip
        safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            model, report = AutoModelForImageTextToText.from_pretrained(
                folder, use_safetensors=True, dtype="auto", output_loading_info=True, **safe
            )
            processor = AutoProcessor.from_pretrained(folder, **safe)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
            raise UserError(
                f"the captioner cannot be read ({error})", where=f"captioner.path={folder}",
                remedy="use a vision-language model that transformers itself knows, with safetensors weights",
            ) from error  # fmt: skip
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(
                f"{len(missing)} tensors are missing, such as {missing[0]}", where=f"captioner.path={folder}",
                remedy="use a complete folder of one model",
            )  # fmt: skip
        model = (model.float() if device.type == "cpu" else model).to(device).eval().requires_grad_(False)
        _prepare(model, processor)
        return cls(model, processor, config, _folder_fingerprint(folder))

    def caption(self, clips: Sequence[CaptionRequest]) -> list[str | CaptionError]:
        """Returns a caption for every clip; see `Captioner`."""
        results: list[str | CaptionError] = []
        for first in range(0, len(clips), self._config.batch_size):
            try:
                texts = self._describe(clips[first : first + self._config.batch_size])
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the captioner ran out of memory ({error})", where="captioner.batch_size",
                    remedy="lower captioner.batch_size, captioner.frames or captioner.max_side_px",
                ) from error  # fmt: skip
            for text in texts:
                try:
                    results.append(answered(text))
                except CaptionError as error:
                    results.append(error)
        return results

    @torch.no_grad()
    def _describe(self, clips: Sequence[CaptionRequest]) -> list[str]:
        inputs = self._chat(clips) if self._has_template else self._plain(clips)
        inputs = inputs.to(self._model.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self._model.dtype)
        ids = self._model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self._config.max_tokens)
        asked = inputs.get("input_ids")
        # Decoders repeat what they were asked, encoder-decoders do not.
        if asked is not None and ids.shape[1] >= asked.shape[1] and torch.equal(ids[:, : asked.shape[1]], asked):
            ids = ids[:, asked.shape[1] :]
        return list(self._processor.batch_decode(ids, skip_special_tokens=True))

    def _chat(self, clips: Sequence[CaptionRequest]) -> Any:
        pictures = [[self._picture(frame) for frame in spread_frames(clip, self._config.frames)] for clip in clips]
        talks = []
        for clip, shown in zip(clips, pictures, strict=True):
            content: list[dict[str, str]] = [{"type": "image"}] * len(shown)
            talks.append([{"role": "user", "content": [*content, {"type": "text", "text": self._ask(clip)}]}])
        texts = self._processor.apply_chat_template(talks, add_generation_prompt=True, tokenize=False)
        start = self._processor.tokenizer.bos_token
        is_started = bool(start) and texts[0].startswith(start)
        return self._processor(
            images=pictures, text=texts, padding=True, return_tensors="pt", add_special_tokens=not is_started
        )

    def _ask(self, clip: CaptionRequest) -> str:
        """Returns the question without the model's own marks, which a caption given as a hint may hold."""
        asked = question(clip, self._config)
        for mark in self._processor.tokenizer.get_added_vocab():
            asked = asked.replace(mark, " ")
        return asked

    def _plain(self, clips: Sequence[CaptionRequest]) -> Any:
        pictures = [self._picture(clip.frames[len(clip.frames) // 2]) for clip in clips]
        prompts = [self._config.prompt if len(clip.frames) > 1 else self._config.image_prompt for clip in clips]
        texts = ["" if prompt in (PROMPT, IMAGE_PROMPT) else prompt for prompt in prompts]
        if not any(texts):
            return self._processor(images=pictures, return_tensors="pt")
        return self._processor(images=pictures, text=texts, return_tensors="pt", padding=True)

    def _picture(self, frame: UInt8[np.ndarray, "H W 3"]) -> Image.Image:
        return Image.fromarray(fit_side(frame, self._config.max_side_px))


def _prepare(model: Any, processor: Any) -> None:
    """Makes answers of a batch start where their questions end, and decoding greedy without warnings."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    for name in ("temperature", "top_p", "top_k"):
        setattr(model.generation_config, name, None)


def _folder_fingerprint(folder: Path) -> str:
    digest = xxhash.xxh128()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in MODEL_FILES:
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with open(path, "rb") as file:
                digest.update(file.read(PROBED_BYTES))
                file.seek(max(0, size - PROBED_BYTES))
                digest.update(file.read(PROBED_BYTES))
    return digest.hexdigest()
