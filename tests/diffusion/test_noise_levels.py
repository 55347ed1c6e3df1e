"""Which noise levels a run trains: expected shares against draws, starved bins, and the tallies of a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from contentv.diffusion.noise_levels import (
    BINS,
    QUADRANTS,
    bars,
    bins_text,
    noise_levels,
    quality_tallies,
    starved,
)
from contentv.diffusion.timesteps import TQD, Discrete, LogitNormal, Uniform


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares_of(draws: torch.Tensor) -> torch.Tensor:
    return torch.bincount((draws * BINS).long().clamp_max(BINS - 1), minlength=BINS) / len(draws)


@pytest.mark.parametrize("keeping", [False, True])
def test_expected_shares_are_those_of_kept_draws(keeping):
    motion, visual = torch.rand(300, generator=seeded(1)), torch.rand(300, generator=seeded(2)) * 0.6
    motion[:40] = math.nan
    tqd = TQD(LogitNormal(shift=2.0), floor=0.1)
    levels = noise_levels(tqd, motion, visual, keeping=keeping)
    keep = torch.maximum(motion, visual).nan_to_num(1.0)
    times = 3000
    kept = torch.rand(times, 300, generator=seeded(3)) < (keep if keeping else torch.ones(300))
    draws = tqd.sample(motion.repeat(times), visual.repeat(times), seeded(4)).view(times, 300)[kept]
    torch.testing.assert_close(torch.tensor(levels.trained), shares_of(draws), rtol=0, atol=0.002)
    torch.testing.assert_close(
        torch.tensor(levels.base), shares_of(tqd.base.sample(10**6, seeded(5))), rtol=0, atol=0.002
    )
    assert levels.mean == pytest.approx(float(draws.mean()), abs=0.003)
    assert levels.std == pytest.approx(float(draws.std()), abs=0.003)
    assert (levels.clips, levels.unscored) == (300, 40)
    assert levels.keep_rate == pytest.approx(float(keep.mean()) if keeping else 1.0)
    assert "of 300 clips looked at 40 lack a score" in levels.describe()


@pytest.mark.parametrize("sampler", [Uniform(shift=3.0), Discrete(LogitNormal(), 1000)], ids=str)
def test_samplers_that_know_no_scores(sampler):
    levels = noise_levels(sampler, torch.empty(0), torch.empty(0))
    assert levels.base == levels.trained
    assert sum(levels.base) == pytest.approx(1)
    torch.testing.assert_close(
        torch.tensor(levels.base), shares_of(sampler.sample(10**6, seeded()) - 1e-6), rtol=0, atol=0.002
    )
    assert levels.describe().count("\n") == 1


def test_clips_without_scores_are_refused_where_the_sampler_says_so():
    nan = torch.full((3,), math.nan)
    with pytest.raises(ValueError, match="3 of 3 clips"):
        noise_levels(TQD(LogitNormal(), missing="refuse"), nan, nan)


def test_opposite_clips_starve_the_middle_and_the_floor_feeds_it():
    motion = torch.tensor([0.9, 0.1])
    tqd = noise_levels(TQD(Uniform(), kappa_max=12.0), motion, 1 - motion)
    mu, kappa = 0.9, 2 + 10 * 0.8
    cdf = stats.beta(mu * kappa, (1 - mu) * kappa).cdf(np.linspace(0, 1, 11))
    marginal = (np.diff(cdf) + np.diff(cdf)[::-1]) / 2
    np.testing.assert_allclose(tqd.trained, marginal, atol=1e-6)
    assert starved(tqd.base, tqd.trained) == [i for i in range(10) if marginal[i] < 0.025] == [3, 4, 5, 6]
    assert bins_text(starved(tqd.base, tqd.trained)) == "0.3-0.7"
    floored = noise_levels(TQD(Uniform(), kappa_max=12.0, floor=0.3), motion, 1 - motion)
    assert starved(floored.base, floored.trained) == []
    # A bin that the base itself leaves alone is no loss.
    assert starved([0.001, 0.999], [0.0, 1.0]) == []
    assert bins_text([0, 4, 5, 9]) == "0.0-0.1, 0.4-0.6, 0.9-1.0"
    assert bars([0.0, 0.5, 1.0]) == " ▄█"


def test_tallies_are_the_sums_of_a_loop_over_clips():
    motion, visual = torch.rand(400, generator=seeded(6)), torch.rand(400, generator=seeded(7))
    motion[::9] = math.nan
    visual[::11] = math.nan
    sigma, errors = torch.rand(400, generator=seeded(8)), torch.rand(400, generator=seeded(9))
    sigma[0] = 1.0
    counts, losses = torch.zeros(len(QUADRANTS), BINS), torch.zeros(len(QUADRANTS), BINS)
    for m, v, s, e in zip(motion.tolist(), visual.tolist(), sigma.tolist(), errors.tolist(), strict=True):
        names = {(True, False): "motion-rich", (False, True): "clean-looking", (True, True): "both"}
        name = "no scores" if m != m or v != v else names.get((m >= 0.5, v >= 0.5), "neither")
        counts[QUADRANTS.index(name), min(int(s * 10), 9)] += 1
        losses[QUADRANTS.index(name), min(int(s * 10), 9)] += e
    found = quality_tallies(errors, sigma, motion, visual)
    assert torch.equal(found["sigma_counts"], counts)
    torch.testing.assert_close(found["sigma_losses"], losses)
    keep = torch.maximum(motion, visual).nan_to_num(1.0)
    torch.testing.assert_close(found["keep_sums"], torch.stack([keep.sum(), (1 / keep.clamp_min(1e-3)).sum()]))
