"""Every layout of dp x sp x tp, ring, ZeRO stage and recompute must follow one process with plain torch.

Compared are the loss and the gradient norm of every step and, after the last, every parameter and its moving average.
Three torchrun starts check all of it: each runs its layouts one after another with new groups.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import toy
from torch import Tensor

import launch
from contentv.engine import zero
from contentv.engine.ema import decay_at
from contentv.engine.plans import MMDIT_PLAN
from contentv.parallel import tensor, ulysses
from contentv.parallel.mesh import ParallelConfig

STEPS, SHORTER, FEW, MAX_STEPS = 20, 10, 3, 20
TOLERANCE = 1e-5
SIX, MANY = "6 heads", "38 heads"  # 6 = 2 x 3 divides by 2 and not by 4, as 38 = 2 x 19 does
MODELS: dict[str, dict[str, Any]] = {SIX: {}, MANY: {"num_attention_heads": 38, "attention_head_dim": 8}}
# In 20 steps at 3e-3 the wider model amplifies rounding: adding up the samples in another order moves its weights by
# 2.4e-6, at 1e-3 by 4e-7.
OPTIM: dict[str, dict[str, Any]] = {SIX: {}, MANY: {"lr": 1e-3}}

TWO: dict[str, dict[str, Any]] = {
    "dp2 zero3 accumulation2": {"micro_batches": 2},
    "sp2 zero3": {"sp": 2},
    "tp2 zero3": {"tp": 2},
    "ring2 zero3": {"sp": 2, "ring": 2},
    "tp2 zero3, sequence norms": {"tp": 2, "sequence_norms": True, "steps": SHORTER},
    "sp2 zero3, overlapped": {"sp": 2, "exchange": "overlapped", "steps": FEW},
    "sp2 zero2 accumulation2": {"sp": 2, "zero_stage": 2, "micro_batches": 2, "steps": FEW},
    "sp2 zero1 accumulation4": {"sp": 2, "zero_stage": 1, "micro_batches": 4, "steps": FEW},
    "tp2 zero1 full recompute": {"tp": 2, "zero_stage": 1, "recompute": "full", "steps": FEW},
    "sp2 zero3 selective recompute": {"sp": 2, "recompute": "selective", "steps": FEW},
    "ring2 zero1 full recompute": {"sp": 2, "ring": 2, "zero_stage": 1, "recompute": "full", "steps": FEW},
    "ring2 zero2 selective recompute": {"sp": 2, "ring": 2, "zero_stage": 2, "recompute": "selective", "steps": FEW},
}
FOUR: dict[str, dict[str, Any]] = {
    "sp2 tp2 zero3": {"sp": 2, "tp": 2},
    "dp2 sp2 zero3": {"sp": 2, "steps": SHORTER},
    "sp4 zero3, 6 heads padded to 8": {"sp": 4},
    "ring4 zero3": {"sp": 4, "ring": 4},
    "ulysses2 ring2 zero3": {"sp": 4, "ring": 2},
    "ring2 tp2 zero2": {"sp": 2, "ring": 2, "tp": 2, "zero_stage": 2, "steps": SHORTER},
    "tp4 zero3, 6 heads as 2 2 1 1": {"tp": 4, "steps": SHORTER, "reload": True},
    "sp4 zero3, 38 heads padded to 40": {"sp": 4, "model": MANY, "steps": SHORTER},
    "tp4 zero1, 38 heads as 10 10 9 9": {"tp": 4, "model": MANY, "zero_stage": 1, "steps": FEW},
    "sp2 tp2 zero3, sequence norms, overlapped": {
        "sp": 2,
        "tp": 2,
        "sequence_norms": True,
        "exchange": "overlapped",
        "steps": SHORTER,
    },
    "ring2 tp2 zero1, sequence norms, full recompute": {
        "sp": 2,
        "ring": 2,
        "tp": 2,
        "sequence_norms": True,
        "zero_stage": 1,
        "recompute": "full",
        "steps": FEW,
    },
}
MORE_TWO: dict[str, dict[str, Any]] = {
    "dp2 zero1": {"zero_stage": 1}, "dp2 zero2": {"zero_stage": 2}, "tp2 zero2": {"tp": 2, "zero_stage": 2},
    "tp2 zero1": {"tp": 2, "zero_stage": 1}, "sp2 zero1": {"sp": 2, "zero_stage": 1},
    "sp2 zero2": {"sp": 2, "zero_stage": 2}, "ring2 zero2": {"sp": 2, "ring": 2, "zero_stage": 2},
    "sp2 zero3 full recompute": {"sp": 2, "recompute": "full"},
    "ring2 zero3 full recompute": {"sp": 2, "ring": 2, "recompute": "full"},
    "dp2 zero3 offloaded optimizer": {"offload": "optimizer", "micro_batches": 2},
    "dp2 zero3 offloaded": {"offload": "all", "micro_batches": 2},
    "sp2 zero3 offloaded": {"sp": 2, "offload": "all"},
    "dp2 zero1 offloaded optimizer": {"zero_stage": 1, "offload": "optimizer"},
    "sp2 zero3 small weights whole": {"sp": 2, "persist_below": 2000},
    "tp2 zero3, sequence norms": {"tp": 2, "sequence_norms": True},
    "tp2 zero2, sequence norms, 38 heads": {"tp": 2, "sequence_norms": True, "zero_stage": 2, "model": MANY},
    "sp2 zero1, overlapped": {"sp": 2, "exchange": "overlapped", "zero_stage": 1},
    "sp2 zero3, overlapped, 38 heads": {"sp": 2, "exchange": "overlapped", "model": MANY},
    "sp2 zero3, 38 heads": {"sp": 2, "model": MANY}, "tp2 zero3, 38 heads": {"tp": 2, "model": MANY},
}  # fmt: skip
MORE_FOUR: dict[str, dict[str, Any]] = {
    "dp2 tp2 zero3": {"tp": 2, "micro_batches": 2},
    "sp4 zero1": {"sp": 4, "zero_stage": 1},
    "sp4 zero2": {"sp": 4, "zero_stage": 2},
    "ring4 zero1": {"sp": 4, "ring": 4, "zero_stage": 1},
    "ulysses2 ring2 zero2 full recompute": {"sp": 4, "ring": 2, "zero_stage": 2, "recompute": "full"},
    "sp2 tp2 zero2 full recompute": {"sp": 2, "tp": 2, "zero_stage": 2, "recompute": "full"},
    "dp4 zero3": {},
    "sp2 tp2 zero3, sequence norms, overlapped": {
        "sp": 2,
        "tp": 2,
        "sequence_norms": True,
        "exchange": "overlapped",
    },
    "tp4 zero3, sequence norms, 38 heads as 10 10 9 9": {"tp": 4, "sequence_norms": True, "model": MANY},
    "ulysses2 ring2 zero2, overlapped, full recompute": {
        "sp": 4,
        "ring": 2,
        "exchange": "overlapped",
        "zero_stage": 2,
        "recompute": "full",
    },
    "sp2 tp2 zero3, 19 heads padded to 20": {"sp": 2, "tp": 2, "model": MANY},
    "tp4 zero3, 38 heads as 10 10 9 9": {"tp": 4, "model": MANY},
    "ulysses2 ring2 zero3, 38 heads": {"sp": 4, "ring": 2, "model": MANY},
}
EIGHT: dict[str, dict[str, Any]] = {
    "sp8 zero3, 6 heads padded to 8": {"sp": 8},
    "sp8 zero3, 38 heads padded to 40": {"sp": 8, "model": MANY},
    "sp4 tp2 zero3, 19 heads padded to 20": {"sp": 4, "tp": 2, "model": MANY},
    "ulysses4 ring2 zero3, 38 heads": {"sp": 8, "ring": 2, "model": MANY},
    "ring8 zero2": {"sp": 8, "ring": 8, "zero_stage": 2},
    "dp2 sp2 tp2 zero3": {"sp": 2, "tp": 2},
    "sp2 tp4 zero3, 38 heads as 10 10 9 9": {"sp": 2, "tp": 4, "model": MANY},
    "sp4 tp2 zero3, sequence norms, overlapped, 38 heads": {
        "sp": 4,
        "tp": 2,
        "sequence_norms": True,
        "exchange": "overlapped",
        "model": MANY,
    },
    "ring2 ulysses2 tp2 zero1, sequence norms": {
        "sp": 4,
        "ring": 2,
        "tp": 2,
        "sequence_norms": True,
        "zero_stage": 1,
    },
}

MUTANTS = (
    "qk-norm gradients not summed", "split weights not marked", "an all-reduce of tensor ranks dropped",
    "gradients of embeddings not summed, sequence norms", "gradients of modulations not summed, sequence norms",
    *(f"sequence ranks {how}, zero{stage}" for stage in (1, 2, 3) for how in ("averaged", "counted twice")),
    "gradients of the output counted once a rank",
)  # fmt: skip


def layout(
    truth: str = "", steps: int = STEPS, micro_batches: int = 1, persist_below: int = 0, model: str = SIX,
    plan: tensor.TensorPlan = MMDIT_PLAN, reload: bool = False, **parallel: Any,
) -> dict[str, Any]:  # fmt: skip
    """Runs in every process: losses and gradient norms of a layout, and how far its state is from the truth's."""
    engine = toy.make_engine(
        ParallelConfig(**parallel), max_steps=MAX_STEPS, persist_below=persist_below, plan=plan,
        model=toy.make_model(**MODELS[model]), config=toy.optim_config(**OPTIM[model]),
    )  # fmt: skip
    found: dict[str, Any] = {"curves": toy.train(engine, steps, micro_batches=micro_batches)}
    if truth:
        want = safetensors.torch.load_file(Path(truth) / f"{model} {steps}.safetensors")
        for kind in ("param", "ema"):
            state = dict(engine.state_tensors(ema=kind == "ema"))
            assert {f"{kind} {name}" for name in state} == {name for name in want if name.startswith(kind)}
            found[kind] = max(distance(value, want[f"{kind} {name}"]) for name, value in state.items())
    if reload:
        found["reloaded"] = reloads(engine, Path(truth) / "checkpoint")
    engine.close()
    return found


