"""The transformer against diffusers' SD3 transformer and against a naive several-frame model."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from contentv.base.errors import UserError
from contentv.base.types import TokenCounts
from contentv.models.layers import Modulation, RMSNorm
from contentv.models.mmdit import MMDiT, MMDiTConfig, flops_per_forward, init_parameter

SMALL = MMDiTConfig(
    num_layers=3, num_attention_heads=4, attention_head_dim=16, joint_attention_dim=24, pooled_projection_dim=20
)
CONFIGS = {
    "small": SMALL,
    "no_qk_norm": MMDiTConfig(2, 2, 24, joint_attention_dim=12, pooled_projection_dim=10, qk_norm=None),
    "other_channels": MMDiTConfig(
        1, 1, 32, in_channels=5, out_channels=7, patch_size=1, joint_attention_dim=8, pooled_projection_dim=6
    ),
    "odd_heads": MMDiTConfig(2, 3, 32, in_channels=4, out_channels=4, joint_attention_dim=40, pooled_projection_dim=8),
}


def randomize(model: nn.Module, seed: int) -> None:
    """Nothing at zero or one: a term that is dropped or doubled must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 16
            parameter.normal_(std=1.0 / math.sqrt(fan_in), generator=generator)
            if parameter.ndim == 1 and "norm_" in name.split(".")[-2]:
                parameter.add_(1.0)


def make_model(config: MMDiTConfig, seed: int = 0) -> MMDiT:
    model = MMDiT(config)
    randomize(model, seed)
    return model


def make_diffusers(config: MMDiTConfig) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        pos_embed_max_size=12,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        patch_size=config.patch_size,
        joint_attention_dim=config.joint_attention_dim,
        caption_projection_dim=config.inner_dim,
        pooled_projection_dim=config.pooled_projection_dim,
        qk_norm=config.qk_norm,
    )


def make_inputs(config: MMDiTConfig, t: int, h: int, w: int, b: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(b, config.in_channels, t, h, w, generator=generator),
        torch.tensor([3.25, 871.5])[:b],
        torch.randn(b, 5, config.joint_attention_dim, generator=generator),
        torch.randn(b, config.pooled_projection_dim, generator=generator),
    )


def use_image_positions(model: MMDiT, image_model: SD3Transformer2DModel, h: int, w: int) -> None:
    table = image_model.pos_embed.cropped_pos_embed(h, w)[0]
    model.positions = lambda t, rows, columns, dim: table


@pytest.mark.parametrize("name", CONFIGS)
def test_one_frame_equals_diffusers_image_model(name: str) -> None:
    config = CONFIGS[name]
    model = make_model(config)
    truth = make_diffusers(config)
    missing, unexpected = truth.load_state_dict(model.state_dict(), strict=False)
    assert missing == ["pos_embed.pos_embed"]
    assert unexpected == []
    h, w = 6, 10
    use_image_positions(model, truth, h, w)
    latents, timestep, tokens, pooled = make_inputs(config, 1, h, w)

    out = model(latents, timestep, tokens, pooled)
    expected = truth(latents[:, :, 0], tokens, pooled, timestep).sample[:, :, None]
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()

    weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    ours, theirs = dict(model.named_parameters()), dict(truth.named_parameters())
    assert set(ours) == set(theirs)
    last = f"transformer_blocks.{config.num_layers - 1}.attn."
    unread = (f"{last}add_q_proj", f"{last}norm_added_q")  # the last layer's text output is dropped
    for key, parameter in ours.items():
        assert parameter.grad is not None, key
        scale = theirs[key].grad.abs().max()
        assert scale > 0 or key.startswith(unread), key
        assert (parameter.grad - theirs[key].grad).abs().max() <= 2e-5 * scale + 1e-6, key


def test_bf16_error_is_within_twice_that_of_diffusers() -> None:
    model = make_model(SMALL)
    truth = make_diffusers(SMALL)
    truth.load_state_dict(model.state_dict(), strict=False)
    use_image_positions(model, truth, 8, 8)
    inputs = make_inputs(SMALL, 1, 8, 8)
    latents, timestep, tokens, pooled = inputs
    with torch.no_grad():
        exact = model(*inputs)
        low = [x.to(torch.bfloat16) for x in (latents, tokens, pooled)]
        ours = model.to(torch.bfloat16)(low[0], timestep, low[1], low[2])
        theirs = truth.to(torch.bfloat16)(low[0][:, :, 0], low[1], low[2], timestep).sample[:, :, None]
    assert ours.dtype == torch.bfloat16
    error, allowed = (ours - exact).pow(2).mean().sqrt(), (theirs - exact).pow(2).mean().sqrt()
    assert 0 < error <= 2 * allowed


