"""Attention: every implementation against the formula, and the accelerators' ones through recording doubles."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from contentv_kernels import attention
from contentv_kernels.attention import flash, npu
from torch import Tensor


def heads_of(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    b, s, heads, dh = q.shape
    for i in range(b):
        for h in range(heads):
            for n in range(s):
                weights = torch.stack([(q[i, n, h] * k[i, m, h]).sum() / math.sqrt(dh) for m in range(s)]).exp()
                out[i, n, h] = (weights[:, None] * v[i, :, h]).sum(0) / weights.sum()
    return out


@pytest.mark.parametrize("impl", ["sdpa", "math"])
def test_formula(impl):
    q, k, v = heads_of((2, 5, 3, 8))
    out = attention(q, k, v, impl=impl)
    torch.testing.assert_close(out, naive(q, k, v), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["sdpa", "math"])
def test_gradients_against_finite_differences(impl):
    q, k, v = (x.requires_grad_() for x in heads_of((1, 3, 2, 8)))
    assert torch.autograd.gradcheck(lambda *args: attention(*args, impl=impl), (q, k, v))


def test_bf16_sdpa_is_as_accurate_as_the_formula_rounded_once_per_operation():
    exact = [x.requires_grad_() for x in heads_of((2, 33, 3, 64), torch.bfloat16)]
    wide = [x.detach().double().requires_grad_() for x in exact]
    cotangent = torch.randn(2, 33, 3, 64, dtype=torch.float64)

    def run(inputs, function):
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]

    def stepwise(q, k, v):
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 8).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    truth = run(wide, stepwise)
    for true, reference, out in zip(truth, run(exact, stepwise), run(exact, attention), strict=True):
        assert (out.double() - true).norm() <= 2 * (reference.double() - true).norm()


@pytest.mark.parametrize("impl", ["sdpa", "math"])
def test_strides_are_free_and_dtype_is_kept(impl):
    q, k, v = heads_of((2, 5, 3, 8), torch.bfloat16)
    packed = torch.stack([q, k, v], dim=-1).permute(4, 0, 2, 1, 3).contiguous().permute(0, 1, 3, 2, 4)
    out = attention(*packed.unbind(), impl=impl)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, attention(q, k, v, impl=impl))


def test_npu_double_gets_our_layout_and_the_operator_gives_the_formula(monkeypatch):
    """Holds the call against the operator's documentation; it does not show that an Ascend device agrees."""
    calls = []

    def npu_fusion_attention(query, key, value, head_num, input_layout, *, scale, keep_prob, pre_tockens, next_tockens):
        calls.append((tuple(query.shape), head_num, input_layout, scale, keep_prob, pre_tockens, next_tockens))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        probabilities = (q @ k.mT * scale).softmax(-1)
        out = (probabilities @ v).transpose(1, 2)
        statistics = torch.zeros(*probabilities.shape[:3], 8)
        return out, statistics, statistics, None, 0, 0, 0

    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu_fusion_attention=npu_fusion_attention))
    assert npu.why_not("npu", torch.bfloat16) is None
    assert npu.why_not("npu", torch.float64) == "npu_fusion_attention takes float16, bfloat16 or float32"
    q, k, v = heads_of((2, 5, 3, 16))
    torch.testing.assert_close(npu.run(q, k, v), naive(q, k, v))
    assert calls == [((2, 5, 3, 16), 3, "BSND", 0.25, 1.0, 65536, 65536)]


def test_flash_attn_double_gets_our_layout_with_consecutive_channels(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v):
        calls.extend((tuple(x.shape), x.stride(-1)) for x in (q, k, v))
        return naive(q, k, v)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    assert flash.why_not("cuda", torch.bfloat16) is None
    q, k, v = heads_of((1, 4, 2, 8))
    turned = q.mT.contiguous().mT
    assert turned.stride(-1) != 1
    torch.testing.assert_close(flash.run(turned, k, v), naive(q, k, v))
    assert calls == [((1, 4, 2, 8), 1)] * 3
