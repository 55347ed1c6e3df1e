"""What every fused modulated LayerNorm must satisfy, on the interpreter and on CUDA alike."""

from __future__ import annotations

import torch
from contentv_kernels import modulated_layer_norm
from torch import Tensor

# (b, s, d): the 8B's width; widths that are no power of two; one token; one column; more tokens than one run holds.
SHAPES = [(1, 333, 2432), (2, 9, 41), (3, 70, 300), (2, 1, 128), (1, 5, 1), (4, 2, 64)]


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens with an offset, the six-fold modulation that blocks compute, and a cotangent."""
    b, s, d = shape
    generator = torch.Generator().manual_seed(b * 1000003 + s * 1009 + d)
    x = torch.randn(b, s, d, generator=generator) * 1.7 + 0.3
    modulation = torch.randn(b, 6 * d, generator=generator) * 0.5
    cotangent = torch.randn(b, s, d, generator=generator)
    x, modulation, cotangent = (t.to(device, dtype) for t in (x, modulation, cotangent))
    return x, modulation, cotangent


def value_and_gradients(impl: str, x: Tensor, modulation: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Returns y and the gradients of x and of the modulation, whose columns 1 and 0 are scale and shift."""
    x, modulation = x.detach().requires_grad_(), modulation.detach().requires_grad_()
    columns = modulation.chunk(6, dim=1)
    y = modulated_layer_norm(x, columns[1], columns[0], impl=impl)
    return [y, *torch.autograd.grad(y, (x, modulation), cotangent)]


def assert_as_accurate_as_reference(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Asserts that y, dx and the modulation's gradient are within twice the reference's own distance to fp64."""
    inputs = make_inputs(shape, dtype, device)
    truth = value_and_gradients("reference", *(t.double() for t in inputs))
    for name, true, reference, fused in zip(
        ("y", "dx", "dmodulation"),
        truth,
        value_and_gradients("reference", *inputs),
        value_and_gradients("triton", *inputs),
        strict=True,
    ):
        assert fused.dtype == dtype
        assert fused.shape == true.shape
        own_error = (reference.double() - true).norm()
        error = (fused.double() - true).norm()
        assert error <= 2 * own_error + 1e-6 * true.norm(), (
            f"{name}: {error:.3g} against the reference's {own_error:.3g}"
        )
