"""Activation recompute: a layer keeps its inputs alone, and its forward pass is run again in the backward pass.

"Selective" also keeps what the fused attention returned: at long video that is most of the work done again, and a small
part of the activations. torch's own selective checkpoint numbers every operator of a layer and wants the same ones both
times. ZeRO-3's gathering of weights is not the same both times (a weight may still be there), so ours numbers the
attentions alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from contentv.engine.activation_offload import ActivationOffload, HostLayer, HostTensor

# Every fused attention says so in its operator's name: aten::_scaled_dot_product_*, flash_attn::_flash_attn_*,
# npu::npu_fusion_attention.
ATTENTION_OPERATORS = ("scaled_dot_product", "flash_attn", "fusion_attention", "efficient_attention")


def recomputed(
    forward: Callable[..., Any], *, selective: bool, offload: ActivationOffload | None = None
) -> Callable[..., Any]:
    """Returns `forward` that keeps its inputs alone (and, if selective, attention outputs) for the backward pass.

    Args:
        forward: of a layer; draws no random numbers.
        selective: keep the outputs of fused attentions.
        offload: keep all this in host memory.
    """

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        layer = offload.layer() if offload is not None else None
        extra: dict[str, Any] = {"context_fn": functools.partial(attention_contexts, layer)} if selective else {}
        with layer.hooks() if layer is not None else nullcontext():
            # Nothing in a layer is random, so no generator's state need be kept.
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **extra, **kwargs)

    return run


def attention_contexts(
    layer: HostLayer | None = None,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Returns the contexts of a layer's forward pass and of its repetition, which share the attentions' outputs."""
    kept: list[Any] = []
    # Detached: autograd makes the output itself a part of the graph, which then would hold itself.
    return _KeepAttention(kept, Tensor.detach if layer is None else layer.pack), _RepeatAttention(kept)


def _is_attention(operator: Any) -> bool:
    name = str(operator)
    return "backward" not in name and any(part in name for part in ATTENTION_OPERATORS)


class _AmongAttentions(TorchDispatchMode):
    """A mode that minds attentions alone, and lets compiled code, which holds none, run as it is."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _KeepAttention(_AmongAttentions):
    """Keeps the outputs of the attentions that run in it, in their order."""

    def __init__(self, kept: list[Any], pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._kept, self._pack = kept, pack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_attention(func):
            self._kept.append(tree_map_only(Tensor, self._pack, out))
        return out


class _RepeatAttention(_AmongAttentions):
    """Gives attentions the outputs they had the first time, in the same order."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self._kept = kept
        self._next: Iterator[Any] = iter(())

    def __enter__(self) -> Any:
        self._next = iter(self._kept)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_attention(func):
            return tree_map_only(HostTensor, HostTensor.get, next(self._next))
        return func(*args, **(kwargs or {}))
