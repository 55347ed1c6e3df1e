"""The optimiser that makes the demo's small models in minutes: orthogonalised momentum for all hidden weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def _orthogonal(update: Tensor) -> Tensor:
    """Returns a matrix with the update's singular vectors and singular values near 1 (Newton-Schulz, five steps)."""
    x = update / (update.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    result: Tensor = x.T if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Muon for weights of two and more dimensions, the first against all others.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the factor that gives its
    updates AdamW's size is that of Liu et al. 2025, arXiv 2502.16982, section 2.2.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1.0 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"]).reshape(parameter.shape[0], -1)
                size = 0.2 * max(update.shape) ** 0.5
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(_orthogonal(update).reshape(parameter.shape), alpha=-group["lr"] * size)


class Schedule:
    """Muon for the hidden weights and AdamW for the rest, on one clock: warm-up, then down to almost 0."""

    def __init__(
        self, model: nn.Module, muon_lr: float, adam_lr: float, warmup_steps: int = 30, weight_decay: float = 0.01
    ) -> None:
        hidden = [p for p in model.parameters() if p.dim() >= 2 and min(p.shape[0], p[0].numel()) >= 8]
        chosen = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(hidden, muon_lr, weight_decay=weight_decay),
            torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.99), weight_decay=1e-3),
        ]  # fmt: skip
        self.rates = [muon_lr, adam_lr]
        self.warmup_steps = warmup_steps
        self.steps = 0

    def step(self, loss: Tensor, progress: float) -> None:
        """Descends along the loss; `progress` in [0, 1] is the share of the time that is over."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        factor = min(1.0, (self.steps + 1) / self.warmup_steps) * (1.01 - progress)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        self.steps += 1
