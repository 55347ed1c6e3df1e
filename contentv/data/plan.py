"""Which samples make up each optimiser step: a pure function of (seed, dataset, global batch, choices of data.*).

A bucket is an endless stream: the kept samples of epoch 0 in a keyed order, then those of epoch 1, and so on. A global
batch is the next samples of one bucket's stream. An epoch of training holds every batch that the streams complete
within it; fewer than a batch of samples per bucket are left over and open the bucket's stream in the next epoch. So
nothing is dropped, each kept sample is seen exactly once for each epoch of its stream, and a bucket smaller than a
batch fills it from several epochs. Which bucket is next is a keyed draw in proportion to the batches that remain of
each, so every order of an epoch's batches is equally likely and no epoch is ever listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from contentv.base.errors import UserError
from contentv.data.permutation import Ids, keyed_below
from contentv.data.shares import apportion
from contentv.data.streams import Cursor, SampleStream, refuse_endless


class PlannedBatch(NamedTuple):
    """One global batch.

    Attributes:
        step: optimiser step.
        first_index: samples of all steps before it.
        epoch: the epoch of training, or the number of epochs that its streams have completed.
        bucket: name of the bucket.
        samples: numbers of the samples within the bucket, in order.
    """

    step: int
    first_index: int
    epoch: int
    bucket: str
    samples: Ids


@runtime_checkable
class Order(Protocol):
    """A sequence of global batches with a small, exact state; None when the data are used up."""

    def next(self) -> PlannedBatch | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class EpochOrder:
    """Batches of all buckets in proportion to what remains of them, epoch by epoch.

    Args:
        streams: one of each bucket, named after it.
        batch_sizes: samples of a global batch of each bucket.
        seed: key of the order.
    """

    def __init__(self, streams: Sequence[SampleStream], batch_sizes: Mapping[str, int], seed: int) -> None:
        self._streams = list(streams)
        self._sizes = [batch_sizes[stream.name] for stream in streams]
        self._seed = seed
        self._step = self._samples = self._epoch = 0
        self._cursors = [Cursor() for _ in streams]
        self._over: set[int] = set()  # buckets found not to complete another batch in this epoch
        self._too_few: dict[int, tuple[Cursor, Ids, Cursor]] = {}  # from where, what was found, up to where

    def next(self) -> PlannedBatch:
        """Returns the next global batch and moves past it."""
        empty = attempt = 0
        while True:
            batches = [self._batches_left(i) for i in range(len(self._streams))]
            if not any(batches):
                empty += 1
                refuse_endless(empty, ", ".join(stream.name for stream in self._streams))
                self._epoch += 1
                self._over.clear()
                continue
            chosen = _draw(batches, self._seed, self._step, attempt, "bucket")
            size = self._sizes[chosen]
            samples, cursor = self._take(chosen, size)
            if len(samples) == size:
                break
            self._over.add(chosen)  # fewer were kept than expected
            attempt += 1
        planned = PlannedBatch(self._step, self._samples, self._epoch, self._streams[chosen].name, samples)
        self._cursors[chosen] = cursor
        self._step += 1
        self._samples += size
        return planned

    def _take(self, i: int, size: int) -> tuple[Ids, Cursor]:
        """Returns a batch of bucket i, or what the epoch has left of it, and the place behind.

        What was too little is kept at hand: a bucket that needs many epochs for a batch is gone through once.
        """
        start, until = self._cursors[i], self._epoch + 1
        before = self._too_few.pop(i, None)
        if before is None or before[0] != start:
            before = (start, np.empty(0, np.int64), start)
        more, cursor = self._streams[i].take(before[2], size - len(before[1]), until)
        samples = np.concatenate([before[1], more])
        if len(samples) < size:
            self._too_few[i] = (start, samples, cursor)
        return samples, cursor

    def _batches_left(self, i: int) -> int:
        """Returns about how many batches bucket i completes in this epoch; 0 only if it is certain to complete none."""
        cursor, size, stream = self._cursors[i], self._sizes[i], self._streams[i]
        if i in self._over or (self._epoch + 1 - cursor.epoch) * stream.size - cursor.offset < size:
            return 0
        return max(1, stream.remaining(cursor, self._epoch + 1) // size)

    def state_dict(self) -> dict[str, Any]:
        """Returns the place of the next batch."""
        return {
            **packed(self._step, self._samples, self._cursors),
            "epoch": self._epoch,
            "over": sorted(self._over),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to the place `state_dict` returned.

        Raises:
            UserError: it is not a place in these streams.
        """
        place = unpacked(state, self._streams, number="epoch", indexes="over")
        self._step, self._samples, self._cursors, (self._epoch,) = place[:4]
        self._over = set(place.indexes)


