"""The engine in one process: equal to plain torch in weights as well as losses, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import toy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from contentv.engine.ema import decay_at
from contentv.engine.frozen import frozen_model
from contentv.engine.optim import lr_at
from contentv.engine.parallelize import parallelize
from contentv.engine.zero import ZeroEngine
from contentv.engine.zero_config import deepspeed_config, weight_sizes
from contentv.parallel.mesh import ParallelConfig, single_process_mesh

STEPS = 5


@pytest.fixture
def engines() -> Iterator[Any]:
    """Makes engines and unhooks them afterwards."""
    made: list[ZeroEngine] = []

    def make(**changes: Any) -> ZeroEngine:
        parallel = ParallelConfig(**changes.pop("parallel", {}))
        made.append(toy.make_engine(parallel, **changes))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_and_losses_are_those_of_torch_adamw(stage: int, engines: Any) -> None:
    plain = toy.make_model()
    config = toy.optim_config(weight_decay=0.3)  # large: a decay applied at set-up or twice would be seen
    losses, norms = toy.train_plainly(plain, STEPS, config, 10)
    engine = engines(parallel={"zero_stage": stage}, config=config)
    got_losses, got_norms = toy.train(engine, STEPS)
    assert got_losses == pytest.approx(losses, rel=1e-6)
    assert got_norms == pytest.approx(norms, rel=1e-6)
    for name, value in engine.state_tensors():
        want = plain.get_parameter(name).detach()
        assert (value - want).norm() <= 1e-6 * want.norm(), name
    assert engine.num_parameters == sum(p.numel() for p in plain.parameters())


def test_any_number_of_micro_batches_before_a_step(engines: Any) -> None:
    losses, norms = toy.train_plainly(toy.make_model(), 3, toy.optim_config(), 10)
    engine = engines()
    curves = [toy.train(engine, 1, micro_batches=n) for n in (4, 1, 2)]
    assert [c[0][0] for c in curves] == pytest.approx(losses, rel=1e-6)
    assert [c[1][0] for c in curves] == pytest.approx(norms, rel=1e-6)


def test_moving_average_and_learning_rates(engines: Any) -> None:
    engine = engines(parallel={"zero_stage": 2})
    want = dict(engine.state_tensors())
    for step in range(3):
        stats_lr = lr_at(step, toy.optim_config(), 10)
        loss = toy.loss_sum(engine.module, toy.make_batch(step))
        engine.backward(loss, toy.SAMPLES)
        stats = engine.step()
        assert (stats.lr, stats.skipped) == (stats_lr, False)
        decay = decay_at(step, 0.9)
        for name, value in engine.state_tensors():
            want[name] = decay * want[name] + (1 - decay) * value
    for name, value in engine.state_tensors(ema=True):
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-7)


def test_no_moving_average_unless_asked_for(engines: Any) -> None:
    engine = engines(config=toy.optim_config(ema_decay=0.0))
    toy.train(engine, 1)
    with pytest.raises(ValueError, match="no moving average"):
        next(engine.state_tensors(ema=True))


def test_frozen_reference_gives_no_gradient(engines: Any) -> None:
    reference = toy.make_model(5)
    batch = {k: v for k, v in toy.make_batch(0).items() if k != "target"}
    want = reference(**batch).detach()
    for stage in (1, 3):
        frozen = frozen_model(
            toy.make_model(5), single_process_mesh(), ParallelConfig(zero_stage=stage), "fp32", toy.CPU, persist_below=0
        )
        out = frozen(*batch.values())
        assert not out.requires_grad
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)


class AttentionCounter(TorchDispatchMode):
    """Counts fused attentions that are really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += "scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "attentions"), [("none", 2), ("selective", 2), ("full", 4)])
def test_recompute_changes_no_gradient_and_selective_keeps_attention(recompute: str, attentions: int) -> None:
    plain, model = toy.make_model(), toy.make_model()
    parallelize(model, single_process_mesh(), recompute=recompute)
    batch = toy.make_batch(0)
    toy.loss_sum(plain, batch).backward()
    with AttentionCounter() as counter:
        toy.loss_sum(model, batch).backward()
    assert counter.count == attentions
    for name, p in plain.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, p.grad), name


def test_a_model_is_parallelized_once() -> None:
    model = toy.make_model()
    parallelize(model, single_process_mesh())
    with pytest.raises(RuntimeError, match="already one rank's part"):
        parallelize(model, single_process_mesh())


def test_refusals(engines: Any) -> None:
    frozen: nn.Module = toy.make_model()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        engines(model=frozen)
    with pytest.raises(ValueError, match="precision=fp16"):
        engines(precision="fp16")


def test_deepspeed_is_told_what_the_user_said() -> None:
    sizes = weight_sizes({"a.weight": (20, 50)})
    config = deepspeed_config(
        ParallelConfig(zero_stage=3, offload="all"), "bf16", torch.device("cuda"), sizes, grad_clip=0.5
    )
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"]
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert config["zero_optimization"]["overlap_comm"]
    assert "sequence" not in str(config)


def test_bf16_masters_start_from_the_unrounded_weights(engines: Any) -> None:
    whole = dict(toy.make_model().named_parameters())
    for stage in (1, 2, 3):
        engine = engines(precision="bf16", parallel={"zero_stage": stage})
        assert all(torch.equal(value, whole[name]) for name, value in engine.state_tensors())
        assert all(torch.equal(value, whole[name]) for name, value in engine.state_tensors(ema=True))
