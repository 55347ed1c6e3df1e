"""What a training state survives: several model calls a backward, a frozen reference, and changes of layout."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

import launch
from contentv.engine.checkpoint_files import read_weights
from contentv.engine.frozen import frozen_model
from contentv.parallel.mesh import ParallelConfig

HALF, MAX_STEPS = 3, 8
TOLERANCE = 1e-6

SOLVER: dict[str, dict[str, Any]] = {
    "dp2 zero3": {}, "sp2 zero3": {"sp": 2}, "tp2 zero3 full recompute": {"tp": 2, "recompute": "full"},
    "sp2 zero1": {"sp": 2, "zero_stage": 1},
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2 zero3": {}, "sp2 zero1": {"sp": 2, "zero_stage": 1}, "tp2 zero3": {"tp": 2},
    "tp2 zero2": {"tp": 2, "zero_stage": 2},
}  # fmt: skip
# saved by -> loaded by
CHANGES = [
    ("dp2 zero3", "sp2 zero1"), ("sp2 zero1", "dp2 zero3"), ("tp2 zero3", "dp2 zero3"), ("dp2 zero3", "tp2 zero2"),
]  # fmt: skip


def solve(model: Any, batch: dict[str, Tensor], reference: Any) -> Tensor:
    """RLHF's shape of a loss: solver steps without and with gradient, model calls between, one backward."""
    rest = {k: v for k, v in batch.items() if k not in ("target", "noisy_latents")}
    x = batch["noisy_latents"]
    with torch.no_grad():
        x = x + 0.2 * model(noisy_latents=x, **rest)
    drift = torch.zeros(len(x))
    for _ in range(2):
        velocity = model(noisy_latents=x, **rest)
        with torch.no_grad():
            guide = model(noisy_latents=-x, **rest)
        frozen = reference(x.detach(), rest["timestep"], rest["text_tokens"], rest["text_pooled"])
        drift = drift + (velocity - frozen).square().mean(dim=(1, 2, 3, 4))
        x = x + 0.3 * velocity + 0.1 * guide
    return ((x - batch["target"]).square().mean(dim=(1, 2, 3, 4)) + 0.5 * drift).sum()


def solver_curves() -> dict[str, Any]:
    curves = {}
    for name, layout in SOLVER.items():
        parallel = ParallelConfig(**layout)
        engine = toy.make_engine(parallel, max_steps=MAX_STEPS)
        reference = frozen_model(toy.make_model(7), engine.mesh, parallel, "fp32", toy.CPU, persist_below=0)
        curves[name] = toy.train(engine, 3, loss=lambda m, b, r=reference: solve(m, b, r))
        engine.close()
    return curves


def go_on(layout: dict[str, Any], folder: str | Path, steps: int = HALF) -> Any:
    """Returns (losses, norms, extra, state) after loading and training further."""
    engine = toy.make_engine(ParallelConfig(**layout), max_steps=MAX_STEPS, model=toy.make_model(99))
    extra = engine.load(folder)
    losses, norms = toy.train(engine, steps)
    state = [*engine.state_tensors(), *engine.state_tensors(ema=True)]
    engine.close()
    return losses, norms, extra, state


def two(root: str, from_one: str) -> dict[str, Any]:
    """Runs in both processes: straight runs, halves with a checkpoint between, and every change of layout."""
    report: dict[str, Any] = {"solver": solver_curves(), "same": {}, "changed": {}, "straight": {}}
    straight = report["straight"]
    for name, layout in LAYOUTS.items():
        engine = toy.make_engine(ParallelConfig(**layout), max_steps=MAX_STEPS)
        toy.train(engine, HALF)
        engine.save(Path(root) / name / "step-00000003", {"name": name}, chunk_bytes=100_000)
        straight[name] = toy.train(engine, HALF)
        state = [*engine.state_tensors(), *engine.state_tensors(ema=True)]
        engine.close()
        losses, norms, extra, again = go_on(layout, Path(root) / name / "step-00000003")
        equal = all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(state, again, strict=True))
        report["same"][name] = [(losses, norms) == straight[name], equal, extra]
    for saved, loaded in CHANGES:
        curves = go_on(LAYOUTS[loaded], Path(root) / saved / "step-00000003")
        report["changed"][f"{saved} -> {loaded}"] = [curves[:2], straight[saved]]
    report["from one"] = {name: go_on(LAYOUTS[name], from_one)[:2] for name in ("dp2 zero3", "tp2 zero3")}
    return report


@pytest.fixture(scope="module")
def single() -> Iterator[dict[str, Any]]:
    """One process: its checkpoint after HALF steps, and how it goes on; then what two processes make of it."""
    with tempfile.TemporaryDirectory() as folder:
        engine = toy.make_engine(ParallelConfig(), max_steps=MAX_STEPS)
        toy.train(engine, HALF)
        saved = Path(folder) / "one" / "step-00000003"
        engine.save(saved, {"cursor": [1, "a"]})
        weights = dict(engine.state_tensors())
        straight = toy.train(engine, HALF)
        engine.close()
        on_two = launch.run(__file__, "two", 2, root=folder, from_one=str(saved))
        yield {"root": Path(folder), "straight": straight, "weights": weights, "saved": saved, "two": on_two}


def error(curves: Any, truth: Any) -> float:
    return max(abs(a - b) / abs(b) for got, want in zip(curves, truth, strict=True)
               for a, b in zip(got, want, strict=True))  # fmt: skip


@pytest.mark.dist
def test_several_calls_before_one_backward(single: dict[str, Any]) -> None:
    reference = toy.make_model(7)
    reference.requires_grad_(False)
    truth = toy.train_plainly(
        toy.make_model(), 3, toy.optim_config(), MAX_STEPS, loss=lambda m, b: solve(m, b, reference)
    )
    for result in single["two"]:
        assert set(result["solver"]) == set(SOLVER)
        for name, curves in result["solver"].items():
            assert error(curves, truth) < 1e-5, name


@pytest.mark.dist
def test_resuming_on_the_same_layout_is_bit_equal(single: dict[str, Any]) -> None:
    for result in single["two"]:
        for name, (same_curves, same_state, extra) in result["same"].items():
            assert same_curves, name
            assert same_state, name
            assert extra == {"name": name}


@pytest.mark.dist
def test_resuming_on_another_layout(single: dict[str, Any]) -> None:
    for result in single["two"]:
        assert len(result["changed"]) == len(CHANGES)
        for name, (curves, straight) in result["changed"].items():
            assert error(curves, straight) < TOLERANCE, name
            assert error(curves, single["straight"]) < 1e-5, name


@pytest.mark.dist
def test_resuming_on_more_and_on_fewer_processes(single: dict[str, Any]) -> None:
    for curves in single["two"][0]["from one"].values():
        assert error(curves, single["straight"]) < TOLERANCE
    for layout in ("tp2 zero3", "sp2 zero1"):
        curves = go_on({"zero_stage": 3}, single["root"] / layout / "step-00000003")[:2]
        assert error(curves, single["two"][0]["straight"][layout]) < TOLERANCE


@pytest.mark.dist
def test_a_checkpoint_of_any_layout_holds_the_same_whole_weights(single: dict[str, Any]) -> None:
    for layout in LAYOUTS:
        read = dict(read_weights(single["root"] / layout / "step-00000003"))
        assert read.keys() == single["weights"].keys()
        for name, value in read.items():
            want = single["weights"][name]
            assert (value - want).norm() < 1e-5 * want.norm(), name
