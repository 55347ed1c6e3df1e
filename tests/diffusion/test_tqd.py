"""TQD's published formulas and their consequences, against scipy's Beta distribution."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from contentv.diffusion.timesteps import TQD, Beta, Discrete, LogitNormal, Mode, Uniform

BASES = [
    Uniform(), Uniform(shift=5.0), LogitNormal(), LogitNormal(0.2, 0.8, 3.0), Mode(), Mode(0.8, 3.0), Beta(1.5, 1.0),
]  # fmt: skip
GAPS = [-0.9, -0.7, -0.5, -0.25, 0.0, 0.25, 0.5, 0.7, 0.9]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(gap: float, n: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Motion and visual scores (n,) whose difference is `gap`, neither at an end unless it must be."""
    visual = (1 - gap) / 2
    return (torch.full((n,), visual + gap, dtype=torch.float64), torch.full((n,), visual, dtype=torch.float64))


def beta_of(gap: float, kappa_base: float = 2.0, kappa_max: float = 8.0):
    mean, kappa = 0.5 + 0.5 * gap, kappa_base + (kappa_max - kappa_base) * abs(gap)
    return stats.beta(mean * kappa, (1 - mean) * kappa)


def density(tqd: TQD, sigma: float, gap: float) -> float:
    return float(tqd.log_density(torch.tensor([sigma], dtype=torch.float64), *scores(gap)).exp())


DIRECT = TQD(Uniform(), mode="direct")


# --- property 1: mean, variance, monotone mean, mirror symmetry ------------------------------------------------------


@pytest.mark.parametrize("kappas", [(2.0, 8.0), (4.0, 8.0)], ids=str)
def test_mean_and_variance_of_direct_draws(kappas):
    tqd, means, n = TQD(Uniform(), *kappas, mode="direct"), [], 40_000
    for gap in GAPS:
        sigma = tqd.sample(*scores(gap, n), seeded(1)).double()
        mu, kappa = 0.5 + 0.5 * gap, kappas[0] + (kappas[1] - kappas[0]) * abs(gap)
        variance = mu * (1 - mu) / (kappa + 1)
        assert float(sigma.mean()) == pytest.approx(mu, abs=4.5 * math.sqrt(variance / n))
        assert float(sigma.var()) == pytest.approx(variance, rel=0.05)
        means.append(float(sigma.mean()))
    assert all(a < b for a, b in itertools.pairwise(means))
    for low, high in zip(means, reversed(means), strict=True):  # gap and -gap
        assert low + high == pytest.approx(1, abs=0.008)


def test_means_are_exact_to_a_thousandth_at_a_million_draws():
    for gap in (-0.7, 0.25, 0.9):
        mean = float(DIRECT.sample(*scores(gap, 10**6), seeded(20)).double().mean())
        assert mean == pytest.approx(0.5 + 0.5 * gap, abs=1e-3)


@pytest.mark.parametrize("kappas", [(2.0, 8.0), (4.0, 8.0), (2.0, 16.0)], ids=str)
def test_moments_of_direct_draws_are_the_closed_form(kappas):
    gap = torch.linspace(-0.97, 0.97, 33, dtype=torch.float64)
    moments = TQD(Uniform(), *kappas, mode="direct").moments((1 + gap) / 2, (1 - gap) / 2)
    mu, kappa = (1 + gap) / 2, kappas[0] + (kappas[1] - kappas[0]) * gap.abs()
    torch.testing.assert_close(moments.mean, mu, rtol=0, atol=1e-8)
    torch.testing.assert_close(moments.std, (mu * (1 - mu) / (kappa + 1)).sqrt(), rtol=0, atol=1e-7)


