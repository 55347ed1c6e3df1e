"""Attention over parts of the keys: parts merged give the whole, and so do the gradients of the parts."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contentv_kernels import attention_part, attention_part_backward, available, dispatch
from contentv_kernels.attention_part import aten, npu, reference
from torch import Tensor

LENGTHS = (4, 1, 7)


def draw(*shape: int, count: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]


def whole(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The formula over all keys and its gradients, by autograd."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, (q, k, v), grad)


@pytest.mark.parametrize("impl", ["flash_cpu", "math"])
def test_parts_make_up_the_whole(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK", 2)  # several blocks of queries
    q, grad = draw(2, 5, 3, 8, count=2)
    k, v = draw(2, sum(LENGTHS), 3, 8, count=2)
    out, lse, grad_q, grad_k, grad_v = whole(q, k, v, grad)
    keys, values = k.split(LENGTHS, 1), v.split(LENGTHS, 1)
    parts = [attention_part(q, *kv, impl=impl) for kv in zip(keys, values, strict=True)]
    total = torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), 0)
    merged = sum(o * (part_lse - total).exp().transpose(1, 2)[..., None] for o, part_lse in parts)
    torch.testing.assert_close(total, lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged, out, rtol=1e-12, atol=1e-12)
    shares = [attention_part_backward(grad, q, *kv, out, lse, impl=impl) for kv in zip(keys, values, strict=True)]
    torch.testing.assert_close(sum(s[0] for s in shares), grad_q, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat([s[1] for s in shares], 1), grad_k, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat([s[2] for s in shares], 1), grad_v, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", ["flash_cpu", "math"])
def test_bf16_statistics_are_fp32_and_results_are_bf16(impl: str) -> None:
    q, k, v, grad = draw(2, 5, 3, 8, count=4, dtype=torch.bfloat16)
    out, lse = attention_part(q, k, v, impl=impl)
    assert (out.dtype, lse.dtype, lse.shape) == (torch.bfloat16, torch.float32, (2, 3, 5))
    assert all(g.dtype == torch.bfloat16 for g in attention_part_backward(grad, q, k, v, out, lse, impl=impl))


def test_what_runs_where() -> None:
    for op in ("attention_part", "attention_part_backward"):
        usable = {
            kind: [name for name, why in available(op, kind, dtype).items() if why is None]
            for kind, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16), ("xpu", torch.float32))
        }
        assert usable == {"cpu": ["flash_cpu", "math"], "cuda": ["flash", "efficient", "math"], "xpu": ["math"]}
        assert "efficient" in [name for name, why in available(op, "cuda", torch.float32).items() if why is None]
        with pytest.raises(RuntimeError, match="needs a CUDA device"):
            dispatch.select(op, "flash", torch.zeros(1))


class Operators:
    """Stands for torch's operators on CUDA: checks what they are called with, and computes by the formula.

    It holds the calls against the operators' schemas; it does not show that a CUDA device agrees.
    """

    def __init__(self) -> None:
        self.called: list[str] = []

    def __call__(self, name: str) -> Any:
        schema = getattr(torch.ops.aten, name).default._schema
        assert self.takes(schema)
        return getattr(self, name)

    def takes(self, schema: Any) -> bool:
        self.called.append(schema.name.removeprefix("aten::"))
        return True

    def _scaled_dot_product_flash_attention(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, debug: bool
    ) -> tuple[Any, ...]:
        assert (dropout_p, is_causal, debug) == (0.0, False, False)
        out, lse = reference.forward(*(x.transpose(1, 2) for x in (query, key, value)))
        return out.transpose(1, 2), lse, None, None, query.shape[2], key.shape[2], None, None, None

    def _scaled_dot_product_flash_attention_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
        cum_seq_q: None, cum_seq_k: None, max_q: int, max_k: int, dropout_p: float, is_causal: bool, *philox: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        assert (cum_seq_q, cum_seq_k, max_q, max_k) == (None, None, query.shape[2], key.shape[2])
        assert (dropout_p, is_causal, len(philox)) == (0.0, False, 2)
        args = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        return [g.transpose(1, 2) for g in reference.backward(*args, logsumexp)]

    def _scaled_dot_product_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: None, compute_log_sumexp: bool, *rest: Any
    ) -> tuple[Any, ...]:
        assert (attn_bias, compute_log_sumexp, rest) == (None, True, (0.0, False))
        out, lse = reference.forward(*(x.transpose(1, 2) for x in (query, key, value)))
        rows = -(-lse.shape[2] // 32) * 32
        lse = torch.nn.functional.pad(lse, (0, rows - lse.shape[2]), value=float("inf"))
        return out.transpose(1, 2), lse, None, None

    def _scaled_dot_product_efficient_attention_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: None, out: Tensor,
        logsumexp: Tensor, seed: Tensor, offset: Tensor, dropout_p: float, wanted: list[bool], is_causal: bool,
    ) -> list[Tensor]:  # fmt: skip
        assert logsumexp.shape[2] % 32 == 0
        assert logsumexp[:, :, query.shape[2] :].isinf().all()
        assert (attn_bias, dropout_p, wanted, is_causal) == (None, 0.0, [True, True, True, False], False)
        args = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        return [g.transpose(1, 2) for g in reference.backward(*args, logsumexp[:, :, : query.shape[2]])]


@pytest.mark.parametrize("kind", ["flash", "efficient"])
def test_cuda_doubles_get_what_the_operators_want(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = Operators()
    monkeypatch.setattr(aten, "_operator", operators)
    q, k, v, grad = draw(2, 5, 3, 8, count=4)
    out, lse = getattr(aten, f"{kind}_forward")(q, k, v)
    grads = getattr(aten, f"{kind}_backward")(grad, q, k, v, out, lse)
    for got, want in zip((out, lse, *grads), whole(q, k, v, grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    name = f"_scaled_dot_product_{kind}_attention"
    assert operators.called == [name, f"{name}_backward"]


def test_npu_double_keeps_the_largest_score_and_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds the calls against the operators' documentation; it does not show that an Ascend device agrees."""

    def forward(query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **kwargs: Any) -> Any:
        assert (head_num, input_layout, kwargs["scale"]) == (3, "BSND", 8**-0.5)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * kwargs["scale"]
        largest = scores.amax(-1, keepdim=True)
        total = (scores - largest).exp().sum(-1, keepdim=True)
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
        return out, largest.expand(-1, -1, -1, 8), total.expand(-1, -1, -1, 8), None, 0, 0, 0

    def backward(
        query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
        softmax_max: Tensor, softmax_sum: Tensor, attention_in: Tensor, scale_value: float, **kwargs: Any,
    ) -> Any:  # fmt: skip
        assert (head_num, input_layout, scale_value, softmax_max.shape[-1]) == (3, "BSND", 8**-0.5, 8)
        lse = (softmax_max + softmax_sum.log())[..., 0]
        return *reference.backward(dy, query, key, value, attention_in, lse), None

    double = SimpleNamespace(npu_fusion_attention=forward, npu_fusion_attention_grad=backward)
    monkeypatch.setitem(sys.modules, "torch_npu", double)
    q, k, v, grad = draw(2, 5, 3, 8, count=4)
    out, lse = npu.forward(q, k, v)
    for got, want in zip(
        (out, lse, *npu.backward(grad, q, k, v, out, lse)), whole(q, k, v, grad), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
