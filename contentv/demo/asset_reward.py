"""Trains the demo's reward model: the small CLIP, taught which of two pictures for a caption is the better one."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from contentv.base.log import get_logger
from contentv.demo.asset_text import (
    MEAN,
    SIDE_PX,
    STD,
    Sheet,
    TextTraining,
    contrastive_loss,
    descend,
    draw_sheet,
    score,
    set_rate,
    write_tokenizer,
)

FAULTS = ("blurred", "noisy", "low_contrast", "washed")


def spoil(
    frames: Float[Tensor, "b 3 H W"], fault: str, level: float, noise: Float[Tensor, "b 3 H W"]
) -> Float[Tensor, "b 3 H W"]:
    """Returns the pictures made worse, differentiably.

    Args:
        frames: in [-1, 1].
        fault: one of `FAULTS`.
        level: 0 leaves the pictures alone, 1 spoils them thoroughly.
        noise: standard normal, used by "noisy".
    """
    if level <= 0.0:
        return frames
    if fault == "blurred":
        sigma = 0.06 * level * frames.shape[-1]
        reach = max(1, math.ceil(2.5 * sigma))
        taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
        kernel = (taps / taps.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
        padded = F.pad(frames, (reach, reach, reach, reach), mode="replicate")
        return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    if fault == "noisy":
        return (frames + 0.5 * level * noise).clamp(-1.0, 1.0)
    if fault == "low_contrast":
        return torch.lerp(frames, frames.mean((1, 2, 3), keepdim=True).expand_as(frames), 0.8 * level)
    return torch.lerp(frames, (0.5 * frames.mean(1, keepdim=True) + 0.4).expand_as(frames), 0.8 * level)


def draw_pairs(sheet: Sheet, rng: np.random.Generator) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 3 H W"]]:
    """Returns the better and the worse picture for each caption: a third differ in colour, the rest in fault."""
    n = len(sheet.frames)
    noise = torch.from_numpy(rng.standard_normal(sheet.frames.shape, dtype=np.float32))
    better, worse = sheet.frames.clone(), sheet.recoloured.clone()
    for row in range(n // 3, n):
        fault = str(rng.choice(FAULTS))
        low = 0.0 if rng.random() < 0.5 else float(rng.uniform(0.0, 0.6))
        high = float(rng.uniform(low + 0.25, 1.0))
        one = slice(row, row + 1)
        better[one] = spoil(sheet.frames[one], fault, low, noise[one])
        worse[one] = spoil(sheet.frames[one], fault, high, noise[one])
    return better, worse


def train_reward(clip: CLIPModel, tokenizer: CLIPTokenizer, config: TextTraining) -> None:
    """Goes on training `clip`, in place, on preference pairs (Bradley-Terry) beside the contrastive loss."""
    rng = np.random.default_rng(config.seed + 1)
    parameters = list(clip.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    scenes = draw_sheet(rng, tokenizer, config.scenes)
    started, step, shown = time.monotonic(), 0, 0.5
    while (share := (time.monotonic() - started) / 60.0 / config.preference_minutes) < 1.0:
        set_rate(optimizer, 0.7 * config.lr * min(1.0, (step + 1) / 50) * (1.02 - share))
        sheet = scenes.pick(rng, config.batch)
        better, worse = draw_pairs(sheet, rng)
        margin = score(clip, better, sheet.ids) - score(clip, worse, sheet.ids)
        contrast, _ = contrastive_loss(clip, sheet)
        descend(optimizer, F.softplus(-margin).mean() + 0.3 * contrast, parameters)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(30.0))
        step += 1
        shown = 0.95 * shown + 0.05 * float((margin > 0).float().mean())
        if step % 50 == 0:
            get_logger().info(f"reward step {step} share {share:.2f} pairs right {shown:.3f}")


@torch.no_grad()
def measure_reward(clip: CLIPModel, tokenizer: CLIPTokenizer, seed: int, n: int = 128) -> dict[str, float]:
    """Returns, per fault and for colour, the share of pairs scored in the right order, and the score's Spearman-like
    monotony: the share of neighbouring levels 0, 0.25 .. 1 that fall."""
    rng = np.random.default_rng(seed)
    sheet = draw_sheet(rng, tokenizer, n)
    noise = torch.from_numpy(rng.standard_normal(sheet.frames.shape, dtype=np.float32))
    base = score(clip, sheet.frames, sheet.ids)
    facts = {"colour": float((base > score(clip, sheet.recoloured, sheet.ids)).float().mean())}
    falls = []
    for fault in FAULTS:
        levels = torch.stack([score(clip, spoil(sheet.frames, fault, 0.25 * k, noise), sheet.ids) for k in range(5)])
        facts[fault] = float((levels[0] > levels[2]).float().mean())
        falls.append((levels.diff(dim=0) < 0).float().mean())
    facts["levels_in_order"] = float(torch.stack(falls).mean())
    return facts


def write_reward(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes a transformers CLIP folder in fp16 with its tokenizer and preprocessor_config.json."""
    clip.half().save_pretrained(folder)
    clip.float()
    write_tokenizer(tokenizer, folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIDE_PX},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": SIDE_PX, "width": SIDE_PX}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD),
        "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
