"""Weights of the loss by noise level: how much an error at sigma counts, beside how often sigma is drawn.

With the signal-to-noise ratio of rectified flow, SNR = ((1 - sigma) / sigma)^2, and an error of the velocity that is
1 / sigma times that of the clean clip it implies, weight(SNR) on the clean clip's error is sigma^2 * weight(SNR) on the
velocity's. Each weight here is divided by its mean over the sampler's draws, so the loss keeps its size.

Source: min-SNR, Hang et al., arXiv 2303.09556, equation 3 [published for noise, clean-clip and v prediction; its form
for the velocity of rectified flow is derived]. cosmap: Esser et al., arXiv 2403.03206, section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from contentv.diffusion.samplers import Number, SigmaSampler, require

WEIGHTS = ("none", "min_snr", "cosmap")
_QUANTILES = 20_000  # at which a weight's mean is taken


@runtime_checkable
class SigmaWeight(Protocol):
    """The factor of a clip's loss, from its noise level."""

    def __call__(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b"]: ...


@dataclass(frozen=True)
class MinSNR:
    """sigma^2 * min(SNR, gamma) = min((1 - sigma)^2, gamma * sigma^2): clean levels no longer outweigh the others.

    Args:
        gamma: the ratio above which a level counts no more, above 0; the paper's is 5.

    Raises:
        ValueError: gamma is out of range.
    """

    gamma: Number = 5.0

    def __post_init__(self) -> None:
        require(0 < self.gamma < math.inf, "snr_gamma", self.gamma, "above 0")

    def __call__(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """Returns the weight of each noise level in 0..1, in sigma's dtype."""
        return torch.minimum((1 - sigma).square(), self.gamma * sigma.square())


@dataclass(frozen=True)
class CosMap:
    """2 / (pi * (1 - 2 sigma + 2 sigma^2)): uniform draws weighted by it are what SD3's CosMap law draws."""

    def __call__(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """Returns the weight of each noise level, in sigma's dtype."""
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))


@dataclass(frozen=True)
class MeanOne:
    """Another weight over its mean.

    Args:
        weight: what is divided.
        mean: its mean over the draws of a sampler.
    """

    weight: SigmaWeight
    mean: float

    def __call__(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """Returns the weight of each noise level, in sigma's dtype."""
        return self.weight(sigma) / self.mean


def mean_one(weight: SigmaWeight, sampler: SigmaSampler) -> MeanOne:
    """Returns a weight whose mean over a sampler's draws is 1."""
    middle = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    return MeanOne(weight, float(weight(sampler.icdf(middle).double()).mean()))
