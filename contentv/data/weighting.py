"""Weighing clips by their scores, where they are not dropped by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from contentv.base.types import BatchSource, StoredBatch
from contentv.data.rows import KeepProbability


class KeepWeighted:
    """A source whose batches carry `loss_weight`, each clip's keep probability over its mean in the global batch.

    The mean is of all ranks' clips, as the loss is: the gradient does not depend on how clips lie on ranks and in
    micro-batches. Iterating is therefore collective.

    Args:
        source: of the batches.
        keep_probability: (motion, visual) -> probability in 0..1.
        sum_over_data_ranks: of a tensor, over the ranks with different samples.
    """

    def __init__(
        self, source: BatchSource, keep_probability: KeepProbability, sum_over_data_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        self._source = source
        self._keep_probability = keep_probability
        self._sum = sum_over_data_ranks

    @property
    def quarantined(self) -> int:
        """How many damaged samples this reader has met."""
        return self._source.quarantined

    def __iter__(self) -> Iterator[list[StoredBatch]]:
        for batches in self._source:
            keeps = [self._keep_probability(batch.motion, batch.visual) for batch in batches]
            mean = float(self._sum(torch.cat(keeps).sum().view(1))) / batches[0].global_samples
            # All probabilities are 0 where the mean is: such a step has nothing to learn from.
            yield [replace(b, loss_weight=keep / max(mean, 1e-6)) for b, keep in zip(batches, keeps, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Returns the source's place."""
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a saved place."""
        self._source.load_state_dict(state)
