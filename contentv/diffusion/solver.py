"""Euler's method for the probability-flow ODE, from noise (sigma 1) to a clip (sigma 0), and guidance.

One step is latents + (sigma_next - sigma) * velocity. The state is fp32 from the first step to the last: a bf16 state
would lose the small steps near the end.

Source: Esser et al., arXiv 2403.03206, section 2; guidance: Ho and Salimans, arXiv 2207.12598. Numbers agree with
diffusers' FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from contentv.base.types import TextCond, VelocityModel
from contentv.diffusion.flow import at_least_fp32, timestep_of
from contentv.diffusion.samplers import Number, require, shift_sigma

VelocityFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(latents b c t h w, sigma as a scalar tensor) -> velocity b c t h w."""


def euler_sigmas(steps: int, shift: Number = 1.0) -> Float[Tensor, "points"]:
    """Returns the noise levels between which a solver steps, (steps + 1,) fp32 falling from 1 to 0.

    Args:
        steps: number of solver steps, 1 or more.
        shift: above 0; above 1 spends more of the steps at high noise.

    Raises:
        ValueError: steps or shift is out of range.
    """
    require(steps >= 1, "steps", steps, "1 or more")
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64).float()
    return shift_sigma(even, shift)


def euler_step(
    latents: Float[Tensor, "b c t h w"],
    velocity: Float[Tensor, "b c t h w"],
    sigma: Float[Tensor, ""],
    sigma_next: Float[Tensor, ""],
) -> Float[Tensor, "b c t h w"]:
    """Returns the latents at `sigma_next`, in fp32 (fp64 for fp64 latents)."""
    return at_least_fp32(latents) + (sigma_next - sigma) * at_least_fp32(velocity)


def euler_sample(
    velocity_fn: VelocityFn, noise: Float[Tensor, "b c t h w"], sigmas: Float[Tensor, "points"]
) -> Float[Tensor, "b c t h w"]:
    """Returns the clip that the ODE connects with `noise`, in fp32 (fp64 for fp64 noise). Keeps no graph by itself.

    Args:
        velocity_fn: from `guided`; it is given the latents in the dtype of `noise`, the dtype the model runs in.
        noise: standard normal draws on the model's device.
        sigmas: from `euler_sigmas`.
    """
    latents = at_least_fp32(noise)
    for sigma, sigma_next in itertools.pairwise(sigmas.to(noise.device)):
        latents = euler_step(latents, velocity_fn(latents.to(noise.dtype), sigma), sigma, sigma_next)
    return latents


def guided(
    model: VelocityModel,
    text: TextCond,
    negative_text: TextCond | None = None,
    scale: Number = 1.0,
    *,
    batched: bool = False,
) -> VelocityFn:
    """Returns the velocity of `model` under classifier-free guidance, v_u + scale * (v_c - v_u), in fp32.

    The two branches are two passes of the model unless `batched`: half the memory, and the prompts may differ in
    length. With scale 1 there is one pass and `negative_text` is not used.

    Args:
        model: the velocity model.
        text: the prompts, one row per sample.
        negative_text: the prompts to move away from; one row stands for all samples.
        scale: 0 or more; 1 = no guidance.
        batched: one pass of twice the batch instead, prompts first; equal to two passes up to rounding.

    Raises:
        ValueError: scale is negative, or not 1 without `negative_text`; or batched prompts differ in length.
    """
    require(scale >= 0, "guidance scale", scale, "0 or more")
    if scale != 1 and negative_text is None:
        raise ValueError(f"guidance scale {scale} needs a negative (or empty) prompt")
    negative = negative_text
    if negative is not None and negative.tokens.shape[0] == 1:
        negative = negative.expand(text.tokens.shape[0])

    def one(latents: Tensor, sigma: Tensor, condition: TextCond) -> Tensor:
        timestep = timestep_of(sigma.expand(latents.shape[0]))
        return at_least_fp32(model(latents, timestep, condition.tokens, condition.pooled))

    if scale == 1 or negative is None:
        return lambda latents, sigma: one(latents, sigma, text)
    unguided = negative

    def two_passes(latents: Tensor, sigma: Tensor) -> Tensor:
        conditional, unconditional = one(latents, sigma, text), one(latents, sigma, unguided)
        return unconditional + scale * (conditional - unconditional)

    if not batched:
        return two_passes
    if text.tokens.shape != negative.tokens.shape:
        raise ValueError(f"prompts of {tuple(text.tokens.shape)} and {tuple(negative.tokens.shape)} make no batch")
    both = TextCond(torch.cat([text.tokens, negative.tokens]), torch.cat([text.pooled, negative.pooled]))

    def one_pass(latents: Tensor, sigma: Tensor) -> Tensor:
        conditional, unconditional = one(torch.cat([latents, latents]), sigma, both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return one_pass