def reloads(engine: zero.ZeroEngine, folder: Path) -> bool:
    """Returns whether a checkpoint of uneven tensor ranks holds the same bits for one of data ranks, and for itself."""
    engine.save(folder, {})
    state = [value for ema in (False, True) for _, value in engine.state_tensors(ema=ema)]
    same = []
    for parallel in (ParallelConfig(zero_stage=1), ParallelConfig(tp=engine.mesh.tp)):
        other = toy.make_engine(parallel, max_steps=MAX_STEPS, model=toy.make_model(99))
        other.load(folder)
        again = [value for ema in (False, True) for _, value in other.state_tensors(ema=ema)]
        same.append(all(torch.equal(a, b) for a, b in zip(state, again, strict=True)))
        other.close()
    return all(same)


def distance(value: Tensor, truth: Tensor) -> float:
    """Returns the difference of two tensors relative to the truth, in the Euclidean norm."""
    return float((value - truth).norm() / truth.norm())


def several(cases: dict[str, dict[str, Any]], truth: str) -> dict[str, Any]:
    return {name: layout(truth, **case) for name, case in cases.items()}


def two(truth: str) -> dict[str, Any]:
    return {"layouts": several(TWO, truth), "mutants": mutants(), "bf16": bf16(), "nan": one_bad_sample()}


