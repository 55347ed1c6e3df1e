"""Degraded twins: the same clip with a worse picture, or with worse motion, and nothing else changed.

All work on pixels, uint8 RGB (T, H, W, 3), before the VAE: what a bad camera or a slideshow would have recorded.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import UInt8

from contentv.analysis.config import TwinConfig
from contentv.base.errors import UserError

Frames = UInt8[np.ndarray, "T H W 3"]

GOLDEN, VISUAL, MOTION = "golden", "visual", "motion"


def make_twins(frames: Frames, config: TwinConfig) -> dict[str, Frames]:
    """Returns the clip itself, its visually degraded and its motion-degraded twin, of one shape.

    Args:
        frames: two frames or more.
        config: what is done to them.

    Raises:
        UserError: the clip is a single frame, which has no motion to spoil.
    """
    if len(frames) < 2:
        raise UserError(
            "a clip of one frame has no motion to compare", where="data.buckets", remedy="name a bucket of videos"
        )
    return {GOLDEN: frames, VISUAL: degrade_picture(frames, config), MOTION: degrade_motion(frames, config)}


def degrade_picture(frames: Frames, config: TwinConfig) -> Frames:
    """Returns the frames with their fine detail taken away; what moves where stays."""
    return np.stack([_degrade_frame(frame, config) for frame in frames])


def _degrade_frame(frame: np.ndarray, config: TwinConfig) -> np.ndarray:
    height, width = frame.shape[:2]
    if config.visual == "blur":
        return np.asarray(cv2.GaussianBlur(frame, (0, 0), config.blur * min(height, width)))
    if config.visual == "resample":
        small = (max(1, width // config.resample), max(1, height // config.resample))
        shrunk = cv2.resize(frame, small, interpolation=cv2.INTER_AREA)
        return np.asarray(cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_LINEAR))
    swapped = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
    ok, data = cv2.imencode(".jpg", swapped, [cv2.IMWRITE_JPEG_QUALITY, config.jpeg_quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR) if ok else None
    if decoded is None:
        raise RuntimeError(f"OpenCV could not write or read {frame.shape} as JPEG")
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))


def degrade_motion(frames: Frames, config: TwinConfig) -> Frames:
    """Returns as many frames, each one of the clip's own: still, slower or jerky."""
    places = np.arange(len(frames))
    shown = {
        "freeze": np.zeros_like(places),
        "slow": places // config.motion_factor,
        "hold": places // config.motion_factor * config.motion_factor,
    }[config.motion]
    return np.ascontiguousarray(frames[shown])
