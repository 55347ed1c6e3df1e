"""Joint attention over all tokens: no mask, not causal, scale 1 / sqrt(dh)."""

from __future__ import annotations

from torch import Tensor

from contentv_kernels import dispatch
from contentv_kernels.attention import flash, npu, reference, sdpa

dispatch.register(
    "attention",
    (
        # SDPA asks cuDNN first, which at head dim 64 on Hopper is published as 1.3x (forward) to 1.5x (backward)
        # faster than flash-attn 2: flash_attn runs when asked for.
        dispatch.Impl("sdpa", sdpa.run, automatic=("cuda", "cpu", "meta", "mps", "xpu")),
        dispatch.Impl("flash_attn", flash.run, why_not=flash.why_not),
        dispatch.Impl("npu_fusion_attention", npu.run, automatic=("npu",), why_not=npu.why_not),
        dispatch.Impl("math", reference.run),
    ),
)


def attention(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
    """Returns softmax(q k^T / sqrt(dh)) v, every token attending to every token, shape (b, s, heads, dh).

    Args:
        q, k, v: queries, keys and values (b, s, heads, dh), of one dtype; strides are free.
        impl: sdpa, flash_attn, npu_fusion_attention or math; None takes what `force` or the device says.

    Raises:
        ValueError: `impl` is none of these.
        RuntimeError: the implementation asked for cannot run on these tensors; the message says why.
    """
    return dispatch.select("attention", impl, q)(q, k, v)
