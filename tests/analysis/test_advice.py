"""The recommended routing: against integrals by scipy, and on gradients whose best routing is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from contentv.analysis.advice import RANKS, advise, trained_shares, untouched_shares, worth
from contentv.analysis.remarks import remarks
from contentv.analysis.similarity import Estimate, Grams
from contentv.diffusion.samplers import LogitNormal, Uniform

GROUPS = 4
CENTRES = [0.05 + 0.1 * i for i in range(10)]


def gram(visual: float, motion: float, noise: float = 0.02, seed: int = 0) -> Grams:
    """Groups of gradients of length about 1; the twins have these cosines with the golden one."""
    rng = np.random.default_rng(seed)
    means = np.zeros((3, 60))
    means[0, 0] = 1.0
    for row, (value, axis) in enumerate(((visual, 1), (motion, 2)), start=1):
        means[row, 0], means[row, axis] = value, math.sqrt(1 - value**2)
    rows = (means[:, None] + noise * rng.standard_normal((3, GROUPS, 60))).reshape(3 * GROUPS, 60)
    return Grams(rows @ rows.T, GROUPS)


def scores(gap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A 50/50 set: motion-rich and clean-looking clips with gaps of one size."""
    high, low = 0.5 + gap / 2, 0.5 - gap / 2
    motion = torch.tensor([high, low], dtype=torch.float64).repeat(50)
    return motion, motion.flip(0)


def test_shares_are_those_of_the_beta_laws() -> None:
    ranks = (np.arange(RANKS) + 0.5) / RANKS
    motion = torch.tensor([0.9, 0.2, 0.6, 0.6], dtype=torch.float64)
    visual = torch.tensor([0.4, 0.7, 0.6, 0.1], dtype=torch.float64)
    found = trained_shares(motion, visual, 2.0, 8.0, ranks)
    parts = np.zeros((3, RANKS))
    for m, v in zip(motion.tolist(), visual.tolist(), strict=True):
        gap, kappa = m - v, 2 + 6 * abs(m - v)
        mean = 0.5 + 0.5 * gap
        density = stats.beta.pdf(ranks, mean * kappa, (1 - mean) * kappa)
        parts[0] += min(m, v) * density
        parts[1 if gap > 0 else 2] += abs(gap) * density
    np.testing.assert_allclose(found.parts, parts / parts.sum(0), atol=1e-6)
    np.testing.assert_allclose(found.density, parts.sum(0) / parts.sum(0).mean(), rtol=1e-6)


def test_worth_is_zero_for_golden_clips_and_falls_with_starved_ranks() -> None:
    ranks = (np.arange(RANKS) + 0.5) / RANKS
    golden = torch.ones(3, dtype=torch.float64)
    same = np.broadcast_to(np.ones((3, 3)), (RANKS, 3, 3))
    assert worth(trained_shares(golden, golden, 2.0, 8.0, ranks), same) == pytest.approx(0.0, abs=1e-9)
    assert worth(untouched_shares(*scores(0.6)), same) == pytest.approx(0.0, abs=1e-9)
    for kappa in (2.0, 8.0, 32.0):  # equal gradients: what is left is how unequally the ranks are trained
        law = [stats.beta.pdf(ranks, mean * k, (1 - mean) * k) for mean in (0.8, 0.2) for k in [2 + (kappa - 2) * 0.6]]
        density = sum(law) / sum(law).mean()
        assert worth(trained_shares(*scores(0.6), 2.0, kappa, ranks), same) == pytest.approx(np.log(density).mean())
        assert np.log(density).mean() < -0.05


def test_the_base_law_trains_every_rank_with_the_same_mix() -> None:
    found = untouched_shares(torch.tensor([0.9, 0.3, 0.5]), torch.tensor([0.4, 0.4, 0.5]))
    np.testing.assert_allclose(found.parts[:, 7], np.array([1.2, 0.5, 0.1]) / 1.8, rtol=1e-6)
    assert (found.parts == found.parts[:, :1]).all()
    assert (found.density == 1).all()


