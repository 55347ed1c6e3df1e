"""The formula itself, in fp32 (fp64 for fp64 inputs): the specification, and the truth in tests. O(s^2) memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns attention computed in at least fp32 and rounded once, to q's dtype: (b, s, heads, dh)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v.to(wide)).to(q.dtype)
