"""Uniform, logit-normal and mode: draws, densities and inverses against scipy and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from contentv.diffusion.samplers import moments_of
from contentv.diffusion.timesteps import Beta, Discrete, LogitNormal, Mode, SigmaSampler, Uniform, shift_sigma

SAMPLERS = [
    Uniform(),
    Uniform(shift=5.0),
    LogitNormal(),
    LogitNormal(mean=-0.6, std=0.7, shift=3.0),
    LogitNormal(mean=0.5, std=1.4, shift=0.4),
    Mode(),
    Mode(scale=-0.9, shift=3.0),
    Mode(scale=1.6, shift=2.0),
    Beta(),
    Beta(alpha=2.5, beta=4.0, shift=3.0),
    Beta(alpha=0.7, beta=1.3, shift=0.5),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integral_over_log_odds(log_density) -> float:
    """The integral of a density over (0, 1) on an even grid of log odds, which resolves both ends."""
    x = torch.linspace(-34, 34, 40001, dtype=torch.float64)
    sigma = torch.sigmoid(x)
    return float(torch.trapezoid(log_density(sigma).exp() * sigma * torch.sigmoid(-x), x))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_density_integrates_to_one(sampler):
    assert isinstance(sampler, SigmaSampler)
    assert integral_over_log_odds(sampler.log_density) == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_inverse_undoes_the_distribution_function(sampler):
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    sigma = sampler.icdf(u)
    assert sigma.dtype == torch.float32
    assert bool((sigma.diff() > 0).all())
    torch.testing.assert_close(sampler.cdf(sigma), u, rtol=0, atol=2e-5)
    low, high = sampler.log_tails(sigma)
    torch.testing.assert_close(low.exp() + high.exp(), torch.ones_like(u))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_density_is_the_slope_of_the_distribution_function(sampler):
    sigma, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-5
    slope = (sampler.cdf(sigma + h) - sampler.cdf(sigma - h)) / (2 * h)
    torch.testing.assert_close(sampler.log_density(sigma).exp(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_draws_follow_the_distribution(sampler):
    draws = sampler.sample(50_000, seeded())
    assert draws.dtype == torch.float32
    assert float(draws.min()) >= 1e-5 * 0.999
    assert float(draws.max()) <= 1 - 1e-5 + 1e-7
    assert stats.kstest(sampler.cdf(draws).numpy(), "uniform").pvalue > 1e-3


def test_logit_normal_is_scipys():
    sampler, sigma = LogitNormal(mean=0.3, std=0.8), torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    s = sigma.numpy()
    expected = stats.norm(0.3, 0.8).logpdf(np.log(s / (1 - s))) - np.log(s) - np.log1p(-s)
    np.testing.assert_allclose(sampler.log_density(sigma).numpy(), expected, rtol=1e-12)
    u = np.linspace(0.001, 0.999, 50)
    expected = 1 / (1 + np.exp(-stats.norm(0.3, 0.8).ppf(u)))
    np.testing.assert_allclose(sampler.icdf(torch.from_numpy(u)).numpy(), expected, rtol=1e-6)


def test_shift_is_a_change_of_variables():
    plain, shifted = LogitNormal(), LogitNormal(shift=3.0)
    u = torch.rand(100, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(shifted.icdf(u), shift_sigma(plain.icdf(u), 3.0))
    # A logit-normal stays one under a shift, its mean moved by log(shift): a closed form of the whole density.
    sigma = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(shifted.log_density(sigma), LogitNormal(mean=math.log(3.0)).log_density(sigma))


def test_mode_draws_are_sd3s_formula():
    u = torch.linspace(0, 1, 21, dtype=torch.float64)
    published = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)  # decreasing in u
    torch.testing.assert_close(Mode(1.29).icdf(1 - u), published.clamp(1e-5, 1 - 1e-5).float())


@pytest.mark.parametrize("scale", [-1.0, 2 / (math.pi - 2)])
def test_mode_is_monotone_to_the_ends_of_its_scale(scale):
    sigma = Mode(scale).icdf(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert bool((sigma.diff() >= 0).all())
    assert stats.kstest(Mode(scale).cdf(Mode(scale).sample(20_000, seeded())).numpy(), "uniform").pvalue > 1e-3


def test_beta_is_scipys():
    sampler, sigma = Beta(1.5, 0.8), torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    expected = stats.beta(1.5, 0.8)
    np.testing.assert_allclose(
        sampler.log_density(sigma).numpy(), expected.logpdf(sigma.numpy()), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(sampler.icdf(sigma).numpy(), expected.ppf(sigma.numpy()), rtol=1e-6)
    low, high = sampler.log_tails(torch.tensor([1e-300, 1e-12, 0.5], dtype=torch.float64))
    assert low[0].item() == pytest.approx(1.5 * math.log(2.0**-52) - math.log(1.5) - special.betaln(1.5, 0.8))
    np.testing.assert_allclose(low[1:].numpy(), expected.logcdf([1e-12, 0.5]), rtol=1e-9)
    np.testing.assert_allclose(high[1:].numpy(), expected.logsf([1e-12, 0.5]), rtol=1e-9, atol=1e-15)


def test_beta_tails_below_the_smallest_number_keep_their_slope():
    low, _ = Beta(60.0, 2.0).log_tails(torch.tensor([1e-9, 1e-8], dtype=torch.float64))  # 1e-540 and 1e-480
    assert float(low[1] - low[0]) == pytest.approx(60 * math.log(10), rel=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_moments_are_those_of_the_quantiles(sampler):
    middle = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    values = sampler.icdf(middle).double()
    moments = sampler.moments()
    assert float(moments.mean) == pytest.approx(float(values.mean()), abs=1e-5)
    assert float(moments.std) == pytest.approx(float(values.std()), abs=1e-5)


def test_moments_in_closed_form():
    for alpha, beta in ((1.5, 1.0), (0.05, 7.0), (30.0, 2.0)):
        moments, exact = moments_of(Beta(alpha, beta).cdf), stats.beta(alpha, beta)
        assert float(moments.mean) == pytest.approx(exact.mean(), abs=1e-9)
        assert float(moments.std) == pytest.approx(exact.std(), abs=1e-8)


@pytest.mark.parametrize("sampler", [*SAMPLERS, Discrete(LogitNormal(), 1000)], ids=str)
def test_many_generators_give_what_each_gives_alone(sampler):
    each = sampler.sample_each([seeded(i) for i in range(37)])
    assert torch.equal(each, torch.cat([sampler.sample(1, seeded(i)) for i in range(37)]))


def test_discrete_levels_are_the_base_rounded_up():
    sampler, u = Discrete(LogitNormal(shift=3.0), 50), torch.rand(5000, generator=seeded(), dtype=torch.float64)
    sigma = sampler.icdf(u).double()
    exact = np.ceil(LogitNormal(shift=3.0).icdf(u).double().numpy() * 50) / 50
    np.testing.assert_allclose(sigma.numpy(), exact.clip(1e-5, 1 - 1e-5), atol=1e-7)
    level = torch.tensor([0.2, 0.219, 0.22], dtype=torch.float64)
    base = LogitNormal(shift=3.0).cdf(torch.tensor([0.2, 0.2, 0.22], dtype=torch.float64))
    torch.testing.assert_close(sampler.cdf(level), base)
    assert isinstance(sampler, SigmaSampler)
    drawn = sampler.sample(200_000, seeded(1)).double()
    assert float(sampler.moments().mean) == pytest.approx(float(drawn.mean()), abs=0.002)
    assert float(sampler.moments().std) == pytest.approx(float(drawn.std()), abs=0.002)
    assert torch.equal(Discrete(Uniform(), 10).icdf(torch.tensor([0.3, 0.31])), torch.tensor([0.3, 0.4]))


def test_one_fp64_uniform_number_per_draw():
    u = torch.rand(8, generator=seeded(3), dtype=torch.float64).numpy()
    expected = 1 / (1 + np.exp(-stats.norm.ppf(u)))
    np.testing.assert_allclose(LogitNormal().sample(8, seeded(3)).numpy(), expected, rtol=1e-6)


def test_upper_tail_uses_the_survival_probability():
    u, survival = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1e-20], dtype=torch.float64)
    exact = stats.norm.isf(1e-20)
    assert LogitNormal().icdf(u, survival).item() == pytest.approx(1 / (1 + math.exp(-exact)), abs=1e-7)
    assert LogitNormal().icdf(u).item() == pytest.approx(1 - 1e-5, abs=1e-7)


def test_shift_fixes_the_ends_and_rises():
    sigma = torch.linspace(0, 1, 11)
    for shift in (0.3, 1.0, 3.0, 12):
        moved = shift_sigma(sigma, shift)
        assert moved[0] == 0
        assert moved[-1] == pytest.approx(1)
        assert bool((moved.diff() > 0).all())
        torch.testing.assert_close(shift_sigma(moved, 1 / shift), sigma)
    assert torch.equal(shift_sigma(sigma, 1.0), sigma)


def test_density_outside_and_at_the_ends():
    outside = torch.tensor([-0.1, 1.1])
    for sampler in SAMPLERS:
        assert sampler.log_density(outside).tolist() == [-math.inf, -math.inf]
        assert not bool(sampler.log_density(torch.tensor([0.0, 1.0])).isnan().any())
    assert Uniform().log_density(torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Uniform(shift=0.0), "shift must be above 0, got 0.0"),
        (lambda: LogitNormal(shift=-2.0), "shift .* got -2.0"),
        (lambda: Mode(shift=-1), "shift .* got -1"),
        (lambda: LogitNormal(std=0.0), "std .* got 0.0"),
        (lambda: LogitNormal(mean=math.nan), "mean .* got nan"),
        (lambda: Beta(alpha=0.0), "alpha must be above 0, got 0.0"),
        (lambda: Beta(beta=-1.0), "beta .* got -1.0"),
        (lambda: Beta(shift=math.nan), "shift .* got nan"),
        (lambda: Discrete(Uniform(), 1), "levels must be 2 or more, got 1"),
        (lambda: Discrete(Uniform(), 9).log_density(torch.ones(1)), "levels=9.* no log density"),
        (lambda: Mode(scale=1.8), "scale .* got 1.8"),
        (lambda: Mode(scale=-1.1), "scale .* got -1.1"),
        (lambda: shift_sigma(torch.ones(1), 0), "shift .* got 0"),
        (lambda: Uniform().icdf(torch.tensor([0.5, 1.5])), "u must be probabilities .* got 1.5"),
        (lambda: Uniform().icdf(torch.tensor([math.nan])), "u must be probabilities .* got nan"),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
