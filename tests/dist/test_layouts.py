"""Every layout of dp x sp x tp, ZeRO stage and recompute must follow one process with plain torch.

Two torchrun starts check all of it: `two` and `four` run their layouts one after another with new groups.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toy

import launch
from contentv.engine import zero
from contentv.engine.plans import MMDIT_PLAN
from contentv.parallel import tensor
from contentv.parallel.mesh import ParallelConfig

STEPS, FEW, MAX_STEPS = 10, 3, 10
TOLERANCE = 1e-5

TWO: dict[str, dict[str, Any]] = {
    "dp2 zero3 accumulation2": {"micro_batches": 2},
    "sp2 zero3": {"sp": 2},
    "tp2 zero3": {"tp": 2},
    "sp2 zero2 accumulation2": {"sp": 2, "zero_stage": 2, "micro_batches": 2, "steps": FEW},
    "sp2 zero1 accumulation4": {"sp": 2, "zero_stage": 1, "micro_batches": 4, "steps": FEW},
    "tp2 zero1 full recompute": {"tp": 2, "zero_stage": 1, "recompute": "full", "steps": FEW},
    "sp2 zero3 selective recompute": {"sp": 2, "recompute": "selective", "steps": FEW},
}
FOUR: dict[str, dict[str, Any]] = {
    "sp2 tp2 zero3": {"sp": 2, "tp": 2},
    "dp2 sp2 zero3": {"sp": 2},
    "sp4 zero3, 6 heads padded to 8": {"sp": 4, "steps": FEW},
}
MORE_TWO: dict[str, dict[str, Any]] = {
    "dp2 zero1": {"zero_stage": 1}, "dp2 zero2": {"zero_stage": 2}, "tp2 zero2": {"tp": 2, "zero_stage": 2},
    "sp2 zero3 full recompute": {"sp": 2, "recompute": "full"},
    "dp2 zero3 offloaded optimizer": {"offload": "optimizer", "micro_batches": 2},
    "dp2 zero3 offloaded": {"offload": "all", "micro_batches": 2},
    "dp2 zero1 offloaded optimizer": {"zero_stage": 1, "offload": "optimizer"},
    "sp2 zero3 small weights whole": {"sp": 2, "persist_below": 2000},
}  # fmt: skip
MORE_FOUR: dict[str, dict[str, Any]] = {
    "dp2 tp2 zero3": {"tp": 2, "micro_batches": 2},
    "sp4 zero1": {"sp": 4, "zero_stage": 1},
    "sp2 tp2 zero2 full recompute": {"sp": 2, "tp": 2, "zero_stage": 2, "recompute": "full"},
    "dp4 zero3": {},
}


def layout(
    steps: int = STEPS, micro_batches: int = 1, persist_below: int = 0, plan: tensor.TensorPlan = MMDIT_PLAN,
    **parallel: Any,
) -> list[list[float]]:  # fmt: skip
    """Runs in every process: (losses, gradient norms) of a layout."""
    engine = toy.make_engine(ParallelConfig(**parallel), max_steps=MAX_STEPS, persist_below=persist_below, plan=plan)
    curves = toy.train(engine, steps, micro_batches=micro_batches)
    engine.close()
    return list(curves)


def several(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: layout(**case) for name, case in cases.items()}


def two() -> dict[str, Any]:
    return {"layouts": several(TWO), "mutants": mutants(), "bf16": bf16(), "nan": one_bad_sample()}


def mutants() -> dict[str, Any]:
    """Runs in every process: what must break parity, or the comparison proves nothing."""
    found = {}
    unsummed = tensor.TensorPlan(MMDIT_PLAN.column, MMDIT_PLAN.row, partial=())
    found["qk-norm gradients not summed"] = layout(FEW, plan=unsummed, tp=2)
    mark, tensor.mark = tensor.mark, lambda parameter: parameter
    found["split weights not marked"] = layout(FEW, tp=2)
    tensor.mark = mark
    right = zero.ZeroEngine.backward
    zero.ZeroEngine.backward = lambda self, loss, n: right(self, loss / self.mesh.sp, n)  # type: ignore[method-assign]
    found["sequence ranks averaged"] = layout(FEW, sp=2)
    zero.ZeroEngine.backward = right  # type: ignore[method-assign]
    return found


def bf16() -> dict[str, Any]:
    curves = {}
    for stage in (1, 2, 3):
        engine = toy.make_engine(ParallelConfig(zero_stage=stage), precision="bf16", max_steps=MAX_STEPS)
        curves[str(stage)] = toy.train(engine, FEW, micro_batches=2)
        engine.close()
    return curves


def one_bad_sample() -> dict[str, Any]:
    """Runs in every process: a NaN on rank 1 alone must skip the step on both and change no weight."""
    report = {}
    for stage in (1, 3):
        engine = toy.make_engine(ParallelConfig(zero_stage=stage), max_steps=MAX_STEPS)
        toy.train(engine, 1)
        before = dict(engine.state_tensors())
        average = dict(engine.state_tensors(ema=True))

        def poisoned(model: Any, batch: dict[str, torch.Tensor], rank: int = engine.mesh.rank) -> torch.Tensor:
            return toy.loss_sum(model, batch) * (float("nan") if rank == 1 else 1.0)

        toy.train(engine, 1, loss=poisoned)
        same = all(torch.equal(before[n], v) for n, v in engine.state_tensors())
        same_average = all(torch.equal(average[n], v) for n, v in engine.state_tensors(ema=True))
        skipped, count = engine.skipped_count, engine.step_count
        next_loss, next_norm = toy.train(engine, 1)
        report[str(stage)] = [same, same_average, skipped, count, next_loss[0], next_norm[0]]
        engine.close()
    return report


@pytest.fixture(scope="module")
def truth() -> tuple[list[float], list[float]]:
    return toy.train_plainly(toy.make_model(), STEPS, toy.optim_config(), MAX_STEPS)


@pytest.fixture(scope="module")
def on_two() -> list[dict[str, Any]]:
    return launch.run(__file__, "two", 2)


@pytest.fixture(scope="module")
def on_four() -> list[dict[str, Any]]:
    return launch.run(__file__, "several", 4, cases=FOUR)


def error(curves: Any, truth: Any) -> float:
    """Returns the largest relative difference of losses and gradient norms."""
    return max(
        abs(a - b) / abs(b) for got, want in zip(curves, truth, strict=True) for a, b in zip(got, want, strict=False)
    )


def check(results: list[dict[str, Any]], name: str, truth: Any) -> None:
    assert all(r[name] == results[0][name] for r in results), "ranks disagree on the global loss or gradient norm"
    assert len(results[0][name][0]) >= FEW
    assert error(results[0][name], truth) < TOLERANCE


@pytest.mark.dist
@pytest.mark.parametrize("name", TWO)
def test_two_processes_follow_one(name: str, on_two: Any, truth: Any) -> None:
    check([r["layouts"] for r in on_two], name, truth)


@pytest.mark.dist
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_follow_one(name: str, on_four: Any, truth: Any) -> None:
    check(on_four, name, truth)


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", ["qk-norm gradients not summed", "split weights not marked", "sequence ranks averaged"]
)
def test_a_mistake_in_the_gradients_is_seen(name: str, on_two: Any, truth: Any) -> None:
    assert error(on_two[0]["mutants"][name], truth) > 5 * TOLERANCE


@pytest.mark.dist
def test_bf16_stays_near_fp32_on_every_stage(on_two: Any, truth: Any) -> None:
    for curves in on_two[0]["bf16"].values():
        assert error(curves, truth) < 0.03


@pytest.mark.dist
def test_a_bad_sample_on_one_rank_skips_the_step_on_all(on_two: Any) -> None:
    for report in (on_two[0]["nan"], on_two[1]["nan"]):
        for same, same_average, skipped, count, loss, norm in report.values():
            assert same
            assert same_average
            assert (skipped, count) == (1, 2)
            assert 0 < loss < 10
            assert 0 < norm < 100


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("nproc", "cases"), [(2, MORE_TWO), (4, MORE_FOUR)])
def test_more_layouts(nproc: int, cases: dict[str, dict[str, Any]], truth: Any) -> None:
    results = launch.run(__file__, "several", nproc, cases=cases, timeout_s=600.0)
    for name in cases:
        check(results, name, truth)