def test_moments_of_the_other_forms_are_those_of_draws():
    for tqd in (TQD(LogitNormal(shift=3.0), floor=0.2), TQD(Mode(), mode="direct", shift=4.0)):
        for gap in (-0.6, 0.4):
            draws, moments = tqd.sample(*scores(gap, 200_000), seeded(21)).double(), tqd.moments(*scores(gap))
            assert float(moments.mean) == pytest.approx(float(draws.mean()), abs=0.003)
            assert float(moments.std) == pytest.approx(float(draws.std()), abs=0.003)
    missing = torch.tensor([math.nan])
    torch.testing.assert_close(TQD(Mode()).moments(missing, missing).mean[0], Mode().moments().mean)


@pytest.mark.parametrize("base", [Uniform(), LogitNormal(), Mode()], ids=str)
@pytest.mark.parametrize("mode", ["quantile", "direct"])
def test_swapping_the_scores_mirrors_the_density(base, mode):
    tqd, sigma = TQD(base, mode=mode), torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    for gap in GAPS:
        one, other = scores(gap)
        torch.testing.assert_close(tqd.log_density(sigma, one, other), tqd.log_density(1 - sigma, other, one))
        torch.testing.assert_close(tqd.icdf(sigma, one, other), 1 - tqd.icdf(1 - sigma, other, one))


def test_swapping_the_scores_mirrors_the_draws_in_the_far_tail():
    # gap +-0.99 puts much of the mass within 1e-16 of an end of u, which fp64 can write near 0 only.
    tqd, (one, other) = TQD(LogitNormal()), scores(0.99, 20_000)
    high, low = (torch.logit(tqd.sample(*pair).double()) for pair in ((one, other, seeded(2)), (other, one, seeded(3))))
    inside = 11.4  # the log odds of the clamp are 11.5, where fp32 no longer writes sigma and 1 - sigma alike
    assert stats.ks_2samp((-high).clamp_min(-inside).numpy(), low.clamp_min(-inside).numpy()).pvalue > 1e-3


# --- property 2: equal scores -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_equal_scores_with_kappa_base_2_are_the_base(base, level):
    tqd, equal = TQD(base, kappa_base=2.0), torch.tensor([level])
    u = torch.linspace(0, 1, 201, dtype=torch.float64)
    assert torch.equal(tqd.icdf(u, equal, equal), base.icdf(u))
    torch.testing.assert_close(tqd.log_density(u, equal, equal), base.log_density(u), rtol=0, atol=1e-12)
    draws = tqd.sample(equal.expand(20_000), equal.expand(20_000), seeded(4))
    assert stats.kstest(base.cdf(draws).numpy(), "uniform").pvalue > 1e-3


def test_equal_scores_in_direct_mode():
    sigma = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(DIRECT.log_density(sigma, *scores(0)), torch.zeros_like(sigma))
    four = TQD(Uniform(), 4.0, 8.0, mode="direct").log_density(sigma, *scores(0)).exp()
    torch.testing.assert_close(four, 6 * sigma * (1 - sigma))  # Beta(2, 2)


def test_which_kappa_comes_nearest_to_a_logit_normal():
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    sigma = torch.sigmoid(x)
    weight = LogitNormal().log_density(sigma).exp() * sigma * (1 - sigma) * (x[1] - x[0])
    variance = float((weight * (sigma - 0.5) ** 2).sum())
    assert variance == pytest.approx(0.04338, abs=1e-5)
    assert 1 / (4 * variance) - 1 == pytest.approx(4.77, abs=0.01)
    kappas = np.arange(4.5, 5.2, 0.01)
    fits = [
        float((weight * TQD(Uniform(), k, 8.0, mode="direct").log_density(sigma, *scores(0))).sum()) for k in kappas
    ]
    assert kappas[int(np.argmax(fits))] == pytest.approx(4.86, abs=0.0151)


# --- properties 3 and 4: clamps, where the density diverges, its mode -------------------------------------------------


