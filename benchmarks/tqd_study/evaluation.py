"""What is asked of a trained model: clips, its loss on golden clips, and its gradients on degraded ones."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from contentv.analysis.config import GradientConfig
from contentv.analysis.gradients import measure_gradients
from contentv.analysis.similarity import Grams
from contentv.base.rng import keyed_normal, keyed_uniform
from contentv.diffusion.flow import add_noise, flow_loss, timestep_of, velocity_target
from contentv.diffusion.solver import euler_sample, euler_sigmas, guided
from contentv.models.mmdit import MMDiT
from tqd_study.measures import compare
from tqd_study.settings import Recipe, Run
from tqd_study.sprites import World, draw_traits, make_clips, render
from tqd_study.training import no_text

HELD_OUT_SEED = 1_000_003  # of golden clips no run trains on, and of all noise in evaluations
BINS = 10
SHOWN = 12  # clips kept for the pictures, as whole hundredths of the middle row


def evaluate(run: Run, model: MMDiT) -> dict[str, Any]:
    """Returns all that is measured of a run's model."""
    start = time.process_time()
    recipe = run.recipe
    golden = make_clips(recipe.world, "golden", recipe.samples, HELD_OUT_SEED)
    generated = sample(recipe, model)
    found: dict[str, Any] = {
        "measured": compare(generated, golden),
        "golden_loss": golden_losses(model, golden),
        "shown": (generated[:SHOWN, 0, :, recipe.world.rows // 2] * 100).round().int().tolist(),
    }
    if run.gradients:
        found["gradients"] = gradient_cosines(recipe, model)
    return {**found, "evaluate_cpu_s": time.process_time() - start}


@torch.no_grad()
def sample(recipe: Recipe, model: MMDiT, late: MMDiT | None = None, level: float = 0.0) -> Tensor:
    """Returns generated clips, from the same noise for every model; `late` makes the steps from sigma `level` down."""
    world = recipe.world
    shape = (1, world.frames, world.rows, world.columns)
    noise = keyed_normal(shape, HELD_OUT_SEED, 0, range(recipe.samples), "samples")
    sigmas = euler_sigmas(recipe.solver_steps, recipe.shift)
    device = device_of(model)
    parts = [part.to(device) for part in noise.split(64)]

    def clips(part: Tensor) -> Tensor:
        early, later = (guided(each, no_text(len(part), device)) for each in (model, late or model))
        return euler_sample(lambda x, sigma: (early if float(sigma) > level else later)(x, sigma), part, sigmas).cpu()

    return torch.cat([clips(part) for part in parts])


@torch.no_grad()
def golden_losses(model: MMDiT, golden: Tensor) -> list[float]:
    """Returns the mean loss on golden clips in each of ten equal bins of sigma, at the same noise for every model."""
    found, clips = [], range(len(golden))
    device = device_of(model)
    golden, text = golden.to(device), no_text(len(golden), device)
    for i in range(BINS):
        sigma = (i + keyed_uniform(HELD_OUT_SEED, i, clips, "loss_sigma").to(device)) / BINS
        noise = keyed_normal(golden.shape[1:], HELD_OUT_SEED, i, clips, "loss_noise").to(device)
        velocity = model(add_noise(golden, noise, sigma), timestep_of(sigma), text.tokens, text.pooled)
        found.append(float(flow_loss(velocity, velocity_target(golden, noise)).mean()))
    return found


def gradient_cosines(recipe: Recipe, model: MMDiT) -> dict[str, list[float]]:
    """Returns, for each bin of sigma, the cosines of the gradients of golden clips and of their degraded twins.

    `visual` twins are blurred as the blurred set is, `motion` twins slow as the static set is, and nothing else of them
    differs. `ceiling` is the cosine of two halves of the golden clips.
    """
    config = GradientConfig(clips=128, groups=8, bins=BINS, micro_batch_size=16, max_values=0, seed=HELD_OUT_SEED)
    twins = degraded_twins(recipe.world, config.clips)
    bins = [
        Grams(found.gram, config.groups)
        for found in measure_gradients(model, twins, no_text(config.clips, device_of(model)), config)
    ]
    return {
        "visual": [grams.cosine(1) for grams in bins],
        "motion": [grams.cosine(2) for grams in bins],
        "ceiling": [grams.ceiling() for grams in bins],
    }


def device_of(model: MMDiT) -> torch.device:
    """Returns where a model is."""
    return next(model.parameters()).device


def degraded_twins(world: World, n: int) -> dict[str, Tensor]:
    """Returns held-out golden clips, the same ones blurred, and the same ones slowed down."""
    traits = draw_traits(world, "golden", n, HELD_OUT_SEED)
    soft = replace(traits, blur=torch.full_like(traits.blur, sum(world.soft) / 2))
    slow = replace(traits, speed=traits.speed * (sum(world.slow) / sum(world.fast)))
    return {"golden": render(world, traits), "visual": render(world, soft), "motion": render(world, slow)}
