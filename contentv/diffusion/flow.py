"""Rectified flow: the straight line from a clean clip to noise, and the velocity along it.

    noisy_latents = (1 - sigma) * latents + sigma * noise
    velocity      = noise - latents                        (the derivative of the line in sigma)
    loss          = mean over c, t, h, w of (predicted velocity - velocity)^2

sigma is 0 at the clean clip and 1 at pure noise; it stays fp32 even where latents are bf16, because bf16 knows only
three significant digits and would merge neighbouring noise levels. The model's own clock, `timestep`, is 1000 * sigma.

Source: Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206, sections 2 and 3.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

TIMESTEP_SCALE = 1000.0


def add_noise(
    latents: Float[Tensor, "b c t h w"], noise: Float[Tensor, "b c t h w"], sigma: Float[Tensor, "b"]
) -> Float[Tensor, "b c t h w"]:
    """Returns the point `sigma` of the way from `latents` to `noise`, in fp32 (fp64 for fp64 inputs).

    The ends are exact: sigma 0 returns the latents, sigma 1 the noise.

    Args:
        latents: clean latents in model space (normalised), any float dtype.
        noise: standard normal draws.
        sigma: noise level of each sample, 0..1.
    """
    level = _over_samples(at_least_fp32(sigma))
    return (1 - level) * at_least_fp32(latents) + level * at_least_fp32(noise)


def velocity_target(
    latents: Float[Tensor, "b c t h w"], noise: Float[Tensor, "b c t h w"]
) -> Float[Tensor, "b c t h w"]:
    """Returns `noise - latents`, what the model is to predict at every sigma, in fp32 (fp64 for fp64 inputs)."""
    return at_least_fp32(noise) - at_least_fp32(latents)


def flow_loss(
    velocity_pred: Float[Tensor, "b c t h w"],
    velocity_target: Float[Tensor, "b c t h w"],
    weight: Float[Tensor, "b"] | None = None,
) -> Float[Tensor, "b"]:
    """Returns each sample's mean squared velocity error over c, t, h, w, in fp32 (fp64 for fp64 inputs).

    There is no mean over the samples: the caller sums and divides by the number of samples in the *global* batch.

    Args:
        velocity_pred: the model's output, any float dtype.
        velocity_target: from `velocity_target`.
        weight: factor of each sample's loss; none = 1.
    """
    error = at_least_fp32(velocity_pred) - at_least_fp32(velocity_target)
    per_sample = error.square().mean(dim=(1, 2, 3, 4))
    return per_sample if weight is None else per_sample * weight.to(per_sample)


def timestep_of(sigma: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """Returns the model's timestep, 1000 * sigma, in fp32."""
    return sigma.float() * TIMESTEP_SCALE


def at_least_fp32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns `x` itself when it is fp32 or fp64, otherwise its fp32 copy."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _over_samples(sigma: Float[Tensor, "b"]) -> Float[Tensor, "b 1 1 1 1"]:
    return sigma[:, None, None, None, None]
