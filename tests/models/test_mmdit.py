"""The transformer against diffusers' SD3 transformer and against the published video class, written anew."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable

import pytest
import torch
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from published_video import PublishedVideo, by_formula, position_table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from contentv.base.errors import UserError
from contentv.base.types import TokenCounts
from contentv.models.layers import Modulation, RMSNorm
from contentv.models.mmdit import MMDiT, MMDiTConfig, flops_per_forward, init_parameter
from contentv.models.positions import SinCos3D

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


Parity = Callable[[str, str, float, float], None]
PUBLISHED = "published video class (our reading)"


def make_diffusers(config: MMDiTConfig, kind: type[SD3Transformer2DModel] = SD3Transformer2DModel) -> nn.Module:
    return kind(
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


def with_weights_of(model: MMDiT, kind: type[SD3Transformer2DModel] = SD3Transformer2DModel) -> nn.Module:
    truth = make_diffusers(model.config, kind)
    missing, unexpected = truth.load_state_dict(model.state_dict(), strict=False)
    assert missing == ["pos_embed.pos_embed"]
    assert unexpected == []
    return truth


def make_inputs(config: MMDiTConfig, t: int, h: int, w: int, b: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(b, config.in_channels, t, h, w, generator=generator),
        torch.tensor([3.25, 871.5])[:b],
        torch.randn(b, 5, config.joint_attention_dim, generator=generator),
        torch.randn(b, config.pooled_projection_dim, generator=generator),
    )


def use_image_positions(model: MMDiT, image_model: nn.Module, h: int, w: int) -> None:
    table = image_model.pos_embed.cropped_pos_embed(h, w)[0]
    model.positions = lambda t, rows, columns, dim: table


def largest_error(value: Tensor, truth: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float(((value - truth).abs().max() / truth.abs().max()).detach())


def rms_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).square().mean().sqrt().detach())


def low(inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In bf16, but for the timestep."""
    latents, timestep, tokens, pooled = inputs
    return latents.bfloat16(), timestep, tokens.bfloat16(), pooled.bfloat16()


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Of the same weighted sum of any model's output."""
    model.zero_grad(set_to_none=True)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(found: dict[str, Tensor], truth: dict[str, Tensor], config: MMDiTConfig) -> float:
    """The largest over the parameters of |difference| / |truth|, in the Euclidean norm."""
    assert set(found) == set(truth)
    last = f"transformer_blocks.{config.num_layers - 1}.attn."
    unread = (f"{last}add_q_proj", f"{last}norm_added_q")  # the last layer's text output is dropped
    errors = []
    for name, expected in truth.items():
        if name.startswith(unread):
            assert expected.abs().max() == found[name].abs().max() == 0, name
        else:
            assert expected.norm() > 0, name
            errors.append(float((found[name] - expected).norm() / expected.norm()))
    return max(errors)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_frame_equals_diffusers_image_model(name: str, parity: Parity) -> None:
    config = CONFIGS[name]
    model = make_model(config)
    truth = with_weights_of(model)
    h, w = 6, 10
    use_image_positions(model, truth, h, w)
    latents, timestep, tokens, pooled = make_inputs(config, 1, h, w)

    out = model(latents, timestep, tokens, pooled)
    expected = truth(latents[:, :, 0], tokens, pooled, timestep).sample[:, :, None]
    assert out.shape == expected.shape
    diffusers = "diffusers SD3Transformer2DModel"
    parity("MMDiT forward, one frame, fp32", diffusers, largest_error(out, expected), 1e-5)

    # 1e-5 is some 170 roundings of fp32: far above what another order of the same sums does, far below a wrong term.
    ours, theirs = gradients(model, out), gradients(truth, expected)
    parity("MMDiT backward, one frame, fp32", diffusers, gradient_error(ours, theirs, config), 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_error_is_within_twice_that_of_diffusers(name: str, parity: Parity) -> None:
    model = make_model(CONFIGS[name])
    truth = with_weights_of(model)
    use_image_positions(model, truth, 8, 8)
    inputs = make_inputs(CONFIGS[name], 1, 8, 8)
    exact_gradients = gradients(model, exact := model(*inputs))
    latents, timestep, tokens, pooled = low(inputs)
    ours = model.bfloat16()(latents, timestep, tokens, pooled)
    theirs = truth.bfloat16()(latents[:, :, 0], tokens, pooled, timestep).sample[:, :, None]
    assert ours.dtype == torch.bfloat16
    error, allowed = rms_error(ours, exact), rms_error(theirs, exact)
    assert error > 0
    against = "diffusers SD3Transformer2DModel: error in bf16 as a multiple of its own"
    parity("MMDiT forward, one frame, bf16", against, error / allowed, 2.0)
    errors = [
        sum(float((g - exact_gradients[k]).square().sum()) for k, g in gradients(m, out).items()) ** 0.5
        for m, out in ((model, ours), (truth, theirs))
    ]
    parity("MMDiT backward, one frame, bf16", against, errors[0] / errors[1], 2.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_several_frames_equal_the_published_video_class(name: str, parity: Parity) -> None:
    config = CONFIGS[name]
    model = make_model(config, seed=1)
    state = {key: value.detach().double().requires_grad_() for key, value in model.state_dict().items()}
    inputs = make_inputs(config, 3, 4, 6)
    truth = by_formula(state, config.num_attention_heads, *inputs)
    out = model(*inputs)
    parity("MMDiT forward, several frames, fp32", f"{PUBLISHED}: its formula in fp64", largest_error(out, truth), 1e-5)

    published = with_weights_of(model, PublishedVideo)
    expected = published(*inputs)
    layers = f"{PUBLISHED}: on diffusers' layers"
    parity("MMDiT forward, several frames, fp32", layers, largest_error(out, expected), 1e-5)
    ours, theirs = gradients(model, out), gradients(published, expected)
    parity("MMDiT backward, several frames, fp32", layers, gradient_error(ours, theirs, config), 1e-5)

    weight = torch.linspace(-1, 1, truth.numel(), dtype=truth.dtype).view_as(truth)
    (truth * weight).sum().backward()
    exact = {key: torch.zeros_like(value) if value.grad is None else value.grad for key, value in state.items()}
    error, allowed = gradient_error(ours, exact, config), gradient_error(theirs, exact, config)
    against = f"{PUBLISHED}: error to its formula in fp64 as a multiple of that of diffusers' layers"
    parity("MMDiT backward, several frames, fp32", against, error / allowed, 2.0)

    with torch.no_grad():
        ours_low, theirs_low = model.bfloat16()(*low(inputs)), published.bfloat16()(*low(inputs))
    against = f"{PUBLISHED}: error in bf16 as a multiple of that of diffusers' layers"
    parity(
        "MMDiT forward, several frames, bf16", against, rms_error(ours_low, truth) / rms_error(theirs_low, truth), 2.0
    )


def test_the_formula_is_that_of_diffusers_image_model_with_other_positions(parity: Parity) -> None:
    """The double must itself be right: one frame, its positions in diffusers' image model."""
    truth = make_diffusers(SMALL)
    randomize(truth, 3)
    truth.pos_embed.pos_embed = table_in_square(position_table(1, 3, 5, SMALL.inner_dim), 12, 3, 5).float()
    latents, timestep, tokens, pooled = make_inputs(SMALL, 1, 6, 10)
    state = {key: value.double() for key, value in truth.state_dict().items() if key != "pos_embed.pos_embed"}
    with torch.no_grad():
        expected = truth(latents[:, :, 0], tokens, pooled, timestep).sample[:, :, None]
        found = by_formula(state, SMALL.num_attention_heads, latents, timestep, tokens, pooled)
    error = largest_error(expected, found)
    parity(f"{PUBLISHED}: its formula in fp64, one frame", "diffusers SD3Transformer2DModel", error, 1e-5)


def table_in_square(table: Tensor, side: int, rows: int, columns: int) -> Tensor:
    """Lays a table of rows x columns where diffusers' image model crops it from: the middle of a square."""
    square = torch.zeros(side, side, table.shape[1], dtype=table.dtype)
    top, left = (side - rows) // 2, (side - columns) // 2
    square[top : top + rows, left : left + columns] = table.reshape(rows, columns, -1)
    return square.reshape(1, side * side, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_positions_are_those_of_the_published_class(dtype: torch.dtype, parity: Parity) -> None:
    width, name = MMDiTConfig().inner_dim, str(dtype).removeprefix("torch.")
    grid = (32, 27, 48)  # 125 frames of 432 x 768
    ours = SinCos3D()(*grid, width).to(dtype)
    theirs = get_3d_sincos_pos_embed(
        embed_dim=width, spatial_size=(48, 27), temporal_size=32, spatial_interpolation_scale=0.5
    )
    error = float((ours - theirs.reshape(-1, width).to(dtype)).abs().max())
    parity(f"3D positions, 32 x 27 x 48 x 2432, {name}", "diffusers get_3d_sincos_pos_embed", error, 0.0)
    small = (3, 4, 5)
    error = float((SinCos3D()(*small, width).to(dtype) - position_table(*small, width).to(dtype)).abs().max())
    parity(f"3D positions, 3 x 4 x 5 x 2432, {name}", f"{PUBLISHED}: channel by channel", error, 0.0)


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
