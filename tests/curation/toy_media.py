"""Small media files for tests of curation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from contentv.curation.video_io import write_mp4

FPS = 8
COLOURS = {"red": (200, 40, 40), "green": (40, 170, 60), "blue": (40, 60, 200), "grey": (120, 120, 120)}


def make_scene(colour: str, frames: int = 20, height: int = 48, width: int = 64) -> np.ndarray:
    """A light disk that crosses a coloured ground."""
    y, x = np.mgrid[0:height, 0:width]
    clip = np.zeros((frames, height, width, 3), np.uint8)
    for n in range(frames):
        disk = np.hypot(x - 8 - 2 * n, y - height / 2) < 7
        clip[n] = np.where(disk[..., None], 230, COLOURS[colour])
    return clip


def put(path: Path, data: bytes | np.ndarray, caption: str | None = None, fps: int = FPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        write_mp4(data, path, fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def make_world(seed: int, frames: int = 20, height: int = 48, width: int = 64) -> np.ndarray:
    """A scene of its own: smooth coloured noise that drifts."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    picture = np.zeros((height, width, 3), np.float32)
    waves = rng.uniform(0.02, 0.35, (3, 5, 2)), rng.uniform(0, 6.3, (3, 5)), rng.normal(0, 0.25, (3, 5))
    clip = np.zeros((frames, height, width, 3), np.uint8)
    for n in range(frames):
        for channel in range(3):
            parts = zip(waves[0][channel], waves[1][channel], waves[2][channel], strict=True)
            picture[..., channel] = sum(np.sin(a * x + b * y + phase + speed * n) for (a, b), phase, speed in parts)
        clip[n] = np.clip(128 + 38 * picture, 0, 255).astype(np.uint8)
    return clip
