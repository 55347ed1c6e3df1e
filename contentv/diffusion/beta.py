"""The Beta distribution: a law of sigma in its own right, and what timestep-aware quality decoupling is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from contentv.diffusion.samplers import Number, ShiftedSampler, require

_UNDERFLOW = 1e-280  # tails below it are told by their leading term


@dataclass(frozen=True)
class Beta(ShiftedSampler):
    """Beta(alpha, beta), then shifted: mean alpha / (alpha + beta) before the shift.

    Args:
        alpha: above 0; larger leans towards noise, below 1 the density has no bound at sigma 1.
        beta: above 0; larger leans towards clean clips, below 1 the density has no bound at sigma 0.
        shift: above 0.

    Raises:
        ValueError: a parameter is out of range.
    """

    alpha: Number = 1.5
    beta: Number = 1.0
    shift: Number = 1.0

    def __post_init__(self) -> None:
        for key in ("alpha", "beta", "shift"):
            require(0 < getattr(self, key) < math.inf, key, getattr(self, key), "above 0")

    def _shapes(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(like, self.alpha), torch.full_like(like, self.beta)

    def _quantile(self, u: Tensor, survival: Tensor) -> Tensor:
        alpha, beta = self._shapes(u)
        low, high = beta_quantile(alpha, beta, u), beta_quantile(beta, alpha, survival)
        return torch.where(u < 0.5, low, 1 - high)

    def _log_tails(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self._shapes(sigma)
        return _log_cdf(alpha, beta, sigma), _log_cdf(beta, alpha, 1 - sigma)

    def _log_density(self, sigma: Tensor) -> Tensor:
        log_norm = math.lgamma(self.alpha + self.beta) - math.lgamma(self.alpha) - math.lgamma(self.beta)
        return (self.alpha - 1) * sigma.log() + (self.beta - 1) * torch.log1p(-sigma) + log_norm


def beta_cdf(alpha: Float[Tensor, "..."], beta: Float[Tensor, "..."], x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns P(Beta(alpha, beta) <= x), fp64."""
    return _elementwise(special.betainc, alpha, beta, x)


def beta_quantile(
    alpha: Float[Tensor, "..."], beta: Float[Tensor, "..."], u: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Returns the inverse of `beta_cdf` in x, fp64."""
    return _elementwise(special.betaincinv, alpha, beta, u)


def beta_log_odds(
    shapes: Float[Tensor, "2 n"], gammas: Float[Tensor, "2 n"], uniforms: Float[Tensor, "2 n"]
) -> Float[Tensor, "n"]:
    """Returns log(u / (1 - u)) of draws u ~ Beta(alpha, beta), finite where u itself would round to 0 or 1.

    Gamma(a) = Gamma(a + 1) * uniform^(1/a), in logs: for the small shapes of a large score gap the product underflows.

    Args:
        shapes: alpha and beta of each draw.
        gammas: draws of Gamma(shapes + 1), fp64.
        uniforms: numbers from [0, 1), fp64.
    """
    logs = gammas.log() + torch.log1p(-uniforms) / shapes
    return logs[0] - logs[1]


def _log_cdf(alpha: Tensor, beta: Tensor, x: Tensor) -> Tensor:
    value = beta_cdf(alpha, beta, x)
    leading = alpha * x.log() - alpha.log() - (torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta))
    return torch.where(value > _UNDERFLOW, value.log(), leading)


def _elementwise(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
    """One of scipy's special functions on tensors; torch has neither the incomplete Beta function nor its inverse."""
    result = function(*(x.detach().cpu().numpy() for x in tensors))
    return torch.as_tensor(result, dtype=torch.float64, device=tensors[0].device)
