"""A look at the scores of a dataset's clips, without reading the clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from contentv.data.permutation import Permutation, key64
from contentv.data.rows import BucketRows

LOOKED_AT = 4096  # clips; all of a smaller dataset


def _none() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class ScoreCensus:
    """Scores of a keyed choice of clips, buckets in proportion to their clips.

    Args:
        motion: in 0..1, NaN = none, fp32 (n,); likewise visual.
        outside: how many have a raw score beyond all that quality.json was fitted to.
    """

    motion: Tensor = field(default_factory=_none)
    visual: Tensor = field(default_factory=_none)
    outside: int = 0


def no_scores() -> ScoreCensus:
    """Returns the census of no clips."""
    return ScoreCensus()


def take_census(rows: Mapping[str, BucketRows], seed: int) -> ScoreCensus:
    """Returns the scores of some clips of buckets.

    Args:
        rows: what is known of each bucket's samples, with the columns source and scores.
        seed: key of the choice.

    Raises:
        UserError: quality.json does not know a source.
    """
    total = sum(len(of_bucket) for of_bucket in rows.values())
    scores, outside = [], 0
    for name, of_bucket in rows.items():
        wanted = len(of_bucket) if total <= LOOKED_AT else max(1, LOOKED_AT * len(of_bucket) // total)
        numbers = np.sort(Permutation(len(of_bucket), key64(seed, name, "census")).stretch(0, wanted))
        scores.append(torch.stack(of_bucket.scores(numbers)))
        outside += int(of_bucket.outside(numbers).sum())
    motion, visual = torch.cat(scores, dim=1)
    return ScoreCensus(motion, visual, outside)
