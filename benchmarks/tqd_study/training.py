"""Training one model of the study with the trainer's own parts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contentv.base.types import Batch, Bucket, TextCond
from contentv.diffusion.noise_levels import noise_levels
from contentv.diffusion.timesteps import TQD, SigmaSampler, Uniform
from contentv.engine.ema import MovingAverage
from contentv.engine.optim import OptimConfig, lr_at
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.objectives.flow import FlowMatching
from tqd_study.clips import Clips, places, training_clips
from tqd_study.settings import Condition, Recipe, Run

TEXT_WIDTH = 16  # of the one empty caption: the study's clips have none
LOG_EVERY = 100


def no_text(n: int, device: torch.device) -> TextCond:
    """Returns the text of clips without captions."""
    return TextCond(torch.zeros(n, 1, TEXT_WIDTH, device=device), torch.zeros(n, TEXT_WIDTH, device=device))


def build_model(recipe: Recipe, seed: int) -> MMDiT:
    """Returns the model before training."""
    model = MMDiT(MMDiTConfig(
        num_layers=recipe.layers, num_attention_heads=recipe.heads, attention_head_dim=recipe.head_dim, in_channels=1,
        out_channels=1, patch_size=recipe.patch, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH,
    ))  # fmt: skip
    model.init_weights(seed)
    return model


def build_sampler(recipe: Recipe, condition: Condition) -> SigmaSampler | TQD:
    """Returns the law of sigma. kappa_base is 2, with which equal scores give back the base law."""
    base = Uniform(recipe.shift)
    if condition.law == "base":
        return base
    return TQD(base, kappa_base=2.0, kappa_max=condition.kappa_max, floor=condition.floor)


def train(
    run: Run, device: torch.device, say: Callable[[str], None] = lambda line: None
) -> tuple[MMDiT, dict[str, Any]]:
    """Returns the trained model with its averaged weights, and what is to be told of its training.

    Args:
        run: what is trained.
        device: where; its clips, first weights and all draws are made on the CPU, and are the same on every device.
        say: is given a line every LOG_EVERY steps.
    """
    recipe, condition, seed = run.recipe, run.condition, run.seed
    start = time.process_time()
    clips = training_clips(recipe, condition, seed)
    model, sampler = build_model(recipe, seed).to(device), build_sampler(recipe, condition)
    objective = FlowMatching(sampler, seed=seed, null_text=no_text(1, device), text_dropout=0)
    optim = OptimConfig(
        lr=recipe.lr, betas=[0.9, 0.99], weight_decay=0.0, warmup_steps=recipe.warmup_steps, schedule="cosine",
        min_lr_ratio=0.05, ema_decay=recipe.ema_decay,
    )  # fmt: skip
    parameters = list(model.parameters())
    adamw = torch.optim.AdamW(parameters, betas=(optim.betas[0], optim.betas[1]), weight_decay=0.0, fused=True)
    average = MovingAverage(parameters, optim.ema_decay)
    losses = []
    for step, batch in zip(range(recipe.steps), batches(clips, run, device), strict=False):
        for group in adamw.param_groups:
            group["lr"] = lr_at(step, optim, recipe.steps)
        output = objective(model, batch, step)
        (output.loss_sum / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], optim.grad_clip)
        adamw.step()
        adamw.zero_grad()
        average.update()
        losses.append(output.loss_sum.detach() / len(batch))
        if (step + 1) % LOG_EVERY == 0:
            say(f"step {step + 1}: loss {mean_of(losses[-LOG_EVERY:]):.4f}, {time.process_time() - start:.0f} s")
    with torch.no_grad():
        for parameter, value in zip(parameters, average.averages, strict=True):
            parameter.copy_(value)
    levels = noise_levels(sampler, clips.motion, clips.visual, keeping=condition.drop)
    return model, {
        "losses": [mean_of(losses[i : i + LOG_EVERY]) for i in range(0, len(losses), LOG_EVERY)],
        "sigma_base": levels.base, "sigma_trained": levels.trained, "keep_rate": levels.keep_rate,
        "mean_gap": float((clips.motion - clips.visual).abs().mean()), "train_cpu_s": time.process_time() - start,
    }  # fmt: skip


def batches(clips: Clips, run: Run, device: torch.device) -> Any:
    """Returns the batches of a run, one a step, without end."""
    world, size = run.recipe.world, run.recipe.batch
    bucket, text, names = Bucket(world.frames, world.rows, world.columns), no_text(size, device), [""] * size
    seen = places(clips, drop=run.condition.drop, seed=run.seed)
    for step in itertools.count():
        chosen = torch.tensor(list(itertools.islice(seen, size)))
        index = step * size + torch.arange(size)
        yield Batch(
            names,
            names,
            bucket,
            clips.latents[chosen].to(device),
            text,
            clips.motion[chosen],
            clips.visual[chosen],
            index,
            size,
        )


def mean_of(values: list[Tensor]) -> float:
    """Returns the mean of some single numbers."""
    return float(torch.stack(values).mean())