@pytest.mark.parametrize("mode", ["quantile", "direct"])
def test_gaps_of_one_stay_in_range(mode):
    tqd = TQD(LogitNormal(), mode=mode)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    for motion, visual, end in ((1.0, 0.0, 1 - 1e-5), (0.0, 1.0, 1e-5)):
        pair = torch.full((1000,), motion), torch.full((1000,), visual)
        sigma = tqd.sample(*pair, seeded(5))
        assert bool(sigma.isfinite().all())
        assert 1e-5 * 0.999 <= float(sigma.min()) <= float(sigma.max()) <= 1 - 1e-5 + 1e-7
        assert float((sigma - end).abs().median()) < 1e-6  # nearly a point mass
        one = pair[0][:1], pair[1][:1]
        assert bool(tqd.icdf(grid, *one).isfinite().all())
        assert not bool(tqd.log_density(grid, *one).isnan().any())


@pytest.mark.parametrize(("kappas", "threshold"), [((2.0, 8.0), 2 / 3), ((4.0, 8.0), math.sqrt(0.5))])
def test_where_the_density_diverges_at_one(kappas, threshold):
    tqd = TQD(Uniform(), *kappas, mode="direct")
    for gap, rises in ((threshold - 0.01, False), (threshold + 0.01, True)):
        assert (density(tqd, 1 - 1e-12, gap) > density(tqd, 1 - 1e-9, gap)) is rises
        assert (density(tqd, 1e-12, -gap) > density(tqd, 1e-9, -gap)) is rises


def test_mode_of_the_density():
    sigma = torch.linspace(0.001, 0.999, 9981, dtype=torch.float64)
    for gap in (-0.6, -0.4, 0.3, 0.5):
        kappa = 2 + 6 * abs(gap)
        peak = sigma[int(DIRECT.log_density(sigma, *scores(gap)).argmax())]
        assert float(peak) == pytest.approx(((0.5 + 0.5 * gap) * kappa - 1) / (kappa - 2), abs=2e-4)


# --- property 5: more motion does not mean more noise everywhere, so nothing may promise it ---------------------------


def test_a_small_gap_may_lower_the_upper_tail():
    tqd, at = TQD(Uniform(), 2.0, 16.0, mode="direct"), torch.tensor([0.9], dtype=torch.float64)
    above = {gap: 1 - float(tqd.cdf(at, *scores(gap))) for gap in (0.0, 0.25)}
    assert above[0.0] == pytest.approx(0.100, abs=5e-4)
    assert above[0.25] == pytest.approx(0.058, abs=5e-4)  # although the mean is higher
    grid = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    gaps = torch.linspace(0, 0.95, 20, dtype=torch.float64)

    def worst(tqd: TQD) -> float:
        """How far a larger gap lifts the distribution function, which dominance forbids."""
        cdf = tqd.cdf(grid[:, None], (1 + gaps) / 2, (1 - gaps) / 2)
        return float(cdf.diff(dim=1).max())

    assert worst(DIRECT) > 0.002
    assert worst(TQD(Uniform(), 4.0, 8.0, mode="direct")) < 1e-6


# --- properties 6 and 7: listed values, the marginal ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "std", "above_09"), [(0.25, 0.228, None), (0.5, 0.177, 0.231), (0.7, 0.133, 0.459), (0.9, None, 0.834)]
)
def test_listed_values(gap, std, above_09):
    sigma = DIRECT.sample(*scores(gap, 100_000), seeded(6))
    if std is not None:
        assert float(sigma.std()) == pytest.approx(std, abs=0.0025)
    if above_09 is not None:
        above = 1 - float(DIRECT.cdf(torch.tensor([0.9], dtype=torch.float64), *scores(gap)))
        assert above == pytest.approx(above_09, abs=6e-4)
        assert float((sigma > 0.9).double().mean()) == pytest.approx(above_09, abs=0.008)


