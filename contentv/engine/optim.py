"""The optimiser's settings and the learning rate of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from contentv.base.errors import UserError

SCHEDULES = ("constant", "cosine")


@dataclass
class OptimConfig:
    """AdamW, its learning-rate schedule, gradient clipping and the moving average of the weights."""

    lr: float = field(default=1e-4, metadata={"help": "highest learning rate, > 0"})
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"help": "AdamW's two decays, 0..1"})
    eps: float = field(default=1e-8, metadata={"help": "AdamW's epsilon, > 0"})
    weight_decay: float = field(default=1e-4, metadata={"help": "decoupled weight decay of all weights, >= 0"})
    grad_clip: float = field(default=1.0, metadata={"help": "largest global gradient norm; 0 = no clipping"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up, >= 0"})
    schedule: str = field(default="constant", metadata={"help": "after the warm-up: constant | cosine"})
    min_lr_ratio: float = field(default=0.1, metadata={"help": "cosine: last learning rate as a share of lr, 0..1"})
    ema_decay: float = field(
        default=0.999, metadata={"help": "decay a step of the weights' moving average, 0..1; 0 = none is kept"}
    )

    def __post_init__(self) -> None:
        checks = {
            "lr": (self.lr > 0, "use a positive number"),
            "betas": (
                len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
                "use two numbers from 0 up to 1, such as [0.9,0.999]",
            ),
            "eps": (self.eps > 0, "use a positive number, such as 1e-8"),
            "weight_decay": (self.weight_decay >= 0, "use 0 or more"),
            "grad_clip": (self.grad_clip >= 0, "use 0 (no clipping) or a positive norm"),
            "warmup_steps": (self.warmup_steps >= 0, "use 0 or more"),
            "schedule": (self.schedule in SCHEDULES, f"use one of {', '.join(SCHEDULES)}"),
            "min_lr_ratio": (0 <= self.min_lr_ratio <= 1, "use a share between 0 and 1"),
            "ema_decay": (0 <= self.ema_decay < 1, "use 0 (no average) or a decay below 1, such as 0.999"),
        }
        for key, (ok, remedy) in checks.items():
            if not ok:
                raise UserError(
                    f"optim.{key}={getattr(self, key)} is not possible", where=f"optim.{key}", remedy=remedy
                )


def lr_at(step: int, config: OptimConfig, max_steps: int) -> float:
    """Returns the learning rate of an optimiser step.

    Linear from lr / warmup_steps up to lr, then constant, or half a cosine down to min_lr_ratio * lr at the last step.

    Args:
        step: 0 for the first step.
        config: lr, warmup_steps, schedule, min_lr_ratio.
        max_steps: steps of the run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    last = max(max_steps - 1 - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / last, 1.0)
    low = config.min_lr_ratio
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
