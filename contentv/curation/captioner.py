"""Captions by a model: what a captioner is asked, and which one is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8

from contentv.base.errors import UserError, nearest
from contentv.curation.captions import CaptionError, checked_caption

KINDS = ("none", "local", "endpoint")
WHEN = ("missing", "always")
PROMPT = (
    "These pictures are frames of one video clip, in order. Describe the clip in one paragraph: the subject, what it "
    "does, how the camera moves, the surroundings, the light and the style. Do not mention frames or pictures."
)
IMAGE_PROMPT = "Describe this picture in one paragraph: the subject, the surroundings, the light and the style."


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class CaptionerConfig:
    """Which model writes captions, and for which clips."""

    kind: str = _doc("none", "none | local (a transformers model) | endpoint (an OpenAI-compatible server)")
    when: str = _doc("missing", "missing: only clips without a caption | always: every clip; the caption that came "
                                "with it is shown to the model as a hint")  # fmt: skip
    path: str = _doc("", "folder of the transformers vision-language model; for kind=local")
    url: str = _doc("", "of the server, up to /v1, such as http://localhost:8000/v1; for kind=endpoint")
    model: str = _doc("", "name of the model that the server is asked for; for kind=endpoint")
    api_key_env: str = _doc("", "name of the environment variable that holds the key; empty = no key")
    prompt: str = _doc(PROMPT, "what the model is asked about a clip")
    image_prompt: str = _doc(IMAGE_PROMPT, "what the model is asked about a still")
    frames: int = _doc(8, "frames of a clip that the model is shown, evenly spread; 1 or more")
    max_side_px: int = _doc(768, "longer side of the frames that the model is shown, in pixels; 32 or more")
    max_tokens: int = _doc(256, "longest answer in tokens; 1 or more")
    batch_size: int = _doc(4, "clips in one call of the local model; 1 or more")
    concurrency: int = _doc(8, "requests to the server at a time; 1 or more")
    timeout_s: float = _doc(120.0, "longest wait for one answer of the server, in seconds; above 0")
    extra: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further fields of a request to the server; null takes one out, such as {max_tokens: null}"},
    )
    retries: int = _doc(5, "further tries after an answer 429 or 5xx, a timeout or a lost connection; 0 or more")

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("when", self.when, WHEN)):
            guess = nearest(value, known)
            _require(value in known, name, value, f"use one of {', '.join(known)}{f'; {guess}' if guess else ''}")
        for name in ("frames", "max_tokens", "batch_size", "concurrency"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        _require(self.max_side_px >= 32, "max_side_px", self.max_side_px, "use 32 or more")
        _require(self.retries >= 0, "retries", self.retries, "use 0 or more")
        _require(self.timeout_s > 0, "timeout_s", self.timeout_s, "use a positive number")
        needed = {"local": ("path",), "endpoint": ("url", "model")}.get(self.kind, ())
        for name in needed:
            _require(bool(getattr(self, name)), name, '""', f"captioner.kind={self.kind} needs it")


@dataclass(frozen=True)
class CaptionRequest:
    """A clip to describe; one frame is a still."""

    frames: UInt8[np.ndarray, "T H W 3"]  # RGB, all or some of the clip's
    fps: float  # of these frames; 0 for a still
    hint: str = ""  # what is known of it, such as the caption that came with it


@runtime_checkable
class Captioner(Protocol):
    """Writes captions."""

    @property
    def fingerprint(self) -> str:
        """What its captions depend on: model, prompt, settings; the same settings have the same one."""

    def caption(self, clips: Sequence[CaptionRequest]) -> list[str | CaptionError]:
        """Returns a caption for every clip, or why there is none (rule `captioner`).

        Raises:
            UserError: no caption can be had at all: the server is not there or refuses the key.
        """


def build_captioner(config: CaptionerConfig, device: torch.device) -> Captioner | None:
    """Returns the captioner that a configuration names, None for kind=none.

    Args:
        config: which one.
        device: of the local model.

    Raises:
        UserError: the model's folder is not usable, or the key's variable is not set.
    """
    if config.kind == "local":
        from contentv.curation.captioner_local import LocalCaptioner

        return LocalCaptioner.from_folder(config, device)
    if config.kind == "endpoint":
        from contentv.curation.captioner_endpoint import EndpointCaptioner

        return EndpointCaptioner(config)
    return None


def spread_frames(clip: CaptionRequest, count: int) -> UInt8[np.ndarray, "n H W 3"]:
    """Returns `count` frames in the middle of as many equal parts of the clip; all of them if there are fewer."""
    length = len(clip.frames)
    if length <= count:
        return clip.frames
    places: npt.NDArray[np.int64] = ((np.arange(count) + 0.5) * length / count).astype(np.int64)
    return clip.frames[places]


def question(clip: CaptionRequest, config: CaptionerConfig) -> str:
    """Returns what the model is asked about a clip."""
    asked = config.prompt if len(clip.frames) > 1 else config.image_prompt
    return f"{asked}\nWhat is already known about it: {clip.hint}" if clip.hint else asked


def fit_side(frame: UInt8[np.ndarray, "H W 3"], max_side_px: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a picture whose longer side has `max_side_px` pixels at most."""
    scale = max_side_px / max(frame.shape[:2])
    if scale >= 1:
        return frame
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def answered(text: str) -> str:
    """Returns a model's answer on one line.

    Raises:
        CaptionError: it is empty, or far too long.
    """
    try:
        return checked_caption(" ".join(text.split()))
    except CaptionError as error:
        raise CaptionError(f"the captioner's answer cannot be used: {error}", "captioner") from error


def _require(ok: bool, key: str, value: object, remedy: str) -> None:
    if not ok:
        raise UserError(f"{key}={value} is not possible", where=f"captioner.{key}", remedy=remedy)
