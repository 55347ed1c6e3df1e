"""torch's own fused kernels, called below autograd, where they return the log-sum-exp.

The CPU's is run by the tests. Those for CUDA are written against the operators' schemas of torch 2.13 and have not been
run on a CUDA device yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
CPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LSE_MULTIPLE = 32  # the memory-efficient kernel keeps its log-sum-exps in rows of this many


def _operator(name: str) -> Any:
    return getattr(torch.ops.aten, name).default


def _by_heads(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]  # b heads s dh


def cpu_why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Returns what keeps the CPU's kernel from running, or None."""
    if device_type != "cpu":
        return "it is the CPU's kernel"
    return None if dtype in CPU_DTYPES else "it takes floating-point numbers"


def cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attention and log-sum-exp by the CPU's flash kernel."""
    q, k, v = _by_heads(q, k, v)
    # It reads a head's keys and values over and over: one after the other they pay for the copy.
    out, lse = _operator("_scaled_dot_product_flash_attention_for_cpu")(q, k.contiguous(), v.contiguous())
    return out.transpose(1, 2), lse


def cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by the CPU's flash kernel."""
    run = _operator("_scaled_dot_product_flash_attention_for_cpu_backward")
    grads = run(*_by_heads(grad, q, k, v, out), lse, 0.0, False)
    return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


def flash_why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Returns what keeps torch's flash-attention kernel from running, or None."""
    if device_type != "cuda":
        return "it needs a CUDA device"
    return None if dtype in HALVES else "it takes float16 or bfloat16"


def flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attention and log-sum-exp by torch's flash-attention kernel; dh a multiple of 8, at most 256."""
    out, lse, *_ = _operator("_scaled_dot_product_flash_attention")(*_by_heads(q, k, v), 0.0, False, False)
    return out.transpose(1, 2), lse


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by torch's flash-attention kernel."""
    unread = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that there is none of
    grads = _operator("_scaled_dot_product_flash_attention_backward")(
        *_by_heads(grad, q, k, v, out), lse, None, None, q.shape[1], k.shape[1], 0.0, False, unread, unread
    )
    return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


def efficient_why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Returns what keeps torch's memory-efficient kernel from running, or None."""
    if device_type != "cuda":
        return "it needs a CUDA device"
    return None if dtype in (*HALVES, torch.float32) else "it takes float16, bfloat16 or float32"


def efficient_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attention and log-sum-exp by torch's memory-efficient kernel."""
    run = _operator("_scaled_dot_product_efficient_attention")
    out, lse, *_ = run(*_by_heads(q, k, v), None, True, 0.0, False)
    return out.transpose(1, 2), lse[:, :, : q.shape[1]]


def efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by torch's memory-efficient kernel."""
    missing = -lse.shape[2] % LSE_MULTIPLE
    lse = torch.nn.functional.pad(lse, (0, missing), value=float("inf")).contiguous()
    unread = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = _operator("_scaled_dot_product_efficient_attention_backward")(
        *_by_heads(grad, q, k, v), None, out.transpose(1, 2), lse, unread, unread, 0.0, [True, True, True, False], False
    )
    return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)