def mutants() -> dict[str, Any]:
    """Runs in every process: what must break parity, or the comparison proves nothing."""
    found = {}

    def wrong(name: str, plan: tensor.TensorPlan = MMDIT_PLAN, **parallel: Any) -> None:
        found[name] = layout(steps=FEW, plan=plan, **parallel)["curves"]

    wrong("qk-norm gradients not summed", dataclasses.replace(MMDIT_PLAN, partial=()), tp=2)
    mark, tensor.mark = tensor.mark, lambda parameter: parameter
    wrong("split weights not marked", tp=2)
    tensor.mark = mark
    enter, tensor.enter_tensor_parallel = tensor.enter_tensor_parallel, lambda x, group: x
    wrong("an all-reduce of tensor ranks dropped", tp=2)
    tensor.enter_tensor_parallel = enter
    unsummed = dataclasses.replace(MMDIT_PLAN, tokenwise=())
    wrong("gradients of embeddings not summed, sequence norms", unsummed, tp=2, sequence_norms=True)
    unsummed = dataclasses.replace(MMDIT_PLAN, modulations=())
    wrong("gradients of modulations not summed, sequence norms", unsummed, tp=2, sequence_norms=True)
    right = zero.ZeroEngine.backward
    for stage in (1, 2, 3):
        for name, scale in (("averaged", 0.5), ("counted twice", 2.0)):
            zero.ZeroEngine.backward = (  # type: ignore[method-assign]
                lambda self, loss, n, scale=scale: right(self, loss * scale, n)
            )
            wrong(f"sequence ranks {name}, zero{stage}", sp=2, zero_stage=stage)
    zero.ZeroEngine.backward = right  # type: ignore[method-assign]
    gather = ulysses.gather_tokens
    ulysses.gather_tokens = lambda x, n, group: Doubled.apply(gather(x, n, group))
    wrong("gradients of the output counted once a rank", sp=2, ring=2)
    ulysses.gather_tokens = gather
    return found


