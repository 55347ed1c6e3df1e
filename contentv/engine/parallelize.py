"""The ordered procedure that turns a single-process model into one rank's part of it.

1. tensor parallelism: the plan's layers become their parts;
2. sequence parallelism: the three seams are replaced;
3. compilation, block by block: the attention, which may talk to other ranks, runs between a block's compiled parts;
4. activation recompute: each block's forward, compiled or not, is run again in the backward pass;
5. ZeRO comes last and is the caller's (`engine.zero`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from contentv.engine.activation_offload import ActivationOffload
from contentv.engine.plans import MMDIT_PLAN
from contentv.engine.recompute import recomputed
from contentv.parallel.collectives import equalize
from contentv.parallel.mesh import RECOMPUTES, Mesh
from contentv.parallel.overlap import OverlappedUlysses
from contentv.parallel.sequence_norms import SequenceNorms
from contentv.parallel.tensor import Split, TensorPlan, apply_plan
from contentv.parallel.ulysses import Attend, Ulysses


@runtime_checkable
class Seamed(Protocol):
    """A model with the three seams and its blocks, such as `contentv.models.mmdit.MMDiT`."""

    attend: Attend
    split_tokens: Callable[[Tensor], Tensor]
    merge_tokens: Callable[[Tensor, int], Tensor]
    transformer_blocks: nn.ModuleList


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    recompute: str = "none",
    offload_activations: bool = False,
    compile: bool = False,
    device: torch.device | None = None,
    plan: TensorPlan = MMDIT_PLAN,
) -> dict[str, Split]:
    """Makes `model` this rank's part of itself, in place, and returns the split of each split parameter.

    All ranks first take rank 0's weights, so that replicas are equal and parts fit together however each rank made its
    model. A model on the meta device has none: its parts are shapes, and whoever fills them gives all ranks the same.

    Args:
        model: the whole model; has the seams and `transformer_blocks`. It can be parallelized once.
        mesh: this rank's place.
        recompute: none, selective (all but the attention itself) or full: what the backward pass computes again.
        offload_activations: keep in host memory what recomputed layers keep.
        compile: also compile each block with torch.compile.
        device: where collectives want their tensors; the CPU by default.
        plan: the tensor-parallel plan.

    Raises:
        UserError: a weight has fewer heads or features than there are tensor ranks.
    """
    if recompute not in RECOMPUTES:
        raise ValueError(f"recompute={recompute} is none of {RECOMPUTES}")
    if getattr(model, "is_parallelized", False):
        raise RuntimeError("this model is already one rank's part: parallelize takes a whole model")
    model.is_parallelized = True  # type: ignore[assignment]
    if mesh.world > 1 and not any(parameter.is_meta for parameter in model.parameters()):
        equalize(model.parameters(), device or torch.device("cpu"))
    splits = apply_plan(model, plan, mesh)
    seamed = cast(Seamed, model)
    replace_seams(seamed, mesh, device or torch.device("cpu"))
    if compile and not hasattr(seamed.attend, "begin"):  # which sees to it itself
        seamed.attend = torch.compiler.disable(seamed.attend)
    offload = ActivationOffload(device or torch.device("cpu")) if offload_activations else None
    for block in seamed.transformer_blocks:
        if compile:
            block.forward = torch.compile(block.forward)
        if recompute != "none":
            block.forward = recomputed(block.forward, selective=recompute == "selective", offload=offload)
    return splits


def replace_seams(model: Seamed, mesh: Mesh, device: torch.device) -> None:
    """Puts what the ranks of a sample exchange in the place of the model's seams.

    Args:
        model: with the seams of a single process.
        mesh: this rank's place.
        device: where the model runs; on accelerators exchanges overlap with projections unless the mesh says otherwise.
    """
    ulysses: Ulysses | None = None
    if mesh.sp > 1:
        assert mesh.sp_group is not None
        overlapped = mesh.exchange == "overlapped" or (mesh.exchange == "auto" and device.type != "cpu")
        kind = OverlappedUlysses if overlapped and mesh.ulysses > 1 else Ulysses
        ulysses = kind(mesh.sp_group, model.attend, mesh.ulysses_group, mesh.ring_group, unit=mesh.token_unit)
    seams: Ulysses | SequenceNorms | None = ulysses
    if mesh.sequence_norms:
        assert mesh.tp_group is not None
        seams = SequenceNorms(mesh.tp_group, model.attend, ulysses)
    if seams is not None:
        model.attend, model.split_tokens, model.merge_tokens = seams.attend, seams.split_tokens, seams.merge_tokens
