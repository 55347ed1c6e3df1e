"""Gradients of clips and twins against autograd on one flat vector, and cosines against explicit vectors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from contentv.analysis.config import GradientConfig
from contentv.analysis.gradients import GradientTap, measure_gradients, part_of, sigma_bins
from contentv.analysis.similarity import Estimate, Grams, crossing, direction, jackknife, trend
from contentv.base.rng import keyed_normal, keyed_uniform
from contentv.base.types import TextCond
from contentv.models.mmdit import MMDiT, MMDiTConfig

SHAPE = MMDiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, joint_attention_dim=8,
    pooled_projection_dim=6,
)  # fmt: skip
CLIPS = 8


@pytest.fixture
def model() -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(SHAPE)


@pytest.fixture(scope="module")
def clips() -> tuple[dict[str, torch.Tensor], TextCond]:
    g = torch.Generator().manual_seed(1)
    golden = torch.randn(CLIPS, 4, 3, 4, 4, generator=g)
    twins = {"golden": golden, "visual": 0.5 * golden, "motion": golden[:, :, :1].expand_as(golden).contiguous()}
    return twins, TextCond(torch.randn(CLIPS, 5, 8, generator=g), torch.randn(CLIPS, 6, generator=g))


def settings(**values: object) -> GradientConfig:
    return GradientConfig(**{"clips": CLIPS, "groups": 4, "bins": 3, "max_values": 0, "micro_batch_size": 3, **values})


def naive(model: MMDiT, twins, text: TextCond, config: GradientConfig, low: float, high: float) -> np.ndarray:
    """The matrix of inner products from whole flat gradients, one group's mean loss at a time, in one forward."""
    weights = [p for p in model.parameters()]
    size, vectors = CLIPS // config.groups, []
    for latents, group in itertools.product(twins.values(), range(config.groups)):
        index = list(range(group * size, (group + 1) * size))
        losses = []
        for draw in range(config.draws):
            u = keyed_uniform(config.seed, draw, index, "gradient_sigma")
            sigma = low + (high - low) * u
            noise = keyed_normal(latents.shape[1:], config.seed, draw, index, "gradient_noise")
            s = sigma[:, None, None, None, None]
            out = model((1 - s) * latents[index] + s * noise, 1000 * sigma, text.tokens[index], text.pooled[index])
            losses.append(((out - (noise - latents[index])) ** 2).mean())
        found = torch.autograd.grad(torch.stack(losses).mean(), weights, allow_unused=True)
        flat = [torch.zeros_like(p) if f is None else f for f, p in zip(found, weights, strict=True)]
        vectors.append(torch.cat([f.flatten() for f in flat]).double())
    rows = torch.stack(vectors)
    return (rows @ rows.T).numpy()


@pytest.mark.parametrize("draws", [1, 2])
def test_inner_products_equal_those_of_whole_gradients(model, clips, draws: int) -> None:
    config = settings(draws=draws, seed=3)
    twins, text = clips
    found = measure_gradients(model, twins, text, config)
    assert [(b.low, b.high) for b in found] == [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)]
    for b in found:
        expected = naive(model, twins, text, config, b.low, b.high)
        np.testing.assert_allclose(b.gram, expected, rtol=2e-4, atol=1e-6 * expected.max())
        assert set(b.grams) == {"input", "layer 0", "layer 1", "output"}


def test_twins_that_are_equal_have_a_cosine_of_one_and_no_distance(model, clips) -> None:
    twins, text = clips
    same = {"golden": twins["golden"], "visual": twins["golden"].clone()}
    (b,) = measure_gradients(model, same, text, settings(), [(0.4, 0.6)])
    gram = Grams(b.gram, 4)
    assert gram.cosine(1) == pytest.approx(1.0, abs=1e-6)
    assert gram.distance(1) == pytest.approx(0.0, abs=1e-3)
    assert b.losses[0] == pytest.approx(b.losses[1])


def test_the_last_layers_alone_are_those_parts_of_the_whole(model, clips) -> None:
    twins, text = clips
    (whole,) = measure_gradients(model, twins, text, settings(), [(0.2, 0.4)])
    (last,) = measure_gradients(model, twins, text, settings(blocks=1), [(0.2, 0.4)])
    assert set(last.grams) == {"layer 1", "output"}
    for part, gram in last.grams.items():
        np.testing.assert_allclose(gram, whole.grams[part], rtol=1e-4, atol=1e-9)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if part_of(n) in ("layer 1", "output")
    }


def test_a_share_of_the_entries_is_right_on_average(model, clips) -> None:
    twins, text = clips
    (whole,) = measure_gradients(model, twins, text, settings(), [(0.5, 0.7)])
    share = sum(p.numel() for p in model.parameters()) // 4
    found = []
    for seed in range(8):  # the seed of the entries alone: the draws must stay
        tap = GradientTap(model, 0, share, seed)
        assert tap.values == pytest.approx(share, rel=0.01)
        (b,) = measure_gradients(model, twins, text, settings(), [(0.5, 0.7)], tap)
        found.append(b.gram)
    scale = np.sqrt(np.outer(whole.gram.diagonal(), whole.gram.diagonal()))
    single = np.mean([np.abs(g - whole.gram) / scale for g in found])
    mean = np.abs(np.mean(found, axis=0) - whole.gram) / scale
    assert 0 < single < 0.1
    assert mean.mean() < 0.6 * single  # errors of different choices cancel


