"""From planned global batches to one rank's micro-batches, ahead of time and resumable."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from contentv.base.errors import UserError
from contentv.base.types import Batch, ReaderRank, TextCond
from contentv.data.dataset import DatasetInfo
from contentv.data.plan import Order, PlannedBatch
from contentv.data.quality import Normaliser
from contentv.data.quarantine import Quarantine
from contentv.data.readahead import ReadAhead
from contentv.data.sample import StoredSample
from contentv.data.store import SampleStore

STATE_VERSION = 1
Step = tuple[list[Batch], dict[str, Any]]  # this rank's micro-batches, and the state after them


class StepReader:
    """Makes one rank's micro-batches of the next global batch, each time it is called."""

    def __init__(
        self,
        info: DatasetInfo,
        store: SampleStore,
        order: Order,
        normaliser: Normaliser,
        reader: ReaderRank,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        self._store = store
        self.order = order
        self._normaliser = normaliser
        self._reader = reader
        self._size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._mean = torch.tensor(info.vae.latents_mean).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(info.vae.latents_std).view(1, -1, 1, 1, 1)

    def __call__(self) -> Step:
        planned = self.order.next()
        share = self._size // self._reader.world
        first = self._reader.rank * share
        starts = range(first, first + share, self._micro_batch_size)
        return [self._micro_batch(planned, start) for start in starts], self.order.state_dict()

    def close(self) -> None:
        """Closes the shards until they are read again."""
        self._store.pool.close()

    def _micro_batch(self, planned: PlannedBatch, start: int) -> Batch:
        places = range(start, start + self._micro_batch_size)
        samples = [self._store.read(planned.bucket, int(planned.samples[place])) for place in places]
        latents = torch.stack([sample.latents.to(torch.float32) for sample in samples])
        return Batch(
            keys=[sample.meta["key"] for sample in samples],
            captions=[sample.meta["caption"] for sample in samples],
            bucket=self._store.tables[planned.bucket].bucket,
            latents=(latents - self._mean) / self._std,
            text=TextCond(
                torch.stack([sample.text_tokens.to(torch.float32) for sample in samples]),
                torch.stack([sample.text_pooled.to(torch.float32) for sample in samples]),
            ),
            motion=self._scores(samples, "motion_raw"),
            visual=self._scores(samples, "visual_raw"),
            sample_index=torch.tensor([planned.step * self._size + place for place in places]),
        )

    def _scores(self, samples: list[StoredSample], name: str) -> torch.Tensor:
        scores = [self._normaliser.apply(sample.meta["source"], name, sample.meta[name]) for sample in samples]
        return torch.tensor(scores, dtype=torch.float32)


class DatasetSource:
    """A `BatchSource` over a dataset: one cursor, moved by iteration and by `load_state_dict`.

    `state_dict` is the place of the next step that has not been delivered; what read-ahead has prepared beyond it does
    not count. The state is independent of the reader's rank and world.
    """

    def __init__(
        self,
        info: DatasetInfo,
        null_text: TextCond,
        step_reader: StepReader,
        identity: dict[str, Any],
        quarantine: Quarantine,
        prefetch: int,
    ) -> None:
        self.info = info
        self.null_text = null_text
        self._step_reader = step_reader
        self._identity = identity
        self._quarantine = quarantine
        self._prefetch = prefetch
        self._state = step_reader.order.state_dict()
        self._ahead: ReadAhead[Step] | None = None
        self._stop_ahead: Callable[[], Any] | None = None

    @property
    def quarantined(self) -> int:
        """How many damaged samples this reader has met."""
        return self._quarantine.count

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._prefetch == 0:
            batches, self._state = self._step_reader()
            return batches
        if self._ahead is None:
            self._ahead = ReadAhead(self._step_reader, self._prefetch)
            self._stop_ahead = weakref.finalize(self, self._ahead.close)  # the thread holds no reference to the source
        batches, self._state = self._ahead.get()
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Returns the place of the next undelivered step, and what the order depends on; small and JSON-compatible."""
        return copy.deepcopy({"version": STATE_VERSION, **self._state, "identity": self._identity})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a saved place; the next item is the one that would have followed it.

        Raises:
            UserError: the state is of another dataset, seed, global batch size, choice of buckets or keep probability,
                so that the order it belongs to cannot be continued.
        """
        identity = state.get("identity")
        if state.get("version") != STATE_VERSION or not isinstance(identity, Mapping):
            raise UserError("the saved data state has another version", where="data state", remedy="train.resume=none")
        changed = [name for name, value in self._identity.items() if identity.get(name) != value]
        if changed:
            values = "; ".join(f"{name} was {identity.get(name)!r}, is {self._identity[name]!r}" for name in changed)
            raise UserError(
                f"the data order cannot be continued: {values}",
                where="data state",
                remedy="restore these settings, or start a new run from the checkpoint's weights",
            )
        self.close()
        self._step_reader.order.load_state_dict(state)
        self._state = self._step_reader.order.state_dict()

    def close(self) -> None:
        """Ends read-ahead and closes the shards; the source can go on, from the next undelivered step."""
        if self._stop_ahead is not None:
            self._stop_ahead()
            self._ahead = self._stop_ahead = None
            self._step_reader.order.load_state_dict(self._state)
        self._step_reader.close()
