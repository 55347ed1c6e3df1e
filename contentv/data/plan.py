"""Which samples make up each optimiser step: a pure function of (seed, dataset, global batch size).

A bucket is an endless stream: the kept samples of epoch 0 in a keyed order, then those of epoch 1, and so on. A global
batch is the next `global_batch_size` samples of one bucket's stream. An epoch of training holds every batch that the
streams complete within it; fewer than a batch of samples per bucket are left over and open the bucket's stream in the
next epoch. So nothing is dropped, each kept sample is seen exactly once for each epoch of its stream, and a bucket
smaller than a batch fills it from several epochs. The order is made with integer hashes, not with a library's
generator, so it is the same under every version of numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from contentv.base.errors import UserError

Ids = NDArray[np.int64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MAX_EMPTY_EPOCHS = 10_000


class Cursor(NamedTuple):
    """A place in a bucket's stream: the next sample is number `offset` of that epoch's kept samples."""

    epoch: int = 0
    offset: int = 0


class PlannedBatch(NamedTuple):
    """One global batch: the optimiser step, the epoch, the bucket, and its samples as numbers within the bucket."""

    step: int
    epoch: int
    bucket: str
    samples: Ids


@runtime_checkable
class Order(Protocol):
    """An endless sequence of global batches with a small, exact state."""

    def next(self) -> PlannedBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def key64(*parts: object) -> np.uint64:
    """Returns 64 bits that depend on all parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    word: np.uint64 = np.frombuffer(digest, dtype="<u8").astype(np.uint64)[0]
    return word


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns 64-bit words whose every bit depends on every bit of the input word (SplitMix64's finaliser)."""
    mixed: NDArray[np.uint64] = values.copy()
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def keyed_order(count: int, key: np.uint64) -> Ids:
    """Returns the numbers 0..count-1 in an order that depends on `key` alone."""
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN + key
    return np.argsort(mix64(counters), kind="stable").astype(np.int64)


def keyed_uniform(words: NDArray[np.uint64], key: np.uint64) -> NDArray[np.float64]:
    """Returns a number in [0, 1) for each word, a function of the word and `key`."""
    bits: NDArray[np.uint64] = mix64(mix64(words ^ key) + _GOLDEN) >> np.uint64(11)
    draws: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return draws


class BucketStream:
    """The endless stream of one bucket's samples.

    Args:
        name: the bucket's name, part of the key of its order.
        size: samples in the bucket.
        seed: the run's seed.
        keep: per sample a hash of its KEY and the probability of being seen in an epoch; None keeps all.
    """

    def __init__(
        self,
        name: str,
        size: int,
        seed: int,
        keep: tuple[NDArray[np.uint64], NDArray[np.float64]] | None = None,
    ) -> None:
        self.name = name
        self.size = size
        self._seed = seed
        self._keep = keep
        self._cache: dict[int, Ids] = {}
        self._tally = (Cursor(), -1, 0)  # the last answer of count_until_end_of: from, to the end of, how many
        expected = size if keep is None else float(keep[1].sum())
        if expected <= 0:
            raise UserError(
                f"bucket {name} has no samples to train on ({size} stored)",
                where="data",
                remedy="leave the bucket out, or raise the keep probability",
            )

    def epoch_samples(self, epoch: int) -> Ids:
        """Returns the samples of one epoch in the order they are seen."""
        if epoch not in self._cache:
            order = keyed_order(self.size, key64(self._seed, epoch, self.name, "order"))
            if self._keep is not None:
                words, probability = self._keep
                order = order[(keyed_uniform(words, key64(self._seed, epoch, "keep")) < probability)[order]]
            while len(self._cache) >= 2:
                del self._cache[min(self._cache)]
            self._cache[epoch] = order
        return self._cache[epoch]

    def take(self, cursor: Cursor, count: int) -> tuple[Ids, Cursor]:
        """Returns the next `count` samples from `cursor` on, over as many epochs as that needs, and the new cursor."""
        parts: list[Ids] = []
        empty = 0
        while count > 0:
            part = self.epoch_samples(cursor.epoch)[cursor.offset : cursor.offset + count]
            empty = 0 if len(part) else empty + 1
            if empty > _MAX_EMPTY_EPOCHS:
                raise _nothing_kept(self.name)
            parts.append(part)
            count -= len(part)
            cursor = self._settle(Cursor(cursor.epoch, cursor.offset + len(part)))
        return np.concatenate(parts) if parts else np.empty(0, np.int64), cursor

    def count_until_end_of(self, cursor: Cursor, epoch: int) -> int:
        """Returns how many samples lie between `cursor` and the end of `epoch`."""
        if self._keep is None:
            return (epoch + 1 - cursor.epoch) * self.size - cursor.offset
        start, counted, total = self._tally
        if start != cursor or counted > epoch:
            counted, total = cursor.epoch - 1, -cursor.offset
        total += sum(len(self.epoch_samples(e)) for e in range(counted + 1, epoch + 1))
        self._tally = (cursor, epoch, total)
        return total

    def _settle(self, cursor: Cursor) -> Cursor:
        """Returns the same place, at the start of the next epoch rather than at the end of one."""
        at_end = cursor.offset >= len(self.epoch_samples(cursor.epoch))
        return Cursor(cursor.epoch + 1, 0) if at_end else cursor


class EpochOrder:
    """Batches of all buckets in proportion to their sizes, shuffled within each epoch.

    The state is the step, the epoch, the number of batches of it already taken, and where each bucket's stream stood
    when the epoch began; resuming replans one epoch and reads nothing.
    """

    def __init__(self, streams: Sequence[BucketStream], global_batch_size: int, seed: int) -> None:
        self._streams = {stream.name: stream for stream in streams}
        self._size = global_batch_size
        self._seed = seed
        self._step = self._epoch = self._batch = 0
        self._starts = {name: Cursor() for name in self._streams}
        self._ends = dict(self._starts)  # where the streams stand when the planned epoch is over
        self._batches: list[tuple[str, Ids]] | None = None  # the plan of the current epoch, made when needed

    def next(self) -> PlannedBatch:
        """Returns the next global batch and moves past it."""
        empty = 0
        while self._batch >= len(batches := self._plan()):
            empty += 1
            if empty > _MAX_EMPTY_EPOCHS:
                raise _nothing_kept(", ".join(self._streams))
            self._epoch += 1
            self._batch = 0
            self._starts = dict(self._ends)
            self._batches = None
        bucket, samples = batches[self._batch]
        planned = PlannedBatch(self._step, self._epoch, bucket, samples)
        self._step += 1
        self._batch += 1
        return planned

    def _plan(self) -> list[tuple[str, Ids]]:
        if self._batches is None:
            batches: list[tuple[str, Ids]] = []
            for name, stream in self._streams.items():
                whole = stream.count_until_end_of(self._starts[name], self._epoch) // self._size
                samples, self._ends[name] = stream.take(self._starts[name], whole * self._size)
                batches += [(name, row) for row in samples.reshape(whole, self._size)]
            order = keyed_order(len(batches), key64(self._seed, self._epoch, "batches"))
            self._batches = [batches[i] for i in order]
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """Returns the place of the next batch."""
        return _state(self._step, self._epoch, self._batch, self._starts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to the place `state_dict` returned."""
        self._step, self._epoch, self._batch, self._starts = _place(state, self._starts)
        self._batches = None
        if self._batch > len(self._plan()):
            raise UserError(
                f"the saved state is at batch {self._batch} of an epoch of {len(self._plan())}",
                where="data state",
                remedy="the dataset is not the one the state was saved with; resume with that one",
            )


class WeightedOrder:
    """Batches of buckets drawn with fixed probabilities, one keyed draw a step, each bucket at its own pace."""

    def __init__(
        self, streams: Sequence[BucketStream], weights: Mapping[str, float], global_batch_size: int, seed: int
    ) -> None:
        self._streams = list(streams)
        weight = np.array([weights[stream.name] for stream in streams], dtype=np.float64)
        self._cumulative = np.cumsum(weight) / np.cumsum(weight)[-1]
        self._size = global_batch_size
        self._seed = seed
        self._step = 0
        self._cursors = {stream.name: Cursor() for stream in streams}

    def next(self) -> PlannedBatch:
        """Returns the next global batch and moves past it; its epoch is that of the drawn bucket."""
        draw = keyed_uniform(np.array([self._step], dtype=np.uint64), key64(self._seed, "bucket"))[0]
        chosen = int(np.searchsorted(self._cumulative, draw, side="right"))
        stream = self._streams[chosen]
        cursor = self._cursors[stream.name]
        samples, self._cursors[stream.name] = stream.take(cursor, self._size)
        planned = PlannedBatch(self._step, cursor.epoch, stream.name, samples)
        self._step += 1
        return planned

    def state_dict(self) -> dict[str, Any]:
        """Returns the place of the next batch; `epoch` is the number of epochs every bucket has completed."""
        return _state(self._step, min(cursor.epoch for cursor in self._cursors.values()), 0, self._cursors)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to the place `state_dict` returned."""
        self._step, _, _, self._cursors = _place(state, self._cursors)


def _state(step: int, epoch: int, batch: int, cursors: Mapping[str, Cursor]) -> dict[str, Any]:
    places = {name: list(cursor) for name, cursor in cursors.items()}
    return {"step": step, "epoch": epoch, "batch": batch, "cursors": places}


def _place(state: Mapping[str, Any], cursors: Mapping[str, Cursor]) -> tuple[int, int, int, dict[str, Cursor]]:
    try:
        numbers = [int(state[name]) for name in ("step", "epoch", "batch")]
        places = {name: _cursor(*state["cursors"][name]) for name in cursors}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the saved state is not valid ({error!r})", where="data state") from error
    if min(numbers + [n for place in places.values() for n in place]) < 0:
        raise UserError("the saved state has negative numbers", where="data state")
    return numbers[0], numbers[1], numbers[2], places


def _cursor(epoch: Any, offset: Any) -> Cursor:
    return Cursor(int(epoch), int(offset))


def _nothing_kept(buckets: str) -> UserError:
    return UserError(
        f"{_MAX_EMPTY_EPOCHS} epochs of {buckets} did not keep enough samples for one batch",
        where="data",
        remedy="raise the keep probability, or use a smaller global batch",
    )
