"""Scores of a clip: picture faults frame by frame, faults over time, motion, and the two sums of them.

visual_raw = sharpness x exp(-noise / 8) x exposure x contrast
motion_raw = m / (m + 0.25) x (1 - incoherence)^2 x exp(-flicker / 0.05),  m = foreground + camera / 4

Both lie in [0, 1]. They are raw: only their order within one source is used, by the quantiles of the dataset's
normaliser. Motion counts foreground four times as much as camera moves, and shake does not pay: what reverses from
frame to frame cancels itself. Pictures are scored at a short side of 256 px.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from contentv.curation.motion import Motion, measure_motion

SCORE_SIDE_PX = 256
MAX_PICTURES = 8  # of a clip that are looked at for picture faults, evenly spaced
_SHARP = 60.0  # Laplacian variance that gives half the full sharpness
_LEAST = 0.5  # variance granted to every picture, so that those without detail still differ by their other faults
_NOISE_SCALE = 8.0  # grey levels
_FLICKER_SCALE = 0.05
_STILL_LEVELS = 0.1  # mean grey levels between frames below which a frame counts as repeated

Plane = npt.NDArray[np.float32]


class ClipView:
    """A clip with what several scorers look at, computed once.

    Args:
        frames: RGB.
        fps: frames per second.
    """

    def __init__(self, frames: UInt8[np.ndarray, "T H W 3"], fps: float | int) -> None:
        if len(frames) == 0:
            raise ValueError("a clip without frames has no scores")
        self.frames = frames
        self.fps = float(fps)

    @functools.cached_property
    def grays(self) -> list[Plane]:
        """Grey pictures (0..255) of evenly spaced frames; shrunk to the scoring size, smaller ones left as they are."""
        places = np.linspace(0, len(self.frames) - 1, min(MAX_PICTURES, len(self.frames))).round().astype(int)
        return [_gray(self.frames[i], SCORE_SIDE_PX) for i in places]

    @functools.cached_property
    def thumbnails(self) -> npt.NDArray[np.float32]:
        """All frames in grey (0..255), short side at most 64 px."""
        return np.stack([_gray(frame, 64) for frame in self.frames])

    @functools.cached_property
    def motion(self) -> Motion:
        """The clip's optical flow, summed up; needs two frames."""
        return measure_motion(self.frames, self.fps)


@dataclass(frozen=True)
class Scorer:
    """A named measurement of a clip; `needs_time` ones are for clips of two frames or more."""

    name: str
    measure: Callable[[ClipView], float]
    needs_time: bool = False

    def score(self, clip: ClipView) -> float:
        """Returns the measurement."""
        return self.measure(clip)


@dataclass(frozen=True)
class ClipScores:
    """All scores of a clip; `motion_raw` is None for single pictures."""

    visual_raw: float
    motion_raw: float | None
    scores: dict[str, float]

    def value(self, name: str) -> float | None:
        """Returns a score by name (`visual` and `motion` are the two sums), None where the clip has none."""
        if name in ("visual", "motion"):
            return self.visual_raw if name == "visual" else self.motion_raw
        return self.scores.get(name)


def score_clip(frames: UInt8[np.ndarray, "T H W 3"], fps: float | int = 24.0) -> ClipScores:
    """Returns every score of a clip.

    Args:
        frames: RGB, at least one.
        fps: frames per second, for speeds.
    """
    clip = ClipView(frames, fps)
    scores = {name: s.score(clip) for name, s in SCORERS.items() if len(frames) > 1 or not s.needs_time}
    visual = scores["sharpness"] * math.exp(-scores["noise"] / _NOISE_SCALE) * scores["exposure"]
    visual *= min(1.0, scores["contrast"] / 0.3)
    motion = None
    if len(frames) > 1:
        moved = scores["foreground_motion"] + 0.25 * scores["camera_motion"]
        motion = moved / (moved + 0.25) * (1 - scores["incoherence"]) ** 2
        motion *= math.exp(-scores["flicker"] / _FLICKER_SCALE)
    return ClipScores(visual, motion, scores)


def sharpness(clip: ClipView) -> float:
    """Returns v / (v + 60), v = variance of the Laplacian beyond that of the smoothest areas; 0 blurred, 1 sharp.

    Noise, too, has a large Laplacian, but everywhere alike: what also the smoothest fifth of the picture has is left
    out, and a quarter more, so that noise never makes a picture look sharper.

    A picture smaller than the scoring size would be blurred by enlarging it; v is lowered by that ratio instead.
    """
    values = []
    for gray in clip.grays:
        energy = _block_means(
            np.square(cv2.Laplacian(gray, cv2.CV_32F, borderType=cv2.BORDER_REFLECT), dtype=np.float32)
        )
        variance = max(0.0, float(energy.mean()) - 1.25 * float(np.quantile(energy, 0.2)))
        variance *= min(1.0, min(gray.shape) / SCORE_SIDE_PX) ** 2
        values.append((variance + _LEAST) / (variance + _LEAST + _SHARP))
    return float(np.mean(values))