class Doubled(torch.autograd.Function):
    """Identity, whose gradient is what an all-reduce over two ranks would make of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


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


def write_truth(folder: Path, model: str) -> Any:
    """Returns the curves of plain training, and writes its state after each number of steps that is compared."""
    whole = toy.make_model(**MODELS[model])
    average = {name: value.detach().clone() for name, value in whole.named_parameters()}
    config = toy.optim_config(**OPTIM[model])

    def keep(step: int) -> None:
        for name, value in whole.named_parameters():
            average[name].lerp_(value.detach(), 1 - decay_at(step - 1, config.ema_decay))
        if step in (FEW, SHORTER, STEPS):
            state = {f"param {name}": value.detach().clone() for name, value in whole.named_parameters()}
            state |= {f"ema {name}": value.clone() for name, value in average.items()}
            safetensors.torch.save_file(state, folder / f"{model} {step}.safetensors")

    return toy.train_plainly(whole, STEPS, config, MAX_STEPS, after_step=keep)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("truth")


@pytest.fixture(scope="module")
def truths(folder: Path) -> dict[str, Any]:
    return {model: write_truth(folder, model) for model in MODELS}


@pytest.fixture(scope="module")
def truth(truths: dict[str, Any]) -> Any:
    return truths[SIX]


@pytest.fixture(scope="module")
def on_two(folder: Path, truths: Any) -> list[dict[str, Any]]:
    return launch.run(__file__, "two", 2, truth=str(folder))


@pytest.fixture(scope="module")
def on_four(folder: Path, truths: Any) -> list[dict[str, Any]]:
    return launch.run(__file__, "several", 4, cases=FOUR, truth=str(folder))


def error(curves: Any, truth: Any) -> float:
    """Returns the largest relative difference of losses and gradient norms."""
    return max(
        abs(a - b) / abs(b) for got, want in zip(curves, truth, strict=True) for a, b in zip(got, want, strict=False)
    )


def check(results: list[dict[str, Any]], name: str, case: dict[str, Any], truths: Any, parity: Any) -> None:
    """Compares one layout's curves and state with those of plain training."""
    found = results[0][name]
    assert all(r[name] == found for r in results), "ranks disagree on the global loss, gradient norm or state"
    steps = case.get("steps", STEPS)
    assert all(len(curve) == steps for curve in found["curves"])
    errors = (error(found["curves"], truths[case.get("model", SIX)]), found["param"], found["ema"])
    what = f"{len(results)} processes, {name}, {steps} steps, fp32"
    parity(what, "one process, plain torch", max(errors), TOLERANCE)


@pytest.mark.dist
@pytest.mark.parametrize("name", TWO)
def test_two_processes_follow_one(name: str, on_two: Any, truths: Any, parity: Any) -> None:
    check([r["layouts"] for r in on_two], name, TWO[name], truths, parity)


@pytest.mark.dist
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_follow_one(name: str, on_four: Any, truths: Any, parity: Any) -> None:
    check(on_four, name, FOUR[name], truths, parity)


@pytest.mark.dist
def test_a_checkpoint_of_uneven_tensor_ranks_loads_on_any_layout(on_four: Any) -> None:
    assert [r["tp4 zero3, 6 heads as 2 2 1 1"]["reloaded"] for r in on_four] == [True] * 4


@pytest.mark.dist
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_the_gradients_is_seen(name: str, on_two: Any, truth: Any) -> None:
    assert on_two[0]["mutants"].keys() == set(MUTANTS)
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
@pytest.mark.parametrize(("nproc", "cases"), [(2, MORE_TWO), (4, MORE_FOUR), (8, EIGHT)], ids=["two", "four", "eight"])
def test_more_layouts(
    nproc: int, cases: dict[str, dict[str, Any]], folder: Path, truths: Any, parity: Any
) -> None:  # fmt: skip
    results = launch.run(__file__, "several", nproc, cases=cases, timeout_s=1200.0, truth=str(folder))
    for name, case in cases.items():
        check(results, name, case, truths, parity)
