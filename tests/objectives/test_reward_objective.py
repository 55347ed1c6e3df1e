"""Reward back-propagation against finite differences and against graphs written out by hand, on toy parts."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from contentv.base.errors import UserError
from contentv.base.rng import keyed_normal
from contentv.base.types import Batch, Bucket, Objective, TextCond
from contentv.diffusion.solver import euler_sample, euler_sigmas, guided
from contentv.diffusion.timesteps import LogitNormal
from contentv.objectives.flow import FlowMatching
from contentv.objectives.reward import FrameDecoder, FrameReward, RewardConfig, RewardObjective

B, C, T, SIZE, L, D, P, SEED = 3, 4, 2, 4, 5, 6, 3, 21
NULL = TextCond(torch.full((1, L, D), 0.5, dtype=torch.float64), torch.full((1, P), -0.5, dtype=torch.float64))


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_batch(dtype=torch.float64) -> Batch:
    return Batch(
        keys=["a", "b", "c"], captions=["red", "green", "blue"], bucket=Bucket(5, 32, 32),
        latents=rand(B, C, T, SIZE, SIZE, seed=1).to(dtype),
        text=TextCond(rand(B, L, D, seed=2).to(dtype), rand(B, P, seed=3).to(dtype)),
        motion=torch.full((B,), 0.5), visual=torch.full((B,), 0.5), sample_index=torch.tensor([7, 8, 9]),
        global_samples=B,
    )  # fmt: skip


class ToyModel(nn.Module):
    """A nonlinear velocity model that notes, for each call, its sigma and whether a graph is kept."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.mix = nn.Parameter(0.4 * rand(C, C, seed=seed))
        self.read = nn.Parameter(0.4 * rand(C, D + P, seed=seed + 50))
        self.calls: list[tuple[float, bool, bool]] = []

    def forward(self, noisy_latents, timestep, text_tokens, text_pooled):
        graph = torch.is_grad_enabled() and self.mix.requires_grad
        self.calls.append((float(timestep[0]) / 1000, graph, noisy_latents.requires_grad))
        text = torch.cat([text_tokens.mean(dim=1), text_pooled], dim=1) @ self.read.T.to(text_tokens.dtype)
        mixed = torch.einsum("bcthw,cd->bdthw", noisy_latents, self.mix.to(noisy_latents.dtype))
        level = 1 + timestep.to(noisy_latents.dtype) / 1000
        return torch.tanh(mixed + text[:, :, None, None, None]) * level[:, None, None, None, None]


class ToyVAE(nn.Module):
    """Frames are a squashed channel mix of the first latent frame; notes how many latent frames it was handed."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(rand(3, C, seed=4))
        self.frames_seen: list[int] = []

    def denormalize(self, z):
        return 1.5 * z + 0.1

    def decode_first_frame(self, raw):
        self.frames_seen.append(raw.shape[2])
        return 0.9 * torch.tanh(0.3 * torch.einsum("bchw,rc->brhw", raw[:, :, 0], self.mix.to(raw.dtype)))


class ToyReward(nn.Module):
    """How much a frame has of the colour its caption names."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def score(self, frames, captions):
        channel = torch.tensor([("red", "green", "blue").index(c) for c in captions])
        own = frames[torch.arange(len(captions)), channel].mean(dim=(1, 2))
        return self.gain.to(frames.dtype) * (own - (frames**2).mean(dim=(1, 2, 3)))


def build(reference=None, flow=None, null_text=None, **values) -> RewardObjective:
    config = RewardConfig(**{"steps": 4, "grad_steps": 4, "kl_weight": 0.0, **values})
    return RewardObjective(ToyVAE(), ToyReward(), reference, config, SEED, flow, null_text)


def start_noise(step: int, dtype=torch.float64) -> torch.Tensor:
    return keyed_normal((C, T, SIZE, SIZE), SEED, step, [7, 8, 9], "rollout_noise").to(dtype)


def gradients(model: ToyModel, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [model.mix, model.read]))


def assert_same(found, expected, rtol=1e-9) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


def reward_of(clip: torch.Tensor, batch: Batch) -> torch.Tensor:
    vae = ToyVAE()
    return ToyReward().score(vae.decode_first_frame(vae.denormalize(clip)), batch.captions)


