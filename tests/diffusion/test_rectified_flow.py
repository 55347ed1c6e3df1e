"""Interpolation, velocity and loss against their formulas, written as loops or derivatives."""

from __future__ import annotations

import pytest
import torch

from contentv.diffusion.flow import add_noise, flow_loss, timestep_of, velocity_target

SHAPE = (3, 4, 2, 5, 6)


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def test_ends_are_exact(clip, noise):
    assert torch.equal(add_noise(clip, noise, torch.zeros(3)), clip)
    assert torch.equal(add_noise(clip, noise, torch.ones(3)), noise)


def test_each_sample_has_its_own_sigma(clip, noise):
    sigma = torch.tensor([0.1, 0.5, 0.9])
    mixed = add_noise(clip, noise, sigma)
    for i, s in enumerate((0.1, 0.5, 0.9)):
        torch.testing.assert_close(mixed[i], (1 - s) * clip[i] + s * noise[i])


def test_velocity_is_the_derivative_in_sigma(clip, noise):
    sigma = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    clip, noise, h = clip.double(), noise.double(), 1e-4
    slope = (add_noise(clip, noise, sigma + h) - add_noise(clip, noise, sigma - h)) / (2 * h)
    torch.testing.assert_close(slope, velocity_target(clip, noise), rtol=1e-9, atol=1e-9)


def test_loss_is_the_mean_over_everything_but_the_samples(clip, noise):
    expected = [
        sum((p - q) ** 2 for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / a.numel()
        for a, b in zip(clip, noise, strict=True)
    ]
    loss = flow_loss(clip, noise)
    torch.testing.assert_close(loss, torch.tensor(expected))
    weight = torch.tensor([2.0, 0.0, 0.5])
    torch.testing.assert_close(flow_loss(clip, noise, weight), torch.tensor(expected) * weight)


def test_bf16_inputs_are_widened_before_the_subtraction():
    # 1 + 2^-7 and 1 are neighbours in bf16: their difference survives, its square would not if summed in bf16.
    shape = (1, 1, 1, 1, 4096)
    pred, target = torch.full(shape, 1 + 2.0**-7, dtype=torch.bfloat16), torch.ones(shape, dtype=torch.bfloat16)
    loss = flow_loss(pred, target)
    assert loss.dtype == torch.float32
    assert loss.item() == 2.0**-14
    assert velocity_target(pred, target).dtype == torch.float32
    noisy = add_noise(pred, target, torch.tensor([0.3]))
    assert noisy.dtype == torch.float32
    torch.testing.assert_close(noisy[0, 0, 0, 0, 0].item(), 0.7 * (1 + 2.0**-7) + 0.3, rtol=1e-6, atol=0)


def test_timestep_is_a_thousand_sigma():
    timestep = timestep_of(torch.tensor([0.0, 0.25, 1.0]))
    assert timestep.dtype == torch.float32
    assert timestep.tolist() == [0.0, 250.0, 1000.0]