def naive_video_forward(truth: SD3Transformer2DModel, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The published video class's arithmetic, step by step, on diffusers' own layers."""
    latents, timestep, text, pooled = inputs
    b, _, t, h, w = latents.shape
    p, dim = truth.config.patch_size, truth.inner_dim
    frames = []
    for i in range(t):
        patches = truth.pos_embed.proj(latents[:, :, i])
        frames.append(patches.permute(0, 2, 3, 1).reshape(b, -1, dim))
    video = torch.cat(frames, dim=1)
    positions = get_3d_sincos_pos_embed(
        embed_dim=dim, spatial_size=(w // p, h // p), temporal_size=t, spatial_interpolation_scale=0.5
    )
    video = video + positions.reshape(1, -1, dim).to(video.dtype)
    temb = truth.time_text_embed(timestep, pooled)
    text = truth.context_embedder(text)
    for block in truth.transformer_blocks:
        text, video = block(video, text, temb)
    tokens = truth.proj_out(truth.norm_out(video, temb))
    out = torch.zeros(b, truth.out_channels, t, h, w)
    for n in range(tokens.shape[1]):
        i, row, column = n // ((h // p) * (w // p)), (n // (w // p)) % (h // p), n % (w // p)
        patch = tokens[:, n].reshape(b, p, p, truth.out_channels)
        for y in range(p):
            for x in range(p):
                out[:, :, i, row * p + y, column * p + x] = patch[:, y, x]
    return out


@pytest.mark.parametrize("name", ["small", "other_channels"])
def test_several_frames_equal_the_naive_video_model(name: str) -> None:
    config = CONFIGS[name]
    model = make_model(config, seed=1)
    truth = make_diffusers(config)
    truth.load_state_dict(model.state_dict(), strict=False)
    inputs = make_inputs(config, 3, 4, 6)
    with torch.no_grad():
        expected = naive_video_forward(truth, inputs)
        assert (model(*inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_full_size_names_shapes_and_count() -> None:
    with torch.device("meta"):
        state = MMDiT(MMDiTConfig()).state_dict()
    assert sum(t.numel() for t in state.values()) == 8_056_627_520
    assert len(state) == 1226
    with torch.device("meta"):
        truth = make_diffusers(MMDiTConfig(num_layers=2)).state_dict()
        two_layers = MMDiT(MMDiTConfig(num_layers=2)).state_dict()
    del truth["pos_embed.pos_embed"]
    assert {k: v.shape for k, v in two_layers.items()} == {k: v.shape for k, v in truth.items()}
    # Of the published model's sorted list of [name, shape].
    listing = json.dumps(sorted([name, list(tensor.shape)] for name, tensor in state.items()))
    assert (
        hashlib.sha256(listing.encode()).hexdigest()
        == "b650f0c625e4fff9095a2a7c8ddfd26efb9bcf7d2cfb504f6642c1941c6d3edd"
    )


def test_seams_see_the_true_token_counts_and_can_split() -> None:
    model = make_model(SMALL)
    inputs = make_inputs(SMALL, 2, 4, 6)
    expected = model(*inputs)
    seen: list[tuple[TokenCounts, tuple[int, ...]]] = []
    attend = model.attend

    def spy(q: Tensor, k: Tensor, v: Tensor, tokens: TokenCounts) -> Tensor:
        seen.append((tokens, tuple(q.shape)))
        return attend(q, k, v, tokens)

    model.attend = spy
    # Padding with tokens that the attention drops again must change nothing: the model may not count by itself.
    model.split_tokens = lambda x: torch.cat([x, x[:, :1]], dim=1)
    model.merge_tokens = lambda x, n: x[:, :n]

    def attend_without_padding(q: Tensor, k: Tensor, v: Tensor, tokens: TokenCounts) -> Tensor:
        real = torch.tensor([*range(tokens.video), *range(tokens.video + 1, tokens.video + 1 + tokens.text)])
        out = torch.zeros_like(q)
        out[:, real] = spy(q[:, real], k[:, real], v[:, real], tokens)
        return out

    model.attend = attend_without_padding
    assert torch.allclose(model(*inputs), expected, atol=1e-6)
    assert seen == [(TokenCounts(12, 5), (2, 17, 4, 16))] * 3


def test_each_parameter_is_read_only_in_its_own_modules_forward() -> None:
    """A partitioned optimiser gathers a module's own parameters around its forward and frees them after."""
    model = make_model(SMALL)
    inputs = make_inputs(SMALL, 1, 4, 4)
    with torch.no_grad():
        expected = model(*inputs)
    stored = {m: {k: p.data for k, p in m.named_parameters(recurse=False)} for m in model.modules()}
    order: list[nn.Module] = []

    def gather(module: nn.Module, _: object) -> None:
        order.append(module)
        for key, parameter in module.named_parameters(recurse=False):
            parameter.data = stored[module][key]

    def free(module: nn.Module, *_: object) -> None:
        for _key, parameter in module.named_parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(free)
        free(module)
    with torch.no_grad():
        assert torch.equal(model(*inputs), expected)
        first = list(order)
        order.clear()
        model(*make_inputs(SMALL, 3, 6, 4))
    assert order == first
    owners = {m for m in model.modules() if list(m.parameters(recurse=False))}
    assert owners == {m for m in first if m in owners}


def test_initial_model_predicts_zero_and_is_a_function_of_the_seed() -> None:
    model, again, other = (MMDiT(SMALL) for _ in range(3))
    model.init_weights(5)
    again.init_weights(5)
    other.init_weights(6)
    assert model(*make_inputs(SMALL, 2, 4, 4)).abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    q, q_other = (m.transformer_blocks[0].attn.to_q.weight for m in (model, other))
    assert not torch.equal(q, q_other)
    bound = math.sqrt(6 / (64 + 64))
    assert 0.9 * bound < q.abs().max() <= bound
    time = model.time_text_embed.timestep_embedder.linear_1.weight
    assert abs(time.std() - 0.02) < 0.001
    for module in model.modules():
        if isinstance(module, RMSNorm):
            assert torch.equal(module.weight, torch.ones(16))
        if isinstance(module, Modulation):
            assert module.linear.weight.abs().max() == 0
    # The first step must be able to move: the output layer gets a gradient although the output is 0.
    model(*make_inputs(SMALL, 1, 4, 4)).sum().backward()
    assert model.proj_out.weight.grad.abs().max() > 0
    part = torch.empty_like(q, dtype=torch.bfloat16)
    init_parameter("transformer_blocks.0.attn.to_q.weight", part, 5)
    assert torch.equal(part, q.to(torch.bfloat16))


def test_heads_follow_the_width_of_the_projections() -> None:
    model = make_model(SMALL)
    shapes: list[tuple[int, ...]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, tokens: TokenCounts) -> Tensor:
        shapes.append(tuple(q.shape))
        return torch.zeros_like(q)

    attention = model.transformer_blocks[0].attn
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        setattr(attention, name, nn.Linear(64, 32))
    attention.to_out[0], attention.to_add_out = nn.Linear(32, 64), nn.Linear(32, 64)
    model.attend = spy
    model(*make_inputs(SMALL, 1, 4, 4))
    assert shapes[0] == (2, 9, 2, 16)
    assert shapes[1] == (2, 9, 4, 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    config = CONFIGS[name]
    inputs = make_inputs(config, 2, 4, 6, b=1)
    with torch.device("meta"):
        model = MMDiT(config)
    with FlopCounterMode(display=False) as counter:
        model(*(x.to("meta") for x in inputs))
    tokens = TokenCounts(video=2 * 4 * 6 // config.patch_size**2, text=5)
    assert flops_per_forward(config, tokens) == counter.get_total_flops()


def test_wrong_configs_and_shapes_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.num_layers"):
        MMDiTConfig(num_layers=0)
    with pytest.raises(UserError, match="multiple of 16"):
        MMDiTConfig(num_attention_heads=3, attention_head_dim=20)
    with pytest.raises(UserError, match="layer_norm"):
        MMDiTConfig(qk_norm="layer_norm")
    with pytest.raises(ValueError, match="5 x 6"):
        make_model(SMALL)(*make_inputs(SMALL, 1, 5, 6))
