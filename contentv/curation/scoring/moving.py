"""Scorers of what happens from frame to frame."""

from __future__ import annotations

import numpy as np

from contentv.curation.scoring.view import ClipView

_STILL_LEVELS = 0.1  # mean grey levels between frames below which a frame counts as repeated


class Flicker:
    """The mean sudden change of overall luma: second differences over time, so that fades are none."""

    name = "flicker"
    meaning = "sudden changes of overall brightness; fades are none"
    range = "0 steady .. 1"
    unit = "of full luma per frame"
    kind = "motion"
    needs_time = True

    def score(self, clip: ClipView) -> float:
        """Returns the mean over the frames."""
        means = clip.thumbnails.mean(axis=(1, 2)) / 255
        return float(np.abs(np.diff(means, n=2)).mean()) if len(means) > 2 else 0.0


class FreezeRatio:
    """The share of frames that repeat the one before."""

    name = "freeze_ratio"
    meaning = "share of frames that repeat the one before (frozen or duplicated)"
    range = "0 none .. 1 a still"
    unit = ""
    kind = "motion"
    needs_time = True

    def score(self, clip: ClipView) -> float:
        """Returns the share."""
        steps = np.abs(np.diff(clip.thumbnails, axis=0)).mean(axis=(1, 2))
        return float(np.mean(steps < _STILL_LEVELS))


class CameraMotion:
    """The speed of the affine motion that most of the picture follows: pans, tilts, zooms, turns."""

    name = "camera_motion"
    meaning = "speed of the motion most of the picture follows (pan, zoom, turn), by optical flow"
    range = "0 fixed .. about 4"
    unit = "short sides per second"
    kind = "motion"
    needs_time = True

    def score(self, clip: ClipView) -> float:
        """Returns the mean over the pairs of frames."""
        return clip.motion.camera


class ForegroundMotion:
    """The speed of the 5 % of the picture that leave the camera's motion fastest."""

    name = "foreground_motion"
    meaning = "speed of the 5 % of the picture that leave the camera's motion fastest"
    range = "0 nothing moves .. about 4"
    unit = "short sides per second"
    kind = "motion"
    needs_time = True

    def score(self, clip: ClipView) -> float:
        """Returns the mean over the pairs of frames."""
        return clip.motion.foreground


class Incoherence:
    """The part of the motion that changes from one frame to the next: shake, stutter."""

    name = "incoherence"
    meaning = "part of the motion that changes from one frame to the next (shake, stutter)"
    range = "0 smooth .. 1 back and forth"
    unit = ""
    kind = "motion"
    needs_time = True

    def score(self, clip: ClipView) -> float:
        """Returns the part over the whole clip."""
        return clip.motion.incoherence
