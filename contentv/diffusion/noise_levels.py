"""Which noise levels a run trains: what its sampler makes of the clips' scores, and what was drawn.

The sigma range is looked at in ten equal bins, clips in the quadrants of motion against visual score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from contentv.diffusion.samplers import SigmaSampler
from contentv.diffusion.tqd import TQD, keep_probability

BINS = 10
QUADRANTS = ("motion-rich", "clean-looking", "both", "neither", "no scores")
SPLIT = 0.5  # where the quadrants meet
STARVED = 0.25  # a bin with less than this share of what the base sampler gives it
_LEAST_BASE = 0.01  # bins that the base itself hardly trains are not starved by routing
_GRID = 20 * BINS  # intervals in which distribution functions are evaluated
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class NoiseLevels:
    """What a sampler makes of some clips.

    Args:
        sampler: as text.
        base: share of the base sampler's draws in each bin.
        trained: share of the draws for the clips in each bin, each clip as often as it is kept.
        mean: of the draws; likewise std.
        clips: how many were looked at.
        unscored: how many of them lack a score.
        keep_rate: mean probability of a clip being kept, 1 where all are.
    """

    sampler: str
    base: list[float]
    trained: list[float]
    mean: float
    std: float
    clips: int = 0
    unscored: int = 0
    keep_rate: float = 1.0

    def describe(self) -> str:
        """Returns two or three lines for people: the sampler, its shares from clean to noise, and what scores do."""
        lines = [
            f"noise levels: {self.sampler}",
            f"  sigma {self.mean:.3f} +- {self.std:.3f}, drawn from 0 |{bars(self.trained)}| to 1"
            + (f", without scores |{bars(self.base)}|" if self.trained != self.base else ""),
        ]
        if self.clips:
            lines.append(
                f"  of {self.clips} clips looked at {self.unscored} lack a score and get the base sampler; "
                f"{self.keep_rate:.0%} of clips count in an epoch"
            )
        return "\n".join(lines)


def noise_levels(
    sampler: SigmaSampler | TQD, motion: Float[Tensor, "n"], visual: Float[Tensor, "n"], *, keeping: bool = False
) -> NoiseLevels:
    """Returns which noise levels clips with these scores are trained at.

    Args:
        sampler: from `build_sampler`; of others than TQD the scores matter for the keep rate alone.
        motion: motion scores in 0..1, NaN = none; may be empty.
        visual: visual scores, likewise.
        keeping: clips are kept, or weighted, by their keep probability.

    Raises:
        ValueError: a score is outside 0..1, or missing where the sampler refuses that.
    """
    grid = torch.linspace(0, 1, _GRID + 1, dtype=torch.float64)
    plain = sampler.base if isinstance(sampler, TQD) else sampler
    of_base = plain.log_tails(grid)[0].exp()
    keep = keep_probability(motion, visual).double() if keeping else torch.ones(len(motion), dtype=torch.float64)
    trained = of_base
    if isinstance(sampler, TQD) and float(keep.sum()) > 0:
        trained = (sampler.cdf(grid[:, None], motion, visual) * keep).sum(1) / keep.sum()
    above = 1 - trained
    mean = float(torch.trapezoid(above, grid))
    variance = float(torch.trapezoid(2 * grid * above, grid)) - mean**2
    return NoiseLevels(
        repr(sampler), _shares(of_base), _shares(trained), mean, math.sqrt(max(variance, 0.0)), len(motion),
        int((motion.isnan() | visual.isnan()).sum()), float(keep.mean()) if len(keep) else 1.0,
    )  # fmt: skip


def starved(base: Sequence[float], trained: Sequence[float]) -> list[int]:
    """Returns the bins that get less than a quarter of what the base sampler would give them.

    Routing by scores empties the middle where clips are either moving or sharp: the marginal turns U-shaped.
    """
    pairs = enumerate(zip(base, trained, strict=True))
    return [i for i, (of_base, share) in pairs if of_base >= _LEAST_BASE and share < STARVED * of_base]


def bins_text(bins: Sequence[int]) -> str:
    """Returns the sigma ranges of some bins, such as "0.4-0.6, 0.9-1.0"."""
    runs: list[list[int]] = []
    for i in bins:
        if runs and i == runs[-1][1]:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return ", ".join(f"{low / BINS:.1f}-{high / BINS:.1f}" for low, high in runs)


def bars(shares: Sequence[float]) -> str:
    """Returns shares as a line of block characters, the largest as a full one."""
    top = max(max(shares), 1e-12)
    return "".join(_BARS[round(share / top * (len(_BARS) - 1))] for share in shares)


def quality_tallies(
    errors: Float[Tensor, "b"], sigma: Float[Tensor, "b"], motion: Float[Tensor, "b"], visual: Float[Tensor, "b"]
) -> dict[str, Tensor]:
    """Returns sums over clips by quadrant and sigma bin, (5, 10) each, in the order of `QUADRANTS` and of sigma.

    `sigma_counts` counts the clips, `sigma_losses` adds up their losses, `keep_sums` (2,) adds up the clips' keep
    probabilities and their inverses. Nothing here waits for the device.

    Args:
        errors: each clip's loss.
        sigma: each clip's noise level, on the same device.
        motion: scores in 0..1, NaN = none; likewise visual.
    """
    device = errors.device
    missing = motion.isnan() | visual.isnan()
    moving, clean = motion >= SPLIT, visual >= SPLIT
    quadrant = torch.where(moving, torch.where(clean, 2, 0), torch.where(clean, 1, 3))
    quadrant = torch.where(missing, 4, quadrant).to(device, non_blocking=True)
    place = quadrant * BINS + (sigma * BINS).long().clamp(0, BINS - 1)
    empty = torch.zeros(len(QUADRANTS) * BINS, dtype=torch.float32, device=device)
    counts = empty.index_add(0, place, torch.ones_like(errors, dtype=torch.float32))
    losses = empty.index_add(0, place, errors.float())
    keep = keep_probability(motion, visual)
    keeps = torch.stack([keep.sum(), keep.clamp_min(1e-3).reciprocal().sum()]).to(device, non_blocking=True)
    shape = (len(QUADRANTS), BINS)
    return {"sigma_counts": counts.view(shape), "sigma_losses": losses.view(shape), "keep_sums": keeps}


def _shares(cdf: Float[Tensor, "n"]) -> list[float]:
    """Shares of the bins from the distribution function on the grid; what lies at the very ends belongs to them."""
    edges = cdf[:: _GRID // BINS].clone()
    edges[0], edges[-1] = 0, 1
    return [float(share) for share in edges.diff()]
