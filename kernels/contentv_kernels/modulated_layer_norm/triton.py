"""Modulated LayerNorm in Triton: one read and one write of the tokens forward, two reads and one write backward.

With xhat = (x - mean) * rstd:

    forward   y = xhat * (1 + scale) + shift
    backward  g = dy * (1 + scale);  dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
              dscale = sum over s of dy * xhat;  dshift = sum over s of dy

Everything is computed in fp32 and rounded once. The sums over s are deterministic: each program adds up a run of
consecutive tokens and writes its partial sum, and the partial sums are added in a fixed order; there are no atomics.

The operation is a torch custom op, opaque to torch.compile: a graph around it stays whole. One program holds a whole
token in registers, so d is bounded by MAX_WIDTH.
"""

from __future__ import annotations

import functools
import math
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384
PROGRAMS_PER_PROCESSOR = 4  # enough programs in flight to hide memory latency, few enough that partial sums stay small
MAX_RUN = 64  # tokens that one program works through


@triton.jit
@no_type_check
def _forward_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr,
    s, d, scale_stride, shift_stride, eps,
    RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < d
    scale = tl.load(scale_ptr + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0) * RUN
    for token in range(first, min(first + RUN, s)):
        row = sample.to(tl.int64) * s + token  # row * d passes 2^31 within the shapes we train on
        x = tl.load(x_ptr + row * d + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=0) / d
        centred = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / d + eps)
        y = centred * rstd * (1.0 + scale) + shift
        tl.store(y_ptr + row * d + column, y.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit
@no_type_check
def _backward_kernel(
    dy_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr,
    s, d, scale_stride,
    RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < d
    weight = 1.0 + tl.load(scale_ptr + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0) * RUN
    for token in range(first, min(first + RUN, s)):
        row = sample.to(tl.int64) * s + token
        x = tl.load(x_ptr + row * d + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * d + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.where(inside, (x - mean) * rstd, 0.0)
        g = dy * weight
        dx = rstd * (g - tl.sum(g, axis=0) / d - xhat * (tl.sum(g * xhat, axis=0) / d))
        tl.store(dx_ptr + row * d + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dscale += dy * xhat
        dshift += dy
    # partial sums lie as (2, b, runs, d): dscale, then dshift
    run = sample * tl.num_programs(0) + tl.program_id(0)
    shift_half = tl.num_programs(1) * tl.num_programs(0)
    tl.store(partial_ptr + run.to(tl.int64) * d + column, dscale, mask=inside)
    tl.store(partial_ptr + (run + shift_half).to(tl.int64) * d + column, dshift, mask=inside)


@torch.library.custom_op("contentv::modulated_layer_norm", mutates_args=())
def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the modulated norm (b, s, d) and, for the backward, each token's mean and 1 / std (b, s) in fp32."""
    b, s, d = x.shape
    x, scale, shift = x.contiguous(), _rows(scale), _rows(shift)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(b, s, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() > 0:
        run = _run_length(b * s, x.device)
        _forward_kernel[(math.ceil(s / run), b)](
            x, scale, shift, y, mean, rstd, s, d, scale.stride(0), shift.stride(0), eps, **_shape(run, d)
        )
    return y, mean, rstd


@torch.library.custom_op("contentv::modulated_layer_norm_backward", mutates_args=())
def backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients dx (b, s, d) in x's dtype, dscale and dshift (b, d) in scale's."""
    b, s, d = x.shape
    dy, x, rows = dy.contiguous(), x.contiguous(), _rows(scale)
    dx = torch.empty_like(x)
    run = _run_length(b * s, x.device)
    runs = math.ceil(s / run)
    partial = torch.empty(2, b, runs, d, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        _backward_kernel[(runs, b)](
            dy, x, rows, mean, rstd, dx, partial, s, d, rows.stride(0), **_shape(run, d)
        )  # fmt: skip
    dscale, dshift = partial.sum(dim=2).to(scale.dtype)
    return dx, dscale.clone(), dshift.clone()


def run(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Returns the modulated LayerNorm of x (b, s, d), computed in fp32 and rounded once.

    Raises:
        RuntimeError: a token is wider than one program can hold.
    """
    if x.shape[-1] > MAX_WIDTH:
        raise RuntimeError(
            f"modulated_layer_norm: the triton kernel takes d up to {MAX_WIDTH}, not {x.shape[-1]}; use impl=reference"
        )
    y: Tensor = forward(x, scale, shift, eps)[0]
    return y


@forward.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), mean, rstd


@backward.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dscale, dshift = (torch.empty(scale.shape, dtype=scale.dtype, device=x.device) for _ in range(2))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dscale, dshift


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, scale, shift, _ = inputs
    ctx.save_for_backward(x, scale, output[1], output[2])
    ctx.shift_dtype = shift.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    dx, dscale, dshift = backward(dy, *ctx.saved_tensors)
    return dx, dscale, dshift.to(ctx.shift_dtype), None


torch.library.register_autograd(forward, _differentiate, setup_context=_save)


def _rows(modulation: Tensor) -> Tensor:
    """Returns (b, d) with consecutive columns; a slice of a wider projection already has them and is not copied."""
    return modulation if modulation.stride(-1) == 1 else modulation.contiguous()


def _run_length(tokens: int, device: torch.device) -> int:
    return max(1, min(MAX_RUN, math.ceil(tokens / (PROGRAMS_PER_PROCESSOR * _processors(device)))))


def _shape(run: int, d: int) -> dict[str, int]:
    block = triton.next_power_of_2(d)
    # 16 bytes per thread and load, in 4 to 16 warps.
    return {"RUN": run, "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2  # the interpreter: a few programs, so that tests see several runs
