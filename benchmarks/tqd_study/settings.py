"""What a run of the study is: the recipe all runs share, the condition they differ in, and a seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tqd_study.sprites import World


@dataclass(frozen=True)
class Recipe:
    """The world, the model, and how it is trained and sampled.

    Args:
        world: what clips look like.
        clips: training clips, over all sets of a run.
        steps: optimiser steps; likewise warmup_steps.
        batch: clips of a step.
        lr: highest learning rate, falling along half a cosine to a twentieth.
        ema_decay: of the averaged weights, which are the ones evaluated.
        shift: of the base law of sigma, uniform before it, and of the solver's steps.
        layers, heads, head_dim, patch: of the MMDiT.
        samples: clips generated, and held-out golden clips they are compared with.
        solver_steps: of Euler's method.
    """

    world: World = field(default_factory=World)
    clips: int = 4096
    steps: int = 1600
    warmup_steps: int = 100
    batch: int = 16
    lr: float = 3e-3
    ema_decay: float = 0.99
    shift: float = 2.0
    layers: int = 3
    heads: int = 4
    head_dim: int = 24
    patch: int = 4
    samples: int = 256
    solver_steps: int = 40


@dataclass(frozen=True)
class Condition:
    """Which clips are trained at which noise levels.

    Args:
        sets: kinds of clips, in equal parts.
        law: of sigma: base, or tqd.
        swap: motion and visual scores change places, for TQD and for the keep probability alike.
        drop: in each epoch clips are kept with their keep probability.
        kappa_max: TQD's concentration at a gap of 1.
        floor: TQD's share of draws that the base law makes.
        scale: how raw scores become scores in 0..1: quantile (ranks) or minmax.
    """

    sets: tuple[str, ...]
    law: str = "base"
    swap: bool = False
    drop: bool = False
    kappa_max: float = 8.0
    floor: float = 0.0
    scale: str = "quantile"


@dataclass(frozen=True)
class Run:
    """One training: all that its result follows from.

    Args:
        recipe: as above; likewise condition.
        seed: of the clips, the first weights, and all draws.
        gradients: the trained model's gradients on golden clips and degraded twins are compared as well.
    """

    recipe: Recipe
    condition: Condition
    seed: int
    gradients: bool = False

    def settings(self) -> dict[str, Any]:
        """Returns the run's settings as they are written in its row, by which a finished run is known."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    """Tuples become lists, as they do in JSON."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
