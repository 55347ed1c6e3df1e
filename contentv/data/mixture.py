"""Batches mixed from several sources, and images mixed with videos, in given shares that hold at any time.

Every (bucket, source) is a stream of its own with a credit: it grows by the stream's share with every sample trained on
anywhere and falls by one with every sample of its own. The kind (image or video) that is most in credit comes next,
within it the bucket that is, and the places of the batch go to the bucket's sources by credit. So shares are exact to
within a batch between kinds and to within a sample inside a bucket, whenever one looks. The places are then shuffled,
so that every rank's slice of the batch is a mixture too.

A source with a budget of epochs drops out when it has been seen that often, and the others share what it had. A bucket
that cannot fill a batch any more ends. When all have, the data are used up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from contentv.base.log import get_logger
from contentv.data.permutation import Ids, key64, shuffled
from contentv.data.plan import PlannedBatch, packed, unpacked
from contentv.data.shares import WHOLE, Targets, fit_shares, is_image
from contentv.data.streams import RATE_ONE, Cursor, SampleStream


@dataclass(frozen=True)
class Cell:
    """One source's samples of one bucket; the source is "" where sources are not told apart."""

    bucket: str
    source: str
    stream: SampleStream


class MixtureOrder:
    """Batches whose samples are shared out between kinds, buckets and sources.

    Args:
        cells: the streams.
        batch_sizes: samples of a global batch of each bucket.
        targets: the shares.
        seed: key of the order.

    Raises:
        UserError: the shares cannot hold all at once.
    """

    def __init__(self, cells: Sequence[Cell], batch_sizes: Mapping[str, int], targets: Targets, seed: int) -> None:
        self._cells = list(cells)
        self._sizes = dict(batch_sizes)
        self._targets = targets
        self._seed = seed
        self._step = self._samples = 0
        self._cursors = [Cursor() for _ in cells]
        self._credits = [0] * len(cells)  # in samples x WHOLE
        self._ended: set[str] = set()  # buckets that cannot fill a batch any more
        self._shares = self._fit(strict=True)

    def next(self) -> PlannedBatch | None:
        """Returns the next global batch and moves past it, None if the data are used up."""
        while any(self._shares):
            bucket = self._most_in_credit()
            size = self._sizes[bucket]
            taken = self._take(bucket, size)
            if taken is None:
                self._ended.add(bucket)
                self._refit()
                continue
            samples, cursors = taken
            epoch = min(self._cursors[i].epoch for i in self._live())
            self._settle(size, samples, cursors)
            mixed = shuffled(np.concatenate([samples[i] for i in sorted(samples)]), self._key("mix"))
            planned = PlannedBatch(self._step, self._samples, epoch, bucket, mixed)
            self._step += 1
            self._samples += size
            return planned
        return None

    def _key(self, purpose: str) -> np.uint64:
        return key64(self._seed, self._step, purpose)

    def _live(self) -> list[int]:
        return [i for i in range(len(self._cells)) if self._is_live(i)]

    def _is_live(self, i: int) -> bool:
        cell = self._cells[i]
        seen_in_full = cell.stream.max_epochs is not None and self._cursors[i].epoch >= cell.stream.max_epochs
        return not seen_in_full and cell.bucket not in self._ended

    def _fit(self, strict: bool = False) -> list[int]:
        """Returns the shares of the cells that are left, 0 for the others."""
        sizes = [
            cell.stream.size * cell.stream.rate / RATE_ONE if self._is_live(i) else 0.0
            for i, cell in enumerate(self._cells)
        ]
        if not any(sizes):
            return [0] * len(sizes)
        return fit_shares([(cell.bucket, cell.source) for cell in self._cells], sizes, self._targets, strict)

    def _refit(self) -> None:
        before = {cell.source for cell, share in zip(self._cells, self._shares, strict=True) if share}
        self._shares = self._fit()
        left = {cell.source for cell, share in zip(self._cells, self._shares, strict=True) if share}
        for source in sorted(before - left):
            get_logger().info(f'step {self._step}: source "{source}" is used up, the others share what it had')
        for i, share in enumerate(self._shares):
            if not share:
                self._credits[i] = 0

    def _most_in_credit(self) -> str:
        """Returns the bucket that is next: of the kind that is most in credit where kinds have shares."""
        totals: dict[tuple[bool, str], tuple[int, int]] = {}
        for i in self._live():
            bucket = self._cells[i].bucket
            place = (bool(self._targets.image_ratio) and is_image(bucket), bucket)
            credit, share = totals.get(place, (0, 0))
            totals[place] = (credit + self._credits[i], share + self._shares[i])
        kinds = sorted({kind for kind, _ in totals})
        kind = max(kinds, key=lambda k: _sum(value for (other, _), value in totals.items() if other == k))
        # Of equals the one with the larger share, and of those the first by name.
        return max(sorted(bucket for k, bucket in totals if k == kind), key=lambda bucket: totals[kind, bucket])

    def _take(self, bucket: str, size: int) -> tuple[dict[int, Ids], dict[int, Cursor]] | None:
        """Returns a batch's samples by cell and where the cells' streams then stand; None if they have too few."""
        open_cells = [i for i in self._live() if self._cells[i].bucket == bucket]
        samples = {i: np.empty(0, np.int64) for i in open_cells}
        cursors = {i: self._cursors[i] for i in open_cells}
        missing = size
        while missing and open_cells:
            quotas = self._quotas(open_cells, missing)
            for i, quota in zip(list(open_cells), quotas, strict=True):
                part, cursors[i] = self._cells[i].stream.take(cursors[i], quota)
                samples[i] = np.concatenate([samples[i], part])
                missing -= len(part)
                if len(part) < quota:
                    open_cells.remove(i)
        return None if missing else (samples, cursors)

    def _quotas(self, cells: Sequence[int], size: int) -> list[int]:
        """Returns how many of `size` places each cell of a bucket gets: its share, put right by its credit."""
        share = sum(self._shares[i] for i in cells)
        credit = sum(self._credits[i] for i in cells)
        # share x WHOLE times the places due to each cell; the sum over the cells is share x WHOLE x size
        due = [self._shares[i] * (size * WHOLE - credit) + self._credits[i] * share for i in cells]
        unit = share * WHOLE
        quotas = [max(0, amount // unit) for amount in due]
        order = sorted(range(len(cells)), key=lambda j: quotas[j] * unit - due[j])
        while sum(quotas) > size:  # a cell far behind is owed more than the batch has
            quotas[max(range(len(cells)), key=quotas.__getitem__)] -= 1
        for j in order[: size - sum(quotas)]:
            quotas[j] += 1
        quotas[order[0]] += size - sum(quotas)
        return quotas

    def _settle(self, size: int, samples: Mapping[int, Ids], cursors: Mapping[int, Cursor]) -> None:
        """Books a batch: credits, places, and whether a source is now used up."""
        for i, share in enumerate(self._shares):
            self._credits[i] += share * size - (len(samples[i]) * WHOLE if i in samples else 0)
        for i, cursor in cursors.items():
            self._cursors[i] = cursor
        if any(not self._is_live(i) for i in cursors):
            self._refit()

    def state_dict(self) -> dict[str, Any]:
        """Returns the place of the next batch."""
        ended = [i for i, cell in enumerate(self._cells) if cell.bucket in self._ended]
        return {**packed(self._step, self._samples, self._cursors), "credits": list(self._credits), "ended": ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to the place `state_dict` returned.

        Raises:
            UserError: it is not a place in these streams.
        """
        streams = [cell.stream for cell in self._cells]
        place = unpacked(state, streams, indexes="ended", per_stream="credits")
        self._step, self._samples, self._cursors = place[:3]
        self._credits = place.per_stream
        self._ended = {self._cells[i].bucket for i in place.indexes}
        self._shares = self._fit()


def _sum(pairs: Any) -> tuple[int, int]:
    """Returns the sums of the first and of the second numbers."""
    rows = list(pairs)
    return sum(row[0] for row in rows), sum(row[1] for row in rows)
