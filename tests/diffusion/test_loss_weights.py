"""Weights of the loss by noise level: their formulas, and a mean of one over what is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from contentv.diffusion.timesteps import CosMap, LogitNormal, MinSNR, SigmaWeight, TimestepConfig, Uniform, build_weight

SIGMA = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


def test_min_snr_is_the_papers_weight_on_the_clean_clips_error():
    """x0 = noisy - sigma * velocity: the clean clip's error is sigma times the velocity's."""
    snr = ((1 - SIGMA) / SIGMA) ** 2
    expected = np.minimum(snr.numpy(), 5.0) * SIGMA.numpy() ** 2
    np.testing.assert_allclose(MinSNR(5.0)(SIGMA).numpy(), expected, rtol=1e-12)
    assert float(SIGMA[int(MinSNR(5.0)(SIGMA).argmax())]) == pytest.approx(1 / (1 + math.sqrt(5)), abs=0.006)


def test_cosmap_weighs_uniform_draws_as_its_law_would_draw_them():
    """CosMap draws sigma = 1 / (1 + tan(pi/2 (1 - u))), whose density the weight is."""
    mass, _ = integrate.quad(lambda s: float(CosMap()(torch.tensor([s], dtype=torch.float64))), 0, 1)
    assert mass == pytest.approx(1, abs=1e-9)
    for u in (0.1, 0.5, 0.8):
        sigma = 1 / (1 + math.tan(math.pi / 2 * (1 - u)))
        below, _ = integrate.quad(lambda s: float(CosMap()(torch.tensor([s], dtype=torch.float64))), 0, sigma)
        assert below == pytest.approx(u, abs=1e-9)


@pytest.mark.parametrize("kind", ["logit_normal", "uniform", "mode", "beta", "tqd"])
@pytest.mark.parametrize("loss_weight", ["min_snr", "cosmap"])
def test_the_mean_over_the_base_draws_is_one(kind, loss_weight):
    config = TimestepConfig(kind=kind, shift=3.0, loss_weight=loss_weight, base="logit_normal")
    weight = build_weight(config)
    assert isinstance(weight, SigmaWeight)
    sampler = {"uniform": Uniform(3.0)}.get(kind, LogitNormal(shift=3.0))
    if kind in ("uniform", "logit_normal", "tqd"):
        density = lambda s: float(sampler.log_density(torch.tensor([s], dtype=torch.float64)).exp())  # noqa: E731
        at = lambda s: float(weight(torch.tensor([s], dtype=torch.float64)))  # noqa: E731
        mean, _ = integrate.quad(lambda s: density(s) * at(s), 1e-9, 1 - 1e-9, limit=200)
        assert mean == pytest.approx(1, abs=1e-4)
    ratio = weight(SIGMA) / (MinSNR(5.0) if loss_weight == "min_snr" else CosMap())(SIGMA)
    torch.testing.assert_close(ratio, ratio[:1].expand(99))


def test_no_weight_is_none():
    assert build_weight(TimestepConfig()) is None
