"""Endless streams of samples, each with a cursor of two numbers and nothing to remember.

A stream goes through its samples in the keyed order of epoch 0, then of epoch 1, and so on. Where samples are kept with
a probability, a cursor still counts the places of the whole order: stretches of it are looked at when they are reached,
so neither opening nor resuming has to go through an epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from contentv.base.errors import UserError
from contentv.data.permutation import Ids, Permutation, key64

RATE_ONE = 1 << 20  # a keep rate of 1, as a whole number, so that what is drawn does not depend on rounding
MAX_EMPTY_EPOCHS = 10_000
_BLOCK = 4096  # places looked at together
_CACHED_BLOCKS = 4


class Cursor(NamedTuple):
    """A place in a stream: the next sample is at place `offset` of that epoch's order or, if dropped, behind it."""

    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Keep:
    """Which samples of a stream are seen in an epoch.

    Args:
        mask: (numbers of samples, epoch) -> whether each is seen in it.
        rate: about how many are, in parts of `RATE_ONE`; decides in which proportion buckets are drawn and no more.
    """

    mask: Callable[[Ids, int], NDArray[np.bool_]]
    rate: int = RATE_ONE


class SampleStream:
    """The endless stream of some samples of one bucket.

    Args:
        name: part of the key of its order.
        size: how many samples.
        seed: the run's seed.
        select: 0..size-1 -> numbers of the samples within the bucket; None if they are the same.
        keep: which are seen; None keeps all.
        max_epochs: epochs after which the stream ends; None if never.

    Raises:
        UserError: the stream has no samples.
    """

    def __init__(
        self,
        name: str,
        size: int,
        seed: int,
        *,
        select: Callable[[Ids], Ids] | None = None,
        keep: Keep | None = None,
        max_epochs: int | None = None,
    ) -> None:
        self.name = name
        self.size = size
        self.max_epochs = max_epochs
        self.rate = RATE_ONE if keep is None else keep.rate
        self._seed = seed
        self._select = select
        self._keep = keep
        self._orders: OrderedDict[int, Permutation] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], tuple[Ids, Ids]] = OrderedDict()
        if size <= 0 or self.rate <= 0:
            raise UserError(
                f"{name} has no samples to train on ({size} stored)",
                where="data",
                remedy="leave the bucket out, or raise the keep probability",
            )

    def take(self, cursor: Cursor, count: int, until: int | None = None) -> tuple[Ids, Cursor]:
        """Returns the next `count` samples from `cursor` on, and the place behind them.

        Fewer come back where epoch `until`, or the end of the stream, begins before.

        Raises:
            UserError: nothing is kept in any of very many epochs.
        """
        last = min((bound for bound in (until, self.max_epochs) if bound is not None), default=None)
        parts: list[Ids] = []
        found_in = cursor.epoch
        while count > 0 and (last is None or cursor.epoch < last):
            part, cursor = self._next(cursor, count)
            count -= len(part)
            if len(part):
                parts.append(part)
                found_in = cursor.epoch
            else:
                refuse_endless(cursor.epoch - found_in, self.name)
        return np.concatenate(parts) if parts else np.empty(0, np.int64), cursor

    def remaining(self, cursor: Cursor, until: int) -> int:
        """Returns about how many samples lie before epoch `until`: exact without `keep`, else by the keep rate."""
        return max(0, (until - cursor.epoch) * self.size - cursor.offset) * self.rate // RATE_ONE

    def check(self, cursor: Cursor) -> None:
        """Passes over a place that this stream can be at; raises ValueError for others."""
        if cursor.epoch < 0 or not 0 <= cursor.offset < self.size:
            raise ValueError(f"{tuple(cursor)} is not a place in {self.name}, which has {self.size} samples")

    def _next(self, cursor: Cursor, count: int) -> tuple[Ids, Cursor]:
        """Returns the samples that one look gives, perhaps none, and the place behind what was looked at."""
        block = cursor.offset // _BLOCK
        places, numbers = self._kept(cursor.epoch, block)
        first = int(np.searchsorted(places, cursor.offset))
        part = numbers[first : first + count]
        behind = int(places[first + count - 1]) + 1 if len(part) == count else (block + 1) * _BLOCK
        return part, Cursor(cursor.epoch + 1, 0) if behind >= self.size else Cursor(cursor.epoch, behind)

    def _numbers(self, epoch: int, first: int, last: int) -> Ids:
        order = self._orders.get(epoch)
        if order is None:
            order = self._orders[epoch] = Permutation(self.size, key64(self._seed, epoch, self.name, "order"))
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        numbers = order.stretch(first, last)
        return numbers if self._select is None else self._select(numbers)

    def _kept(self, epoch: int, block: int) -> tuple[Ids, Ids]:
        """Returns the places of a block whose samples are seen in the epoch, and the samples."""
        if (epoch, block) not in self._blocks:
            first, last = block * _BLOCK, min((block + 1) * _BLOCK, self.size)
            numbers = self._numbers(epoch, first, last)
            seen = np.flatnonzero(self._keep.mask(numbers, epoch)) if self._keep else np.arange(last - first)
            self._blocks[epoch, block] = (seen + first, numbers[seen])
            while len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[epoch, block]


def refuse_endless(empty_epochs: int, where: str) -> None:
    """Passes while a whole batch may still come together.

    Raises:
        UserError: none did in very many epochs.
    """
    if empty_epochs > MAX_EMPTY_EPOCHS:
        raise UserError(
            f"{MAX_EMPTY_EPOCHS} epochs of {where} did not keep enough samples for one batch",
            where="data",
            remedy="raise the keep probability, or use a smaller global batch",
        )
