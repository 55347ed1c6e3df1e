"""What theory expects: the closed-form model of routing by noise level, with nothing learned and nothing fitted.

A clip is two independent numbers, its motion and its detail, each Gaussian with some variance V. The best linear
denoiser of a mixture knows, at noise s = sigma / (1 - sigma), only the mixture's variance there,

    V(s) = share(s) * V_blurred + (1 - share(s)) * V_static,    share(s) = of the draws at s, those of blurred clips

and the probability-flow ODE dx/ds = x * s / (V(s) + s^2) then gives a generated variance of

    V_generated = T^2 * exp(-integral from 0 to T of 2 s / (V(s) + s^2) ds).

Each number is decided around s = sqrt(V). Routing puts the right set there; where scales are near each other, or the
wrong set has next to no variance, it cannot. Predictions are amplitudes (square roots) over the golden ones, as the
study's measures are. Real networks are not linear, and see whether a clip moves: the order of conditions is what is
compared, not the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from contentv.diffusion.timesteps import TQD, SigmaSampler

_TOP = 1e4  # noise from which the ODE starts
_POINTS = 4000


@dataclass(frozen=True)
class Components:
    """Standard deviations of motion and detail in golden clips, and the share of them that the poor set has.

    Args:
        motion, detail: the noise levels s around which each is decided.
        static: amplitude of motion in static clips over that in golden ones.
        blurred: amplitude of detail in blurred clips over that in golden ones.
    """

    motion: float
    detail: float
    static: float
    blurred: float


def blurred_share(
    sampler: SigmaSampler | TQD, blurred: tuple[Tensor, Tensor], static: tuple[Tensor, Tensor], sigma: Tensor
) -> Tensor:
    """Returns the share of blurred clips among the draws at each noise level, (n,).

    Args:
        sampler: of the noise levels.
        blurred: motion and visual scores of the blurred clips; likewise static.
        sigma: (n,) noise levels.
    """
    if not isinstance(sampler, TQD):
        return torch.full_like(sigma, len(blurred[0]) / (len(blurred[0]) + len(static[0])))
    # Pairs of densities may both underflow far from where clips are routed to, so they are compared as logarithms.
    of_blurred, of_static = (
        torch.logsumexp(sampler.log_density(sigma[:, None], motion.double(), visual.double()), dim=1)
        for motion, visual in (blurred, static)
    )
    return torch.sigmoid(of_blurred - of_static)


def predict(
    sampler: SigmaSampler | TQD, blurred: tuple[Tensor, Tensor], static: tuple[Tensor, Tensor], parts: Components
) -> dict[str, float]:
    """Returns the expected motion, detail and their geometric mean, as amplitudes over the golden ones."""
    log_s = torch.linspace(math.log(1e-4), math.log(_TOP), _POINTS, dtype=torch.float64)
    s = log_s.exp()
    share = blurred_share(sampler, blurred, static, s / (1 + s))
    motion = _amplitude(s, log_s, parts.motion**2 * (share + (1 - share) * parts.static**2)) / parts.motion
    detail = _amplitude(s, log_s, parts.detail**2 * (share * parts.blurred**2 + (1 - share))) / parts.detail
    return {"motion": motion, "detail": detail, "combined": math.sqrt(motion * detail)}


def _amplitude(s: Tensor, log_s: Tensor, variance: Tensor) -> float:
    # The integral up to T less that of 2 s / s^2 from the first point on, which is log T^2 - log s_0^2.
    left = 2 * variance / (variance + s.square())
    return math.exp(0.5 * float(torch.trapezoid(left, log_s))) * float(s[0])