def test_bins_can_be_measured_apart(model, clips) -> None:
    twins, text = clips
    together = measure_gradients(model, twins, text, settings())
    for b, interval in zip(together, sigma_bins(3), strict=True):
        (alone,) = measure_gradients(model, twins, text, settings(), [interval])
        np.testing.assert_array_equal(alone.gram, b.gram)


def test_clips_must_divide_into_the_groups(model, clips) -> None:
    twins, text = clips
    with pytest.raises(ValueError, match="6 groups"):
        measure_gradients(model, twins, text, settings(groups=6))


def vectors(signal: float, noise: float, groups: int, dim: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gradients (2, groups, dim) of a golden and a twin direction with a known cosine of 0.6, and their own noise."""
    rng = np.random.default_rng(seed)
    g, orthogonal = np.zeros(dim), np.zeros(dim)
    g[0], orthogonal[1] = 1.0, 1.0
    means = signal * np.stack([g, 0.6 * g + 0.8 * orthogonal])
    return means, means[:, None] + noise * rng.standard_normal((2, groups, dim)) / math.sqrt(dim)


def grams(found: np.ndarray) -> Grams:
    rows = found.reshape(-1, found.shape[-1])
    return Grams(rows @ rows.T, found.shape[1])


def cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("groups", [4, 6])
def test_cosine_distance_and_ceiling_from_explicit_vectors(groups: int) -> None:
    _, found = vectors(1.0, 1.5, groups)
    golden, twin = found
    gram = grams(found)
    assert gram.cosine(1) == pytest.approx(cos(golden.mean(0), twin.mean(0)))
    gap = np.linalg.norm(twin.mean(0) - golden.mean(0)) / np.linalg.norm(golden.mean(0))
    assert gram.distance(1) == pytest.approx(gap)
    halves = []
    for first in itertools.combinations(range(groups), groups // 2):
        second = [i for i in range(groups) if i not in first]
        halves.append(cos(golden[list(first)].mean(0), golden[second].mean(0)))
    assert gram.ceiling() == pytest.approx(np.mean(halves))
    kept = [i for i in range(groups) if i != 2]
    assert gram.without(2).cosine(1) == pytest.approx(cos(golden[kept].mean(0), twin[kept].mean(0)))


def test_the_corrected_cosine_is_that_of_the_expected_gradients() -> None:
    plain, corrected = [], []
    for seed in range(200):
        means, found = vectors(1.0, 2.0, 8, seed=seed)
        plain.append(grams(found).cosine(1))
        corrected.append(grams(found).corrected(1))
    assert cos(*means) == pytest.approx(0.6)
    assert np.mean(plain) < 0.5  # drowned in noise
    assert np.mean(corrected) == pytest.approx(0.6, abs=0.02)


def test_without_any_signal_there_is_no_corrected_cosine() -> None:
    found = [grams(vectors(0.0, 1.0, 4, seed=seed)[1]).corrected(1) for seed in range(40)]
    assert any(math.isnan(value) for value in found)


def test_the_jackknife_of_a_mean_is_students_interval() -> None:
    x = np.random.default_rng(3).normal(size=9)
    found = jackknife(float(x.mean()), [float(np.delete(x, i).mean()) for i in range(9)])
    low, high = stats.t.interval(0.95, 8, loc=x.mean(), scale=x.std(ddof=1) / 3)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_trends_are_weighted_differences() -> None:
    bins = [grams(vectors(s, 0.4, 4, seed=i)[1]) for i, s in enumerate((0.2, 0.5, 1.0, 3.0))]
    found = trend(bins, lambda gram: gram.cosine(1), [3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0])
    c = [gram.cosine(1) for gram in bins]
    assert found.value == pytest.approx((c[2] + c[3]) / 2 - (3 * c[0] + c[1]) / 4)
    assert found.low < found.value < found.high


def test_directions_and_crossings() -> None:
    assert [direction(Estimate(0.0, *ends)) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == [
        "rises", "falls", "flat",
    ]  # fmt: skip
    assert direction(Estimate(0.3, math.nan, math.nan)) == "flat"
    x = [0.1, 0.3, 0.5, 0.7]
    assert crossing(x, [0.2, 0.4, 0.6, 0.8], [0.9, 0.7, 0.5, 0.3]) == pytest.approx(0.45)
    assert math.isnan(crossing(x, [0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]))
    assert math.isnan(crossing(x, [0.9, 0.7, 0.3, 0.1], [0.1, 0.3, 0.5, 0.7]))  # it only comes down