# --- the reward's gradient --------------------------------------------------------------------------------------------


def test_loss_is_minus_the_reward_of_a_plain_sample():
    batch, model = make_batch(), ToyModel()
    output = build()(model, batch, 5)
    clip = euler_sample(guided(model, batch.text), start_noise(5), euler_sigmas(4, 3.0))
    expected = reward_of(clip, batch)
    torch.testing.assert_close(output.loss_sum, -expected.sum())
    torch.testing.assert_close(output.metrics["reward"], expected.sum())
    assert output.samples == B
    assert float(output.metrics["kl"]) == 0
    assert all(not m.requires_grad for m in output.metrics.values())
    assert isinstance(build(), Objective)
    assert isinstance(ToyVAE(), FrameDecoder)
    assert isinstance(ToyReward(), FrameReward)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_all_grad_steps_are_the_full_gradient(guidance):
    batch, model = make_batch(), ToyModel()
    objective = build(null_text=NULL, guidance_scale=guidance)
    found = gradients(model, objective(model, batch, 0).loss_sum)
    clip = euler_sample(guided(model, batch.text, NULL, guidance), start_noise(0), euler_sigmas(4, 3.0))
    assert_same(found, gradients(model, -reward_of(clip, batch).sum()))
    # and against finite differences along a random direction
    ways, h = [rand(C, C, seed=31), rand(C, D + P, seed=32)], 1e-5
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, way in zip((moved.mix, moved.read), ways, strict=True):
                parameter += sign * h * way
        losses.append(float(objective(moved, batch, 0).loss_sum.detach()))
    slope = sum(float((g * w).sum()) for g, w in zip(found, ways, strict=True))
    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(slope, rel=1e-6)


def by_hand(model, batch, step, graded, cut_input, steps=4):
    """The rollout with every detach written out, on one full graph."""
    x, sigmas, velocity_of = start_noise(step), euler_sigmas(steps, 3.0), guided(model, batch.text)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        v = velocity_of(x.detach() if cut_input else x, sigma)
        x = x + (sigma_next - sigma) * (v if i in graded else v.detach())
    return -reward_of(x, batch).sum()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("count", "choice", "graded"), [
    (1, "tail", {3}), (2, "tail", {2, 3}), (2, "uniform", {1, 3}), (1, "uniform", {3}), (4, "uniform", {0, 1, 2, 3}),
])  # fmt: skip
def test_only_the_chosen_steps_learn(count, choice, graded, cut):
    batch, model = make_batch(), ToyModel()
    objective = build(grad_steps=count, grad_step_choice=choice, stop_input_gradient=cut)
    assert objective.grad_step_indices(0) == graded
    found = gradients(model, objective(model, batch, 0).loss_sum)
    assert [graph for _, graph, _ in model.calls] == [i in graded for i in range(4)]
    if cut:
        assert not any(graph and attached for _, graph, attached in model.calls)
    assert_same(found, gradients(model, by_hand(model, batch, 0, graded, cut)))


def test_cutting_the_input_changes_the_gradient_but_not_the_loss():
    batch, model = make_batch(), ToyModel()
    whole, cut = build()(model, batch, 0).loss_sum, build(stop_input_gradient=True)(model, batch, 0).loss_sum
    assert torch.equal(whole, cut)
    assert not torch.allclose(gradients(model, whole)[0], gradients(model, cut)[0])


def test_random_grad_steps_are_drawn_per_optimiser_step():
    objective = build(steps=10, grad_steps=3, grad_step_choice="random")
    drawn = [objective.grad_step_indices(step) for step in range(60)]
    assert drawn == [objective.grad_step_indices(step) for step in range(60)]
    assert all(len(d) == 3 and d <= set(range(10)) for d in drawn)
    assert set().union(*drawn) == set(range(10))
    model = ToyModel()
    objective(model, make_batch(), 4)
    assert {i for i, (_, graph, _) in enumerate(model.calls) if graph} == drawn[4]


