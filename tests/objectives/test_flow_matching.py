"""The flow-matching objective against a loop over the samples, and its independence of how samples are batched."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from contentv.base.errors import UserError
from contentv.base.rng import keyed_generator
from contentv.base.types import Batch, Bucket, LossOutput, Objective, TextCond
from contentv.diffusion.noise_levels import quality_tallies
from contentv.diffusion.timesteps import TQD, LogitNormal, MinSNR, Uniform
from contentv.objectives.flow import FlowMatching, replace_rows

L, D, P = 5, 6, 3
NULL = TextCond(torch.full((1, L, D), -1.0), torch.full((1, P), -2.0))


def make_batch(indices, dtype=torch.float32) -> Batch:
    """Clips whose content depends on their global index alone."""
    generators = [torch.Generator().manual_seed(100 + i) for i in indices]

    def rows(*shape: int) -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(dtype)

    latents, tokens, pooled = rows(4, 2, 3, 3), rows(L, D), rows(P)
    scores = torch.tensor([[0.1 + 0.05 * i, 0.9 - 0.05 * i] for i in indices])
    return Batch(
        keys=[f"k{i}" for i in indices], captions=[f"clip {i}" for i in indices], bucket=Bucket(5, 24, 24),
        latents=latents, text=TextCond(tokens, pooled), motion=scores[:, 0], visual=scores[:, 1],
        sample_index=torch.tensor(list(indices)), global_samples=len(indices),
    )  # fmt: skip


class Toy(nn.Module):
    """A small velocity model that depends on every input and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
        self.calls: list[dict[str, torch.Tensor]] = []

    def forward(self, noisy_latents, timestep, text_tokens, text_pooled):
        self.calls.append({"x": noisy_latents, "timestep": timestep, "tokens": text_tokens, "pooled": text_pooled})
        level = text_tokens.float().mean(dim=(1, 2)) + text_pooled.float().mean(dim=1) + timestep / 1000
        mixed = torch.einsum("bcthw,cd->bdthw", noisy_latents.float(), self.mix)
        return (mixed + level[:, None, None, None, None]).to(noisy_latents.dtype)


def objective(**changes) -> FlowMatching:
    values = {"sampler": LogitNormal(shift=3.0), "seed": 11, "null_text": NULL, "text_dropout": 0.3}
    return FlowMatching(**(values | changes))


def test_loss_is_the_loop_over_samples():
    batch, step, total, sigmas = make_batch(range(8)), 4, 0.0, []
    output = objective()(Toy(), batch, step)
    for i in range(8):
        sigma = LogitNormal(shift=3.0).sample(1, keyed_generator(11, step, i, "sigma"))
        noise = torch.randn(4, 2, 3, 3, generator=keyed_generator(11, step, i, "noise"))
        dropped = torch.rand((), generator=keyed_generator(11, step, i, "text_dropout")) < 0.3
        text = NULL if dropped else batch.text[i : i + 1]
        noisy = (1 - sigma) * batch.latents[i] + sigma * noise
        pred = Toy()(noisy[None], 1000 * sigma, text.tokens, text.pooled)[0]
        total += float((pred - (noise - batch.latents[i])).detach().pow(2).mean())
        sigmas.append(float(sigma))
    assert isinstance(output, LossOutput)
    assert isinstance(objective(), Objective)
    assert output.samples == 8
    assert float(output.loss_sum.detach()) == pytest.approx(total, rel=1e-5)
    assert float(output.metrics["loss"]) == pytest.approx(total, rel=1e-5)
    assert float(output.metrics["sigma_mean"]) == pytest.approx(sum(sigmas), rel=1e-5)


def test_any_split_into_micro_batches_gives_the_same_sum_and_gradient():
    whole, parts = Toy(), Toy()
    objective()(whole, make_batch(range(6)), 2).loss_sum.backward()
    for indices in ([4, 1], [0], [5, 3, 2]):
        objective()(parts, make_batch(indices), 2).loss_sum.backward()
    torch.testing.assert_close(parts.mix.grad, whole.mix.grad, rtol=1e-5, atol=1e-6)


def test_draws_change_with_step_seed_and_sample_only():
    batch = make_batch([3, 3, 4])
    model = Toy()
    for make, step in ((objective(), 1), (objective(), 1), (objective(), 2), (objective(seed=12), 1)):
        make(model, batch, step)
    first, again, next_step, other_seed = (call["x"] for call in model.calls)
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)
    assert not torch.equal(first, other_seed)
    timestep = model.calls[0]["timestep"]
    assert timestep[0] == timestep[1] != timestep[2]


def test_metrics_are_detached_sums_per_quarter_of_sigma():
    batch, model = make_batch(range(12)), Toy()
    metrics = objective(sampler=Uniform())(model, batch, 0).metrics
    assert all(not m.requires_grad and m.ndim == 0 for m in metrics.values())
    sigma = model.calls[0]["timestep"] / 1000
    for q in range(4):
        assert float(metrics[f"loss_sigma_q{q + 1}_count"]) == int(((sigma >= q / 4) & (sigma < (q + 1) / 4)).sum())
    assert len({float(metrics[f"loss_sigma_q{q}_count"]) for q in (1, 2, 3, 4)}) > 1  # or the test shows nothing
    total = sum(float(metrics[f"loss_sigma_q{q}_sum"]) for q in (1, 2, 3, 4))
    assert total == pytest.approx(float(metrics["loss"]), rel=1e-5)


