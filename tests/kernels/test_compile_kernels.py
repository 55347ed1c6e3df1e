"""The kernels inside torch.compile: one graph, the eager result, and force() obeyed after compilation."""

from __future__ import annotations

import pytest
import torch
from contentv_kernels import attention, force, modulated_layer_norm, report

pytestmark = pytest.mark.compile


def block(x, modulation):
    shift, scale, gate = modulation.chunk(3, dim=1)
    q = modulated_layer_norm(x, scale, shift).unflatten(-1, (2, -1))
    return x + gate[:, None] * attention(q, q, q).flatten(2)


def value_and_gradients(function):
    torch.manual_seed(0)
    x, modulation = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 48, requires_grad=True)
    y = function(x, modulation)
    return [y, *torch.autograd.grad(y.square().sum(), (x, modulation))]


def test_one_graph_and_the_same_gradients():
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(compiled), value_and_gradients(block), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_compiled_function_follows_a_later_force():
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    before = value_and_gradients(compiled)
    with force("attention", "math"):
        inside = value_and_gradients(compiled)
        assert report()["attention"].impl == "math"
    for a, b in zip(before, inside, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_the_preference_of_attention_kernels_is_traceable():
    """What runs on CUDA only: a graph may not break at the context that orders torch's kernels."""
    from contentv_kernels.attention import sdpa

    def ordered(q):
        with torch.nn.attention.sdpa_kernel(sdpa.CUDA_ORDER, set_priority=True):
            return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(torch.compile(ordered, fullgraph=True, backend="aot_eager")(q), ordered(q))
