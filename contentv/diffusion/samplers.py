"""Distributions of sigma, the noise level a training sample is shown at.

Each is a density on (0, 1) followed by a shift towards noise, s' = shift * s / (1 + (shift - 1) * s). All of them draw
by inversion, one fp64 uniform number per sample, so the draw, the inverse CDF and the density cannot disagree. Math is
fp64 inside; what comes out is fp32 in [1e-5, 1 - 1e-5], the ends of which no solver step and no model can use.

Arithmetic on many draws gives each of them the same bits as alone, so a clip's sigma does not depend on its batch.

Source: Esser et al., arXiv 2403.03206, sections 3.1 (logit-normal, mode) and 5.3.2 (shift).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

SIGMA_MIN = 1e-5
SIGMA_MAX = 1 - 1e-5
MODE_SCALE_MAX = 2 / (math.pi - 2)  # beyond it the mode sampler's map is no longer monotone
_FP32 = 2.0**-22  # beyond the rounding of a sigma to fp32, which must not move it across a level
_OPEN = 2.0**-52  # densities at the ends are evaluated this far inside

Number: TypeAlias = float | int


@runtime_checkable
class SigmaSampler(Protocol):
    """A distribution of sigma that knows no sample."""

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n"]: ...

    def sample_each(self, generators: Sequence[torch.Generator]) -> Float[Tensor, "n"]: ...

    def icdf(self, u: Float[Tensor, "..."], survival: Float[Tensor, "..."] | None = None) -> Float[Tensor, "..."]: ...

    def log_density(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]: ...

    def log_tails(self, sigma: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]: ...


def require(ok: object, key: str, value: object, rule: str) -> None:
    """Raises a ValueError naming the key, its value and the rule, unless `ok` (a bool of Python or of numpy)."""
    if not ok:
        raise ValueError(f"{key} must be {rule}, got {value}")


def shift_sigma(sigma: Float[Tensor, "..."], shift: Number) -> Float[Tensor, "..."]:
    """Returns shift * sigma / (1 + (shift - 1) * sigma), in sigma's dtype.

    The map is increasing and keeps 0 and 1; its inverse is the shift 1 / shift.

    Args:
        sigma: noise levels, 0..1.
        shift: above 0; above 1 moves towards noise, as long or large clips need.

    Raises:
        ValueError: shift is not a positive number.
    """
    require(0 < shift < math.inf, "shift", shift, "above 0")
    return shift * sigma / (1 + (shift - 1) * sigma)


def log_shift_slope(sigma: Float[Tensor, "..."], shift: Number) -> Float[Tensor, "..."]:
    """Returns the log derivative of `shift_sigma` at `sigma`, the change of variables of a log density."""
    return math.log(shift) - 2 * torch.log1p((shift - 1) * sigma)


def logistic(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns 1 / (1 + exp(-x)); unlike torch's sigmoid, with the same bits for a number alone and among others."""
    return torch.exp(-x).add_(1).reciprocal_()


class Moments(NamedTuple):
    """Mean and standard deviation of sigma, fp64."""

    mean: Float[Tensor, "..."]
    std: Float[Tensor, "..."]


def moments_of(cdf: Callable[[Tensor], Tensor]) -> Moments:
    """Returns the moments of a distribution on (0, 1) from its distribution function alone.

    E[s] is the integral of P(s > x) over (0, 1), E[s^2] that of 2 x P(s > x). On a grid of log odds both are smooth and
    vanish at the ends, so the trapezoidal rule is exact to about 1e-9, also where the density itself has no bound.

    Args:
        cdf: takes noise levels (n,) and returns P(draw <= level), (n, ...).
    """
    x = torch.linspace(-36, 36, 3601, dtype=torch.float64)
    sigma = logistic(x)
    survival = 1 - cdf(sigma)
    shape = (-1, *(1,) * (survival.ndim - 1))
    width = (sigma * logistic(-x) * (x[1] - x[0])).view(shape)
    mean = (survival * width).sum(0)
    square = (2 * sigma.view(shape) * survival * width).sum(0)
    return Moments(mean, (square - mean.square()).clamp_min(0).sqrt())


