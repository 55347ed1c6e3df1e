"""Attention over a part of the keys, with what is needed to merge the parts exactly: the log-sum-exp of the scores.

Softmax attention over keys that lie in several places is a weighted mean of the attentions over each place; the
weights follow from the log-sum-exps. The backward pass needs no merging: given the output and the log-sum-exp over all
keys, the gradients of one part are those of the whole, restricted to it.
"""

from __future__ import annotations

from torch import Tensor

from contentv_kernels import dispatch
from contentv_kernels.attention_part import aten, npu, reference

dispatch.register(
    "attention_part",
    (
        dispatch.Impl("flash_cpu", aten.cpu_forward, automatic=("cpu",), why_not=aten.cpu_why_not),
        dispatch.Impl("flash", aten.flash_forward, automatic=("cuda",), why_not=aten.flash_why_not),
        dispatch.Impl("efficient", aten.efficient_forward, automatic=("cuda",), why_not=aten.efficient_why_not),
        dispatch.Impl("npu_fusion_attention", npu.forward, automatic=("npu",), why_not=npu.why_not),
        dispatch.Impl("math", reference.forward, automatic=("cpu", "meta", "mps", "xpu")),
    ),
)
dispatch.register(
    "attention_part_backward",
    (
        dispatch.Impl("flash_cpu", aten.cpu_backward, automatic=("cpu",), why_not=aten.cpu_why_not),
        dispatch.Impl("flash", aten.flash_backward, automatic=("cuda",), why_not=aten.flash_why_not),
        dispatch.Impl("efficient", aten.efficient_backward, automatic=("cuda",), why_not=aten.efficient_why_not),
        dispatch.Impl("npu_fusion_attention", npu.backward, automatic=("npu",), why_not=npu.why_not),
        dispatch.Impl("math", reference.backward, automatic=("cpu", "meta", "mps", "xpu")),
    ),
)


def attention_part(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns (attention over these keys alone (b, s, heads, dh), log-sum-exp of its scores (b, heads, s)).

    The scores are q k^T / sqrt(dh), natural logarithm; the log-sum-exp is fp32, fp64 for fp64 inputs.

    Args:
        q: queries (b, s, heads, dh).
        k, v: a part of the keys and values (b, s_part, heads, dh), s_part >= 1; strides are free.
        impl: flash_cpu, flash, efficient, npu_fusion_attention or math; None takes what `force` or the device says.

    Raises:
        ValueError: `impl` is none of these.
        RuntimeError: the implementation asked for cannot run on these tensors; the message says why.
    """
    return dispatch.select("attention_part", impl, q)(q, k, v)


def attention_part_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns this part's share of the gradient of the queries, and the gradients of its keys and values.

    Args:
        grad: gradient of the output (b, s, heads, dh).
        q: queries (b, s, heads, dh).
        k, v: a part of the keys and values (b, s_part, heads, dh).
        out: the output over all keys, of all parts (b, s, heads, dh).
        lse: the log-sum-exp over all keys (b, heads, s).
        impl: as in `attention_part`.

    Raises:
        ValueError: `impl` is unknown.
        RuntimeError: the implementation asked for cannot run on these tensors; the message says why.
    """
    return dispatch.select("attention_part_backward", impl, q)(grad, q, k, v, out, lse)
