"""Compiled layers, alone and recomputed, under every way of splitting, give what eager ones give."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from test_zero_options import FEW, SELECTIVE, check, run_layout, write_truth

import launch
from contentv.engine import parallelize as module
from contentv.parallel.mesh import single_process_mesh

pytestmark = pytest.mark.compile
FULL: dict[str, Any] = {"recompute": "full"}
HOST: dict[str, Any] = {"offload_activations": True}
ONE: dict[str, dict[str, Any]] = {"zero1": {"zero_stage": 1}, "zero3 selective": {**SELECTIVE, **HOST}}
TWO: dict[str, dict[str, Any]] = {
    "dp2 zero3": {}, "sp2 zero3 selective": {"sp": 2, **SELECTIVE}, "tp2 zero1 full recompute": {
        "tp": 2, "zero_stage": 1, **FULL,
    },
    "ring2 zero2 selective": {"sp": 2, "ring": 2, "zero_stage": 2, **SELECTIVE},
    "sp2 zero3 overlapped": {"sp": 2, "exchange": "overlapped", **FULL},
    "tp2 zero3 sequence norms": {"tp": 2, "sequence_norms": True, **SELECTIVE},
}  # fmt: skip


def quickly() -> None:
    """Compiles by tracing and differentiating, without generating code."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]


def compiled_layouts(cases: dict[str, Any], truth: str) -> dict[str, Any]:
    """Runs in every process."""
    quickly()
    found = {}
    for name, case in cases.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found[name] = run_layout(truth, compile=True, **case)
        found[name]["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


@pytest.fixture
def truth(tmp_path: Path) -> Any:
    return write_truth(tmp_path, "6 heads", FEW)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain, compiled = toy.make_model(), toy.make_model()
    module.parallelize(compiled, single_process_mesh(), recompute=recompute, compile=True)
    torch._dynamo.reset()  # or what another test compiled is used again
    torch._dynamo.utils.counters.clear()
    for model in (plain, compiled):
        toy.loss_sum(model, toy.make_batch(0)).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, parameter in plain.named_parameters():
        got, want = compiled.get_parameter(name).grad, parameter.grad
        assert got is not None
        assert want is not None
        assert (got - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE)
def test_one_process(name: str, tmp_path: Path, truth: Any, parity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    check(f"{name}, compiled", run_layout(str(tmp_path), compile=True, **ONE[name]), truth, parity)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes(tmp_path: Path, truth: Any, parity: Any) -> None:
    results = launch.run(__file__, "compiled_layouts", 2, cases=TWO, timeout_s=1200.0, truth=str(tmp_path),
                         env={"CONTENTV_TYPECHECK": "0"})  # fmt: skip
    for name in TWO:
        assert results[0][name]["graphs"] > 0
        check(f"{name}, compiled", results[0][name], truth, parity)
