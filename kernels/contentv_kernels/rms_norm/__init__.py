"""The norm of queries and keys: each head divided by its root mean square, times a weight."""

from __future__ import annotations

from torch import Tensor

from contentv_kernels import dispatch
from contentv_kernels.rms_norm import npu, reference

dispatch.register(
    "rms_norm",
    (
        dispatch.Impl("npu_rms_norm", npu.run, automatic=("npu",), why_not=npu.why_not),
        # torch's own: fused on CUDA, elsewhere composed.
        dispatch.Impl("torch", reference.run, automatic=("cuda", "cpu", "npu", "meta", "mps", "xpu")),
    ),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, impl: str | None = None) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last dimension, shape and dtype of `x`.

    Args:
        x: heads (..., dh).
        weight: (dh,).
        eps: added to the mean square.
        impl: torch or npu_rms_norm; None takes what `force` or the device says.

    Raises:
        ValueError: `impl` is neither.
        RuntimeError: the implementation asked for cannot run on these tensors; the message says why.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    return dispatch.select("rms_norm", impl, x)(x, weight, eps)
