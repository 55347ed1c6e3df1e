"""The stages between an order and a rank's batches: each an iterator over an iterator, its place saved and restored.

    order -> share of a rank -> read -> collate -> ahead

The state of every stage is the place of the next item that it has not delivered. Only the order keeps one of its own,
the others hand it through; what `Ahead` holds ready does not count. No stage looks at ranks, processes or machines:
which part of a batch to deliver comes as a value, so any part can be had anywhere, and all parts are the same batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from contentv.base.types import Bucket, ReaderRank, StoredBatch, TextCond
from contentv.data.batch_rows import BatchRead
from contentv.data.dataset import VaeInfo
from contentv.data.joined import JoinedStore
from contentv.data.permutation import Ids
from contentv.data.plan import Order, PlannedBatch
from contentv.data.readahead import ReadAhead, Threads

S = TypeVar("S")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class Stage(Protocol[T_co]):
    """An iterator whose place can be saved and restored; after `close` it goes on from its place."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __next__(self) -> T_co: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Ordered:
    """The global batches of an order, until the data are used up."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self

    def __next__(self) -> PlannedBatch:
        planned = self._order.next()
        if planned is None:
            raise StopIteration
        return planned

    def state_dict(self) -> dict[str, Any]:
        """Returns the place of the next batch."""
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a place."""
        self._order.load_state_dict(state)

    def close(self) -> None:
        """Does nothing: an order holds nothing."""


class Mapped(Generic[S, T]):
    """A function of each item of the stage before.

    Args:
        before: the stage before.
        function: of an item; it keeps nothing from one item to the next that would change a result.
        release: lets go of what the function holds; it may be called again after that.
    """

    def __init__(self, before: Stage[S], function: Callable[[S], T], release: Callable[[], None] | None = None) -> None:
        self._before = before
        self._function = function
        self._release = release

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self._function(next(self._before))

    def state_dict(self) -> dict[str, Any]:
        """Returns the place of the next item."""
        return self._before.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a place."""
        self._before.load_state_dict(state)

    def close(self) -> None:
        """Lets go of threads and files, here and before."""
        self._before.close()
        if self._release is not None:
            self._release()


class Ahead(Generic[T]):
    """The items of the stage before, prepared by a thread while earlier ones are used.

    Args:
        before: the stage before.
        depth: how many items may lie ready; 0 prepares none.
    """

    def __init__(self, before: Stage[T], depth: int) -> None:
        self._before = before
        self._depth = depth
        self._state = before.state_dict()
        self._ahead: ReadAhead[tuple[T, dict[str, Any]]] | None = None
        self._stop: Callable[[], Any] | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._depth == 0:
            item = next(self._before)
            self._state = self._before.state_dict()
            return item
        if self._ahead is None:
            before = self._before
            self._ahead = ReadAhead(lambda: (next(before), before.state_dict()), self._depth)
            self._stop = weakref.finalize(self, self._ahead.close)  # the thread holds no reference to this stage
        item, self._state = self._ahead.get()
        return item

    def state_dict(self) -> dict[str, Any]:
        """Returns the place of the next item that has not been delivered."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a place; what lies ready is forgotten."""
        self._end()
        self._before.load_state_dict(state)
        self._state = self._before.state_dict()

    def close(self) -> None:
        """Ends the thread and lets go of what the stages before hold."""
        if self._end():
            self._before.load_state_dict(self._state)
        self._before.close()

    def _end(self) -> bool:
        if self._stop is None:
            return False
        self._stop()
        self._ahead = self._stop = None
        return True


@dataclass(frozen=True)
class Share:
    """What one rank reads of a global batch: numbers within the bucket, where they stand in the run, and in how many
    micro-batches they are wanted."""

    bucket: str
    numbers: Ids
    first_index: int
    global_samples: int
    micro_batches: int


class ShareOf:
    """A rank's contiguous part of each global batch.

    Args:
        reader: which part.
        micro_batches: into how many micro-batches it is cut, for every bucket the same.
    """

    def __init__(self, reader: ReaderRank, micro_batches: int) -> None:
        self._reader = reader
        self._micro_batches = micro_batches

    def __call__(self, planned: PlannedBatch) -> Share:
        size = len(planned.samples)
        share = size // self._reader.world
        first = self._reader.rank * share
        return Share(
            planned.bucket, planned.samples[first : first + share], planned.first_index + first, size,
            self._micro_batches,
        )  # fmt: skip


class Read:
    """The samples of a share, micro-batch by micro-batch.

    Args:
        store: where they are read.
        workers: threads that read at once; 0 reads in the calling thread.
    """

    def __init__(self, store: JoinedStore, workers: int) -> None:
        self._store = store
        self._workers = workers
        self._threads: Threads | None = None

    def __call__(self, share: Share) -> tuple[Share, list[BatchRead]]:
        if self._workers and self._threads is None:
            self._threads = Threads(self._workers)
        numbers = share.numbers.tolist()
        size = len(numbers) // share.micro_batches
        starts = range(0, len(numbers), size)
        return share, [self._store.read_batch(share.bucket, numbers[i : i + size], self._threads) for i in starts]

    def close(self) -> None:
        """Ends the threads and closes the shards until they are needed again."""
        if self._threads is not None:
            self._threads.close()
            self._threads = None
        self._store.close()


class Collate:
    """Samples to micro-batches; nothing is converted here.

    Args:
        vae: has the statistics that normalise the latents, on the device.
    """

    def __init__(self, vae: VaeInfo) -> None:
        self._mean = torch.tensor(vae.latents_mean).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(vae.latents_std).view(1, -1, 1, 1, 1)

    def __call__(self, read: tuple[Share, list[BatchRead]]) -> list[StoredBatch]:
        share, batches = read
        batch_size = len(share.numbers) // share.micro_batches
        return [self._micro_batch(share, one, share.first_index + i * batch_size) for i, one in enumerate(batches)]

    def _micro_batch(self, share: Share, read: BatchRead, index: int) -> StoredBatch:
        metas = [meta for meta, _, _ in read.described]
        return StoredBatch(
            keys=[meta["key"] for meta in metas],
            captions=[meta["caption"] for meta in metas],
            bucket=Bucket.parse(share.bucket),
            latents=read.tensors["latents"],
            text=TextCond(read.tensors["text_tokens"], read.tensors["text_pooled"]),
            motion=torch.tensor([motion for _, motion, _ in read.described], dtype=torch.float32),
            visual=torch.tensor([visual for _, _, visual in read.described], dtype=torch.float32),
            sample_index=torch.arange(index, index + len(metas)),
            global_samples=share.global_samples,
            latents_mean=self._mean,
            latents_std=self._std,
        )
