"""Timestep-aware quality decoupling (TQD): clips with good motion train high noise levels, sharp ones low levels.

High noise decides motion and composition, low noise texture. With a clip's motion and visual scores in [0, 1],

    gap   = motion - visual
    mu    = 0.5 + 0.5 * gap                                       mean of the Beta distribution
    kappa = kappa_base + (kappa_max - kappa_base) * |gap|         its concentration
    u     ~ Beta(mu * kappa, (1 - mu) * kappa)

and a clip is kept with probability max(motion, visual). Two readings of u:

- `direct`: sigma = u, then shifted. kappa_base = 4 comes near a logit-normal(0, 1) base, 2 is uniform.
- `quantile`: sigma = the base sampler's inverse CDF at u. kappa_base = 2 and equal scores give back *any* base sampler
  exactly, because u is then uniform. The base carries its own shift.

Random numbers, in this order, all from the one generator of `sample`: the base sampler's draws for the clips without
scores; then, for 65,536 scored clips at a time, with floor > 0 one uniform number per clip, two arrays of Gamma draws
and two of uniform ones, and with floor > 0 the base sampler's draws. So with one generator per clip, a clip without
scores gets the very number the base sampler gives it. Equal scores give the base's distribution, not its numbers.

Scores are NaN where a clip has none. Such clips get the base sampler, or are refused: `missing` says which.

Source: Luo et al., TQD, arXiv 2603.25527. The formulas of gap, mu, kappa and the keep probability are [reported], from
notes on the paper whose full text we could not open; kappa_max = 8, the quantile reading (also in a third-party image
trainer) and the floor are [inferred] choices of ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from contentv.diffusion.beta import beta_cdf, beta_log_odds, beta_quantile
from contentv.diffusion.samplers import (
    Moments,
    Number,
    SigmaSampler,
    as_probability,
    bisect,
    log_shift_slope,
    logistic,
    moments_of,
    require,
    shift_sigma,
    to_sigma,
    uniform,
)

MODES = ("quantile", "direct")
MISSING = ("base", "refuse")
SHAPE_MIN = 1e-3  # least alpha and beta: at a gap of +-1 one of them is 0 and the Beta law a point mass
_BLOCK = 65_536  # clips drawn at a time: what they need fits in the processor's cache


class _Numbers(NamedTuple):
    """The random numbers of some scored clips: one row each of two, then of two; the others only with a floor."""

    gammas: Tensor
    uniforms: Tensor
    floor: Tensor
    base: Tensor


class TQD:
    """Sigma whose distribution follows from a clip's motion and visual scores.

    Args:
        base: the sampler that clips without scores, the floor and (in quantile mode) u fall back on.
        kappa_base: concentration for equal scores, above 0; 2 = uniform u.
        kappa_max: concentration for a gap of 1, at least kappa_base. It needs tuning: too strong a routing starves the
            middle noise levels.
        mode: "quantile" or "direct".
        floor: probability of using the base sampler whatever the scores, 0..1; 0 = off.
        shift: of the draw in direct mode, above 0. In quantile mode the base has its own and this must stay 1.
        missing: what clips without scores get: "base", the base sampler, or "refuse", a ValueError.

    Raises:
        ValueError: a parameter is out of range.
    """

    def __init__(
        self,
        base: SigmaSampler,
        kappa_base: Number = 2.0,
        kappa_max: Number = 8.0,
        mode: str = "quantile",
        floor: Number = 0.0,
        shift: Number = 1.0,
        missing: str = "base",
    ) -> None:
        require(0 < kappa_base < math.inf, "kappa_base", kappa_base, "above 0")
        require(kappa_base <= kappa_max < math.inf, "kappa_max", kappa_max, f"at least kappa_base={kappa_base}")
        require(mode in MODES, "mode", mode, "quantile or direct")
        require(0 <= floor <= 1, "floor", floor, "in 0..1")
        require(0 < shift < math.inf, "shift", shift, "above 0")
        require(mode == "direct" or shift == 1, "shift", shift, "1 in mode=quantile, where the base carries the shift")
        require(missing in MISSING, "missing", missing, "base or refuse")
        self.base = base
        self.kappa_base = kappa_base
        self.kappa_max = kappa_max
        self.mode = mode
        self.floor = floor
        self.shift = shift
        self.missing = missing

    def __repr__(self) -> str:
        values = f"kappa_base={self.kappa_base}, kappa_max={self.kappa_max}, mode={self.mode}, floor={self.floor}"
        return f"TQD({self.base}, {values}, shift={self.shift})"

    def sample(
        self, motion: Float[Tensor, "..."], visual: Float[Tensor, "..."], generator: torch.Generator
    ) -> Float[Tensor, "b"]:
        """Returns one sigma per clip, (b,) fp32 in [1e-5, 1 - 1e-5].

        Args:
            motion: motion scores (b,) in 0..1; NaN = the clip has none and gets the base sampler.
            visual: visual scores (b,), likewise.
            generator: source of all draws; the module's docstring has their order.

        Raises:
            ValueError: the scores are not two (b,) tensors, or one is outside 0..1.
        """
        if motion.ndim != 1:
            raise ValueError(f"motion must have the shape (b,), got {tuple(motion.shape)}")
        device = generator.device
        alpha, beta, missing = self._parameters(motion.to(device), visual.to(device))
        shapes = torch.stack([alpha, beta])[:, ~missing]
        sigma = torch.empty(motion.shape, device=device)
        sigma[missing] = self.base.sample(int(missing.sum()), generator)
        blocks = [self._place_scored(block, self._numbers(block, generator)) for block in shapes.split(_BLOCK, dim=1)]
        sigma[~missing] = torch.cat(blocks)
        return sigma

    def sample_each(
        self, motion: Float[Tensor, "b"], visual: Float[Tensor, "b"], generators: Sequence[torch.Generator]
    ) -> Float[Tensor, "b"]:
        """Returns one sigma per clip, each from its own CPU generator: bit for bit what `sample` gives it alone.

        Args:
            motion: motion scores (b,) in 0..1; NaN = none.
            visual: visual scores (b,), likewise.
            generators: one per clip.

        Raises:
            ValueError: as of `sample`.
        """
        alpha, beta, missing = self._parameters(motion, visual)
        shapes = torch.stack([alpha, beta])[:, ~missing]
        without = [generator for generator, lacks in zip(generators, missing.tolist(), strict=True) if lacks]
        scored = [generator for generator, lacks in zip(generators, missing.tolist(), strict=True) if not lacks]
        sigma = torch.empty(motion.shape)
        if without:
            sigma[missing] = self.base.sample_each(without)
        if scored:
            sigma[~missing] = self._place_scored(shapes, self._numbers_each(shapes, scored))
        return sigma

    def _numbers(self, shapes: Float[Tensor, "2 n"], generator: torch.Generator) -> _Numbers:
        n = shapes.shape[1]
        floor = uniform(n, generator) if self.floor > 0 else shapes[0, :0]
        gammas = torch._standard_gamma(shapes + 1, generator=generator)
        uniforms = uniform(2 * n, generator).view(2, n)
        return _Numbers(gammas, uniforms, floor, self.base.sample(n, generator) if self.floor > 0 else floor)

    def _numbers_each(self, shapes: Float[Tensor, "2 n"], generators: Sequence[torch.Generator]) -> _Numbers:
        """The numbers of `_numbers`, one generator a clip: kind by kind, since the order matters in each alone."""
        floor = torch.cat([uniform(1, each) for each in generators]) if self.floor > 0 else shapes[0, :0]
        pairs = (shapes + 1).t().contiguous().split(1)
        drawn = zip(pairs, generators, strict=True)
        gammas = torch.cat([torch._standard_gamma(pair, generator=each) for pair, each in drawn]).t()
        uniforms = torch.cat([uniform(2, each) for each in generators]).view(-1, 2).t()
        return _Numbers(gammas, uniforms, floor, self.base.sample_each(generators) if self.floor > 0 else floor)

    def _place_scored(self, shapes: Float[Tensor, "2 n"], numbers: _Numbers) -> Float[Tensor, "n"]:
        log_odds = beta_log_odds(shapes, numbers.gammas, numbers.uniforms)
        sigma = self._place(logistic(log_odds), logistic(-log_odds))
        return sigma if self.floor == 0 else torch.where(numbers.floor < self.floor, numbers.base, sigma)

    def icdf(
        self, u: Float[Tensor, "..."], motion: Float[Tensor, "..."], visual: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Returns the sigma below which a share `u` of a clip's draws lies, fp32 in [1e-5, 1 - 1e-5].

        Args:
            u: probabilities in 0..1, of a shape that broadcasts with the scores'.
            motion: motion scores in 0..1; NaN = none.
            visual: visual scores, of the same shape.

        Raises:
            ValueError: a probability or score is outside 0..1, or the scores' shapes differ.
        """
        alpha, beta, missing = self._parameters(motion, visual)
        wide = as_probability(u) + torch.zeros_like(alpha)  # the scores' and the probabilities' common shape
        if self.floor > 0:
            scored = to_sigma(bisect(lambda sigma: self._scored_cdf(sigma, alpha, beta), wide))
        else:
            rank = beta_quantile(alpha, beta, wide)
            scored = self._place(rank, beta_quantile(beta, alpha, 1 - wide))
        return torch.where(missing, self.base.icdf(wide), scored)

    def cdf(
        self, sigma: Float[Tensor, "..."], motion: Float[Tensor, "..."], visual: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Returns P(draw <= sigma) of clips with these scores, fp64; shapes and errors as in `icdf`."""
        alpha, beta, missing = self._parameters(motion, visual)
        wide = sigma.double()
        return torch.where(missing, self.base.log_tails(wide)[0].exp(), self._scored_cdf(wide, alpha, beta))

    def moments(self, motion: Float[Tensor, "..."], visual: Float[Tensor, "..."]) -> Moments:
        """Returns the mean and standard deviation of the draws of clips with these scores, of the scores' shape.

        In direct mode without floor and shift they are mu and sqrt(mu * (1 - mu) / (kappa + 1)). Errors as in `icdf`.
        """
        shape = (-1, *(1,) * motion.ndim)
        return moments_of(lambda sigma: self.cdf(sigma.view(shape), motion, visual))

    def _scored_cdf(self, sigma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        of_base = self.base.log_tails(sigma)[0].exp()
        place = of_base if self.mode == "quantile" else shift_sigma(sigma, 1 / self.shift)
        return (1 - self.floor) * beta_cdf(alpha, beta, place) + self.floor * of_base

    def log_density(
        self, sigma: Float[Tensor, "..."], motion: Float[Tensor, "..."], visual: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Returns the log density (per unit of sigma) of clips with these scores, in sigma's dtype; -inf outside 0..1.

        Args:
            sigma: noise levels, of a shape that broadcasts with the scores'.
            motion: motion scores in 0..1; NaN = none.
            visual: visual scores, of the same shape.

        Raises:
            ValueError: a score is outside 0..1, or the scores' shapes differ.
        """
        alpha, beta, missing = self._parameters(motion, visual)
        wide = sigma.double()
        of_base = self.base.log_density(wide)
        if self.mode == "quantile":
            (log_low, log_high), log_slope = self.base.log_tails(wide), of_base
        else:
            inner = shift_sigma(wide, 1 / self.shift).clamp(2.0**-52, 1 - 2.0**-52)
            log_low, log_high, log_slope = inner.log(), torch.log1p(-inner), -log_shift_slope(inner, self.shift)
            log_slope = log_slope.masked_fill((wide < 0) | (wide > 1), -math.inf)
        log_norm = torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
        value = (alpha - 1) * log_low + (beta - 1) * log_high + log_norm + log_slope
        if self.floor > 0:
            log_keep = math.log1p(-self.floor) if self.floor < 1 else -math.inf
            value = torch.logaddexp(value + log_keep, of_base + math.log(self.floor))
        return torch.where(missing, of_base, value).to(sigma.dtype)

    def keep_probability(self, motion: Float[Tensor, "..."], visual: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns max(motion, visual), the probability of keeping a clip in an epoch, fp32; 1 for clips without scores.

        Raises:
            ValueError: a score is outside 0..1, or the shapes differ.
        """
        return keep_probability(motion, visual)

    def _parameters(self, motion: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Bool[Tensor, "..."]]:
        """The Beta law's alpha and beta (those of equal scores where one is missing), and which clips lack scores."""
        motion, visual = checked_scores(motion, visual)
        gap = motion - visual
        missing = gap.isnan()
        if self.missing == "refuse" and bool(missing.any()):
            raise ValueError(
                f"motion and visual scores are NaN for {int(missing.sum())} of {missing.numel()} clips: "
                "missing=refuse wants all clips scored, missing=base gives these the base sampler"
            )
        gap = gap.nan_to_num(nan=0.0)
        mean = 0.5 + 0.5 * gap
        kappa = self.kappa_base + (self.kappa_max - self.kappa_base) * gap.abs()
        return (mean * kappa).clamp_min(SHAPE_MIN), ((1 - mean) * kappa).clamp_min(SHAPE_MIN), missing

    def _place(self, u: Tensor, survival: Tensor) -> Tensor:
        if self.mode == "quantile":
            return self.base.icdf(u, survival)
        return to_sigma(shift_sigma(u, self.shift))


def keep_probability(motion: Float[Tensor, "..."], visual: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns max(motion, visual), the probability of keeping a clip in an epoch, fp32; 1 for clips without scores.

    Raises:
        ValueError: a score is outside 0..1, or the shapes differ.
    """
    best = torch.maximum(*checked_scores(motion, visual))  # NaN if either is
    return best.nan_to_num(nan=1.0).float()


def checked_scores(
    motion: Float[Tensor, "..."], visual: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Returns both scores in fp64.

    Raises:
        ValueError: a score is outside 0..1 (NaN, a missing score, is allowed), or the shapes differ.
    """
    if motion.shape != visual.shape:
        raise ValueError(f"motion and visual must have one shape, got {tuple(motion.shape)} and {tuple(visual.shape)}")
    for name, scores in (("motion", motion), ("visual", visual)):
        wrong = (scores < 0) | (scores > 1)
        if bool(wrong.any()):
            raise ValueError(f"{name} scores must be in 0..1 (NaN = missing), got {float(scores[wrong][0])}")
    return motion.double(), visual.double()
