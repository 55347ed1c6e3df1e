"""A part of the weights in training, the rest frozen: on every layout as in plain torch; checkpoints of the part."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn

import launch
from contentv.base.errors import UserError
from contentv.engine.checkpoint_files import read_weights
from contentv.models.io import TransformerSource
from contentv.models.lora import adapted_weights, add_lora, lora_names
from contentv.models.lora_config import LoRAConfig
from contentv.parallel.mesh import ParallelConfig

STEPS, MAX_STEPS = 4, 10
TOLERANCE = 1e-5
LORA = LoRAConfig(rank=4, alpha=8.0)
SEED = 3
# A mix: frozen layers before, between and after trained ones; the first block's inputs need no gradients.
TRAINED = ("attn.to_q.", "1.ff.net.2.", "norm_added_k", "proj_out.bias")

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2 zero3": {}, "dp2 zero1": {"zero_stage": 1}, "sp2 zero3 full recompute": {"sp": 2, "recompute": "full"},
    "sp2 zero2": {"sp": 2, "zero_stage": 2}, "dp2 zero3 small weights whole": {"persist_below": 2000},
}  # fmt: skip
RESUMED = ("dp2 zero3", "sp2 zero2")
MORE: dict[str, dict[str, Any]] = {
    "sp2 zero3 selective recompute": {"sp": 2, "recompute": "selective"}, "dp2 zero3 offloaded": {"offload": "all"},
    "dp2 zero2": {"zero_stage": 2}, "sp2 zero1 full recompute": {"sp": 2, "zero_stage": 1, "recompute": "full"},
}  # fmt: skip


def part_trained() -> nn.Module:
    model = toy.make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
    return model


def with_lora() -> nn.Module:
    model = toy.make_model()
    add_lora(model, LORA, SEED)
    return model


MODELS = {"some weights": part_trained, "lora": with_lora}


def engine_of(kind: str, precision: str = "fp32", persist_below: int = 0, **layout: Any) -> Any:
    """Returns an engine of shapes and values, as `contentv train` makes it."""
    whole = toy.make_model()
    with torch.device("meta"):
        model = type(whole)(whole.config)
    weights: Any = dict(whole.named_parameters())
    if kind == "lora":
        add_lora(model, LORA, SEED)
        weights = adapted_weights(TransformerSource(whole.config, weights, "toy"), LORA, SEED)
    else:
        for (_, parameter), (_, like) in zip(model.named_parameters(), part_trained().named_parameters(), strict=True):
            parameter.requires_grad_(like.requires_grad)
    return toy.make_engine(
        ParallelConfig(**layout), model=model, weights=weights, precision=precision, max_steps=MAX_STEPS,
        persist_below=persist_below,
    )  # fmt: skip


def run_layouts(cases: dict[str, dict[str, Any]], folder: str) -> dict[str, Any]:
    """Runs in every process: curves, and whether halves with a checkpoint between are the same as all at once."""
    report: dict[str, Any] = {}
    for kind in MODELS:
        report[kind] = {}
        for name, case in cases.items():
            engine = engine_of(kind, **case)
            curves = toy.train(engine, STEPS)
            same = None
            if name in RESUMED:
                saved = Path(folder) / f"{kind} {name}" / "step-00000004"
                engine.save(saved, {})
                onwards, state = toy.train(engine, 2), dict(engine.state_tensors())
                again = engine_of(kind, **case)
                again.load(saved)
                same = toy.train(again, 2) == onwards
                same = same and all(torch.equal(state[n], v) for n, v in again.state_tensors())
                again.close()
            engine.close()
            report[kind][name] = [curves, same]
    report["bf16"] = {}
    for stage in (1, 3):
        engine = engine_of("lora", "bf16", zero_stage=stage)
        report["bf16"][str(stage)] = toy.train(engine, STEPS)
        engine.close()
    return report


@pytest.fixture(scope="module")
def checkpoints() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.fixture(scope="module")
def on_two(checkpoints: str) -> list[dict[str, Any]]:
    return launch.run(__file__, "run_layouts", 2, cases=LAYOUTS, folder=checkpoints)


@pytest.fixture(scope="module")
def truths() -> dict[str, Any]:
    return {
        kind: toy.train_plainly(make(), STEPS, toy.optim_config(), MAX_STEPS) for kind, make in MODELS.items()
    }  # fmt: skip


def error(curves: Any, truth: Any) -> float:
    return max(abs(a - b) / abs(b) for got, want in zip(curves, truth, strict=True)
               for a, b in zip(got, want, strict=True))  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("kind", MODELS)
def test_every_layout_follows_plain_torch(kind: str, on_two: list[dict[str, Any]], truths: dict[str, Any]) -> None:
    assert truths[kind][1][0] > 0
    for rank in on_two:
        for name, (curves, same) in rank[kind].items():
            assert error(curves, truths[kind]) < TOLERANCE, name
            assert same is (True if name in RESUMED else None), f"{name}: a checkpoint changed what comes after it"


@pytest.mark.dist
@pytest.mark.slow
def test_more_layouts(truths: dict[str, Any], tmp_path: Path) -> None:
    for rank in launch.run(__file__, "run_layouts", 2, cases=MORE, folder=str(tmp_path)):
        for kind in MODELS:
            for name, (curves, _) in rank[kind].items():
                assert error(curves, truths[kind]) < TOLERANCE, name


@pytest.mark.dist
def test_bf16_stays_near_fp32(on_two: list[dict[str, Any]], truths: dict[str, Any]) -> None:
    for losses, _ in on_two[0]["bf16"].values():
        assert error([losses], [truths["lora"][0]]) < 0.03


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_one_process_trains_the_part_and_nothing_else(
    kind: str, stage: int, tmp_path: Path, truths: dict[str, Any]
) -> None:
    plain = MODELS[kind]()
    toy.train_plainly(plain, STEPS, toy.optim_config(), MAX_STEPS)
    trained = {n: p.detach() for n, p in plain.named_parameters() if p.requires_grad}
    engine = engine_of(kind, zero_stage=stage)
    assert error(toy.train(engine, STEPS), truths[kind]) < TOLERANCE
    state = dict(engine.state_tensors())
    assert state.keys() == trained.keys()
    assert engine.num_parameters == sum(p.numel() for p in trained.values())
    for name, value in state.items():
        assert (value - trained[name]).norm() <= 1e-5 * trained[name].norm(), name
    engine.save(tmp_path / "step-00000004", {})
    engine.close()
    manifest = json.loads((tmp_path / "step-00000004" / "manifest.json").read_text())
    all_weights = sum(p.numel() for p in plain.parameters())
    numel = sum(p.numel() for p in trained.values())
    assert manifest["weights"] == {"trained": numel, "frozen": all_weights - numel}
    assert set(manifest["tensors"]) == set(trained)
    read = dict(read_weights(tmp_path / "step-00000004"))
    assert all(torch.equal(read[n], state[n]) for n in state)


@pytest.mark.dist
def test_the_checkpoint_of_two_processes_loads_in_one(on_two: list[dict[str, Any]], checkpoints: str) -> None:
    saved = Path(checkpoints) / "lora dp2 zero3" / "step-00000004"
    engine = engine_of("lora", zero_stage=1)
    engine.load(saved)
    stored = dict(read_weights(saved))
    assert stored.keys() == set(lora_names(with_lora()))
    assert all(torch.equal(stored[name], value) for name, value in engine.state_tensors())
    truth = toy.train_plainly(with_lora(), STEPS + 2, toy.optim_config(), MAX_STEPS)
    assert error(toy.train(engine, 2), [curve[STEPS:] for curve in truth]) < TOLERANCE
    engine.close()


def test_a_checkpoint_of_the_part_is_none_of_the_whole(tmp_path: Path) -> None:
    engine = engine_of("lora")
    engine.save(tmp_path / "step-00000000", {})
    engine.close()
    whole = toy.make_engine(ParallelConfig())
    with pytest.raises(UserError, match="another model"):
        whole.load(tmp_path / "step-00000000")
    whole.close()


def refused() -> str:
    try:
        engine_of("lora", tp=2)
    except UserError as problem:
        return str(problem)
    return ""


@pytest.mark.dist
def test_tensor_parallelism_is_refused() -> None:
    for message in launch.run(__file__, "refused", 2):
        assert "parallel.tp" in message
        assert "parallel.sp" in message