def test_memory_grows_with_the_grad_steps_alone():
    def kept(**values) -> int:
        total = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += 1
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            build(**values)(ToyModel(), make_batch(), 0)
        return total

    # (a tail of 2 and one of 3 are compared, because only from the second grad step on has the input a graph)
    per_step = kept(steps=6, grad_steps=3) - kept(steps=6, grad_steps=2)
    assert per_step > 0
    assert kept(steps=6, grad_steps=5) - kept(steps=6, grad_steps=3) == 2 * per_step
    assert kept(steps=12, grad_steps=2) == kept(steps=6, grad_steps=2)


# --- first frame ------------------------------------------------------------------------------------------------------


def test_only_the_first_latent_frame_reaches_decoder_and_reward():
    objective = build()
    model, batch = ToyModel(), make_batch()
    objective(model, batch, 0)
    assert objective.vae.frames_seen == [1]
    clip = rand(B, C, T, SIZE, SIZE, seed=9)
    later = clip.clone()
    later[:, :, 1:] += 10
    assert torch.equal(objective._score(clip, batch.captions), objective._score(later, batch.captions))
    clip.requires_grad_(True)
    (slope,) = torch.autograd.grad(objective._score(clip, batch.captions).sum(), clip)
    assert float(slope[:, :, 0].abs().min()) > 0
    assert float(slope[:, :, 1:].abs().max()) == 0


def test_first_frame_of_the_causal_vae_is_the_decoded_first_latent_frame():
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=C, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    z = torch.randn(1, C, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z[:, :, :1]).sample[:, :, 0], vae.decode(z).sample[:, :, 0])


def test_frames_are_clamped_to_what_a_picture_can_show():
    class Bright(ToyVAE):
        def decode_first_frame(self, raw):
            return 100 * super().decode_first_frame(raw)

    seen = []

    class Eye(ToyReward):
        def score(self, frames, captions):
            seen.append((float(frames.detach().min()), float(frames.detach().max())))
            return super().score(frames, captions)

    RewardObjective(Bright(), Eye(), None, RewardConfig(steps=2, kl_weight=0.0), SEED)(ToyModel(), make_batch(), 0)
    assert seen == [(-1.0, 1.0)]


# --- the terms of the loss --------------------------------------------------------------------------------------------


def test_distance_to_an_equal_reference_is_zero_and_so_is_its_gradient():
    batch, model = make_batch(), ToyModel()
    output = build(copy.deepcopy(model), kl_weight=5.0, reward_weight=0.0)(model, batch, 0)
    assert float(output.metrics["kl"]) == 0
    assert float(output.loss_sum.detach()) == 0
    assert all(float(g.abs().max()) == 0 for g in gradients(model, output.loss_sum))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, 3])
def test_distance_to_the_reference_by_hand(count, guidance):
    batch, model, reference = make_batch(), ToyModel(), ToyModel(seed=70)
    objective = build(reference, None, NULL, grad_steps=count, kl_weight=0.7, guidance_scale=guidance)
    output = objective(model, batch, 0)
    assert not any(graph for _, graph, _ in reference.calls)
    assert len(reference.calls) == count * (1 if guidance == 1 else 2)

    x, kl = start_noise(0), torch.zeros(B, dtype=torch.float64)
    ours, theirs = (guided(m, batch.text, NULL, guidance) for m in (model, reference))
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(euler_sigmas(4, 3.0))):
        v = ours(x, sigma) if i >= 4 - count else ours(x, sigma).detach()
        if i >= 4 - count:
            kl = kl + (v - theirs(x, sigma).detach()).pow(2).mean(dim=(1, 2, 3, 4)) / count
        x = x + (sigma_next - sigma) * v
    expected = (-reward_of(x, batch) + 0.7 * kl).sum()
    torch.testing.assert_close(output.loss_sum, expected)
    torch.testing.assert_close(output.metrics["kl"], kl.sum().detach())
    assert_same(gradients(model, output.loss_sum), gradients(model, expected))


def test_hinge_stops_at_the_margin():
    batch, model = make_batch(), ToyModel()
    rewards = reward_of(
        euler_sample(guided(model, batch.text), start_noise(0), euler_sigmas(4, 3.0)).detach(), batch
    ).detach()
    margin = float(rewards.sort().values[1])  # one sample above, one at, one below
    output = build(hinge_margin=margin, reward_weight=3.0)(model, batch, 0)
    torch.testing.assert_close(output.loss_sum, 3.0 * (margin - rewards).clamp_min(0).sum())
    assert float(output.loss_sum.detach()) > 0
    satisfied = build(hinge_margin=float(rewards.min()) - 1)(model, batch, 0)
    assert float(satisfied.loss_sum.detach()) == 0
    assert all(float(g.abs().max()) == 0 for g in gradients(model, satisfied.loss_sum))


