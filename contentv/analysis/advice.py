"""How strongly TQD should route a dataset's clips, by the gradients measured on a checkpoint.

Two things pull in opposite directions. Routing sends a degraded clip to the noise levels where its gradient is like a
golden one's, and it takes draws away from the levels that neither kind of clip is sent to. With u the rank of sigma
under the base law (u is uniform without TQD), a choice of kappa_max is worth

    worth(kappa_max) = mean over u of log( density(u) * cosine(u)^2 )

density(u): of the ranks trained, over all clips, each as often as it is kept. cosine(u): of the gradient of the mix
that is trained at u with the golden one. A clip kept with probability max(motion, visual) = min(motion, visual) + |gap|
counts as golden with its min(motion, visual) part and as degraded with its |gap| part: visually where its motion is
the better score, in motion where its picture is. density * cosine^2 is the share of the draws at u whose squared
gradient points the golden way: effective golden draws. Their geometric mean, as no noise level makes up for another.

What it is compared with is the base law for all clips. That is not kappa_max = kappa_base: a gap moves the mean of the
Beta law whatever its concentration, and a wide one piles up at the ends.

[derived] The criterion is ours, not the paper's, and rests on assumptions: that a gap of scores is a share of such
degradation as the twins have, and that steps of as many clips as were measured are taken. It tells whether routing can
pay on this model and data, and a first kappa_max to try. A run decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from contentv.analysis.similarity import Estimate, Grams, crossing, jackknife
from contentv.diffusion.samplers import SigmaSampler, Uniform
from contentv.diffusion.tqd import TQD

GOLDEN, VISUAL, MOTION = 0, 1, 2  # rows of the inner products
KAPPA_STEPS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 32.0)  # times kappa_base
RANKS = 400  # at which the integral over u is taken
GAPS = 101  # values of |gap| that clips are rounded to
COSINE_MIN = 0.01  # a gradient that points the wrong way is worth as little as this
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Advice:
    """What the measurement recommends.

    Attributes:
        kappa_max: the best of those tried; None if routing does not pay beyond the measurement's error.
        kappa_low, kappa_high: the least and greatest best ones with one group of clips left out.
        gain: worth of the best less that of the base law for all, in nats of effective golden draws.
        pays: whether the gain's interval lies above 0.
        gains: kappa_max -> worth less that of the base law, of all that were tried.
        crossing: sigma above which visually degraded clips agree with golden ones better than motion-degraded ones do.
        median: sigma at which the base law has its median, where quantile routing changes sides.
    """

    kappa_max: float | None
    kappa_low: float
    kappa_high: float
    gain: Estimate
    pays: bool
    gains: dict[float, float]
    crossing: Estimate
    median: float


@dataclass(frozen=True)
class Shares:
    """What is trained at each rank u: the density, and how much of it is golden, visual and motion (3, ranks)."""

    density: Array
    parts: Array


def trained_shares(
    motion: Float[Tensor, " n"], visual: Float[Tensor, " n"], kappa_base: float, kappa_max: float, ranks: Array
) -> Shares:
    """Returns what TQD in quantile mode trains at each rank of the base law.

    Args:
        motion: scores in 0..1 of all clips that have both.
        visual: likewise.
        kappa_base: see `TQD`.
        kappa_max: see `TQD`.
        ranks: u in 0..1, exclusive.
    """
    gap = (motion - visual).double()
    size = (gap.abs() * (GAPS - 1)).round().long()
    golden = torch.minimum(motion, visual).double()
    levels = torch.linspace(0, 1, GAPS, dtype=torch.float64)
    parts = np.zeros((3, len(ranks)))
    for sign, degraded in ((1.0, VISUAL), (-1.0, MOTION)):
        side = gap >= 0 if sign > 0 else gap < 0
        of_golden, of_degraded = (
            torch.zeros(GAPS, dtype=torch.float64).index_add_(0, size[side], weight[side])
            for weight in (golden, gap.abs())
        )
        law = TQD(Uniform(), kappa_base, kappa_max)
        u = torch.from_numpy(ranks)[:, None]
        density = law.log_density(u, 0.5 + sign * levels / 2, 0.5 - sign * levels / 2).exp()
        parts[GOLDEN] += (density @ of_golden).numpy()
        parts[degraded] += (density @ of_degraded).numpy()
    total = parts.sum(axis=0)
    return Shares(total / total.mean(), parts / total)


def untouched_shares(motion: Float[Tensor, " n"], visual: Float[Tensor, " n"]) -> Shares:
    """Returns what the base law trains at each rank, with the same clips kept as often: the same everywhere."""
    gap = (motion - visual).double()
    golden = torch.minimum(motion, visual).double()
    parts = torch.stack([golden.sum(), gap.clamp_min(0).sum(), (-gap).clamp_min(0).sum()]).numpy()
    return Shares(np.ones(RANKS), np.repeat((parts / parts.sum())[:, None], RANKS, axis=1))


def worth(shares: Shares, inner: Array) -> float:
    """Returns the mean over ranks of log(density * cosine^2).

    Args:
        shares: what is trained at each rank.
        inner: inner products (ranks, 3, 3) of the golden, visually and motion-degraded gradients at each rank.
    """
    mixed = np.einsum("ku,ukl->ul", shares.parts, inner)  # of the mix with each kind
    length = np.einsum("ul,lu->u", mixed, shares.parts)
    cosine = mixed[:, GOLDEN] / np.sqrt(np.maximum(length * inner[:, GOLDEN, GOLDEN], 1e-300))
    return float(np.mean(np.log(shares.density) + 2 * np.log(np.clip(cosine, COSINE_MIN, 1.0))))


def advise(
    bins: Sequence[Grams], centres: Sequence[float], motion: Float[Tensor, " n"], visual: Float[Tensor, " n"],
    base: SigmaSampler, kappa_base: float = 2.0,
) -> Advice:  # fmt: skip
    """Returns a kappa_max for a dataset's scores, and where the two kinds of clips change places.

    Args:
        bins: inner products of each interval of sigma, of three twins: golden, visual, motion.
        centres: middles of the intervals, ascending.
        motion: scores in 0..1 of all clips that have both, at least one of them above 0.
        visual: likewise.
        base: the base law.
        kappa_base: of the law to be recommended.
    """
    ranks = (np.arange(RANKS) + 0.5) / RANKS
    sigma = base.icdf(torch.from_numpy(ranks)).double().numpy()
    kappas = [kappa_base * step for step in KAPPA_STEPS]
    shares = [trained_shares(motion, visual, kappa_base, kappa, ranks) for kappa in kappas]
    untouched = untouched_shares(motion, visual)

    def gains(grams: Sequence[Grams]) -> Array:
        inner = _between(sigma, centres, [gram.of_means() for gram in grams])
        return np.array([worth(share, inner) for share in shares]) - worth(untouched, inner)

    found, left_out = gains(bins), [gains([gram.without(i) for gram in bins]) for i in range(bins[0].groups)]
    best = int(found.argmax())
    gain = jackknife(float(found[best]), [float(values[best]) for values in left_out])
    pays = gain.low > 0
    others = [kappas[int(values.argmax())] for values in left_out]
    median = float(base.icdf(torch.tensor([0.5], dtype=torch.float64))[0])
    return Advice(
        float(kappas[best]) if pays else None, float(min(others)), float(max(others)), gain, pays,
        dict(zip(map(float, kappas), map(float, found), strict=True)), _crossing(bins, centres), median,
    )  # fmt: skip


def _crossing(bins: Sequence[Grams], centres: Sequence[float]) -> Estimate:
    """Returns where the visual cosine comes to lie above the motion one; without an interval if it is not always so."""

    def place(grams: Sequence[Grams]) -> float:
        return crossing(centres, [g.cosine(VISUAL) for g in grams], [g.cosine(MOTION) for g in grams])

    value = place(bins)
    left_out = [place([gram.without(i) for gram in bins]) for i in range(bins[0].groups)]
    if math.isnan(value) or any(math.isnan(other) for other in left_out):
        return Estimate(value, math.nan, math.nan)
    return jackknife(value, left_out)


def _between(sigma: Array, centres: Sequence[float], inner: Sequence[Array]) -> Array:
    """Returns inner products at some sigma by straight lines between the bins; beyond the outer ones theirs."""
    stacked = np.stack(inner)
    kinds = stacked.shape[1]
    flat = [np.interp(sigma, centres, stacked[:, k, m]) for k in range(kinds) for m in range(kinds)]
    return np.stack(flat, axis=1).reshape(len(sigma), kinds, kinds)
