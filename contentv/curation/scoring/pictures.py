"""Scorers of picture faults, frame by frame."""

from __future__ import annotations

import math

import cv2
import numpy as np

from contentv.curation.scoring.view import SCORE_SIDE_PX, ClipView, Plane, block_means

_SHARP = 60.0  # Laplacian variance that gives half the full sharpness
_LEAST = 0.5  # variance granted to every picture, so that those without detail still differ by their other faults


class Sharpness:
    """v / (v + 60), v = variance of the Laplacian beyond that of the smoothest areas.

    Noise, too, has a large Laplacian, but everywhere alike: what also the smoothest fifth of the picture has is left
    out, and a quarter more, so that noise never makes a picture look sharper.

    A picture smaller than the scoring size would be blurred by enlarging it; v is lowered by that ratio instead.
    """

    name = "sharpness"
    meaning = "detail: variance of the Laplacian beyond that of the smoothest areas"
    range = "0 blurred .. 1 sharp"
    unit = ""
    kind = "visual"
    needs_time = False

    def score(self, clip: ClipView) -> float:
        """Returns the mean over the pictures."""
        values = []
        for gray in clip.grays:
            energy = block_means(
                np.square(cv2.Laplacian(gray, cv2.CV_32F, borderType=cv2.BORDER_REFLECT), dtype=np.float32)
            )
            variance = max(0.0, float(energy.mean()) - 1.25 * float(np.quantile(energy, 0.2)))
            variance *= min(1.0, min(gray.shape) / SCORE_SIDE_PX) ** 2
            values.append((variance + _LEAST) / (variance + _LEAST + _SHARP))
        return float(np.mean(values))


class Noise:
    """The mean noise level of the pictures."""

    name = "noise"
    meaning = "grain: deviation of white noise in the smoothest fifth of the picture"
    range = "0 .. about 60"
    unit = "grey levels of 255"
    kind = "visual"
    needs_time = False

    def score(self, clip: ClipView) -> float:
        """Returns the mean over the pictures."""
        return float(np.mean([noise_level(gray) for gray in clip.grays]))


class Brightness:
    """The mean luma."""

    name = "brightness"
    meaning = "mean luma"
    range = "0 black .. 1 white"
    unit = ""
    kind = "visual"
    needs_time = False

    def score(self, clip: ClipView) -> float:
        """Returns the mean over the pictures."""
        return float(np.mean([gray.mean() for gray in clip.grays])) / 255


class Exposure:
    """1 for well exposed pictures, less the more is burnt out, drowned, or too dark or bright as a whole."""

    name = "exposure"
    meaning = "how little is burnt out, drowned, or too dark or bright as a whole"
    range = "0 lost .. 1 well exposed"
    unit = ""
    kind = "visual"
    needs_time = False

    def score(self, clip: ClipView) -> float:
        """Returns the mean over the pictures."""
        values = []
        for gray in clip.grays:
            lost = float(np.mean((gray < 3) | (gray > 252)))
            mean = float(gray.mean()) / 255
            values.append((1 - lost) * min(1.0, mean / 0.15, (1 - mean) / 0.15))
        return float(np.mean(values))


class Contrast:
    """The distance between the 1st and 99th percentile of luma."""

    name = "contrast"
    meaning = "distance between the 1st and 99th percentile of luma"
    range = "0 flat .. 1 full"
    unit = ""
    kind = "visual"
    needs_time = False

    def score(self, clip: ClipView) -> float:
        """Returns the mean over the pictures."""
        return float(np.mean([np.subtract(*np.percentile(gray, (99, 1))) for gray in clip.grays])) / 255


class BlackBorder:
    """The share of the area in black bars at the edges: letterbox above and below, pillarbox at the sides."""

    name = "black_border"
    meaning = "share of the area in black bars at any of the four edges"
    range = "0 none .. 1 all black"
    unit = ""
    kind = "visual"
    needs_time = False

    def score(self, clip: ClipView) -> float:
        """Returns the share that is black in every picture."""
        rows, columns = clip.lit
        lit = (rows.stop - rows.start) * (columns.stop - columns.start)
        return 1.0 - float(lit) / float(clip.grays[0].size)


def noise_level(gray: Plane) -> float:
    """Returns the deviation of white noise in grey levels (0..255): that of the smoothest fifth of the picture.

    The mask has no response to constant, linear or twisted (x y) areas; texture stands out in places, noise everywhere.
    Areas near black or white are left out, where clipping hides noise.

    Source: Immerkaer, "Fast Noise Variance Estimation", 1996 (the mask; the choice of blocks is ours).
    """
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = np.abs(cv2.filter2D(gray, cv2.CV_32F, mask, borderType=cv2.BORDER_REFLECT))[1:-1, 1:-1]
    level = block_means(gray[1:-1, 1:-1])
    usable = block_means(response)[(level > 12) & (level < 243)]
    # The mean of |normal| is sqrt(2/pi) of its deviation, and the squared mask sums to 36.
    return float(np.quantile(usable, 0.2)) * math.sqrt(math.pi / 2) / 6 if usable.size else 0.0
