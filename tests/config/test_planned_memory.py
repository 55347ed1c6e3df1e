"""What a forward pass of two ranks keeps, counted, against the formulas of `contentv plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import launch
from contentv.base.types import TokenCounts
from contentv.config.planning.activations import kept_activations
from contentv.config.planning.layout import Job, Layout
from contentv.engine import recompute
from contentv.engine.parallelize import parallelize
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.parallel.collectives import start
from contentv.parallel.mesh import build_mesh

SHAPE = MMDiTConfig(
    num_layers=3, num_attention_heads=6, attention_head_dim=64, joint_attention_dim=32, pooled_projection_dim=32
)
TOKENS = TokenCounts(320, 60)
LAYOUTS = {
    "sp2": Layout(sp=2), "ring2": Layout(sp=2, ring=2), "tp2": Layout(tp=2),
    "tp2 sequence norms": Layout(tp=2, sequence_norms=True), "sp2 full": Layout(sp=2, recompute="full"),
    "sp2 selective": Layout(sp=2, recompute="selective"),
    "ring2 selective": Layout(sp=2, ring=2, recompute="selective"),
    "tp2 selective": Layout(tp=2, recompute="selective"),
    "tp2 sequence norms, selective": Layout(tp=2, sequence_norms=True, recompute="selective"),
    "tp2 sequence norms, full": Layout(tp=2, sequence_norms=True, recompute="full"),
}  # fmt: skip


def kept(layouts: list[dict[str, Any]]) -> list[int]:
    """Runs in every process: returns the bytes that a forward pass keeps, by layout."""
    rank, world = start(torch.device("cpu"))
    return [kept_by(Layout(**values), world, rank) for values in layouts]


def kept_by(layout: Layout, world: int, rank: int) -> int:
    torch.manual_seed(0)
    model = MMDiT(SHAPE)
    parallelize(
        model, build_mesh(layout.parallel(), world, rank, heads=SHAPE.num_attention_heads), recompute=layout.recompute
    )
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    weights = sum(storage.nbytes() for storage in storages.values())

    class Attentions:
        """Where selective recompute is told to keep the attentions' outputs."""

        @staticmethod
        def pack(x: Tensor) -> Tensor:
            storages.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage())  # alive: no address comes twice
            return x.detach()

    contexts: Callable[..., Any] = recompute.attention_contexts
    recompute.attention_contexts = lambda layer: contexts(Attentions)
    try:
        with torch.autograd.graph.saved_tensors_hooks(Attentions.pack, lambda x: x):
            out = model(
                torch.randn(1, 16, 5, 16, 16), torch.tensor([500.0]), torch.randn(1, TOKENS.text, 32),
                torch.randn(1, 32),
            )  # fmt: skip
    finally:
        recompute.attention_contexts = contexts
    assert out.requires_grad
    return sum(storage.nbytes() for storage in storages.values()) - weights


@pytest.fixture(scope="module")
def on_two() -> list[list[int]]:
    # The double of a layer in host memory is none: shapes in annotations are not checked.
    env = {"CONTENTV_TYPECHECK": "0"}
    return launch.run(__file__, "kept", nproc=2, env=env, layouts=[vars(layout) for layout in LAYOUTS.values()])


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_keep_what_the_plan_says(on_two: list[list[int]], name: str) -> None:
    measured = max(result[list(LAYOUTS).index(name)] for result in on_two)
    layout = replace(LAYOUTS[name], zero_stage=1)  # without DeepSpeed, whose linear keeps its input as it lies
    assert kept_activations(Job(SHAPE, "fp32", device="cpu"), layout, TOKENS) == pytest.approx(measured, rel=0.03)
