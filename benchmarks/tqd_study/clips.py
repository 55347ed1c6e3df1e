"""The training clips of a run, their scores, and the order in which they are seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from contentv.base.rng import keyed_generator
from contentv.data.quality import Normaliser, ScoreStatistics
from contentv.diffusion.tqd import keep_probability
from tqd_study.measures import sharpness_of, speed_of
from tqd_study.settings import Condition, Recipe
from tqd_study.sprites import SETS, make_clips

SOURCE = "sprites"
SCORES = {"motion_raw": speed_of, "visual_raw": sharpness_of}


@dataclass(frozen=True)
class Clips:
    """Clips (n, 1, frames, rows, columns) with their motion and visual scores (n,) in 0..1."""

    latents: Tensor
    motion: Tensor
    visual: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def training_clips(recipe: Recipe, condition: Condition, seed: int) -> Clips:
    """Returns the clips of a condition, scored as the trainer scores them.

    Raw scores are the measured speed and sharpness. They are scaled within a corpus that holds as many clips of each of
    the four kinds; the condition's clips are some of that corpus.
    """
    each = recipe.clips // len(condition.sets)
    corpus = {kind: make_clips(recipe.world, kind, recipe.clips, seed) for kind in SETS}
    statistics = {
        name: ScoreStatistics.fit(torch.cat([measure(clips) for clips in corpus.values()]).tolist())
        for name, measure in SCORES.items()
    }
    normaliser = Normaliser({SOURCE: {}}, condition.scale, statistics)
    latents = torch.cat([corpus[kind][:each] for kind in condition.sets])
    motion, visual = (
        torch.from_numpy(normaliser.apply_many(SOURCE, name, measure(latents).double().numpy())).float()
        for name, measure in SCORES.items()
    )
    return Clips(latents, visual, motion) if condition.swap else Clips(latents, motion, visual)


def places(clips: Clips, *, drop: bool, seed: int) -> Iterator[int]:
    """Returns the places of clips in the order they are seen, without end: epochs, each in an order of its own.

    Args:
        clips: for their scores.
        drop: a clip is kept in an epoch with its keep probability, anew in each.
        seed: of order and keeping.
    """
    epoch, keep = 0, keep_probability(clips.motion, clips.visual)
    while True:
        order = torch.randperm(len(clips), generator=keyed_generator(seed, epoch, 0, "order"))
        if drop:
            kept = torch.rand(len(clips), generator=keyed_generator(seed, epoch, 0, "keep")) < keep
            order = order[kept[order]]
        yield from order.tolist()
        epoch += 1