def test_weights_multiply_the_loss_and_leave_the_metrics():
    batch, model = make_batch(range(6)), Toy()
    plain = objective()(model, batch, 3)
    sigma = model.calls[0]["timestep"] / 1000
    errors = [float(objective()(Toy(), make_batch([i]), 3).loss_sum.detach()) for i in range(6)]
    by_clip = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 1.0])
    snr = MinSNR(5.0)(sigma)
    for weight, of_clip in ((None, by_clip), (MinSNR(5.0), None), (MinSNR(5.0), by_clip)):
        batch.loss_weight = of_clip
        output = objective(weight=weight)(Toy(), batch, 3)
        factor = (snr if weight else torch.ones(6)) * (torch.ones(6) if of_clip is None else of_clip)
        expected = sum(f * e for f, e in zip(factor.tolist(), errors, strict=True))
        assert float(output.loss_sum.detach()) == pytest.approx(expected, rel=1e-5)
        assert float(output.metrics["weighted_loss"]) == pytest.approx(expected, rel=1e-5)
        assert output.metrics["loss"] == plain.metrics["loss"]
    assert "weighted_loss" not in plain.metrics


def test_tallies_are_of_the_errors_and_levels_that_were_trained():
    batch, model = make_batch(range(12)), Toy()
    batch.motion[3] = math.nan
    output = objective()(model, batch, 5)
    errors = torch.stack([objective()(Toy(), make_batch([i]), 5).loss_sum.detach() for i in range(12)])
    expected = quality_tallies(errors, model.calls[0]["timestep"] / 1000, batch.motion, batch.visual)
    assert output.tallies.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.tallies[name], value)
    assert float(output.tallies["sigma_counts"].sum()) == 12
    assert float(output.tallies["sigma_counts"][-1].sum()) == 1


def test_bf16_latents_meet_the_model_in_bf16_and_the_loss_in_fp32():
    batch, model = make_batch(range(4), torch.bfloat16), Toy()
    output = objective(text_dropout=1.0)(model, batch, 0)
    call = model.calls[0]
    assert {call["x"].dtype, call["tokens"].dtype, call["pooled"].dtype} == {torch.bfloat16}
    assert (call["timestep"].dtype, output.loss_sum.dtype) == (torch.float32, torch.float32)
    # The target comes from fp32 noise: a prediction of exactly noise - latents has zero loss, a rounded one has not.
    noise = torch.stack([torch.randn(4, 2, 3, 3, generator=keyed_generator(11, 0, i, "noise")) for i in range(4)])
    exact = noise - batch.latents.float()
    assert float(objective()(lambda *_: exact, batch, 0).loss_sum) == 0
    assert float(objective()(lambda *_: exact.bfloat16(), batch, 0).loss_sum) > 0


def test_captions_are_dropped_whole_and_at_the_given_rate():
    batch, model = make_batch(range(10)), Toy()
    dropped = 0
    for step in range(100):
        objective()(model, batch, step)
        call = model.calls[-1]
        empty = (call["tokens"] == -1).all(dim=(1, 2))
        assert torch.equal(empty, (call["pooled"] == -2).all(dim=1))
        assert torch.equal(call["tokens"][~empty], batch.text.tokens[~empty])
        dropped += int(empty.sum())
    assert 0.3 * 1000 - 60 < dropped < 0.3 * 1000 + 60  # 4 standard deviations


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_dropout_rates_at_the_ends(rate):
    batch, model = make_batch(range(4)), Toy()
    objective(text_dropout=rate)(model, batch, 0)
    expected = NULL.expand(4) if rate else batch.text
    assert torch.equal(model.calls[0]["tokens"], expected.tokens)
    assert torch.equal(model.calls[0]["pooled"], expected.pooled)


def test_scores_change_nothing_but_tqd():
    scored, plain = make_batch(range(4)), make_batch(range(4))
    plain.motion, plain.visual = torch.full((4,), math.nan), torch.full((4,), math.nan)

    def sigma(sampler, batch):
        model = Toy()
        objective(sampler=sampler)(model, batch, 0)
        return model.calls[0]["timestep"]

    base = LogitNormal(shift=3.0)
    assert torch.equal(sigma(base, scored), sigma(base, plain))
    assert torch.equal(sigma(TQD(base), plain), sigma(base, plain))
    assert not torch.equal(sigma(TQD(base), scored), sigma(base, scored))


def test_errors_name_what_is_wrong():
    with pytest.raises(UserError, match=r"text.dropout: 1.5 is not a probability"):
        objective(text_dropout=1.5)
    short = TextCond(torch.zeros(1, L - 1, D), torch.zeros(1, P))
    with pytest.raises(ValueError, match=r"\(4, 6\) tokens and \(3,\) pooled, the batch's captions as \(5, 6\)"):
        replace_rows(make_batch([0]).text, torch.tensor([True]), short)
