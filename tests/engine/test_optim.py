"""Learning rates by their formulas, refused settings, and the moving average's ramp."""

from __future__ import annotations

import math

import pytest
import torch

from contentv.base.errors import UserError
from contentv.engine.ema import MovingAverage, decay_at
from contentv.engine.optim import OptimConfig, lr_at


def test_warm_up_then_constant() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [lr_at(s, config, 100) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_at(0, OptimConfig(lr=0.5, warmup_steps=0), 10) == 0.5


def test_cosine_ends_at_its_lowest() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=10, schedule="cosine", min_lr_ratio=0.1)
    assert lr_at(10, config, 111) == pytest.approx(2.0)
    assert lr_at(60, config, 111) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert lr_at(110, config, 111) == pytest.approx(0.2)
    assert lr_at(500, config, 111) == pytest.approx(0.2)
    rates = [lr_at(s, config, 111) for s in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.0}, {"betas": [0.9]}, {"betas": [0.9, 1.0]}, {"eps": 0.0}, {"weight_decay": -1.0}, {"grad_clip": -1.0},
     {"warmup_steps": -1}, {"schedule": "linear"}, {"min_lr_ratio": 2.0}, {"ema_decay": 1.0}],
)  # fmt: skip
def test_settings_out_of_range_name_their_key(change: dict[str, object]) -> None:
    with pytest.raises(UserError) as error:
        OptimConfig(**change)
    assert error.value.where == f"optim.{next(iter(change))}"


def test_the_average_starts_quickly_and_settles() -> None:
    assert decay_at(0, 0.999) == pytest.approx(0.1)
    assert decay_at(90, 0.999) == pytest.approx(0.91)
    assert decay_at(1_000_000, 0.999) == 0.999


def test_average_by_its_formula() -> None:
    master = torch.zeros(3, requires_grad=True)
    average, want = MovingAverage([master], 0.5), torch.zeros(3)
    for step in range(5):
        with torch.no_grad():
            master.add_(torch.arange(3.0) + step)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * master.detach()
        torch.testing.assert_close(average.averages[0], want)
    average.restart()
    assert torch.equal(average.averages[0], master.detach())
    assert average.updates == 0
