"""The full-size model on the meta device: its operations and its activations are those of the formulas."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from contentv.base.types import TokenCounts
from contentv.engine.recompute import recomputed
from contentv.models import layers, mmdit
from contentv.models.cost import (
    activation_bytes,
    activation_bytes_per_block,
    flops_per_step,
    parameter_count,
    weight_bytes,
)
from contentv.models.layers import RMSNorm
from contentv.models.mmdit import MMDiT, MMDiTConfig, flops_per_forward

FULL = MMDiTConfig()
FULL_GRID, FULL_TOKENS = (32, 54, 96), TokenCounts(41_472, 333)  # 125 frames of 432 x 768
SMALL = MMDiTConfig(
    num_layers=3, num_attention_heads=4, attention_head_dim=16, joint_attention_dim=24, pooled_projection_dim=20
)


class FusedRMS(torch.autograd.Function):
    """Keeps what CUDA's fused RMSNorm keeps (input, weight, 1 / rms): on the meta device torch has no fused one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# A fused attention computes its scores anew in its backward pass; torch would count that, a formula for MFU does not.
ATTENTION_FLOPS = {
    ATTENTION: lambda q, *_, **__: 4 * q[0] * q[1] * q[2] ** 2 * q[3],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda _, q, *__, **___: 8 * q[0] * q[1] * q[2] ** 2 * q[3]
    ),
}


def fused_attend(q: Tensor, k: Tensor, v: Tensor, tokens: TokenCounts) -> Tensor:
    """A fused attention, which the meta device does not choose by itself."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ATTENTION(q, k, v)[0].transpose(1, 2)


def use_fused_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the norms that run on CUDA into the model, as far as what they keep and return goes."""
    with monkeypatch.context() as importing:
        # torch reads the schema of a custom operator from its annotations, which the shape-checking hook wraps.
        importing.setattr(sys, "meta_path", [x for x in sys.meta_path if "jaxtyping" not in type(x).__module__])
        triton_norm = pytest.importorskip("contentv_kernels.modulated_layer_norm.triton")
    for module in (layers, mmdit):
        monkeypatch.setattr(module, "modulated_layer_norm", triton_norm.run)
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: FusedRMS.apply(x, self.weight))


@pytest.fixture(autouse=True)
def torch_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own linear: DeepSpeed replaces it, for the rest of the process, once a ZeRO-3 engine has been made."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.fixture(params=[True, False], ids=["fused_norms", "plain_norms"])
def fused_norms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        use_fused_norms(monkeypatch)
    return request.param


def meta_model(config: MMDiTConfig, dtype: torch.dtype = torch.bfloat16) -> MMDiT:
    with torch.device("meta"):
        model = MMDiT(config).to(dtype)
    model.attend = fused_attend
    return model