def to_sigma(value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns fp64 noise levels as they leave this package: fp32 in [1e-5, 1 - 1e-5]."""
    return value.clamp(SIGMA_MIN, SIGMA_MAX).float()


class ShiftedSampler(ABC):
    """What the samplers share: inversion, the shift, and the change of variables. Subclasses know the unshifted law."""

    shift: Number

    @abstractmethod
    def _quantile(self, u: Tensor, survival: Tensor) -> Tensor:
        """The unshifted inverse CDF; survival is 1 - u, the more exact of the two near u = 1."""

    @abstractmethod
    def _log_tails(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The unshifted log CDF and log (1 - CDF)."""

    @abstractmethod
    def _log_density(self, sigma: Tensor) -> Tensor:
        """The unshifted log density."""

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n"]:
        """Returns `n` draws, fp32 in [1e-5, 1 - 1e-5], from one fp64 uniform number each of `generator`."""
        return self.icdf(uniform(n, generator))

    def sample_each(self, generators: Sequence[torch.Generator]) -> Float[Tensor, "n"]:
        """Returns one draw of each generator: bit for bit those of `sample(1, generator)`, several times as fast."""
        return self.icdf(torch.cat([uniform(1, generator) for generator in generators]))

    def icdf(self, u: Float[Tensor, "..."], survival: Float[Tensor, "..."] | None = None) -> Float[Tensor, "..."]:
        """Returns the sigma below which a share `u` of all draws lies, fp32 in [1e-5, 1 - 1e-5].

        Args:
            u: probabilities, 0..1.
            survival: 1 - u where the caller knows it more exactly than fp64 can write u near 1.

        Raises:
            ValueError: a probability is outside 0..1.
        """
        wide = as_probability(u)
        upper = 1 - wide if survival is None else survival.double()
        return to_sigma(shift_sigma(self._quantile(wide, upper), self.shift))

    def log_density(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns the log density of the draws (per unit of sigma) in sigma's dtype, -inf outside 0..1.

        The two ends hold the negligible mass that the clamp of the draws moves there; the density leaves it out.
        """
        inner = _inside(shift_sigma(sigma.double(), 1 / self.shift))
        value = self._log_density(inner) - log_shift_slope(inner, self.shift)
        return value.masked_fill((sigma < 0) | (sigma > 1), -math.inf).to(sigma.dtype)

    def log_tails(self, sigma: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Returns log P(draw <= sigma) and log P(draw > sigma), fp64, both exact far into either tail."""
        return self._log_tails(_inside(shift_sigma(sigma.double(), 1 / self.shift)))

    def cdf(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns P(draw <= sigma), fp64."""
        return self.log_tails(sigma)[0].exp()

    def moments(self) -> Moments:
        """Returns the mean and standard deviation of the draws."""
        return moments_of(self.cdf)


@dataclass(frozen=True)
class Uniform(ShiftedSampler):
    """Every noise level alike, then shifted.

    Args:
        shift: above 0.

    Raises:
        ValueError: a parameter is out of range.
    """

    shift: Number = 1.0

    def __post_init__(self) -> None:
        require(0 < self.shift < math.inf, "shift", self.shift, "above 0")

    def _quantile(self, u: Tensor, survival: Tensor) -> Tensor:
        return u

    def _log_tails(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return sigma.log(), torch.log1p(-sigma)

    def _log_density(self, sigma: Tensor) -> Tensor:
        return torch.zeros_like(sigma)


@dataclass(frozen=True)
class LogitNormal(ShiftedSampler):
    """sigmoid(mean + std * z) with z standard normal, then shifted: the middle noise levels more often than the ends.

    Args:
        mean: of the logit; positive leans towards noise.
        std: of the logit, above 0.
        shift: above 0.

    Raises:
        ValueError: a parameter is out of range.
    """

    mean: Number = 0.0
    std: Number = 1.0
    shift: Number = 1.0

    def __post_init__(self) -> None:
        require(math.isfinite(self.mean), "mean", self.mean, "a finite number")
        require(0 < self.std < math.inf, "std", self.std, "above 0")
        require(0 < self.shift < math.inf, "shift", self.shift, "above 0")

    def _quantile(self, u: Tensor, survival: Tensor) -> Tensor:
        z = torch.where(u < 0.5, torch.special.ndtri(u), -torch.special.ndtri(survival))
        return logistic(self.mean + self.std * z)

    def _standardized(self, sigma: Tensor) -> Tensor:
        return (torch.logit(sigma) - self.mean) / self.std

    def _log_tails(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        z = self._standardized(sigma)
        return torch.special.log_ndtr(z), torch.special.log_ndtr(-z)

    def _log_density(self, sigma: Tensor) -> Tensor:
        normal = -0.5 * self._standardized(sigma).square() - math.log(self.std * math.sqrt(2 * math.pi))
        return normal - sigma.log() - torch.log1p(-sigma)


@dataclass(frozen=True)
class Mode(ShiftedSampler):
    """u - scale * (sin(pi u / 2)^2 - u) with u uniform, then shifted: a hump in the middle that keeps the ends alive.

    Args:
        scale: -1 (more at the ends) .. 2 / (pi - 2) = 1.752 (most in the middle); 0 is uniform.
        shift: above 0.

    Raises:
        ValueError: a parameter is out of range.
    """

    scale: Number = 1.29
    shift: Number = 1.0

    def __post_init__(self) -> None:
        require(-1 <= self.scale <= MODE_SCALE_MAX, "scale", self.scale, f"in -1..{MODE_SCALE_MAX:.4f}")
        require(0 < self.shift < math.inf, "shift", self.shift, "above 0")

    def _quantile(self, u: Tensor, survival: Tensor) -> Tensor:
        return u - self.scale * (torch.sin(math.pi / 2 * u).square() - u)

    def _rank(self, sigma: Tensor) -> Tensor:
        return bisect(lambda u: self._quantile(u, u), sigma)  # the map has no inverse in closed form

    def _log_tails(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        rank = self._rank(sigma)
        return rank.log(), torch.log1p(-rank)

    def _log_density(self, sigma: Tensor) -> Tensor:
        return -torch.log(1 + self.scale - self.scale * math.pi / 2 * torch.sin(math.pi * self._rank(sigma)))


@dataclass(frozen=True)
class Discrete:
    """Another sampler's draws, rounded up to multiples of 1 / levels: the noise levels of a discrete scheduler.

    Args:
        base: the distribution that is rounded, its shift included.
        levels: how many noise levels there are, 2 or more; 1000 is usual.

    Raises:
        ValueError: there are fewer than two levels.
    """

    base: ShiftedSampler
    levels: int

    def __post_init__(self) -> None:
        require(self.levels >= 2, "levels", self.levels, "2 or more")

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n"]:
        """Returns `n` draws; as of `ShiftedSampler`."""
        return self.icdf(uniform(n, generator))

    def sample_each(self, generators: Sequence[torch.Generator]) -> Float[Tensor, "n"]:
        """Returns one draw of each generator."""
        return self.icdf(torch.cat([uniform(1, generator) for generator in generators]))

    def icdf(self, u: Float[Tensor, "..."], survival: Float[Tensor, "..."] | None = None) -> Float[Tensor, "..."]:
        """Returns the level below or at which a share `u` of all draws lies; arguments as of `ShiftedSampler.icdf`."""
        place = self.base.icdf(u, survival).double() * self.levels * (1 - _FP32)
        return to_sigma(place.ceil() / self.levels)

    def log_tails(self, sigma: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Returns log P(draw <= sigma) and log P(draw > sigma), fp64."""
        return self.base.log_tails((sigma.double() * self.levels * (1 + _FP32)).floor() / self.levels)

    def cdf(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns P(draw <= sigma), fp64."""
        return self.log_tails(sigma)[0].exp()

    def moments(self) -> Moments:
        """Returns the mean and standard deviation of the draws: a sum over the levels."""
        level = torch.arange(1, self.levels + 1, dtype=torch.float64) / self.levels
        share = torch.diff(self.cdf(level), prepend=torch.zeros(1, dtype=torch.float64))
        mean = (level * share).sum()
        return Moments(mean, ((level - mean).square() * share).sum().sqrt())

    def log_density(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Raises a ValueError: separate levels have probabilities, which `cdf` tells, and no density."""
        raise ValueError(f"levels={self.levels}: separate noise levels have no log density; use cdf, or levels=0")


def uniform(n: int, generator: torch.Generator) -> Float[Tensor, "n"]:
    """Returns `n` fp64 numbers from [0, 1)."""
    return torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)


def as_probability(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns `u` in fp64.

    Raises:
        ValueError: an entry is outside 0..1 or NaN.
    """
    wide = u.double()
    wrong = ~((wide >= 0) & (wide <= 1))
    if bool(wrong.any()):
        raise ValueError(f"u must be probabilities in 0..1, got {float(wide[wrong][0])}")
    return wide


def bisect(increasing: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Returns where an increasing function on [0, 1] takes each `value`, fp64 and strictly inside (0, 1)."""
    low, high = torch.zeros_like(value), torch.ones_like(value)
    for _ in range(53):  # the bits of an fp64 mantissa
        middle = (low + high) / 2
        below = increasing(middle) < value
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return _inside((low + high) / 2)


def _inside(sigma: Tensor) -> Tensor:
    return sigma.clamp(_OPEN, 1 - _OPEN)
