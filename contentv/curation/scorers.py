"""Scores of a clip: picture faults frame by frame, faults over time, motion, plug-ins; and the two sums of them.

visual_raw = focus x exp(-noise / 6) x exposure x contrast
motion_raw = m / (m + 0.25) x (1 - incoherence)^2 x exp(-flicker / 0.05),  m = foreground + camera / 4

Both lie in [0, 1]. They are raw: only their order within one source is used, by the quantiles of the dataset's
normaliser. Motion counts foreground four times as much as camera moves, and shake does not pay: what reverses from
frame to frame cancels itself. Pictures are scored at a short side of 256 px. `scoring.visual=` and `scoring.motion=`
put a plug-in's score in the place of a sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8

from contentv.base.errors import UserError
from contentv.curation.scoring.blockiness import Blockiness
from contentv.curation.scoring.config import ScoringConfig
from contentv.curation.scoring.focus import Focus
from contentv.curation.scoring.moving import CameraMotion, Flicker, ForegroundMotion, FreezeRatio, Incoherence
from contentv.curation.scoring.names import CLASSICAL, SCORER_NAMES
from contentv.curation.scoring.pictures import BlackBorder, Brightness, Contrast, Exposure, Noise, Sharpness
from contentv.curation.scoring.plugins import load_plugins, plugin_infos
from contentv.curation.scoring.scorer import Scorer, ScorerInfo
from contentv.curation.scoring.text_area import TextArea
from contentv.curation.scoring.view import SCORE_SIDE_PX, ClipScores, ClipView

__all__ = ["SCORERS", "SCORE_SIDE_PX", "ClipScores", "ClipView", "ScoringConfig", "list_scorers", "score_clip"]

_NOISE_SCALE = 6.0  # grey levels
_FLICKER_SCALE = 0.05
_FULL_CONTRAST = 0.3
_HALF_MOTION = 0.25  # short sides per second

_ALL: tuple[Scorer, ...] = (
    Focus(), Sharpness(), Noise(), Brightness(), Exposure(), Contrast(), BlackBorder(), Blockiness(), TextArea(),
    Flicker(), FreezeRatio(), CameraMotion(), ForegroundMotion(), Incoherence(),
)  # fmt: skip
SCORERS: Mapping[str, Scorer] = MappingProxyType({scorer.name: scorer for scorer in _ALL})
assert tuple(SCORERS) == SCORER_NAMES


def score_clip(
    frames: UInt8[np.ndarray, "T H W 3"],
    fps: float | int = 24.0,
    config: ScoringConfig | None = None,
    caption: str = "",
    given: Mapping[str, float] | None = None,
) -> ClipScores:
    """Returns every score of a clip.

    Args:
        frames: RGB, at least one.
        fps: frames per second, for speeds.
        config: which scores; None = the built-in ones. Models of plug-ins are loaded once per process.
        caption: what the clip is said to show; for scorers that read it.
        given: scores that came with the clip; they are kept as given_<name>.

    Raises:
        UserError: a plug-in cannot be loaded, gives no number, or the score that shall be visual_raw or motion_raw is
            no scorer's.
    """
    config = config or ScoringConfig()
    clip = ClipView(frames, fps, config.pictures, caption)
    scores: dict[str, float] = {}
    for scorer in _scorers(config):
        if len(frames) > 1 or not scorer.needs_time:
            _add(scores, scorer, scorer.score(clip))
    scores.update({f"given_{name}": float(value) for name, value in (given or {}).items()})
    visual = _classical_visual(scores) if config.visual == CLASSICAL else _chosen(scores, "visual", config.visual)
    motion = None
    if len(frames) > 1:
        motion = _classical_motion(scores) if config.motion == CLASSICAL else _chosen(scores, "motion", config.motion)
    return ClipScores(visual, motion, scores)


def list_scorers(config: ScoringConfig | None = None) -> list[ScorerInfo]:
    """Returns what every scorer measures and whether it works here, built-in ones first, then plug-ins.

    Args:
        config: whose plug-in folders are looked for; None = nothing is set.
    """
    config = config or ScoringConfig()
    infos = [
        ScorerInfo(
            scorer.name, scorer.meaning, scorer.range, scorer.unit, scorer.kind,
            needs="2 frames" if scorer.needs_time else "", available=scorer.name not in config.skip,
        )
        for scorer in SCORERS.values()
    ]  # fmt: skip
    return infos + plugin_infos(config)


def _scorers(config: ScoringConfig) -> list[Scorer]:
    return [scorer for name, scorer in SCORERS.items() if name not in config.skip] + load_plugins(config)


def _add(scores: dict[str, float], scorer: Scorer, result: object) -> None:
    for name, value in (result if isinstance(result, Mapping) else {scorer.name: result}).items():
        if not isinstance(name, str) or not isinstance(value, (int, float)):
            raise UserError(
                f'"{scorer.name}" gives {value!r} for {name}, no number', where="scoring.plugins",
                remedy="let its score return a float, or a mapping of names to floats",
            )  # fmt: skip
        if name in scores:
            raise UserError(f'two scorers give "{name}"', where="scoring.plugins", remedy="rename the plug-in's score")
        scores[name] = float(value)


def _chosen(scores: Mapping[str, float], key: str, name: str) -> float:
    # What came with other clips but not with this one is no mistake of the settings; NaN is rejected as such later.
    if name not in scores and not name.startswith("given_"):
        raise UserError(
            f'no scorer gives "{name}"', where=f"scoring.{key}",
            remedy=f"use classical, or one of {', '.join(sorted(scores))}",
        )  # fmt: skip
    return scores.get(name, math.nan)


def _classical_visual(scores: Mapping[str, float]) -> float:
    visual = scores["focus"] * math.exp(-scores["noise"] / _NOISE_SCALE) * scores["exposure"]
    return visual * min(1.0, scores["contrast"] / _FULL_CONTRAST)


def _classical_motion(scores: Mapping[str, float]) -> float:
    moved = scores["foreground_motion"] + 0.25 * scores["camera_motion"]
    motion = moved / (moved + _HALF_MOTION) * (1 - scores["incoherence"]) ** 2
    return float(motion * math.exp(-scores["flicker"] / _FLICKER_SCALE))