def meta_inputs(
    config: MMDiTConfig, grid: tuple[int, ...], text: int, b: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    return (
        torch.empty(b, config.in_channels, *grid, device="meta", dtype=dtype),
        torch.empty(b, device="meta"),
        torch.empty(b, text, config.joint_attention_dim, device="meta", dtype=dtype),
        torch.empty(b, config.pooled_projection_dim, device="meta", dtype=dtype),
    )


def recompute_blocks(model: MMDiT, recompute: str) -> None:
    if recompute != "none":
        for block in model.transformer_blocks:
            block.forward = recomputed(block.forward, selective=recompute == "selective")


class Storages(TorchDispatchMode):
    """Every storage that an operation made or read and that is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor):
                self.add(x)
        return out

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self.seen[storage._cdata] = weakref.ref(storage)

    def alive_bytes(self, without: Iterable[Tensor]) -> int:
        left_out = {x.untyped_storage()._cdata for x in without}
        alive = [(key, ref()) for key, ref in self.seen.items()]
        return sum(storage.nbytes() for key, storage in alive if storage is not None and key not in left_out)


@contextmanager
def saved_storages() -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd saves, by the hooks that torch has for it; weights are among them."""
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found


def bytes_without(saved: dict[int, int], tensors: Iterable[Tensor]) -> int:
    left_out = {x.untyped_storage()._cdata for x in tensors}
    return sum(size for key, size in saved.items() if key not in left_out)


SHAPES = {
    "small": SMALL,
    "odd_heads": replace(SMALL, num_layers=2, num_attention_heads=3, attention_head_dim=32),
    "no_qk_norm": replace(SMALL, qk_norm=None),
    "one_layer": replace(SMALL, in_channels=5, out_channels=7, patch_size=1, num_layers=1),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_activation_bytes_are_those_that_the_model_keeps(name: str, batch: int, fused_norms: bool) -> None:
    config = SHAPES[name]
    tokens = TokenCounts(2 * 4 * 6 // config.patch_size**2, 5)
    for dtype in (torch.bfloat16, torch.float32):
        for recompute in ("none", "selective", "full"):
            model = meta_model(config, dtype)
            recompute_blocks(model, recompute)
            inputs = meta_inputs(config, (2, 4, 6), 5, batch, dtype)
            storages = Storages()
            with saved_storages() as saved, storages:
                out = model(*inputs)
            expected = activation_bytes(config, tokens, dtype, recompute, batch=batch, fused_norms=fused_norms)
            # All that is alive: the graph's and recomputation's tensors, and what is no activation.
            kept = [axis for axes in model.positions._axes.values() for axis in axes]
            # Of a larger batch the model keeps a copy of the latents, frames first.
            callers = [inputs[1], *([inputs[0]] if batch > 1 else [])]
            assert storages.alive_bytes([*model.parameters(), *kept, *callers, out]) == expected
            if recompute != "selective":  # which keeps the attention's output past autograd
                assert bytes_without(saved, model.parameters()) == expected


def test_activation_bytes_on_a_real_device_in_fp32() -> None:
    torch.manual_seed(0)
    model = MMDiT(SMALL)
    inputs = [torch.randn(x.shape) for x in meta_inputs(SMALL, (2, 4, 6), 5, 1, torch.float32)]
    with saved_storages() as saved:
        model(*inputs)
    expected = activation_bytes(SMALL, TokenCounts(12, 5), torch.float32, fused_norms=False)
    assert bytes_without(saved, model.parameters()) == expected


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", SHAPES)
def test_step_flops_are_those_that_torch_counts(name: str, recompute: str) -> None:
    config = SHAPES[name]
    model = meta_model(config)
    recompute_blocks(model, recompute)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        model(*meta_inputs(config, (2, 4, 6), 5, 1, torch.bfloat16)).sum().backward()
    tokens = TokenCounts(2 * 4 * 6 // config.patch_size**2, 5)
    assert counter.get_total_flops() == flops_per_step(config, tokens, recompute)


@pytest.mark.parametrize("config", [FULL, *SHAPES.values()])
def test_parameter_count(config: MMDiTConfig) -> None:
    model = meta_model(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    assert weight_bytes(config, torch.bfloat16) == sum(p.untyped_storage().nbytes() for p in model.parameters())


def test_every_layer_of_the_full_model_runs_forward_and_backward(fused_norms: bool) -> None:
    model = meta_model(FULL)
    d, text = FULL.inner_dim, FULL_TOKENS.text
    for number, block in enumerate(model.transformer_blocks):
        last = number == FULL.num_layers - 1
        video_in, text_in, condition = (
            torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
            for shape in ((1, FULL_TOKENS.video, d), (1, text, d), (1, d))
        )
        with saved_storages() as saved:
            outputs = block(video_in, text_in, condition, fused_attend, FULL_TOKENS)
        assert [x.shape for x in outputs] == [video_in.shape, text_in.shape]
        expected = activation_bytes_per_block(FULL, FULL_TOKENS, torch.bfloat16, last=last, fused_norms=fused_norms)
        assert bytes_without(saved, [*block.parameters(), condition]) == expected  # all layers share the condition
        torch.autograd.backward(list(outputs), [torch.empty_like(x) for x in outputs])
        for name, x in [*block.named_parameters(), ("video", video_in), ("text", text_in), ("condition", condition)]:
            assert x.grad is not None, name
            assert x.grad.shape == x.shape


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_full_model_trains_on_125_frames(recompute: str, parity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fused_norms(monkeypatch)
    model = meta_model(FULL)
    recompute_blocks(model, recompute)
    inputs = meta_inputs(FULL, FULL_GRID, FULL_TOKENS.text, 1, torch.bfloat16)
    storages = Storages()
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    with counter:
        with storages:
            out = model(*inputs)
        forward = counter.get_total_flops()
        kept = [axis for axes in model.positions._axes.values() for axis in axes]
        alive = storages.alive_bytes([*model.parameters(), *kept, inputs[1], out])
        out.sum().backward()
    assert out.shape == inputs[0].shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    what = f"8B, 125 frames of 432 x 768, recompute {recompute}"
    against = "torch's count on the meta device"
    counted = counter.get_total_flops()
    assert forward == flops_per_forward(FULL, FULL_TOKENS)
    parity(f"operations of a step: {what}", against, abs(flops_per_step(FULL, FULL_TOKENS, recompute) / counted - 1), 0)
    formula = activation_bytes(FULL, FULL_TOKENS, torch.bfloat16, recompute)
    parity(f"activation bytes: {what}", against, abs(formula / alive - 1), 0)


def test_an_unknown_recompute_is_refused() -> None:
    with pytest.raises(ValueError, match="recompute=some"):
        activation_bytes_per_block(SMALL, TokenCounts(4, 1), torch.float32, "some")
    with pytest.raises(ValueError, match="recompute=some"):
        flops_per_step(SMALL, TokenCounts(4, 1), "some")
