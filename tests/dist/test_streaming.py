"""Weights read straight into partitions: training as with a whole model, to the bit, and never one in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import launch
from contentv.engine.frozen import frozen_model
from contentv.engine.zero import ZeroEngine
from contentv.models.io import load_whole, open_transformer, write_transformer
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.parallel.mesh import ParallelConfig

STEPS, LAYERS = 3, 6
SHARD_BYTES = 300_000
CASES: dict[str, dict[str, Any]] = {
    "dp2 zero1": {"zero_stage": 1}, "dp2 zero2 bf16": {"zero_stage": 2, "precision": "bf16"}, "dp2 zero3": {},
    "dp2 zero3 bf16": {"precision": "bf16"}, "sp2 zero3": {"sp": 2}, "sp2 zero1 bf16": {"sp": 2, "zero_stage": 1,
    "precision": "bf16"}, "tp2 zero3": {"tp": 2}, "tp2 zero3 bf16": {"tp": 2, "precision": "bf16"},
    "tp2 zero1": {"tp": 2, "zero_stage": 1}, "dp2 zero3 small weights whole": {"persist_below": 2000},
    "dp2 zero3 offloaded": {"offload": "all"},
}  # fmt: skip
ALONE: dict[str, dict[str, Any]] = {
    f"zero{stage} {precision}": {"zero_stage": stage, "precision": precision}
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
}


def shapes_alone(**changes: Any) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(MMDiTConfig(**{**toy.SHAPE, **changes}))


def outcome(engine: ZeroEngine) -> tuple[list[tuple[list[float], list[float]]], list[tuple[str, Tensor]]]:
    """Returns the curves and the weights before and after; the engine is closed."""
    before = list(engine.state_tensors())
    curves = toy.train(engine, STEPS)
    state = [*before, *engine.state_tensors(), *engine.state_tensors(ema=True)]
    engine.close()
    return [curves], state


def same(folder: str, case: dict[str, Any]) -> bool:
    """Whether a model read from a folder and a whole one given train alike, to the bit."""
    settings = dict(case)
    keyword = {k: settings.pop(k) for k in ("precision", "persist_below") if k in settings}
    parallel = ParallelConfig(**settings)
    streamed = outcome(
        toy.make_engine(parallel, model=shapes_alone(), weights=open_transformer(folder).tensors, **keyword)
    )
    whole = outcome(toy.make_engine(parallel, model=toy.make_model(), **keyword))
    return streamed[0] == whole[0] and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(streamed[1], whole[1], strict=True)
    )


class Storages(TorchDispatchMode):
    """Follows the bytes of all tensors that operations touch, while they exist."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = self.largest_bytes = 0

    def live_bytes(self) -> int:
        self.known = {key: entry for key, entry in self.known.items() if not entry[0].expired()}
        return sum(size for _, size in self.known.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        found = 0
        for tensor in torch.utils._pytree.tree_leaves((args, out)):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if self.known.get(reference.cdata, (None, -1))[1] != storage.nbytes():
                    self.known[reference.cdata] = (reference, storage.nbytes())
                    self.largest_bytes = max(self.largest_bytes, storage.nbytes())
                    found += 1
        if found:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return out


def memory(folder: str) -> dict[str, dict[str, int]]:
    """Runs in every process: bytes of tensors while a model comes into being, and when it is there."""
    source, report = open_transformer(folder), {}
    mesh = toy.make_mesh(ParallelConfig())
    for what in ("training", "reference", "whole"):
        with Storages() as storages:
            if what == "training":
                kept: Any = toy.make_engine(
                    ParallelConfig(), model=shapes_alone(num_layers=LAYERS), weights=source.tensors, precision="bf16"
                )
            elif what == "reference":
                kept = frozen_model(
                    shapes_alone(num_layers=LAYERS), mesh, ParallelConfig(), "fp32", toy.CPU, weights=source.tensors,
                    persist_below=0,
                )  # fmt: skip
            else:
                kept = frozen_model(load_whole(source), mesh, ParallelConfig(), "fp32", toy.CPU, persist_below=0)
            report[what] = {
                "peak": storages.peak_bytes, "steady": storages.live_bytes(), "largest": storages.largest_bytes,
            }  # fmt: skip
        del kept
    return report


def two(folder: str, deep: str) -> dict[str, Any]:
    return {"same": {name: same(folder, case) for name, case in CASES.items()}, "memory": memory(deep)}


@pytest.fixture(scope="module")
def folders() -> Iterator[tuple[str, str]]:
    """A folder of the toy model's weights in several files, and one of a deeper model."""
    with tempfile.TemporaryDirectory() as root:
        for name, model in (("toy", toy.make_model()), ("deep", toy.make_model(num_layers=LAYERS))):
            write_transformer(model, Path(root) / name, model.config, max_shard_bytes=SHARD_BYTES)
            assert len(list((Path(root) / name).glob("*.safetensors"))) > 2
        yield str(Path(root) / "toy"), str(Path(root) / "deep")


@pytest.fixture(scope="module")
def on_two(folders: tuple[str, str]) -> list[dict[str, Any]]:
    return launch.run(__file__, "two", 2, folder=folders[0], deep=folders[1])


@pytest.mark.parametrize("name", ALONE)
def test_one_process_trains_as_with_a_whole_model(name: str, folders: tuple[str, str]) -> None:
    assert same(folders[0], ALONE[name])


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_with_a_whole_model(name: str, on_two: list[dict[str, Any]]) -> None:
    assert all(rank["same"][name] for rank in on_two)


@pytest.mark.dist
def test_no_rank_ever_holds_the_model(on_two: list[dict[str, Any]]) -> None:
    model = toy.make_model(num_layers=LAYERS)
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    weight, whole = max(sizes), sum(sizes)
    for rank in (on_two[0]["memory"], on_two[1]["memory"]):
        reference, training = rank["reference"], rank["training"]
        assert reference["steady"] == pytest.approx(whole / 2, rel=0.02)
        assert reference["peak"] <= reference["steady"] + weight
        assert reference["largest"] <= weight
        # bf16 weights, fp32 masters, two moments, the average, gradients: all of half a model, all there at the end.
        assert training["steady"] >= (2 + 4 * 4) / 4 * whole / 2
        assert training["peak"] <= training["steady"] + weight
        assert training["largest"] <= 1.02 * whole / 2 + weight
        assert rank["whole"]["peak"] > whole + reference["steady"] - 2 * weight  # what the bounds would catch
