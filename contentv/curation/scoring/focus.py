"""Focus: how narrow the picture's strongest edges are, whatever it shows."""

from __future__ import annotations

import cv2
import numpy as np

from contentv.curation.scoring.view import SCORE_SIDE_PX, ClipView, Plane, block_means

_FINE_PX, _COARSE_PX = 0.7, 2.4  # deviations of the two blurs whose slopes are compared
_HALF_PX = 1.2  # blur of edges, of a short side of 256 px, that gives half the full score
_EDGES = 0.005  # share of the pixels that are taken for edges
_PICTURES = 4  # of a clip, about: blur changes slowly
_RIM_PX = 4  # beside a black bar, where its edge is still felt
_LEAST = 0.02  # squared grey levels per pixel that a slope must be large against


class Focus:
    """1 / (1 + (blur / 1.2 px)^2), blur = deviation of the Gaussian that the strongest edges look blurred by.

    A step blurred by s has, after another blur by a, a slope proportional to 1 / sqrt(s^2 + a^2). The ratio of the
    slopes after a fine and a coarse blur tells s without knowing how high the step is: unlike a Laplacian's variance
    it does not grow with contrast or with the number of edges. Slopes that also the smoothest fifth of the picture
    has are noise and taken off, twice, so that noise never makes a picture look sharper. Black bars are cut away
    first. Pixels of small pictures are counted as those of one of 256 px, which is how blurred they would look
    enlarged.

    Text laid over a blurred picture has sharp edges and makes it look sharp; `text_area` tells.

    Source: Zhuo and Sim 2011 compare slopes so to map defocus; the choice of edges and the noise term are ours.
    """

    name = "focus"
    meaning = "how narrow the strongest edges are, whatever the contrast"
    range = "0 blurred .. 1 sharp"
    unit = ""
    kind = "visual"
    needs_time = False

    def score(self, clip: ClipView) -> float:
        """Returns the mean over the pictures."""
        height, width = clip.grays[0].shape
        inside = tuple(
            slice(lit.start + _RIM_PX * (lit.start > 0), lit.stop - _RIM_PX * (lit.stop < size))
            for lit, size in zip(clip.lit, (height, width), strict=True)
        )
        some = clip.grays[:: max(1, len(clip.grays) // _PICTURES)]
        return float(np.mean([_focus(np.ascontiguousarray(gray[inside])) for gray in some]))


def _focus(gray: Plane) -> float:
    if min(gray.shape) < 8:
        return 0.0
    fine, coarse = (_slopes(gray, blur) for blur in (_FINE_PX, _COARSE_PX))
    rank = int((1 - _EDGES) * coarse.size)
    edges = coarse >= np.partition(coarse.ravel(), rank)[rank]
    at_fine, at_coarse = (
        max(0.0, float(slopes[edges].mean()) - 2 * float(np.quantile(block_means(slopes), 0.2))) + _LEAST
        for slopes in (fine, coarse)
    )
    gain = at_fine / at_coarse - 1  # 0 for what has no edge at all
    # blur^2 = (coarse^2 - ratio fine^2) / (ratio - 1), written so that nothing is divided by zero.
    blur = max(0.0, _COARSE_PX**2 - (gain + 1) * _FINE_PX**2)
    scale = (SCORE_SIDE_PX / min(SCORE_SIDE_PX, *gray.shape)) ** 2
    return max(0.0, gain) * _HALF_PX**2 / (max(0.0, gain) * _HALF_PX**2 + blur * scale) if gain > 0 else 0.0


def _slopes(gray: Plane, blur: float) -> Plane:
    """Returns the squared gradient of a picture after a blur, in squared grey levels per pixel."""
    smooth = cv2.GaussianBlur(gray, (0, 0), blur)
    dx = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=3, scale=0.125)
    dy = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=3, scale=0.125)
    return np.asarray(dx * dx + dy * dy, np.float32)
