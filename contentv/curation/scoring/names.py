"""The names of the built-in scores, and which of them make up the classical sums."""

from __future__ import annotations

CLASSICAL = "classical"
CLASSICAL_VISUAL = ("focus", "noise", "exposure", "contrast")
CLASSICAL_MOTION = ("camera_motion", "foreground_motion", "incoherence", "flicker")
SCORER_NAMES = (
    "focus", "sharpness", "noise", "brightness", "exposure", "contrast", "black_border", "blockiness", "text_area",
    "flicker", "freeze_ratio", "camera_motion", "foreground_motion", "incoherence",
)  # fmt: skip
