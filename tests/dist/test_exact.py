"""RLHF's loss and every gradient of it on every layout, in fp64: what differs in fp32 is then rounding alone.

The loss is the real one, of the demo's parts: a guided rollout whose last steps keep gradients, first frames decoded,
a CLIP reward, the distance to a reference. No engine is at work but the ranks' own collectives: each sequence rank has
the gradient of its tokens, and their sum is the model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from torch import Tensor

import launch
from contentv.base.types import Batch, Bucket, TextCond
from contentv.engine.parallelize import parallelize
from contentv.engine.plans import MMDIT_PLAN
from contentv.models.io import read_transformer
from contentv.models.mmdit import MMDiT
from contentv.models.reward import CLIPReward
from contentv.models.vae import VideoVAE
from contentv.objectives.reward import RewardConfig, RewardObjective
from contentv.parallel import sequence_norms, tensor
from contentv.parallel.collectives import start
from contentv.parallel.mesh import ParallelConfig, build_mesh

ASSETS = Path(__file__).resolve().parents[2] / "contentv" / "demo" / "assets"
TOLERANCE = 1e-10
CAPTIONS = ["a red circle moving left", "a blue square"]
CONFIG = RewardConfig(steps=3, grad_steps=2, guidance_scale=2.0, kl_weight=0.1)
# 3 x 4 x 4 = 48 video tokens, 7 text tokens; 4 heads
LATENTS, TEXT = (16, 3, 8, 8), 7

FOUR: dict[str, dict[str, Any]] = {
    "sp 4": {"sp": 4},
    "sp 4, overlapped": {"sp": 4, "exchange": "overlapped"},
    "ring 2 x ulysses 2, overlapped": {"sp": 4, "ring": 2, "exchange": "overlapped"},
    "ring 4": {"sp": 4, "ring": 4},
    "sp 2 x tp 2": {"sp": 2, "tp": 2},
    "tp 4, sequence norms": {"tp": 4, "sequence_norms": True},
    "sp 2 x tp 2, sequence norms, overlapped": {
        "sp": 2, "tp": 2, "sequence_norms": True, "exchange": "overlapped",
    },
    "ring 2 x tp 2, sequence norms": {"sp": 2, "ring": 2, "tp": 2, "sequence_norms": True},
}  # fmt: skip
EIGHT: dict[str, dict[str, Any]] = {
    "sp 8": {"sp": 8},
    "ring 2 x ulysses 4": {"sp": 8, "ring": 2},
    "sp 4 x tp 2": {"sp": 4, "tp": 2},
    "sp 4 x tp 2, sequence norms": {"sp": 4, "tp": 2, "sequence_norms": True},
    "ring 2 x ulysses 2 x tp 2, sequence norms, overlapped": {
        "sp": 4, "ring": 2, "tp": 2, "sequence_norms": True, "exchange": "overlapped",
    },
}  # fmt: skip


def text(rows: int, seed: int, dtype: torch.dtype) -> TextCond:
    g = torch.Generator().manual_seed(seed)
    tokens, pooled = (torch.randn(shape, generator=g) for shape in ((rows, TEXT, 64), (rows, 64)))
    return TextCond(tokens.to(dtype), pooled.to(dtype))


def batch(dtype: torch.dtype) -> Batch:
    rows = len(CAPTIONS)
    return Batch(
        keys=["a", "b"], captions=CAPTIONS, bucket=Bucket(9, 64, 64),
        latents=torch.zeros(rows, *LATENTS, dtype=dtype), text=text(rows, 0, dtype),
        motion=torch.full((rows,), 0.5), visual=torch.full((rows,), 0.5), sample_index=torch.arange(rows),
        global_samples=rows,
    )  # fmt: skip


def model(dtype: torch.dtype) -> MMDiT:
    return read_transformer(ASSETS / "image_model" / "transformer").to(dtype)


def objective(dtype: torch.dtype) -> RewardObjective:
    reference = model(dtype)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.01)  # so that there is a distance to it
    return RewardObjective(
        VideoVAE.from_folder(ASSETS / "vae").to(dtype), CLIPReward.from_folder(ASSETS / "reward", dtype), reference,
        CONFIG, seed=5, null_text=text(1, 9, dtype),
    )  # fmt: skip


def gradients(of: RewardObjective, dtype: torch.dtype, parallel: dict[str, Any] | None) -> dict[str, Tensor]:
    """Returns the loss, the reward and all whole gradients: of one process, or of all ranks together."""
    whole = model(dtype)
    splits: dict[str, Any] = {}
    mesh = None
    if parallel is not None:
        mesh = build_mesh(ParallelConfig(**parallel), dist.get_world_size(), dist.get_rank(), heads=4)
        splits = parallelize(whole, mesh)
    out = of(whole, batch(dtype), step=0)
    out.loss_sum.backward()
    found = {"loss": out.loss_sum.detach(), "reward": out.metrics["reward"]}
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad
        if mesh is not None:
            dist.all_reduce(grad, group=mesh.sp_group)
            if name in splits:
                grad = gathered(grad, splits[name].dim, splits[name].sizes, mesh.tp_group)
        found[name] = grad
    return found


def gathered(part: Tensor, dim: int, sizes: tuple[int, ...], group: Any) -> Tensor:
    parts = [part.new_empty([size if i == dim else n for i, n in enumerate(part.shape)]) for size in sizes]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim)


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """Returns the largest relative difference, tensors by their norm, and where it is."""
    assert found.keys() == truth.keys()
    return max((float((found[n].double() - t).norm() / t.norm()), n) for n, t in truth.items())


def ranks(cases: dict[str, dict[str, Any]], mistaken: bool) -> dict[str, Any]:
    """Runs in every process: each layout's error in fp64, in fp32, and with mistakes; one process's in fp32."""
    start(toy.CPU, timeout_s=600.0)
    double, half = objective(torch.float64), objective(torch.float32)
    truth = gradients(double, torch.float64, None)
    report: dict[str, Any] = {"one fp32": errors(gradients(half, torch.float32, None), truth)}
    for name, case in cases.items():
        report[name] = {
            "fp64": errors(gradients(double, torch.float64, case), truth),
            "fp32": errors(gradients(half, torch.float32, case), truth),
        }
    report["mutants"] = mutants(double, truth) if mistaken else {}
    return report


def mutants(of: RewardObjective, truth: dict[str, Tensor]) -> dict[str, float]:
    """What must be seen, or the comparison proves nothing: mistakes of tensor ranks that share the tokens."""
    case, found = {"tp": 4, "sequence_norms": True}, {}

    def error() -> float:
        return errors(gradients(of, torch.float64, case), truth)[0]

    summed, tensor._summed = tensor._summed, lambda grad, group: grad
    found["gradients of replicated weights not summed"] = error()
    tensor._summed = summed
    back, tensor._summed_back = tensor._summed_back, lambda forward, group: forward
    found["gradients of modulations not summed"] = error()
    tensor._summed_back = back
    scattered = sequence_norms._scattered

    def own_part(x: Tensor, group: Any) -> Tensor:
        return scattered(x, group) / dist.get_world_size(group)

    sequence_norms._scattered = own_part
    found["sums averaged"] = error()
    sequence_norms._scattered = scattered
    backward = sequence_norms._Gather.backward

    def unsummed(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows = torch.unflatten(grads[0], 1, (dist.get_world_size(ctx.group), -1))
        return rows[:, dist.get_rank(ctx.group)].contiguous(), None

    sequence_norms._Gather.backward = staticmethod(unsummed)  # type: ignore[method-assign]
    found["gradients of gathered tokens not summed"] = error()
    sequence_norms._Gather.backward = staticmethod(backward)  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def on_four() -> list[dict[str, Any]]:
    return launch.run(__file__, "ranks", 4, timeout_s=900.0, cases=FOUR, mistaken=True)


def check(results: list[dict[str, Any]], nproc: int, name: str, parity: Any) -> None:
    worst = max(result[name]["fp64"][0] for result in results)
    what = f"{nproc} processes, rlhf's loss and its gradients, {name}, fp64"
    parity(what, "one process, plain torch", worst, TOLERANCE)
    ours, single = max(result[name]["fp32"][0] for result in results), results[0]["one fp32"][0]
    assert ours <= 3 * single, (ours, single)  # no further from the truth than rounding takes one process


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_gradients_of_a_rollout_are_exact(name: str, on_four: Any, parity: Any) -> None:
    check(on_four, 4, name, parity)


@pytest.mark.dist
@pytest.mark.slow
def test_rounding_alone_takes_one_process_further_than_1e_5(on_four: Any, parity: Any) -> None:
    single = on_four[0]["one fp32"][0]
    assert single > 1e-5  # so that no layout's run in fp32 can be held to that
    parity("1 process, rlhf's loss and its gradients, fp32", "the same in fp64", single, 1e-3)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gradients of replicated weights not summed", "gradients of modulations not summed", "sums averaged",
        "gradients of gathered tokens not summed",
    ],
)  # fmt: skip
def test_a_mistake_of_sequence_norms_is_seen(name: str, on_four: Any) -> None:
    assert max(result["mutants"][name] for result in on_four) > 1e-3


@pytest.mark.dist
@pytest.mark.slow
def test_gradients_of_a_rollout_are_exact_on_eight(parity: Any) -> None:
    results = launch.run(__file__, "ranks", 8, timeout_s=900.0, cases=EIGHT, mistaken=False)
    for name in EIGHT:
        check(results, 8, name, parity)


def test_the_plan_names_every_replicated_weight_that_sees_tokens() -> None:
    whole = toy.make_model()
    known = MMDIT_PLAN.partial + MMDIT_PLAN.tokenwise + MMDIT_PLAN.row + MMDIT_PLAN.modulations
    left = {
        name for name, _ in whole.named_parameters()
        if MMDIT_PLAN.dim_of(name) is None and not tensor.matches(name.rpartition(".")[0], known)
    }  # fmt: skip
    assert left == {name for name, _ in whole.named_parameters() if name.startswith("time_text_embed.")}
