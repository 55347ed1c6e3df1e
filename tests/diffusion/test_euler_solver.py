"""The Euler solver against diffusers' scheduler and against flows with a known solution."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from contentv.base.types import TextCond
from contentv.diffusion.solver import euler_sample, euler_sigmas, euler_step, guided


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 4, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_sigmas_and_steps_are_diffusers(steps, shift, parity):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist())
    sigmas = euler_sigmas(steps, shift)
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=2e-7, atol=1e-8)
    published = "diffusers FlowMatchEulerDiscreteScheduler"
    # sigmas lie in [0, 1]: one rounding of fp32 there
    parity("solver: sigmas", published, float((sigmas - scheduler.sigmas).abs().max()), 1.2e-7)
    assert (float(sigmas[0]), float(sigmas[-1])) == (1.0, 0.0)

    weight = normal(3, 3, seed=1)

    def velocity(latents, sigma):
        return torch.einsum("bcthw,cd->bdthw", torch.tanh(latents), weight) * (1 + sigma)

    theirs = noise = normal(2, 3, 2, 4, 4, seed=2)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        theirs = scheduler.step(velocity(theirs, sigma), timestep, theirs).prev_sample
    ours = euler_sample(velocity, noise, sigmas)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    parity("solver: latents", published, float((ours - theirs).abs().max() / theirs.abs().max()), 1e-5)


def test_a_straight_flow_is_solved_in_one_step():
    clip, noise = normal(1, 2, 2, 3, 3, seed=3), normal(1, 2, 2, 3, 3, seed=4)
    for steps in (1, 5):
        found = euler_sample(lambda x, s: noise - clip, noise, euler_sigmas(steps, 3.0))
        torch.testing.assert_close(found, clip, rtol=1e-5, atol=1e-6)


def test_error_falls_with_the_step_size():
    # dx/dsigma = x has x(0) = x(1) / e; Euler's error is proportional to the step.
    noise = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    errors = [float(euler_sample(lambda x, s: x, noise, euler_sigmas(n)) - 1 / math.e) for n in (50, 100, 200)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.02)


def test_state_stays_fp32_while_the_model_sees_the_noises_dtype():
    seen = []

    def velocity(latents, sigma):
        seen.append(latents.dtype)
        return torch.full_like(latents, 2.0**-12)

    noise = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    clip = euler_sample(velocity, noise, euler_sigmas(10))
    assert set(seen) == {torch.bfloat16}
    assert clip.dtype == torch.float32
    assert clip.item() == pytest.approx(1 - 2.0**-12, abs=1e-6)  # each step is far below bf16's resolution at 1
    step = euler_step(noise, noise, torch.tensor(0.5), torch.tensor(0.25))
    assert step.dtype == torch.float32
    assert step.item() == 0.75


class Recorder:
    """A velocity that depends on all its inputs and notes them."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, noisy_latents, timestep, text_tokens, text_pooled):
        self.calls.append((timestep, text_tokens, text_pooled))
        level = text_tokens.mean(dim=(1, 2)) + text_pooled.mean(dim=1) + timestep / 1000
        return noisy_latents * level[:, None, None, None, None]


def test_guidance_is_two_passes_and_its_formula():
    text = TextCond(normal(2, 5, 4, seed=5), normal(2, 3, seed=6))
    negative = TextCond(normal(1, 3, 4, seed=7), normal(1, 3, seed=8))  # another length, one row for all
    x, sigma = normal(2, 1, 1, 2, 2, seed=9), torch.tensor(0.7)
    model = Recorder()
    conditional = model(x, torch.full((2,), 700.0), text.tokens, text.pooled)
    unconditional = model(x, torch.full((2,), 700.0), negative.expand(2).tokens, negative.expand(2).pooled)
    model.calls.clear()
    found = guided(model, text, negative, 6.0)(x, sigma)
    torch.testing.assert_close(found, unconditional + 6 * (conditional - unconditional))
    assert len(model.calls) == 2
    assert {t.dtype for t, _, _ in model.calls} == {torch.float32}
    torch.testing.assert_close(model.calls[0][0], torch.full((2,), 700.0))
    assert [tuple(c.shape) for _, c, _ in model.calls] == [(2, 5, 4), (2, 3, 4)]
    torch.testing.assert_close(guided(model, text, negative, 0.0)(x, sigma), unconditional)


def test_batched_guidance_is_one_pass_of_twice_the_batch():
    text = TextCond(normal(2, 5, 4, seed=5), normal(2, 3, seed=6))
    negative = TextCond(normal(2, 5, 4, seed=7), normal(2, 3, seed=8))  # another one for each prompt
    x, sigma = normal(2, 1, 1, 2, 2, seed=9), torch.tensor(0.7)
    expected = guided(Recorder(), text, negative, 6.0)(x, sigma)
    model = Recorder()
    velocity = guided(model, text, negative, 6.0, batched=True)
    torch.testing.assert_close(velocity(x, sigma), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(velocity(x + 1, sigma), guided(Recorder(), text, negative, 6.0)(x + 1, sigma))
    assert [(tuple(t.shape), tuple(c.shape), tuple(p.shape)) for t, c, p in model.calls] == [
        ((4,), (4, 5, 4), (4, 3))
    ] * 2
    one = TextCond(normal(1, 5, 4, seed=7), normal(1, 3, seed=8))  # one for all
    torch.testing.assert_close(
        guided(model, text, one, 6.0, batched=True)(x, sigma), guided(Recorder(), text, one, 6.0)(x, sigma)
    )
    model.calls.clear()
    guided(model, text, negative, 1, batched=True)(x, sigma)
    assert [tuple(c.shape) for _, c, _ in model.calls] == [(2, 5, 4)]
    with pytest.raises(ValueError, match="make no batch"):
        guided(model, text, TextCond(normal(1, 3, 4), normal(1, 3)), 6.0, batched=True)


@pytest.mark.parametrize("negative", [None, TextCond(torch.zeros(1, 5, 4), torch.zeros(1, 3))], ids=["none", "given"])
def test_guidance_of_one_is_one_pass(negative):
    model, text = Recorder(), TextCond(normal(2, 5, 4), normal(2, 3))
    x = normal(2, 1, 1, 2, 2)
    found = guided(model, text, negative, 1)(x, torch.tensor(0.5))
    assert len(model.calls) == 1
    assert torch.equal(found, model(x, torch.full((2,), 500.0), text.tokens, text.pooled))


def test_gradients_flow_through_a_solve():
    gain = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    noise, sigmas = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), euler_sigmas(4, 3.0)
    euler_sample(lambda x, s: gain * x, noise, sigmas).sum().backward()
    factors = [1 + 0.3 * float(b - a) for a, b in itertools.pairwise(sigmas)]
    expected = sum(
        math.prod(factors) / f * float(b - a) for f, (a, b) in zip(factors, itertools.pairwise(sigmas), strict=True)
    )
    assert float(gain.grad) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: euler_sigmas(0), "steps must be 1 or more, got 0"),
        (lambda: euler_sigmas(4, 0.0), "shift must be above 0, got 0.0"),
        (lambda: guided(Recorder(), TextCond(normal(1, 1, 1), normal(1, 1)), None, -1.0), "guidance scale .* got -1.0"),
        (lambda: guided(Recorder(), TextCond(normal(1, 1, 1), normal(1, 1)), None, 2.0), "scale 2.0 needs a negative"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
