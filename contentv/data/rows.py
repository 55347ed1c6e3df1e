"""What is known of the samples of one bucket, over all datasets it lies in, by their numbers.

Numbers within a bucket run through the datasets in the given order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from contentv.base.errors import UserError
from contentv.data.permutation import Ids, Permutation, Words, key64, keyed_uniform
from contentv.data.quality import Normaliser
from contentv.data.streams import RATE_ONE, Keep
from contentv.data.table import Columns, release

KeepProbability = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (motion, visual) -> probability, all (n,) fp32
_LEAST_BLOCK = 1024
_MOST_COUNTS = 1 << 22  # bounds what the counts of one bucket take
_CHUNK = 1 << 22
_GATHERED = 1024  # rows looked at before their pages are given back; the kernel maps 16 pages for each
_RATE_SAMPLES = 8192  # looked at to estimate how many are kept; all of a smaller stream


def gathered(column: NDArray[Any], rows: Ids) -> NDArray[Any]:
    """Returns some rows of a column; of a mapped one few pages are in memory at a time, however many rows there are."""
    parts = [column[:0]]
    for first in range(0, len(rows), _GATHERED):
        parts.append(np.asarray(column[rows[first : first + _GATHERED]]))
        release(column)
    return np.concatenate(parts)


class SourceRows:
    """Finds the i-th sample of a source in a column of source places, with one small count per block in memory."""

    def __init__(self, column: NDArray[Any], sources: int) -> None:
        self._column = column
        self._block = max(_LEAST_BLOCK, math.ceil(len(column) * (sources + 1) / _MOST_COUNTS))
        blocks = math.ceil(len(column) / self._block)
        counts = np.zeros((blocks, sources + 1), dtype=np.int64)  # the last: of no known source
        step = max(1, _CHUNK // self._block)
        for first in range(0, blocks, step):
            part = np.asarray(column[first * self._block : (first + step) * self._block])
            cells = np.minimum(part, sources).astype(np.int64)
            cells += np.arange(len(part)) // self._block * (sources + 1)
            found = np.bincount(cells, minlength=min(step, blocks - first) * (sources + 1))
            counts[first : first + step] = found.reshape(-1, sources + 1)
            release(column)
        self._before = np.concatenate([np.zeros((1, sources + 1), np.int64), np.cumsum(counts, axis=0)])

    def count(self, source: int) -> int:
        """Returns how many samples a source has."""
        return int(self._before[-1, source])

    def select(self, source: int, places: Ids) -> Ids:
        """Returns the row of each of a source's samples: of its first at place 0, and so on."""
        before = self._before[:, source]
        blocks = np.searchsorted(before, places, side="right") - 1
        rows = np.empty(len(places), dtype=np.int64)
        for block in np.unique(blocks):
            here = blocks == block
            first = int(block) * self._block
            found = np.flatnonzero(self._column[first : first + self._block] == source)
            rows[here] = found[places[here] - before[block]] + first
        release(self._column)
        return rows


