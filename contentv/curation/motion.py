"""Motion in a clip by dense optical flow: what the camera does, what the things in front of it do, how steadily.

Lengths are fractions of the picture's short side, speeds short sides per second: independent of resolution and frame
rate.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from jaxtyping import Float, UInt8

FLOW_SIDE_PX = 128  # short side of the pictures that flow is computed on
MAX_PAIRS = 48  # of neighbouring frames that are looked at; longer clips in WINDOWS runs of them
WINDOWS = 6
TOP_SHARE = 0.05  # of the pixels: the moving part, however small
_NOISE_PX = 0.05  # of flow that means nothing
_FLAT_WEIGHT = 0.25  # vote of a pixel without texture on the camera's motion
_TEXTURE = 2.0  # grey levels a pixel; below, a pixel counts as flat

Plane = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Motion:
    """Motion of a clip.

    `camera` is the mean speed of the affine motion most of the picture follows and `foreground` the mean speed of the
    5 % of the picture that leave it fastest, both in short sides per second. `incoherence` is the part of the motion
    that changes from one frame to the next, along the paths of the moving pixels: about 0 when things go on as they
    went, about 0.7 when they jump at random, 1 when they go back and forth or stop and go.
    """

    camera: float
    foreground: float
    incoherence: float


def measure_motion(frames: UInt8[np.ndarray, "T H W 3"], fps: float | int) -> Motion:
    """Returns the motion of a clip of at least two frames."""
    if len(frames) < 2:
        raise ValueError("motion needs at least two frames")
    camera, foreground = [], []
    changed = total = 0.0
    for first, last in _windows(len(frames) - 1):
        grays = [_small_gray(frame) for frame in frames[first : last + 1]]
        flows = optical_flows(grays)
        for gray, flow in zip(grays[:-1], flows, strict=True):
            path = camera_flow(flow, gray)
            camera.append(float(_length(path).mean()))
            foreground.append(_fastest(_length(flow - path)))
        for flow, following in itertools.pairwise(flows):
            change, size = _change(flow, following)
            changed += change
            total += size
    side = min(grays[0].shape)
    speed = float(fps) / side
    return Motion(
        camera=float(np.mean(camera)) * speed,
        foreground=float(np.mean(foreground)) * speed,
        incoherence=min(1.0, changed / total) if total > 0 else 0.0,
    )


def optical_flows(grays: list[npt.NDArray[np.uint8]]) -> list[Float[np.ndarray, "h w 2"]]:
    """Returns the flow from each picture to the next, in pixels (x, y)."""
    estimator: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return [estimator.calc(a, b, None) for a, b in itertools.pairwise(grays)]


def camera_flow(flow: Float[np.ndarray, "h w 2"], gray: npt.NDArray[np.uint8]) -> Float[np.ndarray, "h w 2"]:
    """Returns the affine flow that most of the picture follows.

    It is fitted by reweighted least squares (Cauchy weights, from the median on), so that things which move otherwise
    do not pull it; pixels without texture, whose flow is a guess, vote with a quarter of the weight.

    Args:
        flow: pixels (x, y) to the next frame.
        gray: the picture the flow starts from.
    """
    height, width = gray.shape
    step = max(1, min(height, width) // 24)
    ys, xs = np.mgrid[0:height:step, 0:width:step]
    scale = max(height, width) / 2
    design = np.stack([np.ones(xs.size), (xs.ravel() - width / 2) / scale, (ys.ravel() - height / 2) / scale], axis=1)
    target = flow[::step, ::step].reshape(-1, 2).astype(np.float64)
    vote = np.where(_texture(gray)[::step, ::step].ravel() > _TEXTURE, 1.0, _FLAT_WEIGHT)
    affine = np.zeros((3, 2))
    affine[0] = [_weighted_median(target[:, axis], vote) for axis in (0, 1)]
    for _ in range(8):
        error = _length(target - design @ affine)
        width_px = max(0.1, 1.5 * _weighted_median(error, vote))
        weight = vote / (1 + (error / width_px) ** 2)
        weighted = design * weight[:, None]
        # The small diagonal decides for "no zoom, no turn" where nothing speaks for one.
        normal = weighted.T @ design + np.diag([0.0, 1e-3, 1e-3]) * weight.sum()
        affine = np.linalg.solve(normal, weighted.T @ target)
    all_y, all_x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = (all_x - width / 2) / scale, (all_y - height / 2) / scale
    return np.stack([affine[0, k] + affine[1, k] * x + affine[2, k] * y for k in (0, 1)], axis=2).astype(np.float32)


def _small_gray(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    height, width = gray.shape
    scale = FLOW_SIDE_PX / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(gray, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return cv2.GaussianBlur(small, (0, 0), 1.0).astype(np.uint8, copy=False)


def _windows(pairs: int) -> list[tuple[int, int]]:
    """Returns (first frame, last frame) of the runs of frames that are looked at."""
    if pairs <= MAX_PAIRS:
        return [(0, pairs)]
    length = MAX_PAIRS // WINDOWS
    return [(start, start + length) for start in np.linspace(0, pairs - length, WINDOWS).round().astype(int).tolist()]


def _fastest(speed: Plane) -> float:
    """Returns the mean of the largest 5 %, less what noise alone would give."""
    count = max(1, int(TOP_SHARE * speed.size))
    top = np.partition(speed.ravel(), speed.size - count)[-count:]
    return max(0.0, float(top.mean()) - _NOISE_PX)


def _change(flow: Plane, following: Plane) -> tuple[float, float]:
    """Returns how much the motion of the fastest pixels changes along their paths, and how much of it there is."""
    height, width = flow.shape[:2]
    speed = _length(flow)
    moving = speed >= max(4 * _NOISE_PX, float(np.quantile(speed, 1 - TOP_SHARE)))
    ys, xs = np.nonzero(moving)
    if len(ys) == 0:
        return 0.0, 0.0
    here = flow[ys, xs]
    to_x, to_y = np.rint(xs + here[:, 0]).astype(int), np.rint(ys + here[:, 1]).astype(int)
    inside = (to_x >= 0) & (to_x < width) & (to_y >= 0) & (to_y < height)
    here, there = here[inside], following[to_y[inside], to_x[inside]]
    change = _length(there - here)
    size = _length(here) + _length(there)
    return float(change.sum()), float(size.sum())


def _length(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # As numpy.linalg.norm over the last axis, which for two components takes five times as long.
    x, y = vectors[..., 0], vectors[..., 1]
    return np.asarray(np.sqrt(x * x + y * y))


def _texture(gray: npt.NDArray[np.uint8]) -> Plane:
    dx = cv2.Sobel(gray, cv2.CV_32F, 1, 0, ksize=3, scale=0.125)
    dy = cv2.Sobel(gray, cv2.CV_32F, 0, 1, ksize=3, scale=0.125)
    strength: Plane = np.hypot(dx, dy)
    return strength


def _weighted_median(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, cumulative[-1] / 2)])