def test_clips_that_agree_at_opposite_ends_are_worth_routing() -> None:
    steep = [1 / (1 + math.exp(10 * (0.5 - c))) for c in CENTRES]
    bins = [gram(visual=c, motion=1 - c, seed=i) for i, c in enumerate(steep)]
    advice = advise(bins, CENTRES, *scores(0.6), base=Uniform())
    assert advice.pays
    assert advice.gain.low > 0
    assert 4 <= advice.kappa_max <= 16  # neither off nor endless: the middle must still be trained
    assert advice.crossing.value == pytest.approx(0.5, abs=0.02)
    assert advice.median == 0.5
    assert advice.gains[advice.kappa_max] == max(advice.gains.values()) == advice.gain.value


@pytest.mark.parametrize("way", ["equal", "reversed"])
def test_no_routing_where_it_cannot_help(way: str) -> None:
    if way == "equal":
        bins = [gram(visual=0.9, motion=0.9, seed=i) for i, _ in enumerate(CENTRES)]
    else:
        bins = [gram(visual=1 - c, motion=c, seed=i) for i, c in enumerate(CENTRES)]
    advice = advise(bins, CENTRES, *scores(0.6), base=Uniform())
    assert not advice.pays
    assert advice.kappa_max is None
    if way == "reversed":
        assert math.isnan(advice.crossing.value)


def test_clips_without_gaps_leave_nothing_to_route() -> None:
    bins = [gram(visual=c, motion=1 - c, seed=i) for i, c in enumerate(CENTRES)]
    even = torch.full((20,), 0.7, dtype=torch.float64)
    advice = advise(bins, CENTRES, even, even, base=LogitNormal())
    assert not advice.pays
    assert list(advice.gains.values()) == pytest.approx([0.0] * len(advice.gains), abs=1e-9)


def row(i: int, visual: float, motion: float, ceiling: float) -> dict[str, object]:
    return {
        "sigma_low": i / 10, "sigma_high": (i + 1) / 10, "base_mass": 0.1, "ceiling": {"value": ceiling},
        "visual": {"cosine": {"value": visual}}, "motion": {"cosine": {"value": motion}},
    }  # fmt: skip


def test_remarks_say_why_a_premise_does_not_show() -> None:
    bins = [row(i, 0.5, 0.9, 0.7 if i == 0 else 0.05 if i == 9 else 0.3) for i in range(10)]
    measured = [gram(visual=0.5, motion=0.9, seed=i) for i in range(10)]
    advice = advise(measured, CENTRES, *scores(0.6), base=Uniform())
    rises = {"visual": Estimate(0.01, -0.1, 0.1), "motion": Estimate(-0.3, -0.4, -0.2)}
    text = " ".join(remarks(rises, advice, {"visual": 0.1, "motion": 0.9}, bins))
    for words in (
        "does not change clearly", "TQD expects that it rises", "falls with the noise level", "as TQD expects",
        "sigma 0.00-0.10 even disjoint golden clips agree",
        "sigma 0.90-1.00 the gradient of these clips is mostly noise",
        "not degraded alike", "do not cross", "motion-degraded clips agree better", "Routing does not pay",
    ):  # fmt: skip
        assert words in text


def test_remarks_are_short_where_all_is_as_expected() -> None:
    measured = [gram(visual=c, motion=1 - c, seed=i) for i, c in enumerate(CENTRES)]
    bins = [row(i, c, 1 - c, 0.7) for i, c in enumerate(CENTRES)]
    rises = {"visual": Estimate(0.3, 0.2, 0.4), "motion": Estimate(-0.3, -0.4, -0.2)}
    shifted = advise(measured, CENTRES, *scores(0.6), base=LogitNormal(shift=3.0))
    found = remarks(rises, shifted, {"visual": 0.5, "motion": 0.6}, bins)
    assert len(found) == 4
    assert "0.34 times its shift would have it there" in found[2]  # odds of 0.504 over those of the median, 0.75
    fitting = advise(measured, CENTRES, *scores(0.6), base=Uniform())
    assert "it fits" in remarks(rises, fitting, {"visual": 0.5, "motion": 0.6}, bins)[2]