def noise_level(gray: Plane) -> float:
    """Returns the deviation of white noise in grey levels (0..255): that of the smoothest fifth of the picture.

    The mask has no response to constant, linear or twisted (x y) areas; texture stands out in places, noise everywhere.
    Areas near black or white are left out, where clipping hides noise.

    Source: Immerkaer, "Fast Noise Variance Estimation", 1996 (the mask; the choice of blocks is ours).
    """
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = np.abs(cv2.filter2D(gray, cv2.CV_32F, mask, borderType=cv2.BORDER_REFLECT))[1:-1, 1:-1]
    level = _block_means(gray[1:-1, 1:-1])
    usable = _block_means(response)[(level > 12) & (level < 243)]
    # The mean of |normal| is sqrt(2/pi) of its deviation, and the squared mask sums to 36.
    return float(np.quantile(usable, 0.2)) * math.sqrt(math.pi / 2) / 6 if usable.size else 0.0


def noise(clip: ClipView) -> float:
    """Returns the mean noise level in grey levels (0..255)."""
    return float(np.mean([noise_level(gray) for gray in clip.grays]))


def brightness(clip: ClipView) -> float:
    """Returns the mean luma, 0..1."""
    return float(np.mean([gray.mean() for gray in clip.grays])) / 255


def exposure(clip: ClipView) -> float:
    """Returns 1 for well exposed pictures, less the more is burnt out, drowned, or too dark or bright as a whole."""
    values = []
    for gray in clip.grays:
        lost = float(np.mean((gray < 3) | (gray > 252)))
        mean = float(gray.mean()) / 255
        values.append((1 - lost) * min(1.0, mean / 0.15, (1 - mean) / 0.15))
    return float(np.mean(values))


def contrast(clip: ClipView) -> float:
    """Returns the distance between the 1st and 99th percentile of luma, 0..1."""
    return float(np.mean([np.subtract(*np.percentile(gray, (99, 1))) for gray in clip.grays])) / 255


def black_border(clip: ClipView) -> float:
    """Returns the share of the area in black bars at the edges, 0..1."""
    brightest = np.max(np.stack(clip.grays), axis=0)
    lit_rows = np.flatnonzero(np.quantile(brightest, 0.99, axis=1) > 24)
    lit_columns = np.flatnonzero(np.quantile(brightest, 0.99, axis=0) > 24)
    if lit_rows.size == 0 or lit_columns.size == 0:
        return 1.0
    height, width = lit_rows[-1] + 1 - lit_rows[0], lit_columns[-1] + 1 - lit_columns[0]
    return 1.0 - float(height * width) / float(brightest.size)


def flicker(clip: ClipView) -> float:
    """Returns the mean sudden change of overall luma, 0..1: second differences over time, so that fades are none."""
    means = clip.thumbnails.mean(axis=(1, 2)) / 255
    return float(np.abs(np.diff(means, n=2)).mean()) if len(means) > 2 else 0.0


def freeze_ratio(clip: ClipView) -> float:
    """Returns the share of frames that repeat the one before, 0..1."""
    steps = np.abs(np.diff(clip.thumbnails, axis=0)).mean(axis=(1, 2))
    return float(np.mean(steps < _STILL_LEVELS))


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        scorer.name: scorer
        for scorer in (
            Scorer("sharpness", sharpness),
            Scorer("noise", noise),
            Scorer("brightness", brightness),
            Scorer("exposure", exposure),
            Scorer("contrast", contrast),
            Scorer("black_border", black_border),
            Scorer("flicker", flicker, needs_time=True),
            Scorer("freeze_ratio", freeze_ratio, needs_time=True),
            Scorer("camera_motion", lambda clip: clip.motion.camera, needs_time=True),
            Scorer("foreground_motion", lambda clip: clip.motion.foreground, needs_time=True),
            Scorer("incoherence", lambda clip: clip.motion.incoherence, needs_time=True),
        )
    }
)


def _block_means(plane: Plane) -> Plane:
    """Returns the means over square blocks of up to 16 x 16 pixels; a rest at the lower and right edge is left out."""
    block = max(1, min(16, min(plane.shape) // 6))
    rows, columns = (size // block for size in plane.shape)
    cut = plane[: rows * block, : columns * block].reshape(rows, block, columns, block)
    averaged: Plane = cut.mean(axis=(1, 3))
    return averaged


def _gray(frame: npt.NDArray[np.uint8], short_side_px: int) -> Plane:
    gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    scale = short_side_px / min(gray.shape)
    if scale >= 1:
        return gray
    size = (max(1, round(gray.shape[1] * scale)), max(1, round(gray.shape[0] * scale)))
    return cv2.resize(gray, size, interpolation=cv2.INTER_AREA).astype(np.float32, copy=False)
