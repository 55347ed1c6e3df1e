"""The kernels and a training step on a CUDA device (`make test-gpu`)."""

from __future__ import annotations

import pytest
import torch
from contentv_kernels import (
    attention,
    attention_part,
    attention_part_backward,
    available,
    force,
    modulated_layer_norm,
    report,
)
from contentv_kernels.attention import sdpa
from layer_norm_cases import SHAPES, assert_as_accurate_as_reference, make_inputs, value_and_gradients
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 14669, 2432)], ids=str)
def test_layer_norm_is_as_accurate_as_the_reference(shape, dtype):
    assert_as_accurate_as_reference(shape, dtype, "cuda")


def test_layer_norm_gradients_are_deterministic():
    inputs = make_inputs((3, 4429, 2432), torch.bfloat16, "cuda")
    first, second = (value_and_gradients("triton", *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_layer_norm_past_the_reach_of_32_bit_offsets():
    x = torch.randn(1, 1, 2432, device="cuda", dtype=torch.bfloat16).expand(2, 450_000, 2432).contiguous()
    assert x.numel() > 2**31
    zero = torch.zeros(2, 2432, device="cuda", dtype=torch.bfloat16)
    y = modulated_layer_norm(x, zero, zero, impl="triton")
    assert torch.equal(y[-1, -1], y[0, 0])


def test_layer_norm_compiles_into_one_graph():
    x, modulation, cotangent = make_inputs((2, 333, 2432), torch.bfloat16, "cuda")

    def step(x, modulation):
        shift, scale, gate = modulation.chunk(6, dim=1)[:3]
        return modulated_layer_norm(x, scale, shift, impl="triton") * gate[:, None]

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        inputs = [t.clone().requires_grad_() for t in (x, modulation)]
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, cotangent)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("impl", ["sdpa", "flash_attn"])
@pytest.mark.parametrize("tokens", [333, 1357])
def test_attention_is_as_accurate_as_torchs_unfused_kernel(impl, tokens):
    reason = available("attention", "cuda", torch.bfloat16)[impl]
    if reason is not None:
        pytest.skip(reason)
    inputs = [torch.randn(2, tokens, 38, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    cotangent = torch.randn(2, tokens, 38, 64, device="cuda", dtype=torch.float64)

    def run(args, impl):
        out = attention(*args, impl=impl)
        return [out, *torch.autograd.grad(out, args, cotangent.to(out.dtype))]

    truth = run(wide, "math")
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)
        reference = [out, *torch.autograd.grad(out, inputs, cotangent.bfloat16())]
    for true, own, fused in zip(truth, reference, run(inputs, impl), strict=True):
        assert (fused.double() - true).norm() <= 2 * (own.double() - true).norm()


def test_attention_takes_cudnn_where_it_can():
    q = torch.randn(1, 1357, 38, 64, device="cuda", dtype=torch.bfloat16)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            sdpa.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3)
    except RuntimeError as error:
        pytest.skip(f"this build or device has no cuDNN attention: {error}")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q, q, q)
    assert any("cudnn_attention" in event.key for event in profile.key_averages())


def test_training_step_learns_and_agrees_with_the_references():
    from contentv.models.mmdit import MMDiT, MMDiTConfig

    torch.manual_seed(0)
    config = MMDiTConfig(num_layers=2, num_attention_heads=6, joint_attention_dim=64, pooled_projection_dim=32)
    model = MMDiT(config)
    model.init_weights(0)
    model = model.to("cuda", torch.bfloat16)
    latents, target = torch.randn(2, 2, 16, 3, 16, 28, device="cuda", dtype=torch.bfloat16).unbind()
    arguments = (
        torch.tensor([100.0, 900.0], device="cuda"),
        torch.randn(2, 33, 64, device="cuda", dtype=torch.bfloat16),
        torch.randn(2, 32, device="cuda", dtype=torch.bfloat16),
    )

    def loss():
        return (model(latents, *arguments).float() - target.float()).square().mean()

    with force("attention", "math"), force("modulated_layer_norm", "reference"):
        expected = loss().item()
    assert loss().item() == pytest.approx(expected, rel=1e-2)
    assert report()["modulated_layer_norm"].impl == "triton"

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert value.item() < 0.9 * expected


@pytest.mark.parametrize(
    ("impl", "dtype"), [("flash", torch.bfloat16), ("efficient", torch.bfloat16), ("efficient", torch.float32)]
)
def test_attention_in_parts_is_as_accurate_as_the_formula_step_by_step(impl, dtype):
    draw = [torch.randn(2, n, 19, 64, device="cuda", dtype=torch.float64).to(dtype) for n in (333, 1357, 1357, 333)]
    parts = [slice(0, 333), slice(333, 1357)]

    def stepwise(inputs):
        q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 8).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]

    def in_parts(q, k, v, grad):
        merged = [attention_part(q, k[:, part], v[:, part], impl=impl) for part in parts]
        lse = torch.logsumexp(torch.stack([part_lse for _, part_lse in merged]), 0)
        weights = [(part_lse - lse).exp().transpose(1, 2)[..., None] for _, part_lse in merged]
        out = sum(o * w for (o, _), w in zip(merged, weights, strict=True)).to(q.dtype)
        shares = [attention_part_backward(grad, q, k[:, p], v[:, p], out, lse, impl=impl) for p in parts]
        return [out, sum(s[0].float() for s in shares), *(torch.cat([s[i] for s in shares], 1) for i in (1, 2))]

    truth = stepwise([x.double() for x in draw])
    for true, reference, ours in zip(truth, stepwise(draw), in_parts(*draw), strict=True):
        assert (ours.double() - true).norm() <= 2 * (reference.double() - true).norm()
