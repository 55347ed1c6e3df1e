"""The ordered procedure that turns a single-process model into one rank's part of it.

1. tensor parallelism: the plan's layers become their parts;
2. sequence parallelism: the three seams are replaced;
3. activation recompute: each block's forward is run again in the backward pass;
4. compilation, block by block;
5. ZeRO comes last and is the caller's (`engine.zero`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from contentv.engine.plans import MMDIT_PLAN
from contentv.parallel.collectives import equalize
from contentv.parallel.mesh import RECOMPUTES, Mesh
from contentv.parallel.tensor import Split, TensorPlan, apply_plan
from contentv.parallel.ulysses import Attend, Ulysses

# Every fused attention says so in its operator's name: aten::_scaled_dot_product_*, flash_attn::_flash_attn_*,
# npu::npu_fusion_attention.
ATTENTION_OPERATORS = ("scaled_dot_product", "flash_attn", "fusion_attention", "efficient_attention")


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
    if mesh.sp > 1:
        assert mesh.sp_group is not None
        ulysses = Ulysses(mesh.sp_group, seamed.attend, mesh.ulysses_group, mesh.ring_group)
        seamed.attend, seamed.split_tokens, seamed.merge_tokens = (
            ulysses.attend, ulysses.split_tokens, ulysses.merge_tokens,
        )  # fmt: skip
    for block in seamed.transformer_blocks:
        if recompute != "none":
            block.forward = recomputed(block.forward, selective=recompute == "selective")
        if compile:
            block.forward = torch.compile(block.forward)
    return splits


def recomputed(forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    """Returns `forward` that keeps its inputs alone (and, if selective, attention outputs) for the backward pass."""
    extra: dict[str, Any] = {}
    if selective:
        extra["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_attention)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The model draws no random numbers, so no generator state need be kept.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **extra, **kwargs)

    return run


def keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Returns "keep" for fused attention and "compute again" for everything else.

    At long video the attention is most of a block's work, and its output a small part of the block's activations.
    """
    name = str(operator)
    if any(part in name for part in ATTENTION_OPERATORS) and "backward" not in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
