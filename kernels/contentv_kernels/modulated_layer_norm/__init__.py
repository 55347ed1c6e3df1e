"""The adaLN step of a transformer block: a LayerNorm without weights, then a scale and a shift per sample."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from contentv_kernels import dispatch
from contentv_kernels.modulated_layer_norm import reference

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _why_not_triton(device_type: str, dtype: torch.dtype) -> str | None:
    if not dispatch.installed("triton"):
        return "triton is not installed (extra `gpu`)"
    if dtype not in TRITON_DTYPES:
        return "the kernel takes float16, bfloat16 or float32"
    if device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    if device_type == "cpu":
        return "on the CPU Triton only interprets, for tests: set TRITON_INTERPRET=1 before the first import of triton"
    return "the kernel is written for CUDA devices"


def _run_triton(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    from contentv_kernels.modulated_layer_norm import triton

    return triton.run(x, scale, shift, eps)


dispatch.register(
    "modulated_layer_norm",
    (
        dispatch.Impl("triton", _run_triton, automatic=("cuda",), why_not=_why_not_triton),
        dispatch.Impl(
            "reference",
            reference.run,
            automatic=("cuda", "cpu", "npu", "meta", "mps", "xpu"),
        ),
    ),
)


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, impl: str | None = None) -> Tensor:
    """Returns (x - mean) / sqrt(var + eps) * (1 + scale) + shift over the last dimension, shape and dtype of `x`.

    Args:
        x: tokens (b, s, d).
        scale, shift: modulation of each sample (b, d), floating point; columns of a wider tensor are taken as they lie.
        eps: added to the variance.
        impl: reference or triton; None takes what `force` or the device says.

    Raises:
        ValueError: the shapes do not belong together, or `impl` is unknown.
        RuntimeError: the implementation asked for cannot run on these tensors; the message says why.

    Source: adaLN, Peebles and Xie 2023 (DiT), section 3.2.
    """
    if x.ndim != 3 or scale.shape != (x.shape[0], x.shape[2]) or shift.shape != scale.shape:
        raise ValueError(
            f"modulated_layer_norm takes x (b, s, d) with scale and shift (b, d), not {tuple(x.shape)}, "
            f"{tuple(scale.shape)}, {tuple(shift.shape)}"
        )
    return dispatch.select("modulated_layer_norm", impl, x)(x, scale, shift, eps)
