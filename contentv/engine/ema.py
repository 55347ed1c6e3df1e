"""A moving average of the weights, kept beside this rank's part of the fp32 master weights and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def decay_at(updates: int, decay: float) -> float:
    """Returns the decay of an update: a ramp (1 + n) / (10 + n) at first, so that short runs forget their start.

    Args:
        updates: updates made before this one.
        decay: the decay in the long run, 0..1.
    """
    return min(decay, (1 + updates) / (10 + updates))


class MovingAverage:
    """One fp32 average per flat tensor of master weights; no rank holds more than its own partition.

    Args:
        masters: this rank's flat fp32 master weights, updated in place by the optimiser.
        decay: long-run decay a step, 0..1.
    """

    def __init__(self, masters: Sequence[Tensor], decay: float) -> None:
        self.masters = list(masters)
        self.decay = decay
        self.updates = 0
        self.averages = [m.detach().clone() for m in self.masters]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the master weights; call it after each optimiser step that was applied."""
        decay = decay_at(self.updates, self.decay)
        for average, master in zip(self.averages, self.masters, strict=True):
            average.lerp_(master.detach(), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the averages to the present weights."""
        self.updates = 0
        for average, master in zip(self.averages, self.masters, strict=True):
            average.copy_(master.detach())