@pytest.mark.parametrize(("gap", "alpha", "beta"), [(0.25, 2.1875, 1.3125), (0.5, 3.75, 1.25), (0.7, 5.27, 0.93)])
def test_listed_shapes(gap, alpha, beta):
    sigma = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    expected = stats.beta(alpha, beta).logpdf(sigma.numpy())
    np.testing.assert_allclose(DIRECT.log_density(sigma, *scores(gap)).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_marginal_of_opposite_clips_is_u_shaped_and_the_floor_fills_it():
    def marginal(tqd: TQD, sigma: float) -> float:
        return (density(tqd, sigma, 0.7) + density(tqd, sigma, -0.7)) / 2

    assert marginal(DIRECT, 0.5) == pytest.approx(0.24, abs=0.005)
    assert marginal(DIRECT, 0.02) == pytest.approx(2.69, abs=0.005)
    assert marginal(DIRECT, 0.98) == pytest.approx(2.69, abs=0.005)
    floored = TQD(Uniform(), mode="direct", floor=0.2)
    assert marginal(floored, 0.5) == pytest.approx(0.8 * marginal(DIRECT, 0.5) + 0.2)


# --- every base, both modes, floor: draws, density, distribution function and inverse agree ---------------------------

VARIANTS = [
    *(TQD(base) for base in BASES),
    TQD(LogitNormal(shift=3.0), 3.0, 12.0),
    TQD(LogitNormal(shift=3.0), floor=0.15),
    TQD(Uniform(), mode="direct", shift=3.0),
    TQD(LogitNormal(shift=3.0), 4.0, 8.0, mode="direct", floor=0.2, shift=3.0),
]


@pytest.mark.parametrize("tqd", VARIANTS, ids=str)
@pytest.mark.parametrize("gap", [-0.7, -0.3, 0.0, 0.5, 0.85])
def test_density_integrates_to_one(tqd, gap):
    x = torch.linspace(-34, 34, 20001, dtype=torch.float64)
    sigma = torch.sigmoid(x)
    mass = torch.trapezoid(tqd.log_density(sigma, *scores(gap)).exp() * sigma * torch.sigmoid(-x), x)
    assert float(mass) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("tqd", VARIANTS, ids=str)
@pytest.mark.parametrize("gap", [-0.6, 0.0, 0.4])
def test_inverse_density_and_distribution_function_agree(tqd, gap):
    u = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    sigma = tqd.icdf(u, *scores(gap))
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(tqd.cdf(sigma, *scores(gap)), u, rtol=0, atol=2e-5)
    middle, h = sigma.double(), 1e-6
    slope = (tqd.cdf(middle + h, *scores(gap)) - tqd.cdf(middle - h, *scores(gap))) / (2 * h)
    torch.testing.assert_close(tqd.log_density(middle, *scores(gap)).exp(), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tqd", VARIANTS, ids=str)
@pytest.mark.parametrize("gap", [-0.8, 0.3])
def test_draws_follow_the_distribution(tqd, gap):
    draws = tqd.sample(*scores(gap, 20_000), seeded(7))
    assert draws.dtype == torch.float32
    assert stats.kstest(tqd.cdf(draws, *scores(gap)).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("base", BASES, ids=str)
def test_quantile_mode_is_a_beta_rank_of_the_base(base):
    u = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    rank = torch.from_numpy(beta_of(0.6).ppf(u.numpy()))
    torch.testing.assert_close(TQD(base).icdf(u, *scores(0.6)), base.icdf(rank))


def test_direct_mode_shifts_after_the_draw():
    u = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    drawn = torch.from_numpy(beta_of(-0.4).ppf(u.numpy()))
    shifted = TQD(Uniform(), mode="direct", shift=3.0).icdf(u, *scores(-0.4))
    torch.testing.assert_close(shifted, (3 * drawn / (1 + 2 * drawn)).float())


def test_small_kappas_do_not_underflow():
    # Beta(0.005, 0.005): both Gamma draws underflow to 0 for a third of the pairs if not taken in logs.
    sigma = TQD(Uniform(), 0.01, 0.01, mode="direct").sample(*scores(0, 20_000), seeded(8))
    middle = ((sigma > 0.01) & (sigma < 0.99)).double().mean()
    assert float(middle) == pytest.approx(np.diff(stats.beta(0.005, 0.005).cdf([0.01, 0.99]))[0], abs=0.005)


# --- what a clip without scores gets, and the order of the random numbers ---------------------------------------------


def test_clips_without_scores_get_the_base_samplers_numbers():
    base = LogitNormal(shift=3.0)
    nan = math.nan
    motion, visual = torch.tensor([nan, 0.9, 0.2, nan]), torch.tensor([0.4, 0.1, nan, nan])
    for floor in (0.0, 0.3):
        sigma = TQD(base, floor=floor).sample(motion, visual, seeded(9))
        assert torch.equal(sigma[[0, 2, 3]], base.sample(3, seeded(9)))
    tqd, u = TQD(base), torch.tensor([0.1, 0.2, 0.3, 0.4])
    inverse, log_density = tqd.icdf(u, motion, visual), tqd.log_density(u, motion, visual)
    for i in (0, 2, 3):
        assert inverse[i] == base.icdf(u)[i]
        assert log_density[i] == base.log_density(u)[i]
        assert tqd.cdf(u, motion, visual)[i] == base.cdf(u)[i]
    assert inverse[1] > base.icdf(u)[1]
    torch.testing.assert_close(tqd.keep_probability(motion, visual), torch.tensor([1.0, 0.9, 1.0, 1.0]))


def test_many_generators_give_what_each_gives_alone():
    motion, visual = torch.rand(45, generator=seeded(22)), torch.rand(45, generator=seeded(23))
    motion[::5] = math.nan
    for tqd in VARIANTS:
        each = tqd.sample_each(motion, visual, [seeded(i) for i in range(45)])
        alone = [tqd.sample(motion[i : i + 1], visual[i : i + 1], seeded(i)) for i in range(45)]
        assert torch.equal(each, torch.cat(alone))


def test_clips_without_scores_can_be_refused():
    motion, visual = torch.tensor([0.5, math.nan, 0.2]), torch.tensor([math.nan, math.nan, 0.1])
    strict = TQD(LogitNormal(), missing="refuse")
    with pytest.raises(ValueError, match="motion and visual scores are NaN for 2 of 3 clips: missing=refuse"):
        strict.sample(motion, visual, seeded())
    with pytest.raises(ValueError, match="2 of 3 clips"):
        strict.log_density(torch.tensor([0.5]), motion, visual)
    assert torch.equal(strict.sample(*scores(0.3, 4), seeded()), TQD(LogitNormal()).sample(*scores(0.3, 4), seeded()))


def test_a_base_of_separate_levels_routes_and_has_no_density():
    tqd = TQD(Discrete(LogitNormal(), 100))
    draws = tqd.sample(*scores(0.6, 5000), seeded(24)).double() * 100
    torch.testing.assert_close(draws, draws.round(), rtol=0, atol=1e-3)
    assert float(draws.mean()) / 100 == pytest.approx(float(TQD(LogitNormal()).moments(*scores(0.6)).mean), abs=0.02)
    with pytest.raises(ValueError, match=r"levels=100: .* no log density"):
        tqd.log_density(torch.tensor([0.5]), *scores(0.6))


def test_draws_are_a_function_of_the_generator():
    pair = scores(0.4, 16)
    assert torch.equal(TQD(Mode()).sample(*pair, seeded(10)), TQD(Mode()).sample(*pair, seeded(10)))
    assert not torch.equal(TQD(Mode()).sample(*pair, seeded(10)), TQD(Mode()).sample(*pair, seeded(11)))


def test_floor_of_one_is_the_base():
    base, pair = LogitNormal(), scores(0.8)
    tqd, sigma = TQD(base, floor=1.0), torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(tqd.log_density(sigma, *pair), base.log_density(sigma))
    draws = tqd.sample(*scores(0.8, 20_000), seeded(12))
    assert stats.kstest(base.cdf(draws).numpy(), "uniform").pvalue > 1e-3


# --- a public implementation's own checks, keep probability, speed, errors --------------------------------------------


def test_motion_clips_see_more_noise_than_sharp_clips():
    motion = TQD(LogitNormal(shift=3.0)).sample(torch.full((20_000,), 0.9), torch.full((20_000,), 0.3), seeded(13))
    sharp = TQD(LogitNormal(shift=3.0)).sample(torch.full((20_000,), 0.3), torch.full((20_000,), 0.9), seeded(13))
    assert float(motion.mean()) > float(sharp.mean()) + 0.1


def test_keep_probability_and_its_mean_over_a_corpus():
    motion, visual = torch.rand(200_000, generator=seeded(14)), torch.rand(200_000, generator=seeded(15))
    keep = DIRECT.keep_probability(motion, visual)
    assert keep.dtype == torch.float32
    assert torch.equal(keep, torch.maximum(motion, visual))
    assert float(keep.mean()) == pytest.approx(2 / 3, abs=0.003)


def test_keep_rate_and_gap_of_ranks_that_disagree():
    rank = stats.norm.cdf(np.random.default_rng(0).multivariate_normal([0, 0], [[1, -0.25], [-0.25, 1]], 400_000))
    motion, visual = torch.from_numpy(rank).float().unbind(1)  # ranks of correlation -0.24, as in the published corpus
    assert float(np.corrcoef(rank.T)[0, 1]) == pytest.approx(-0.24, abs=0.005)
    assert float((motion - visual).abs().mean()) == pytest.approx(0.378, abs=0.002)
    assert float(DIRECT.keep_probability(motion, visual).mean()) == pytest.approx(0.689, abs=0.002)


def test_a_million_draws_in_blocks_follow_the_scores():
    motion, visual = torch.rand(10**6, generator=seeded(16)), torch.rand(10**6, generator=seeded(17))
    sigma = TQD(LogitNormal(), floor=0.1).sample(motion, visual, seeded(18))
    assert float(np.corrcoef((motion - visual).numpy(), sigma.numpy())[0, 1]) > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kappa_base": 0.0}, "kappa_base must be above 0, got 0.0"),
        ({"kappa_base": -1.0}, "kappa_base .* got -1.0"),
        ({"kappa_base": 4.0, "kappa_max": 3.0}, "kappa_max must be at least kappa_base=4.0, got 3.0"),
        ({"mode": "middle"}, "mode must be quantile or direct, got middle"),
        ({"kappa_base": math.nan}, "kappa_base .* got nan"),
        ({"kappa_max": math.nan}, "kappa_max .* got nan"),
        ({"missing": "skip"}, "missing must be base or refuse, got skip"),
        ({"floor": 1.5}, "floor .* got 1.5"),
        ({"floor": -0.1}, "floor .* got -0.1"),
        ({"mode": "direct", "shift": 0.0}, "shift must be above 0, got 0.0"),
        ({"mode": "direct", "shift": -3.0}, "shift .* got -3.0"),
        ({"shift": 3.0}, "shift must be 1 in mode=quantile.*got 3.0"),
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TQD(LogitNormal(), **arguments)


@pytest.mark.parametrize("call", ["sample", "icdf", "log_density", "keep_probability"])
@pytest.mark.parametrize(
    ("motion", "visual", "message"),
    [
        ([0.5, 1.25], [0.5, 0.5], "motion scores must be in 0..1 .* got 1.25"),
        ([0.5, 0.5], [-0.5, 0.5], "visual scores .* got -0.5"),
        ([math.inf, 0.5], [0.5, 0.5], "motion scores .* got inf"),
        ([0.5, 0.5], [0.5], r"motion and visual must have one shape, got \(2,\) and \(1,\)"),
    ],
)
def test_bad_scores_are_named(call, motion, visual, message):
    pair = torch.tensor(motion), torch.tensor(visual)
    arguments = {"sample": (*pair, seeded()), "keep_probability": pair}.get(call, (torch.tensor([0.5, 0.5]), *pair))
    with pytest.raises(ValueError, match=message):
        getattr(DIRECT, call)(*arguments)


def test_sample_wants_one_score_per_clip():
    with pytest.raises(ValueError, match=r"shape \(b,\), got \(2, 1\)"):
        DIRECT.sample(torch.zeros(2, 1), torch.zeros(2, 1), seeded())
