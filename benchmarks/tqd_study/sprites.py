"""Clips of one sprite that drifts along a ring, with speed and sharpness set apart.

A frame is a strip of a few rows whose columns form a ring. The sprite is a soft blob, the coarse part that says where
it is, times fine stripes, its detail. Blur takes the stripes away and leaves the blob; a slow sprite has both. So
motion lives in the large amplitude and detail in the small one, and `detail` alone sets their scales apart.

All frames are grey on a background of 0, in the units that the model sees: there is no VAE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from contentv.base.rng import keyed_generator

SETS = ("golden", "blurred", "static", "neither")


@dataclass(frozen=True)
class World:
    """What clips look like. Lengths are in pixels, speeds in pixels a frame; pairs are lowest and highest.

    Args:
        rows, columns, frames: of a clip; the columns form a ring.
        amplitude: of the blob at its centre.
        detail: of the stripes there.
        size: standard deviation of the blob, down and along.
        stripe: length of one stripe.
        fast, slow: speeds of moving and of nearly static clips.
        sharp, soft: standard deviation of the blur of sharp and of blurred clips.
    """

    rows: int = 4
    columns: int = 16
    frames: int = 6
    amplitude: float = 4.0
    detail: float = 0.3
    size: tuple[float, float] = (1.2, 1.8)
    stripe: float = 8 / 3
    fast: tuple[float, float] = (1.0, 2.0)
    slow: tuple[float, float] = (0.0, 0.3)
    sharp: tuple[float, float] = (0.0, 0.2)
    soft: tuple[float, float] = (0.8, 1.1)


@dataclass(frozen=True)
class Traits:
    """How clips move and how they are blurred, one entry a clip: all that is random about them."""

    start: Tensor  # pixels
    phase: Tensor  # of the stripes, radians
    speed: Tensor  # pixels a frame, to the right
    blur: Tensor  # pixels


def draw_traits(world: World, kind: str, n: int, seed: int) -> Traits:
    """Returns the traits of `n` clips of a set: golden (both), blurred (moving), static (sharp), or neither.

    Args:
        world: ranges of speed and blur.
        kind: one of SETS.
        n: clips.
        seed: of all draws; sets of one seed differ.
    """
    u = torch.rand(4, n, generator=keyed_generator(seed, 0, 0, f"sprites/{kind}"))
    speed = world.slow if kind in ("static", "neither") else world.fast
    blur = world.soft if kind in ("blurred", "neither") else world.sharp
    return Traits(
        start=u[0] * world.columns, phase=u[1] * 2 * math.pi,
        speed=speed[0] + (speed[1] - speed[0]) * u[2], blur=blur[0] + (blur[1] - blur[0]) * u[3],
    )  # fmt: skip


def render(world: World, traits: Traits) -> Tensor:
    """Returns the clips (n, 1, frames, rows, columns). Blur acts along the ring: the blob widens, the stripes fade."""
    columns, (down, along) = world.columns, world.size
    centre = traits.start[:, None] + traits.speed[:, None] * torch.arange(world.frames)
    offset = torch.arange(columns) - centre[..., None]  # n frames columns
    around = (offset + columns / 2) % columns - columns / 2  # to the nearest image of the centre
    stripes = math.sqrt(2) * torch.cos(2 * math.pi / world.stripe * around + traits.phase[:, None, None])
    line = blurred(
        torch.exp(-around.square() / (2 * along**2)) * (world.amplitude + world.detail * stripes), traits.blur
    )
    height = torch.arange(world.rows) - (world.rows - 1) / 2
    return (torch.exp(-height.square() / (2 * down**2))[:, None] * line[:, :, None, :])[:, None]


def blurred(clips: Tensor, width_px: Tensor) -> Tensor:
    """Returns clips (n, ..., columns) after a Gaussian blur along the ring, of each clip's own width."""
    frequency = torch.fft.rfftfreq(clips.shape[-1])
    gain = torch.exp(-2 * (math.pi * width_px[:, None] * frequency).square())
    gain = gain.view(len(clips), *(1,) * (clips.ndim - 2), -1)
    return torch.fft.irfft(torch.fft.rfft(clips) * gain, n=clips.shape[-1])


def make_clips(world: World, kind: str, n: int, seed: int) -> Tensor:
    """Returns `n` clips of a set, (n, 1, frames, rows, columns)."""
    return render(world, draw_traits(world, kind, n, seed))
