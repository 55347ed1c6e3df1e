"""Reads colour and direction of motion off the pixels of a clip, to judge samples.

It knows nothing of how clips are drawn and learns nothing: it looks for strongly coloured pixels, takes the commonest
of four hues, and follows the middle of that hue's pixels through the clip.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

# Hue ranges in degrees. The gaps between them belong to no colour.
HUE_RANGES_DEG: dict[str, tuple[tuple[float, float], ...]] = {
    "red": ((0.0, 22.0), (338.0, 360.0)),
    "yellow": ((38.0, 72.0),),
    "green": ((85.0, 165.0),),
    "blue": ((200.0, 265.0),),
}
MIN_SATURATION = 0.42
MIN_VALUE = 0.25
MIN_AREA = 0.006  # of the frame; a smaller patch is not an object
MIN_TRAVEL = 0.08  # of the frame's side over the whole clip; less is standing still


class Reading(NamedTuple):
    """What is seen in a clip: colour ("none" when nothing coloured), direction, and how sure that is, in [0, 1]."""

    colour: str
    direction: str
    confidence: float


def _masks(video: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float64]]:
    """Returns, per colour, how strongly each pixel shows it (T, H, W): saturation where the hue fits, else 0."""
    hsv = np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2HSV) for f in video.astype(np.float32) / np.float32(255.0)])
    hue, saturation, value = hsv[..., 0], hsv[..., 1].astype(np.float64), hsv[..., 2]
    vivid = (saturation >= MIN_SATURATION) & (value >= MIN_VALUE)
    masks = {}
    for colour, ranges in HUE_RANGES_DEG.items():
        fits = np.zeros(hue.shape, bool)
        for low, high in ranges:
            fits |= (hue >= low) & (hue <= high)
        masks[colour] = np.where(vivid & fits, saturation, 0.0)
    return masks


def _track(mask: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns the frames in which the object is large enough, and its centre (x, y) in each, in frame sides."""
    frames, height, width = mask.shape
    seen, centres = [], []
    for index in range(frames):
        blob = (mask[index] > 0).astype(np.uint8)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(blob, connectivity=8)
        if count < 2:
            continue
        best = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
        if stats[best, cv2.CC_STAT_AREA] < MIN_AREA * height * width:
            continue
        weight = mask[index] * (labels == best)
        total = weight.sum()
        x = (weight.sum(0) * (np.arange(width) + 0.5)).sum() / total / width
        y = (weight.sum(1) * (np.arange(height) + 0.5)).sum() / total / height
        seen.append(float(index))
        centres.append((x, y))
    return np.array(seen), np.array(centres, np.float64).reshape(-1, 2)


def classify(video: npt.NDArray[np.uint8]) -> Reading:
    """Returns the colour and the direction of motion seen in a clip.

    Args:
        video: uint8 RGB, shape (T, H, W, 3).

    Returns:
        (colour, direction, confidence): colour one of red, green, blue, yellow or "none"; direction one of left,
        right, up, down or "still". The confidence is the product of the colour's share among coloured pixels and,
        for a moving object, how far the main axis of its path outweighs the other.

    Raises:
        ValueError: the array is not a clip.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise ValueError(f"a clip is uint8 (T, H, W, 3); this is {video.dtype} {video.shape}")
    masks = _masks(video)
    amounts = {colour: float(mask.sum()) for colour, mask in masks.items()}
    colour = max(amounts, key=lambda name: amounts[name])
    frames, height, width = video.shape[:3]
    if (masks[colour] > 0).sum() < 0.5 * MIN_AREA * frames * height * width:
        return Reading("none", "still", 0.0)
    share = amounts[colour] / sum(amounts.values())
    seen, centres = _track(masks[colour])
    if len(seen) < max(2, math.ceil(0.3 * frames)):
        return Reading(colour, "still", 0.25 * share)
    # a straight line through all centres: one bad frame does not turn the answer, as it would with last minus first
    slope = np.polyfit(seen, centres, 1)[0] if len(seen) > 2 else (centres[-1] - centres[0]) / (seen[-1] - seen[0])
    dx, dy = (slope * (frames - 1)).tolist()
    if max(abs(dx), abs(dy)) < MIN_TRAVEL:
        return Reading(colour, "still", share)
    if abs(dx) >= abs(dy):
        direction = "right" if dx > 0 else "left"
    else:
        direction = "down" if dy > 0 else "up"
    big, small = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    return Reading(colour, direction, share * (big - small) / big)


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion; (0, 1) for n = 0.

    Args:
        successes: number of hits, in [0, n].
        n: number of trials.
        z: normal quantile; the default is for 95 %.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    spread = z * math.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    middle = share + z * z / (2.0 * n)
    scale = 1.0 + z * z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
