"""Ascend's fused attention. Written against torch_npu's published interface; not yet run on an Ascend device."""

from __future__ import annotations

import torch
from torch import Tensor

from contentv_kernels.dispatch import installed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# "All tokens before and after" in the operator's terms; longer sequences need no more, the mask is absent.
EVERY_TOKEN = 65536


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Returns what keeps npu_fusion_attention from running, or None."""
    if device_type != "npu":
        return "npu_fusion_attention needs an Ascend NPU"
    if dtype not in DTYPES:
        return "npu_fusion_attention takes float16, bfloat16 or float32"
    if not installed("torch_npu"):
        return "torch_npu is not installed"
    return None


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns attention by torch_npu.npu_fusion_attention: (b, s, heads, dh)."""
    import torch_npu

    outputs = torch_npu.npu_fusion_attention(
        q,
        k,
        v,
        head_num=q.shape[2],
        input_layout="BSND",  # batch, sequence, heads, dim: our layout, so nothing is transposed or copied
        scale=q.shape[-1] ** -0.5,
        pre_tockens=EVERY_TOKEN,
        next_tockens=EVERY_TOKEN,
        keep_prob=1.0,
    )
    out: Tensor = outputs[0]  # then come the softmax statistics, kept by the operator for its backward
    return out
