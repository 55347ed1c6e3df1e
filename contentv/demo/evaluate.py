"""Do the sampled videos show what their prompts say? Measured on the files, by pixels and the reward model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from contentv.curation.synth_captions import MOVING
from contentv.curation.synth_world import COLOURS, DIRECTIONS, SHADES, SHAPES
from contentv.curation.video_io import read_video
from contentv.demo.classifier import Reading, classify
from contentv.models.reward import CLIPReward


@dataclass(frozen=True)
class PromptSpec:
    """A prompt and what its video must show."""

    caption: str
    colour: str
    direction: str


@dataclass(frozen=True)
class Evaluation:
    """What was measured on the videos of one set of weights, in the order of the prompts."""

    paths: list[Path]
    verdicts: list[Reading]
    rewards: list[float]


def prompts(count: int, seed: int) -> list[PromptSpec]:
    """Returns `count` prompts, every colour and direction equally often (up to the remainder), keyed by `seed`."""
    rng = random.Random(f"prompts/{seed}")
    pairs = list(itertools.product(COLOURS, DIRECTIONS))
    specs = []
    for index in range(count):
        colour, direction = pairs[index % len(pairs)]
        words = {"shape": rng.choice(SHAPES), "shade": rng.choice(list(SHADES))}
        caption = rng.choice(MOVING).format(colour=colour, direction=direction, **words)
        specs.append(PromptSpec(caption, colour, direction))
    return specs


def evaluate(specs: Sequence[PromptSpec], folder: Path, reward_folder: Path) -> Evaluation:
    """Returns the pixel-level verdict and the reward of the first frame of every sampled video."""
    reward = CLIPReward.from_folder(reward_folder)
    paths = [folder / f"{index:05d}.mp4" for index in range(len(specs))]
    verdicts, frames = [], []
    for path in paths:
        video = read_video(path).frames
        verdicts.append(classify(video))
        frames.append(torch.from_numpy(video[0]).permute(2, 0, 1).float() / 127.5 - 1)
    with torch.no_grad():
        scores = reward.score(torch.stack(frames), [spec.caption for spec in specs])
    return Evaluation(paths, verdicts, scores.tolist())
