"""The formulas in blocks of queries, in fp32 (fp64 for fp64 inputs): the specification, and the truth in tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 1024  # queries whose scores are held at once


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attention rounded once, to q's dtype, and the log-sum-exp of the scores."""
    wide = torch.promote_types(q.dtype, torch.float32)
    wide_k, wide_v = k.to(wide), v.to(wide)
    outs, lses = [], []
    for part in q.split(BLOCK, dim=1):
        scores = torch.einsum("bqhd,bkhd->bhqk", part.to(wide), wide_k) / math.sqrt(q.shape[-1])
        lse = scores.logsumexp(dim=-1)
        outs.append(torch.einsum("bhqk,bkhd->bqhd", (scores - lse[..., None]).exp(), wide_v).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, each rounded once, to its tensor's dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1])
    wide_k, wide_v = k.to(wide), v.to(wide)
    grad_k, grad_v = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    grads_q = []
    for part, part_grad, part_out, part_lse in zip(
        q.split(BLOCK, dim=1), grad.split(BLOCK, dim=1), out.split(BLOCK, dim=1), lse.split(BLOCK, dim=2), strict=True
    ):
        wide_q, wide_grad = part.to(wide), part_grad.to(wide)
        scores = torch.einsum("bqhd,bkhd->bhqk", wide_q, wide_k) * scale
        weights = (scores - part_lse[..., None]).exp()  # those over all keys
        mean = torch.einsum("bqhd,bqhd->bhq", wide_grad, part_out.to(wide))
        grad_scores = weights * (torch.einsum("bqhd,bkhd->bhqk", wide_grad, wide_v) - mean[..., None]) * scale
        grads_q.append(torch.einsum("bhqk,bkhd->bqhd", grad_scores, wide_k).to(q.dtype))
        grad_k += torch.einsum("bhqk,bqhd->bkhd", grad_scores, wide_q)
        grad_v += torch.einsum("bhqk,bqhd->bkhd", weights, wide_grad)
    return torch.cat(grads_q, dim=1), grad_k.to(k.dtype), grad_v.to(v.dtype)
