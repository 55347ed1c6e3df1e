"""Thresholds on scores: which clips are too blurred, too still, too dark to train on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from contentv.base.errors import UserError
from contentv.curation.scoring.view import ClipScores


def _limit(meaning: str) -> Any:
    return field(default=None, metadata={"help": f"{meaning}; null = any"})


@dataclass
class FilterConfig:
    """Bounds on the scores of a clip; limits on motion hold for videos only, `visual` and `motion` are the raw sums."""

    min_visual: float | None = _limit("smallest visual_raw, 0..1")
    max_visual: float | None = _limit("largest visual_raw, 0..1")
    min_focus: float | None = _limit("smallest focus, 0 blurred .. 1 sharp")
    min_sharpness: float | None = _limit("smallest sharpness, 0..1")
    max_noise: float | None = _limit("most noise, in grey levels 0..255")
    min_brightness: float | None = _limit("smallest mean luma, 0..1")
    max_brightness: float | None = _limit("largest mean luma, 0..1")
    min_exposure: float | None = _limit("smallest exposure, 0 burnt out or drowned .. 1 well exposed")
    min_contrast: float | None = _limit("smallest contrast, 0..1")
    max_black_border: float | None = _limit("largest share of the area in black bars, 0..1")
    max_blockiness: float | None = _limit("strongest grid of compression, 0..1")
    max_text_area: float | None = _limit("largest share of the area under overlaid text, 0..1")
    min_motion: float | None = _limit("smallest motion_raw, 0..1")
    max_motion: float | None = _limit("largest motion_raw, 0..1")
    max_camera_motion: float | None = _limit("fastest camera, in short sides per second")
    min_foreground_motion: float | None = _limit("slowest foreground, in short sides per second")
    max_foreground_motion: float | None = _limit("fastest foreground, in short sides per second")
    max_incoherence: float | None = _limit("most shake, 0..1: share of the motion that reverses")
    max_freeze_ratio: float | None = _limit("largest share of repeated frames, 0..1")
    max_flicker: float | None = _limit("most flicker, 0..1 of full luma per frame")
    bounds: dict[str, list[float | None]] = field(
        default_factory=dict,
        metadata={"help": "{name: [least, most]} for any score, of plug-ins and given_<name> too; null = any"},
    )

    def __post_init__(self) -> None:
        for name, pair in self.bounds.items():
            if len(pair) != 2:
                raise UserError(
                    f"{name}: {list(pair)} is no pair", where="filters.bounds", remedy="write {name: [least, most]}"
                )
        for name, low, high in _bounds(self):
            if low is not None and high is not None and low > high:
                where = "filters.bounds" if name in self.bounds else f"filters.min_{name}"
                raise UserError(f"min_{name}={low} is above max_{name}={high}", where=where, remedy="leave a range")


@dataclass(frozen=True)
class BrokenBound:
    """A bound that a clip breaks: `rule` is the same for all such clips, `reason` tells the value and the bound."""

    rule: str
    reason: str
    name: str
    value: float


def broken_bounds(config: FilterConfig, scores: ClipScores) -> list[BrokenBound]:
    """Returns every bound that a clip breaks; a score that the clip does not have breaks none, NaN breaks any."""
    broken = []
    for name, low, high in _bounds(config):
        value = scores.value(name)
        if value is None:
            continue
        for key, bound, is_least in ((f"min_{name}", low, True), (f"max_{name}", high, False)):
            if bound is None:
                continue
            sign = "<" if is_least else ">"
            if math.isnan(value) or (value < bound if is_least else value > bound):
                reason = f"{name} {value:.4g} {sign} {key} {bound:g}"
                broken.append(BrokenBound(f"filter:{name}", reason, name, value))
    return broken


def failures(config: FilterConfig, scores: ClipScores) -> list[str]:
    """Returns a sentence for every bound that a clip breaks, such as `motion 0.01 < min_motion 0.05`."""
    return [bound.reason for bound in broken_bounds(config, scores)]


def _bounds(config: FilterConfig) -> Iterator[tuple[str, float | None, float | None]]:
    """Yields (score, least, most): the named keys in their order, then the free ones."""
    names = [entry.name[4:] for entry in dataclasses.fields(config) if entry.name != "bounds"]
    for name in dict.fromkeys(names):
        yield name, getattr(config, f"min_{name}", None), getattr(config, f"max_{name}", None)
    for name, (low, high) in config.bounds.items():
        yield name, low, high
