"""The Triton kernels on CPU tensors, run by test_modulated_layer_norm.py in a process with TRITON_INTERPRET=1.

Triton decides between compiling and interpreting when its modules are first imported, so this cannot share a process
with tests that may already have imported it. The interpreter cuts bf16 off where a GPU rounds, which costs it about
half of the factor 2 allowed.
"""

from __future__ import annotations

import pytest
import torch
from contentv_kernels import force, modulated_layer_norm, report
from contentv_kernels.modulated_layer_norm import triton as kernel
from layer_norm_cases import SHAPES, assert_as_accurate_as_reference, make_inputs, value_and_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_as_accurate_as_the_reference(shape, dtype):
    assert_as_accurate_as_reference(shape, dtype, "cpu")


def test_strides_of_x_and_of_its_gradient_are_free():
    x, modulation, cotangent = make_inputs((2, 6, 24), torch.float32, "cpu")
    expected = value_and_gradients("reference", x, modulation, cotangent)
    turned = value_and_gradients("triton", x.mT.contiguous().mT, modulation, cotangent.mT.contiguous().mT)
    for a, b in zip(turned, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_modulation_may_have_another_dtype_than_the_tokens():
    x, modulation, _ = make_inputs((2, 6, 24), torch.float32, "cpu")
    scale, shift, _ = modulation[:, :72].chunk(3, dim=1)
    scale, shift, x = scale.clone().requires_grad_(), shift.bfloat16().requires_grad_(), x.bfloat16()
    y = modulated_layer_norm(x, scale, shift, impl="triton")
    y.sum().backward()
    assert (y.dtype, scale.grad.dtype, shift.grad.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    torch.testing.assert_close(shift.grad, torch.full_like(shift, 6.0))


def test_no_tokens_give_no_output_and_zero_gradients():
    x = torch.zeros(2, 0, 8, requires_grad=True)
    scale = torch.ones(2, 8, requires_grad=True)
    y = modulated_layer_norm(x, scale, scale, impl="triton")
    y.sum().backward()
    assert y.shape == (2, 0, 8)
    assert torch.equal(scale.grad, torch.zeros(2, 8))


def test_torch_library_contract():
    x, modulation, _ = make_inputs((2, 6, 24), torch.float32, "cpu")
    args = tuple(t.clone().requires_grad_() for t in (x, modulation[:, :24], modulation[:, 24:48]))
    torch.library.opcheck(kernel.forward, (*args, 1e-6))


def test_one_graph_under_compile_with_the_same_result():
    inputs = make_inputs((2, 6, 24), torch.float32, "cpu")

    def step(x, modulation):
        columns = modulation.chunk(6, dim=1)
        return modulated_layer_norm(torch.sin(x), columns[1], columns[0], impl="triton") * columns[2][:, None]

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x, modulation = (t.clone().requires_grad_() for t in inputs[:2])
        y = function(x, modulation)
        results.append([y, *torch.autograd.grad(y, (x, modulation), inputs[2])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-6)


def test_force_reaches_the_kernel_and_a_wide_token_is_refused():
    with force("modulated_layer_norm", "triton"):
        modulated_layer_norm(torch.randn(1, 2, 8), torch.zeros(1, 8), torch.zeros(1, 8))
        assert report()["modulated_layer_norm"].impl == "triton"
        wide = torch.zeros(1, 1, kernel.MAX_WIDTH + 1)
        with pytest.raises(RuntimeError, match="d up to 16384, not 16385"):
            modulated_layer_norm(wide, wide[0], wide[0])
