"""Our kernels against eager torch and Inductor, as shares of the device's measured bandwidth and matrix rate.

    python benchmarks/gpu_kernels.py
    python benchmarks/gpu_kernels.py --device cpu --tiny        # seconds: does the benchmark itself work?

modulated_layer_norm is bound by memory: counted are the bytes it must move, each tensor once (forward: x in, y out;
backward: dy and x in, dx out; the modulation is small). Calls go round a set of inputs larger than the L2 cache.
attention is bound by arithmetic: 4 b s^2 heads dh forward, twice that backward. Errors are relative to fp64.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure
import torch
from contentv_kernels import attention, available, modulated_layer_norm
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

WIDTH, HEADS, HEAD_DIM = 2432, 38, 64
SHAPES = [(16, 1357), (4, 4429), (1, 14669), (1, 33093), (1, 41805)]  # batch, tokens
CACHE_BYTES = 256 * 2**20  # several times any L2 cache
SDPA_BACKENDS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--warmups", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--no-compile", action="store_true", help="leave Inductor out")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes, 2 repeats: a test of this file, not a result"
    )
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    shapes, width, heads = ([(2, 9)], 48, 3) if args.tiny else (SHAPES, WIDTH, HEADS)
    dh = 16 if args.tiny else HEAD_DIM
    warmups, repeats = (1, 2) if args.tiny else (max(3, args.warmups), max(20, args.repeats))
    copy_rate = measure.copy_bytes_per_s(device, 2**20 if args.tiny else 2**31)
    rows: list[dict[str, object]] = []
    for b, s in shapes:
        rows += layer_norm_rows(b, s, width, device, warmups, repeats, copy_rate, not args.no_compile)
        rows += attention_rows(b, s, heads, dh, device, warmups, repeats)
    common = measure.provenance(device) | {"dtype": "bfloat16", "copy_gb_per_s": round(copy_rate / 1e9, 2)}
    path = measure.append_rows([common | row for row in rows], "kernels", device, args.out)
    for row in rows:
        print({k: v for k, v in row.items() if k not in ("p10_ms", "p90_ms", "repeats")})
    print(path)


def layer_norm_impls(device: torch.device, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """Returns the implementations that run here."""
    found = {"eager": partial(modulated_layer_norm, impl="reference")}
    if compiled:
        found["inductor"] = torch.compile(found["eager"], dynamic=False)
    if available("modulated_layer_norm", device.type, torch.bfloat16)["triton"] is None:
        found["triton"] = partial(modulated_layer_norm, impl="triton")
    return found


def layer_norm_rows(
    b: int, s: int, d: int, device: torch.device, warmups: int, repeats: int, copy_rate: float, compiled: bool
) -> list[dict[str, object]]:
    """Returns a forward and a backward row for each implementation."""
    size = b * s * d * 2
    sets = max(2, math.ceil(CACHE_BYTES / (2 * size))) if device.type == "cuda" else 2
    inputs = [layer_norm_inputs(b, s, d, device) for _ in range(sets)]
    impls = layer_norm_impls(device, compiled)
    errors = {name: layer_norm_errors(function, inputs[0]) for name, function in impls.items()}
    rows = []
    for direction, moved in (("forward", 2 * size), ("backward", 3 * size)):
        calls = {
            name: (forward_calls if direction == "forward" else backward_calls)(function, inputs)
            for name, function in impls.items()
        }
        times_of = measure.interleave(calls, max(warmups, sets), repeats, device, prepared=direction == "backward")
        for name, times in times_of.items():
            row = {
                "op": "modulated_layer_norm",
                "direction": direction,
                "impl": name,
                "shape": [b, s, d],
                "bytes": moved,
            }
            row |= measure.spread(times)
            row["share_of_copy"] = round(moved / (row["median_ms"] / 1000) / copy_rate, 4)
            rows.append(row | {"error": errors[name][direction]})
    return rows


def layer_norm_inputs(b: int, s: int, d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns x, scale, shift (columns of one projection, as in a block) and a cotangent, bf16."""
    x, cotangent = (torch.randn(b, s, d, device=device, dtype=torch.bfloat16) for _ in range(2))
    shift, scale = (torch.randn(b, 6 * d, device=device, dtype=torch.bfloat16) * 0.5).chunk(6, dim=1)[:2]
    return x.requires_grad_(), scale.requires_grad_(), shift.requires_grad_(), cotangent


def forward_calls(function: Callable[..., Tensor], inputs: list[tuple[Tensor, ...]]) -> Callable[[], object]:
    turn = itertools.cycle(inputs)

    @torch.no_grad()
    def call() -> Tensor:
        return function(*next(turn)[:3])

    return call


def backward_calls(
    function: Callable[..., Tensor], inputs: list[tuple[Tensor, ...]]
) -> Callable[[], Callable[[], object]]:
    """Returns a function that runs a forward and returns its backward."""
    turn = itertools.cycle(inputs)

    def prepare() -> Callable[[], object]:
        *arguments, cotangent = next(turn)
        return partial(torch.autograd.grad, function(*arguments), arguments, cotangent)

    return prepare


def layer_norm_errors(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Returns the relative errors of y and of the worst gradient against fp64."""
    *arguments, cotangent = inputs
    wide = [t.detach().double().requires_grad_() for t in arguments]
    truth = modulated_layer_norm(*wide, impl="reference")
    true_gradients = torch.autograd.grad(truth, wide, cotangent.double())
    y = function(*arguments)
    gradients = torch.autograd.grad(y, arguments, cotangent)
    worst = max(measure.relative_error(g, t) for g, t in zip(gradients, true_gradients, strict=True))
    return {"forward": round(measure.relative_error(y, truth), 6), "backward": round(worst, 6)}


def attention_impls(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Returns our automatic choice, torch's own, each of torch's kernels, and flash-attn where it is installed."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def one_kernel(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return plain(q, k, v)

    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"contentv": attention, "torch_default": plain}
    if device.type == "cuda":
        found |= {name: partial(one_kernel, backend) for name, backend in SDPA_BACKENDS.items()}
    if available("attention", device.type, torch.bfloat16)["flash_attn"] is None:
        found["flash_attn"] = partial(attention, impl="flash_attn")
    return found


def attention_rows(
    b: int, s: int, heads: int, dh: int, device: torch.device, warmups: int, repeats: int
) -> list[dict[str, object]]:
    """Returns a forward and a backward row for each implementation that takes these tensors."""
    q, k, v = (torch.randn(b, s, heads, dh, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    cotangent = torch.randn_like(q)
    forwards, backwards = {}, {}
    for name, function in attention_impls(device).items():
        with contextlib.suppress(RuntimeError):  # a kernel that this device or build does not have: no row
            function(q, k, v)
            backwards[name] = backward_calls(function, [(q, k, v, cotangent)])
            forwards[name] = forward_calls(function, [(q, k, v, cotangent)])
    rows = []
    for direction, calls, flops in (
        ("forward", forwards, 4 * b * s * s * heads * dh),
        ("backward", backwards, 8 * b * s * s * heads * dh),
    ):
        times_of = measure.interleave(calls, warmups, repeats, device, prepared=direction == "backward")
        for name, times in times_of.items():
            row = {"op": "attention", "direction": direction, "impl": name, "shape": [b, s, heads, dh], "flops": flops}
            row |= measure.spread(times)
            row["tflops"] = round(flops / (row["median_ms"] / 1000) / 1e12, 3)
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
