"""The choice of a noise-level distribution: its configuration, its construction, and the keyed draw of a batch.

The distributions themselves are in `samplers` and `beta` (independent of the clip) and `tqd` (following a clip's
scores), weights of the loss in `weights`; their names are public from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from contentv.base.errors import UserError, nearest
from contentv.diffusion.beta import Beta
from contentv.diffusion.samplers import (
    Discrete,
    LogitNormal,
    Mode,
    ShiftedSampler,
    SigmaSampler,
    Uniform,
    require,
    shift_sigma,
)
from contentv.diffusion.tqd import TQD
from contentv.diffusion.weights import WEIGHTS, CosMap, MinSNR, SigmaWeight, mean_one

__all__ = [
    "TQD", "Beta", "CosMap", "Discrete", "LogitNormal", "MinSNR", "Mode", "SigmaSampler", "SigmaWeight",
    "TimestepConfig", "Uniform", "build_sampler", "build_weight", "draw", "shift_sigma",
]  # fmt: skip

BASES = ("logit_normal", "uniform", "mode", "beta")


@dataclass
class TimestepConfig:
    """Which noise levels are trained, and how often.

    Raises:
        UserError: a value is unknown or out of range.
    """

    kind: str = field(
        default="logit_normal",
        metadata={"help": "distribution of sigma: logit_normal | uniform | mode | beta | tqd (by each clip's scores)"},
    )
    mean: float = field(default=0.0, metadata={"help": "logit_normal: mean of the logit; above 0 leans towards noise"})
    std: float = field(default=1.0, metadata={"help": "logit_normal: standard deviation of the logit; above 0"})
    mode_scale: float = field(default=1.29, metadata={"help": "mode: -1..1.75; 0 = uniform, higher = more middle"})
    alpha: float = field(default=1.5, metadata={"help": "beta: above 0; higher leans towards noise"})
    beta: float = field(default=1.0, metadata={"help": "beta: above 0; higher leans towards clean clips"})
    levels: int = field(
        default=0,
        metadata={"help": "rounds sigma up to multiples of 1/levels, as discrete schedulers do; 0 = off, or >= 2"},
    )
    shift: float = field(
        default=1.0, metadata={"help": "moves sigma towards noise, s' = shift*s/(1+(shift-1)*s); above 0, 1 = off"}
    )
    base: str = field(default="logit_normal", metadata={"help": "tqd: its base: logit_normal | uniform | mode | beta"})
    tqd_mode: str = field(
        default="quantile",
        metadata={"help": "tqd: quantile = the Beta draw is a rank of the base | direct = the Beta draw is sigma"},
    )
    kappa_base: float = field(
        default=2.0,
        metadata={"help": "tqd: concentration for equal scores; above 0. 2 = the base (quantile) or uniform (direct)"},
    )
    kappa_max: float = field(
        default=8.0, metadata={"help": "tqd: concentration at a score gap of 1; kappa_base or more; needs tuning"}
    )
    floor: float = field(default=0.0, metadata={"help": "tqd: probability of the base whatever the scores; 0..1"})
    missing: str = field(
        default="base", metadata={"help": "tqd: clips without scores get the base sampler (base) or an error (refuse)"}
    )
    loss_weight: str = field(
        default="none",
        metadata={"help": "weight of the loss by sigma, mean one over the draws: none | min_snr | cosmap"},
    )
    snr_gamma: float = field(
        default=5.0, metadata={"help": "min_snr: signal-to-noise ratio above which a level counts no more; above 0"}
    )

    def __post_init__(self) -> None:
        _require_known("kind", self.kind, (*BASES, "tqd"))
        _require_known("base", self.base, BASES)
        _require_known("loss_weight", self.loss_weight, WEIGHTS)
        try:
            build_weight(self)
        except ValueError as error:
            raise UserError(
                f"{error}", where="timestep", remedy="see `contentv train --help` for the range of each timestep key"
            ) from None


def build_sampler(config: TimestepConfig) -> SigmaSampler | TQD:
    """Returns the sampler a configuration describes.

    Raises:
        ValueError: a parameter is out of range.
    """
    if config.kind != "tqd":
        return _build_base(config.kind, config)
    direct = config.tqd_mode == "direct"
    require(not (direct and config.levels), "levels", config.levels, "0 in tqd_mode=direct, whose draws are continuous")
    # Both readings of a TQD draw end up shifted once: as part of the base (quantile), or after the draw (direct).
    return TQD(
        _build_base(config.base, config),
        kappa_base=config.kappa_base,
        kappa_max=config.kappa_max,
        mode=config.tqd_mode,
        floor=config.floor,
        shift=config.shift if direct else 1.0,
        missing=config.missing,
    )


def build_weight(config: TimestepConfig) -> SigmaWeight | None:
    """Returns the weight of the loss a configuration describes, None for none; its mean over the base's draws is 1.

    Raises:
        ValueError: a parameter is out of range.
    """
    sampler = build_sampler(config)
    if config.loss_weight == "none":
        return None
    weight = MinSNR(config.snr_gamma) if config.loss_weight == "min_snr" else CosMap()
    return mean_one(weight, sampler.base if isinstance(sampler, TQD) else sampler)


def _build_base(kind: str, config: TimestepConfig) -> SigmaSampler:
    require(config.levels >= 0, "levels", config.levels, "0 or more")
    law = _build_law(kind, config)
    return Discrete(law, config.levels) if config.levels else law


def _build_law(kind: str, config: TimestepConfig) -> ShiftedSampler:
    if kind == "logit_normal":
        return LogitNormal(config.mean, config.std, config.shift)
    if kind == "mode":
        return Mode(config.mode_scale, config.shift)
    if kind == "beta":
        return Beta(config.alpha, config.beta, config.shift)
    return Uniform(config.shift)


def _require_known(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(
            f'timestep.{key}="{value}" is unknown; {nearest(value, known)}'.rstrip("; "),
            where=f"timestep.{key}",
            remedy=f"use one of {', '.join(known)}",
        )


def draw(
    sampler: SigmaSampler | TQD,
    motion: Float[Tensor, "..."],
    visual: Float[Tensor, "..."],
    generators: Sequence[torch.Generator],
) -> Float[Tensor, "b"]:
    """Returns one sigma per sample, (b,) fp32 in [1e-5, 1 - 1e-5], entry i from generators[i] alone.

    A sampler other than TQD never looks at the scores: its draws are the same, bit for bit, with and without them. A
    sample whose motion or visual score is NaN gets from TQD exactly what the base sampler would give it.

    Args:
        sampler: from `build_sampler`.
        motion: motion scores (b,) in 0..1; NaN = none.
        visual: visual scores (b,), likewise.
        generators: one per sample, keyed by the sample, so that every process handling it draws the same.

    Raises:
        ValueError: the three arguments disagree in length, or TQD is given a score outside 0..1.
    """
    b = len(generators)
    if motion.shape != (b,) or visual.shape != (b,):
        raise ValueError(
            f"motion {tuple(motion.shape)} and visual {tuple(visual.shape)} must have one entry per generator, ({b},)"
        )
    if isinstance(sampler, TQD):
        return sampler.sample_each(motion, visual, generators)
    return sampler.sample_each(generators)
