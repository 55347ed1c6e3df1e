"""A dataset as a source of optimiser steps: the last stage, and the identity of the order it belongs to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from contentv.base.errors import UserError
from contentv.base.types import StoredBatch, TextCond
from contentv.data.census import ScoreCensus, no_scores
from contentv.data.joined import JoinedDatasets
from contentv.data.pipeline import Stage
from contentv.data.quarantine import Quarantine

STATE_VERSION = 2


class DatasetSource:
    """A `BatchSource` over one or more datasets: one cursor, moved by iteration and by `load_state_dict`.

    `state_dict` is the place of the next step that has not been delivered; what read-ahead has prepared beyond it does
    not count. The state is independent of the reader's rank and world, of workers and of the micro-batch.
    """

    def __init__(
        self,
        info: JoinedDatasets,
        null_text: TextCond,
        steps: Stage[list[StoredBatch]],
        identity: dict[str, Any],
        quarantine: Quarantine,
        census: Callable[[], ScoreCensus] = no_scores,
    ) -> None:
        self.census = census
        self.info = info
        self.null_text = null_text
        self._steps = steps
        self._identity = identity
        self._quarantine = quarantine

    @property
    def quarantined(self) -> int:
        """How many damaged samples this reader has met."""
        return self._quarantine.count

    def __iter__(self) -> Iterator[list[StoredBatch]]:
        return self

    def __next__(self) -> list[StoredBatch]:
        return next(self._steps)

    def state_dict(self) -> dict[str, Any]:
        """Returns the place of the next undelivered step, and what the order depends on; small and JSON-compatible."""
        return copy.deepcopy({"version": STATE_VERSION, **self._steps.state_dict(), "identity": self._identity})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a saved place; the next item is the one that would have followed it.

        Raises:
            UserError: the state is of another dataset, seed, global batch size or choice of data.*, so that the order
                it belongs to cannot be continued.
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
        self._steps.load_state_dict(state)

    def close(self) -> None:
        """Ends read-ahead and closes the shards; the source can go on, from the next undelivered step."""
        self._steps.close()
