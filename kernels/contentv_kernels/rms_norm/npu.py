"""Ascend's fused RMS norm. Written against torch_npu's published interface; not yet run on an Ascend device.

LayerNorms need nothing of the kind: torch_npu computes torch's own `layer_norm` by one fused operator, and marks its
older `npu_layer_norm_eval` as deprecated in favour of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contentv_kernels.dispatch import installed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Returns what keeps npu_rms_norm from running, or None."""
    if device_type != "npu":
        return "npu_rms_norm needs an Ascend NPU"
    if dtype not in DTYPES:
        return "npu_rms_norm takes float16, bfloat16 or float32"
    if not installed("torch_npu"):
        return "torch_npu is not installed"
    return None


def run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns the RMS norm by torch_npu.npu_rms_norm, which wants one dtype for both."""
    import torch_npu

    out: Tensor = torch_npu.npu_rms_norm(x, weight.to(x.dtype), epsilon=eps)[0]  # then 1 / rms, for its backward
    return out
