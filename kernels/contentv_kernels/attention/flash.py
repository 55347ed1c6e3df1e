"""Tri Dao's flash-attn, when it is installed (it is built from source in the `cuda` image)."""

from __future__ import annotations

import torch
from torch import Tensor

from contentv_kernels.dispatch import installed

DTYPES = (torch.float16, torch.bfloat16)


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Returns what keeps flash-attn from running, or None."""
    if device_type != "cuda":
        return "flash-attn needs a CUDA device"
    if dtype not in DTYPES:
        return "flash-attn takes float16 or bfloat16"
    if not installed("flash_attn"):
        return "flash_attn is not installed (Dockerfile target cuda builds it)"
    return None


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns attention by flash_attn_func, whose own layout is ours: (b, s, heads, dh)."""
    from flash_attn import flash_attn_func

    # The kernel reads any strides but wants consecutive elements within a head.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out: Tensor = flash_attn_func(q, k, v)
    return out