class BucketRows:
    """The samples of one bucket.

    Args:
        parts: the rows of each dataset.
        normalisers: raw scores to [0, 1], of each dataset.
    """

    def __init__(self, parts: Sequence[Columns], normalisers: Sequence[Normaliser]) -> None:
        self._parts = list(parts)
        self._normalisers = list(normalisers)
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        self._by_source: list[SourceRows] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def _selectors(self) -> list[SourceRows]:
        if self._by_source is None:
            self._by_source = [SourceRows(part.source, len(part.sources)) for part in self._parts]
        return self._by_source

    def sources(self) -> dict[str, int]:
        """Returns how many samples each source has in this bucket, sources without any left out."""
        counts: dict[str, int] = {}
        for part, selector in zip(self._parts, self._selectors, strict=True):
            for place, name in enumerate(part.sources):
                if selector.count(place):
                    counts[name] = counts.get(name, 0) + selector.count(place)
        return counts

    def select(self, source: str) -> Callable[[Ids], Ids]:
        """Returns the function from 0..n-1 to the numbers of a source's samples, which run through the datasets."""
        held = [
            (self._starts[i], part.sources.index(source), self._selectors[i])
            for i, part in enumerate(self._parts)
            if source in part.sources
        ]
        starts = np.cumsum([0] + [selector.count(place) for _, place, selector in held])

        def numbers(places: Ids) -> Ids:
            found = np.empty(len(places), dtype=np.int64)
            part_of = np.searchsorted(starts, places, side="right") - 1
            for i in np.unique(part_of):
                here = part_of == i
                first, place, selector = held[i]
                found[here] = selector.select(place, places[here] - starts[i]) + first
            return found

        return numbers

    def words(self, numbers: Ids) -> Words:
        """Returns a hash of the KEY of each sample."""
        words = np.empty(len(numbers), dtype=np.uint64)
        for part, _, here, rows in self._split(numbers):
            words[here] = gathered(part.key_hash, rows)
        return words

    def scores(self, numbers: Ids) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (motion, visual) in [0, 1], fp32, NaN where a sample has none."""
        found = np.full((2, len(numbers)), math.nan)
        for part, normaliser, here, rows in self._split(numbers):
            source, raw = gathered(part.source, rows), gathered(part.scores, rows).astype(np.float64)
            normalised = np.full((2, len(rows)), math.nan)
            for place in np.unique(source):
                of_source = source == place
                if place < len(part.sources):
                    for i, (column, name) in enumerate(((1, "motion_raw"), (0, "visual_raw"))):
                        values = raw[of_source, column]
                        normalised[i, of_source] = normaliser.apply_many(part.sources[place], name, values)
            found[:, here] = normalised
        motion, visual = torch.from_numpy(found).to(torch.float32)
        return motion, visual

    def outside(self, numbers: Ids) -> NDArray[np.bool_]:
        """Returns which samples have a raw score below or above all that quality.json was fitted to."""
        found = np.zeros(len(numbers), dtype=np.bool_)
        for part, normaliser, here, rows in self._split(numbers):
            source, raw = gathered(part.source, rows), gathered(part.scores, rows).astype(np.float64)
            beyond = np.zeros(len(rows), dtype=np.bool_)
            for place in np.unique(source):
                statistics = normaliser.sources.get(part.sources[place], {}) if place < len(part.sources) else {}
                for column, name in ((1, "motion_raw"), (0, "visual_raw")):
                    if name in statistics:
                        of_source = source == place
                        beyond[of_source] |= statistics[name].outside(raw[of_source, column])
            found[here] = beyond
        return found

    def _split(self, numbers: Ids) -> list[tuple[Columns, Normaliser, NDArray[np.bool_], Ids]]:
        """Returns for each dataset concerned its rows, its normaliser, which of the numbers are its own, and where."""
        part_of = np.searchsorted(self._starts, numbers, side="right") - 1
        return [
            (self._parts[i], self._normalisers[i], part_of == i, numbers[part_of == i] - self._starts[i])
            for i in np.unique(part_of)
        ]


class Keeper:
    """Draws which samples of a bucket are seen in an epoch, each with a probability that its scores give.

    Args:
        rows: the bucket's samples.
        probability: of being kept, from scores; samples without both scores are always kept.
        seed: key of the draws.
    """

    def __init__(self, rows: BucketRows, probability: KeepProbability, seed: int) -> None:
        self._rows = rows
        self._probability = probability
        self._seed = seed
        self.digest = xxhash.xxh128()  # of what `keep` looked at

    def mask(self, numbers: Ids, epoch: int) -> NDArray[np.bool_]:
        """Returns whether each sample is seen in an epoch: a function of its KEY, the epoch and the seed."""
        drawn = keyed_uniform(self._rows.words(numbers), key64(self._seed, epoch, "keep"))
        seen: NDArray[np.bool_] = drawn < self.probabilities(numbers)
        return seen

    def probabilities(self, numbers: Ids) -> NDArray[np.float64]:
        """Returns the probability of each sample.

        Raises:
            UserError: one is outside [0, 1].
        """
        motion, visual = self._rows.scores(numbers)
        scored = ~(motion.isnan() | visual.isnan())
        found = torch.ones(len(numbers), dtype=torch.float64)
        if bool(scored.any()):
            found[scored] = self._probability(motion[scored], visual[scored]).to(torch.float64)
        if not bool(((found >= 0) & (found <= 1)).all()):
            raise UserError("keep_probability gave a value outside [0, 1]", where="data", remedy="check the sampler")
        return found.numpy()

    def keep(self, name: str, size: int, select: Callable[[Ids], Ids] | None) -> Keep:
        """Returns what a stream of some of the bucket's samples keeps; its rate is that of a keyed choice of them."""
        looked_at = Permutation(size, key64(name, "rate")).stretch(0, min(size, _RATE_SAMPLES))
        looked_at.sort()
        found = self.probabilities(looked_at if select is None else select(looked_at))
        self.digest.update(found.tobytes())
        rate = int((found * RATE_ONE).astype(np.int64).sum()) // len(looked_at)  # whole numbers sum alike everywhere
        if not found.any() and size > len(looked_at):
            rate = self._any_kept(size, select)
        return Keep(self.mask, max(rate, int(bool(found.any()))))

    def _any_kept(self, size: int, select: Callable[[Ids], Ids] | None) -> int:
        """Returns the least rate if any of all samples may be kept, else 0; looks at all of them if it has to."""
        for first in range(0, size, _CHUNK):
            numbers = np.arange(first, min(first + _CHUNK, size), dtype=np.int64)
            if self.probabilities(numbers if select is None else select(numbers)).any():
                return 1
        return 0