def test_flow_loss_is_added_with_its_weight():
    batch, model = make_batch(), ToyModel()
    flow = FlowMatching(LogitNormal(), SEED, NULL)
    alone, plain = flow(model, batch, 3), build()(model, batch, 3)
    both = build(None, flow, flow_weight=0.25)(model, batch, 3)
    torch.testing.assert_close(both.loss_sum, plain.loss_sum + 0.25 * alone.loss_sum)
    assert both.metrics.keys() == plain.metrics.keys() | {f"flow_{name}" for name in alone.metrics}
    torch.testing.assert_close(both.metrics["flow_loss"], alone.metrics["loss"])


# --- training, layout, dtype ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [{"grad_steps": 1}, {"grad_steps": 4}, {"grad_steps": 2, "stop_input_gradient": True}], ids=str
)
def test_a_few_steps_of_descent_raise_the_reward(values):
    batch, model = make_batch(), ToyModel()
    reference = copy.deepcopy(model)
    objective = build(reference, kl_weight=0.01, **values)

    def held_out_reward() -> float:
        with torch.no_grad():
            return sum(float(build()(model, batch, step).metrics["reward"]) for step in range(1000, 1008)) / (8 * B)

    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), held_out_reward()
    for step in range(25):
        output = objective(model, batch, step)
        optimizer.zero_grad()
        (output.loss_sum / output.samples).backward()
        optimizer.step()
    assert held_out_reward() > before + 0.3
    assert all(p.grad is None for p in reference.parameters())


def test_judges_are_frozen():
    objective, model = build(), ToyModel()
    objective(model, make_batch(), 0).loss_sum.backward()
    judges = [*objective.vae.parameters(), *objective.reward_model.parameters()]
    assert len(judges) == 2
    assert all(not p.requires_grad and p.grad is None for p in judges)
    assert model.mix.grad is not None


def test_a_sample_does_not_depend_on_its_micro_batch():
    batch, model = make_batch(), ToyModel()
    whole = build()(model, batch, 0)
    parts = 0.0
    for i in range(B):
        rows = slice(i, i + 1)
        row = Batch(
            batch.keys[rows], batch.captions[rows], batch.bucket, batch.latents[rows], batch.text[rows],
            batch.motion[rows], batch.visual[rows], batch.sample_index[rows],
            batch.global_samples,
        )  # fmt: skip
        parts += float(build()(model, row, 0).loss_sum.detach())
    assert float(whole.loss_sum.detach()) == pytest.approx(parts, rel=1e-9)


def test_bf16_batches_keep_the_state_and_the_loss_in_fp32():
    batch, dtypes = make_batch(torch.bfloat16), []

    class Watched(ToyModel):
        def forward(self, noisy_latents, timestep, text_tokens, text_pooled):
            dtypes.append((noisy_latents.dtype, timestep.dtype))
            return super().forward(noisy_latents, timestep, text_tokens, text_pooled)

    model = Watched()
    output = build(ToyModel(1), kl_weight=0.1)(model, batch, 0)
    assert set(dtypes) == {(torch.bfloat16, torch.float32)}
    assert output.loss_sum.dtype == torch.float32
    exact = build(ToyModel(1), kl_weight=0.1)(ToyModel(), make_batch(torch.float32), 0)
    assert float(output.loss_sum.detach()) == pytest.approx(float(exact.loss_sum.detach()), abs=0.05)


# --- missing parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_weight": 0.1}, "reward.kl_weight=0.1 .*\n.*reference model"),
        ({"flow_weight": 1.0}, "reward.flow_weight=1.0 .*\n.*flow-matching"),
        ({"guidance_scale": 4.0}, "reward.guidance_scale=4.0 .*\n.*empty caption"),
    ],
)
def test_missing_parts_are_named(values, message):
    with pytest.raises(UserError, match=message):
        build(**values)
