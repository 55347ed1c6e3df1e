"""The NPU kernels behind their seams: a whole model on a recording double of torch_npu follows the same model without.

The double computes by plain formulas what torch_npu's documentation says. What an Ascend device computes, it does not
show.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from contentv_kernels import available, dispatch, report, rms_norm
from torch import Tensor

from contentv.models.mmdit import MMDiT, MMDiTConfig

CALLS: list[tuple[str, tuple[int, ...]]] = []


def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """As documented: self has 2 to 8 dimensions, gamma the same dtype; returns y and 1 / rms."""
    assert self.dtype == gamma.dtype
    assert 2 <= self.ndim <= 8
    CALLS.append(("npu_rms_norm", tuple(self.shape)))
    inverse = (self.float().pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return (self * inverse).to(self.dtype) * gamma, inverse


def npu_fusion_attention(query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **options: float):
    """As documented for the layout BSND: attention, and the softmax statistics eight times over."""
    known = {"scale", "keep_prob", "pre_tockens", "next_tockens"}
    assert set(options) == known
    assert input_layout == "BSND"
    assert head_num == query.shape[2]
    assert query.shape[1] - 1 <= options["pre_tockens"]
    CALLS.append(("npu_fusion_attention", tuple(query.shape)))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q @ k.mT * options["scale"]
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights / total @ v).transpose(1, 2)
    return out, largest.expand(*largest.shape[:3], 8), total.expand(*total.shape[:3], 8), None, 0, 0, 0


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the tables believe that tensors lie on an NPU, and puts the double in torch_npu's place."""
    CALLS.clear()
    double = SimpleNamespace(npu_rms_norm=npu_rms_norm, npu_fusion_attention=npu_fusion_attention)
    monkeypatch.setitem(sys.modules, "torch_npu", double)
    monkeypatch.setattr(
        dispatch, "select",
        lambda op, impl, x: dispatch._functions[op, dispatch._resolve(op, impl, None, "npu", x.dtype)],
    )  # fmt: skip


def loss_and_gradients() -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    config = MMDiTConfig(
        num_layers=2, num_attention_heads=3, attention_head_dim=16, joint_attention_dim=32, pooled_projection_dim=24,
    )  # fmt: skip
    model = MMDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(2, 16, 2, 4, 6), torch.tensor([100.0, 700.0]), torch.randn(2, 5, 32), torch.randn(2, 24)
    loss = model(*inputs).square().mean()
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


def test_a_model_on_the_npus_kernels_follows_the_same_model_without(request: pytest.FixtureRequest) -> None:
    loss, gradients = loss_and_gradients()
    request.getfixturevalue("npu")
    npu_loss, npu_gradients = loss_and_gradients()
    torch.testing.assert_close(npu_loss, loss, rtol=1e-5, atol=0)
    for got, expected in zip(npu_gradients, gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item() + 1e-12)
    norms = [shape for name, shape in CALLS if name == "npu_rms_norm"]
    attentions = [shape for name, shape in CALLS if name == "npu_fusion_attention"]
    tokens = 2 * 2 * 3
    assert sorted(norms) == sorted([(2, tokens, 3, 16), (2, 5, 3, 16)] * 4)  # q and k of both streams and layers
    assert attentions == [(2, tokens + 5, 3, 16)] * 2
    assert {op: report()[op].impl for op in ("attention", "rms_norm", "modulated_layer_norm")} == {
        "attention": "npu_fusion_attention", "rms_norm": "npu_rms_norm", "modulated_layer_norm": "reference",
    }  # fmt: skip


def test_rms_norm_is_the_formula_and_its_dtype_that_of_the_input(npu: None) -> None:
    x, weight = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    expected = torch.stack([row / (sum(v * v for v in row) / 8 + 1e-3) ** 0.5 for row in x.reshape(-1, 8)]) * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-3, impl="torch"), expected.reshape(x.shape))
    half = rms_norm(x.bfloat16(), weight.float(), 1e-3)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected.reshape(x.shape), rtol=3e-2, atol=3e-2)
    assert available("rms_norm", "npu", torch.bfloat16) == {"npu_rms_norm": None, "torch": None}


def test_where_there_is_no_npu_the_reason_is_given() -> None:
    assert available("rms_norm", "cpu", torch.float32) == {
        "npu_rms_norm": "npu_rms_norm needs an Ascend NPU",
        "torch": None,
    }
    with pytest.raises(RuntimeError, match="npu_rms_norm needs an Ascend NPU"):
        rms_norm(torch.zeros(1, 2), torch.ones(2), impl="npu_rms_norm")
