"""What is measured of clips, and how near a generated set is to a golden one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def speed_of(clips: Tensor) -> Tensor:
    """Returns how far each clip's sprite moves in a frame, in pixels, (n,).

    The sprite is where the lowest Fourier mode along the ring says, and its speed the mean displacement from frame to
    frame, in which jitter cancels: a sprite that jumps about its place has not moved.

    Args:
        clips: (n, 1, frames, rows, columns).
    """
    angle = _modes(clips)[..., 1].angle()
    turns = (angle.diff(dim=1) + math.pi) % (2 * math.pi) - math.pi
    return turns.mean(dim=1).abs() * clips.shape[-1] / (2 * math.pi)


def sharpness_of(clips: Tensor) -> Tensor:
    """Returns the amplitude of each clip's fine detail, (n,): root mean square of what is shorter than four pixels.

    Rows are averaged before: stripes run down all of them, and most of what is left of the noise cancels.
    """
    columns = clips.shape[-1]
    fine = _modes(clips).abs()[..., columns // 4 + 1 : columns // 2]
    return (2 * fine.square().sum(dim=2)).mean(dim=1).sqrt() / columns


def presence_of(clips: Tensor) -> Tensor:
    """Returns the amplitude of the lowest mode of each clip, (n,): small where there is no one sprite."""
    return 2 * _modes(clips)[..., 1].abs().mean(dim=1) / clips.shape[-1]


MEASURES = {"speed": speed_of, "sharpness": sharpness_of, "presence": presence_of}


def compare(generated: Tensor, golden: Tensor) -> dict[str, Any]:
    """Returns how generated clips compare with held-out golden ones, as many of either as there are.

    For each measure: `ratio`, the generated mean over the golden one, `quantiles` of the generated values (5, 25, 50,
    75, 95 %) and `score` = 1 - W / golden mean, at least 0, with W the Wasserstein distance of the two distributions:
    1 for golden clips, the ratio for clips that all fall short, and less for a spread that golden clips lack.
    `combined` is the geometric mean of the scores of speed and sharpness. `golden_like` is the share of single clips
    that show a sprite, move and are sharp at once: presence and speed above half of the golden mean, sharpness from a
    half to twice that.
    """
    found: dict[str, Any] = {}
    like = torch.ones(len(generated), dtype=torch.bool)
    for name, measure in MEASURES.items():
        values, wanted = measure(generated), measure(golden)
        mean = float(wanted.mean())
        found[name] = {
            "ratio": float(values.mean()) / mean,
            "score": max(0.0, 1 - wasserstein(values, wanted) / mean),
            "quantiles": torch.quantile(values, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist(),
        }
        like &= values > mean / 2
        if name == "sharpness":
            like &= values < 2 * mean
    found["combined"] = math.sqrt(found["speed"]["score"] * found["sharpness"]["score"])
    found["golden_like"] = float(like.float().mean())
    return found


def wasserstein(first: Tensor, second: Tensor) -> float:
    """Returns the mean distance between the quantiles of two samples."""
    levels = (torch.arange(1000) + 0.5) / 1000
    return float((torch.quantile(first, levels) - torch.quantile(second, levels)).abs().mean())


def _modes(clips: Tensor) -> Tensor:
    return torch.fft.rfft(clips[:, 0].mean(dim=2))  # of the mean over the rows: n frames modes
