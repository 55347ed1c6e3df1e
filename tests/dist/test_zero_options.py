"""What saves memory or traffic under ZeRO changes no number: selective recompute, offloads, hpZ, compiled layers.

Layouts are compared with one process and plain torch, as in test_layouts: losses, gradient norms, weights and moving
averages. `limits` of 0 let ZeRO-3 give every weight up at once, as it does with models that do not fit.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from counting import GATHERS, zero3_formula
from test_layouts import STEPS, TOLERANCE, distance, error

import launch
from contentv.base.errors import UserError
from contentv.engine import zero
from contentv.engine.ema import decay_at
from contentv.parallel.collectives import start
from contentv.parallel.mesh import ParallelConfig

FEW = 3
LIMITS = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
MODELS: dict[str, dict[str, Any]] = {
    "6 heads": {},
    "tiny": {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32},  # conf/model/tiny.yaml
    "small": {"num_layers": 10, "num_attention_heads": 8, "attention_head_dim": 64},  # conf/model/small.yaml
}
VECTORS = {"persist_below": None}  # what the engine derives: vectors stay whole
SOME = {"persist_below": 2000}
FREED = {"limits": 0}
SELECTIVE: dict[str, Any] = {"recompute": "selective"}
HOST: dict[str, Any] = {"offload_activations": True}

ONE: dict[str, dict[str, Any]] = {
    "zero3 selective": SELECTIVE,
    "zero3 selective, vectors whole, activations on the host": {**SELECTIVE, **HOST, **VECTORS},
    "zero1 full recompute, activations on the host": {"zero_stage": 1, "recompute": "full", **HOST},
}
FOUR: dict[str, dict[str, Any]] = {
    "dp2 sp2 hpz2 selective": {"sp": 2, "hpz": 2, **SELECTIVE, **FREED},
}
MORE_ONE: dict[str, dict[str, Any]] = {
    "zero1 selective": {"zero_stage": 1, **SELECTIVE}, "zero2 selective": {"zero_stage": 2, **SELECTIVE},
    "zero3 selective, vectors whole": {**SELECTIVE, **VECTORS},
    "zero3 all offloaded, activations too": {"offload": "all", "recompute": "full", **HOST, **VECTORS},
}  # fmt: skip
TWO: dict[str, dict[str, Any]] = {
    "dp2 zero2 selective": {"zero_stage": 2, **SELECTIVE},
    "dp2 zero3 selective": {**SELECTIVE, **FREED},
    "sp2 zero3 selective, vectors whole, activations on the host": {"sp": 2, **SELECTIVE, **HOST, **VECTORS},
    "dp2 hpz2 accumulation2, some whole": {"hpz": 2, "micro_batches": 2, **SOME, **FREED},
    "dp2 zero1 selective": {"zero_stage": 1, **SELECTIVE},
    "dp2 zero3 selective, vectors whole": {**SELECTIVE, **VECTORS},
    "dp2 zero3 selective, some whole": {**SELECTIVE, **SOME, **FREED},
    "tp2 zero3 selective": {"tp": 2, **SELECTIVE, **VECTORS},
    "ring2 zero3 selective, activations on the host": {"sp": 2, "ring": 2, **SELECTIVE, **HOST},
}
MORE_FOUR: dict[str, dict[str, Any]] = {
    "dp2 tp2 hpz2": {"tp": 2, "hpz": 2, **FREED},
    "dp4 hpz2": {"hpz": 2, **FREED},
    "dp2 sp2 hpz2, vectors whole, accumulation2": {"sp": 2, "hpz": 2, "micro_batches": 2, **VECTORS, **FREED},
    "sp4 hpz2 full recompute": {"sp": 4, "hpz": 2, "recompute": "full", **VECTORS, **FREED},
    "dp4 hpz2 selective, all offloaded": {"hpz": 2, "offload": "all", **SELECTIVE, **HOST, **FREED},
    "dp4 hpz4": {"hpz": 4, **FREED},
}
OFFLOADED: dict[str, dict[str, Any]] = {
    f"{name} zero{stage} {kind} offloaded": {"zero_stage": stage, "offload": kind, **degrees}
    for name, degrees in (("dp2", {"micro_batches": 2}), ("sp2", {"sp": 2}), ("tp2", {"tp": 2}))
    for stage, kind in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all"))
}


def run_layout(
    truth: str, model: str = "6 heads", steps: int = FEW, micro_batches: int = 1, persist_below: int | None = 0,
    limits: int | None = None, **parallel: Any,
) -> dict[str, Any]:  # fmt: skip
    """Runs in every process: losses and gradient norms of a layout, and how far its state is from the truth's."""
    ours = zero.deepspeed_config

    def limited(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = ours(*args, **kwargs)
        if limits is not None and config["zero_optimization"]["stage"] == 3:
            config["zero_optimization"].update(dict.fromkeys(LIMITS, limits))
        return config

    zero.deepspeed_config = limited
    engine = toy.make_engine(
        ParallelConfig(**parallel), max_steps=STEPS, persist_below=persist_below, model=toy.make_model(**MODELS[model]),
        config=optim_of(model),
    )  # fmt: skip
    zero.deepspeed_config = ours
    found: dict[str, Any] = {"curves": toy.train(engine, steps, micro_batches=micro_batches)}
    want = torch.load(Path(truth) / f"{model} {steps}.pt", weights_only=True)
    for kind in ("param", "ema"):
        state = engine.state_tensors(ema=kind == "ema")
        found[kind] = max(distance(value, want[kind][name]) for name, value in state)
    engine.close()
    return found


def optim_of(model: str) -> Any:
    return toy.optim_config(lr=3e-3 if model == "6 heads" else 3e-4)  # wider models amplify rounding


def write_truth(folder: Path, model: str, steps: int) -> Any:
    """Returns the curves of plain training, and writes the weights and their average after the last step."""
    whole = toy.make_model(**MODELS[model])
    average = {name: value.detach().clone() for name, value in whole.named_parameters()}

    def keep(step: int) -> None:
        for name, value in whole.named_parameters():
            average[name].lerp_(value.detach(), 1 - decay_at(step - 1, optim_of(model).ema_decay))

    curves = toy.train_plainly(whole, steps, optim_of(model), STEPS, after_step=keep)
    state = {"param": {name: value.detach() for name, value in whole.named_parameters()}, "ema": average}
    torch.save(state, folder / f"{model} {steps}.pt")
    return curves


def several(cases: dict[str, dict[str, Any]], truth: str) -> dict[str, Any]:
    return {name: run_layout(truth, **case) for name, case in cases.items()}


def four(truth: str) -> dict[str, Any]:
    start(toy.CPU, timeout_s=60.0)
    counts = Gathers()  # before DeepSpeed starts, which keeps torch's functions
    found = {"hpz": gathered(counts, hpz=2), "none": gathered(counts), "layouts": several(FOUR, truth)}
    try:
        toy.make_engine(ParallelConfig(hpz=3))
    except UserError as refused:
        found["refused"] = [refused.what, refused.where]
    return found


class Gathers:
    """Counts the bytes that all-gathers yield, by the number of ranks that take part."""

    def __init__(self) -> None:
        self.bytes: Counter[int] = Counter()
        for name in GATHERS:
            if hasattr(dist, name):
                setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            group = next((x for x in given if isinstance(x, dist.ProcessGroup)), None)
            out = next(x for x in given if isinstance(x, torch.Tensor))
            self.bytes[dist.get_world_size(group)] += out.numel() * out.element_size()
            return function(*args, **kwargs)

        return run


def gathered(counts: Gathers, hpz: int = 1) -> dict[str, int]:
    """Returns the bytes of weights gathered in the second step, by ranks, where every weight is given up at once."""
    ours = zero.deepspeed_config

    def limited(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = ours(*args, **kwargs)
        config["zero_optimization"].update(dict.fromkeys(LIMITS, 0))
        return config

    zero.deepspeed_config = limited
    engine = toy.make_engine(ParallelConfig(hpz=hpz))
    zero.deepspeed_config = ours
    toy.train(engine, 1)
    counts.bytes.clear()
    toy.train(engine, 1)
    engine.close()
    return {str(ranks): n for ranks, n in counts.bytes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("truth")


@pytest.fixture(scope="module")
def truth(folder: Path) -> Any:
    return write_truth(folder, "6 heads", FEW)


@pytest.fixture(scope="module")
def on_four(folder: Path, truth: Any) -> Any:
    return launch.run(__file__, "four", 4, truth=str(folder))


def check(what: str, found: dict[str, Any], truth: Any, parity: Any) -> None:
    worst = max(error(found["curves"], truth), found["param"], found["ema"])
    parity(f"{what}, {len(found['curves'][0])} steps, fp32", "one process, plain torch", worst, TOLERANCE)


@pytest.mark.parametrize("name", ONE)
def test_one_process(name: str, folder: Path, truth: Any, parity: Any) -> None:
    check(f"1 process, {name}", run_layout(str(folder), **ONE[name]), truth, parity)


@pytest.mark.dist
@pytest.mark.parametrize("name", FOUR)
def test_four_processes(name: str, on_four: Any, truth: Any, parity: Any) -> None:
    check(f"4 processes, {name}", on_four[0]["layouts"][name], truth, parity)


@pytest.mark.dist
def test_with_hpz_the_backward_pass_gathers_from_neighbours_alone(on_four: Any) -> None:
    shapes = [tuple(p.shape) for p in toy.make_model().parameters()]
    once = zero3_formula(shapes, 4, torch.float32, 1)["all_gather"]
    for result in on_four:
        assert result["none"] == {"4": 2 * once}
        assert result["hpz"] == {"4": once, "2": once}


@pytest.mark.dist
def test_a_degree_that_does_not_divide_is_refused(on_four: Any) -> None:
    for result in on_four:
        assert result["refused"] == ["parallel.hpz=3 does not divide 4 ranks (dp 4 x sp 1)", "parallel.hpz"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_ONE)
def test_more_of_one_process(name: str, folder: Path, truth: Any, parity: Any) -> None:
    check(f"1 process, {name}", run_layout(str(folder), **MORE_ONE[name]), truth, parity)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("nproc", "cases"), [(2, TWO), (4, MORE_FOUR)], ids=["two", "four"])
def test_more_layouts(nproc: int, cases: dict[str, Any], folder: Path, truth: Any, parity: Any) -> None:
    results = launch.run(__file__, "several", nproc, cases=cases, timeout_s=1200.0, truth=str(folder))
    for name in cases:
        check(f"{nproc} processes, {name}", results[0][name], truth, parity)


@pytest.mark.dist
@pytest.mark.slow
def test_every_offload(folder: Path, parity: Any) -> None:
    curves = write_truth(folder, "6 heads", STEPS)
    cases = {name: {**case, "steps": STEPS} for name, case in OFFLOADED.items()}
    results = launch.run(__file__, "several", 2, cases=cases, timeout_s=1200.0, truth=str(folder))
    for name in cases:
        check(f"2 processes, {name}", results[0][name], curves, parity)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("model", "steps"), [("tiny", STEPS), ("small", FEW)])
def test_real_shapes_selective(model: str, steps: int, folder: Path, parity: Any) -> None:
    curves = write_truth(folder, model, steps)
    kinds = {"": {}, ", vectors whole": VECTORS, ", some whole": {"persist_below": 100_000}}
    cases = {
        f"{model} zero{stage} selective{kind}": {
            "model": model, "steps": steps, "zero_stage": stage, **SELECTIVE, **more
        }
        for stage in (1, 2, 3) for kind, more in kinds.items() if stage == 3 or not kind
    }  # fmt: skip
    for name, case in cases.items():
        check(f"1 process, {name}", run_layout(str(folder), **case), curves, parity)
    on_two = launch.run(__file__, "several", 2, cases=cases, timeout_s=1800.0, truth=str(folder))
    for name in cases:
        check(f"2 processes, dp2 {name}", on_two[0][name], curves, parity)
