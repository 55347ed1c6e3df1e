"""Thresholds on scores: which clips are too blurred, too still, too dark to train on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from contentv.base.errors import UserError
from contentv.curation.scorers import ClipScores


def _limit(meaning: str) -> Any:
    return field(default=None, metadata={"help": f"{meaning}; null = any"})


@dataclass
class FilterConfig:
    """Bounds on the scores of a clip; limits on motion hold for videos only, `visual` and `motion` are the raw sums."""

    min_visual: float | None = _limit("smallest visual_raw, 0..1")
    min_sharpness: float | None = _limit("smallest sharpness, 0..1")
    max_noise: float | None = _limit("most noise, in grey levels 0..255")
    min_brightness: float | None = _limit("smallest mean luma, 0..1")
    max_brightness: float | None = _limit("largest mean luma, 0..1")
    min_contrast: float | None = _limit("smallest contrast, 0..1")
    max_black_border: float | None = _limit("largest share of the area in black bars, 0..1")
    min_motion: float | None = _limit("smallest motion_raw, 0..1")
    max_motion: float | None = _limit("largest motion_raw, 0..1")
    max_camera_motion: float | None = _limit("fastest camera, in short sides per second")
    max_incoherence: float | None = _limit("most shake, 0..1: share of the motion that reverses")
    max_freeze_ratio: float | None = _limit("largest share of repeated frames, 0..1")
    max_flicker: float | None = _limit("most flicker, 0..1 of full luma per frame")

    def __post_init__(self) -> None:
        for name in {entry.name[4:] for entry in dataclasses.fields(self)}:
            low, high = getattr(self, f"min_{name}", None), getattr(self, f"max_{name}", None)
            if low is not None and high is not None and low > high:
                raise UserError(
                    f"min_{name}={low} is above max_{name}={high}", where=f"filters.min_{name}", remedy="leave a range"
                )


def failures(config: FilterConfig, scores: ClipScores) -> list[str]:
    """Returns a sentence for every bound that a clip breaks, such as `motion 0.01 < min_motion 0.05`."""
    broken = []
    for entry in dataclasses.fields(config):
        bound, name = getattr(config, entry.name), entry.name[4:]
        value = scores.value(name)
        if bound is None or value is None:
            continue
        is_least = entry.name.startswith("min_")
        if value < bound if is_least else value > bound:
            broken.append(f"{name} {value:.4g} {'<' if is_least else '>'} {entry.name} {bound:g}")
    return broken
