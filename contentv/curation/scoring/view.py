"""A clip as scorers see it, and what they say of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from contentv.curation.motion import Motion, measure_motion

SCORE_SIDE_PX = 256
THUMBNAIL_SIDE_PX = 64
MAX_PICTURES = 8  # of a clip that are looked at for picture faults, evenly spaced
_BLACK = 24  # grey levels; a row or column counts as lit if more than a hundredth of it is brighter

Plane = npt.NDArray[np.float32]


class ClipView:
    """A clip with what several scorers look at, computed once.

    Args:
        frames: RGB, at least one.
        fps: frames per second.
        pictures: number of frames that are looked at for picture faults, evenly spaced.
        caption: what the clip is said to show; for scorers that read it.
    """

    def __init__(
        self, frames: UInt8[np.ndarray, "T H W 3"], fps: float | int, pictures: int = MAX_PICTURES, caption: str = ""
    ) -> None:
        if len(frames) == 0:
            raise ValueError("a clip without frames has no scores")
        self.frames = frames
        self.fps = float(fps)
        self.caption = caption
        places = np.linspace(0, len(frames) - 1, min(pictures, len(frames))).round().astype(int)
        self.places: list[int] = places.tolist()

    @functools.cached_property
    def pictures(self) -> list[npt.NDArray[np.uint8]]:
        """Evenly spaced frames, RGB, as large as they came."""
        return [self.frames[place] for place in self.places]

    @functools.cached_property
    def grays(self) -> list[Plane]:
        """The pictures in grey (0..255), shrunk to the scoring size; smaller ones are left as they are."""
        return [gray_picture(picture, SCORE_SIDE_PX) for picture in self.pictures]

    @functools.cached_property
    def lit(self) -> tuple[slice, slice]:
        """Rows and columns of `grays` between black bars, which are dark in every picture; empty if all is black."""
        brightest = np.max(np.stack(self.grays), axis=0)
        rows, columns = (np.flatnonzero(np.quantile(brightest, 0.99, axis=axis) > _BLACK) for axis in (1, 0))
        if rows.size == 0 or columns.size == 0:
            return slice(0, 0), slice(0, 0)
        return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)

    @functools.cached_property
    def thumbnails(self) -> npt.NDArray[np.float32]:
        """All frames in grey (0..255), short side at most 64 px."""
        return np.stack([gray_picture(frame, THUMBNAIL_SIDE_PX) for frame in self.frames])

    @functools.cached_property
    def motion(self) -> Motion:
        """The clip's optical flow, summed up; needs two frames."""
        return measure_motion(self.frames, self.fps)


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


def gray_picture(frame: npt.NDArray[np.uint8], short_side_px: int) -> Plane:
    """Returns a picture in grey (0..255), its short side at most `short_side_px` (area-averaged)."""
    gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    scale = short_side_px / min(gray.shape)
    if scale >= 1:
        return gray
    size = (max(1, round(gray.shape[1] * scale)), max(1, round(gray.shape[0] * scale)))
    return cv2.resize(gray, size, interpolation=cv2.INTER_AREA).astype(np.float32, copy=False)


def block_means(plane: Plane) -> Plane:
    """Returns the means over square blocks of up to 16 x 16 pixels; a rest at the lower and right edge is left out."""
    block = max(1, min(16, min(plane.shape) // 6))
    rows, columns = (size // block for size in plane.shape)
    cut = plane[: rows * block, : columns * block].reshape(rows, block, columns, block)
    averaged: Plane = cut.mean(axis=(1, 3))
    return averaged