class WeightedOrder:
    """Batches of buckets drawn with fixed probabilities, one keyed draw a step, each bucket at its own pace.

    Args:
        streams: one of each bucket, named after it.
        batch_sizes: samples of a global batch of each bucket.
        weights: relative probability of each bucket.
        seed: key of the order.
    """

    def __init__(
        self,
        streams: Sequence[SampleStream],
        batch_sizes: Mapping[str, int],
        weights: Mapping[str, float],
        seed: int,
    ) -> None:
        self._streams = list(streams)
        self._sizes = [batch_sizes[stream.name] for stream in streams]
        self._parts = apportion(1 << 30, [float(weights[stream.name]) for stream in streams])
        self._seed = seed
        self._step = self._samples = 0
        self._cursors = [Cursor() for _ in streams]

    def next(self) -> PlannedBatch:
        """Returns the next global batch and moves past it; its epoch is that of the drawn bucket."""
        chosen = _draw(self._parts, self._seed, self._step, "bucket")
        stream, size, epoch = self._streams[chosen], self._sizes[chosen], self._cursors[chosen].epoch
        samples, self._cursors[chosen] = stream.take(self._cursors[chosen], size)
        planned = PlannedBatch(self._step, self._samples, epoch, stream.name, samples)
        self._step += 1
        self._samples += size
        return planned

    def state_dict(self) -> dict[str, Any]:
        """Returns the place of the next batch."""
        return packed(self._step, self._samples, self._cursors)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to the place `state_dict` returned.

        Raises:
            UserError: it is not a place in these streams.
        """
        self._step, self._samples, self._cursors = unpacked(state, self._streams)[:3]


def _draw(weights: Sequence[int], *key: object) -> int:
    """Returns a place drawn in proportion to whole-numbered weights."""
    if len(weights) == 1:
        return 0
    draw = keyed_below(sum(weights), *key)
    for place, weight in enumerate(weights):
        if draw < weight:
            return place
        draw -= weight
    raise RuntimeError("unreachable: the draw is below the sum")


def packed(step: int, samples: int, cursors: Sequence[Cursor]) -> dict[str, Any]:
    """Returns the part of a state that all orders have; cursors are [epoch, offset, epoch, offset, ...]."""
    return {"step": step, "samples": samples, "cursors": [number for cursor in cursors for number in cursor]}


class Place(NamedTuple):
    """A checked state."""

    step: int
    samples: int
    cursors: list[Cursor]
    numbers: list[int]
    indexes: list[int]
    per_stream: list[int]


def unpacked(
    state: Mapping[str, Any], streams: Sequence[SampleStream], number: str = "", indexes: str = "", per_stream: str = ""
) -> Place:
    """Returns what a state says: what all orders have, and at the given names numbers, places of streams, and one
    number for each stream.

    Raises:
        UserError: something is missing, of another type, or no place in these streams.
    """
    try:
        flat = [int(number) for number in state["cursors"]]
        cursors = [Cursor(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
        for stream, cursor in zip(streams, cursors, strict=True):
            stream.check(cursor)
        numbers = [int(state[name]) for name in ("step", "samples", *filter(None, [number]))]
        chosen = [int(i) for i in state[indexes]] if indexes else []
        rows = [int(value) for value in state[per_stream]] if per_stream else [0] * len(streams)
        if min(numbers) < 0 or not set(chosen) <= set(range(len(streams))) or len(rows) != len(streams):
            raise ValueError("numbers out of range")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the saved state is not valid ({error!r})",
            where="data state",
            remedy="the dataset is not the one the state was saved with; resume with that one",
        ) from error
    return Place(numbers[0], numbers[1], cursors, numbers[2:], chosen, rows)
