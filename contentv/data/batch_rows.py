"""Room for a micro-batch that samples are read into, so that nothing is copied after the read."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from contentv.data.sample import INFINITY, Layout, StoredSample


class BatchRows:
    """One tensor of each name, a row a sample, for samples whose KEY.safetensors has exactly this header.

    The same memory serves batch after batch: the page faults of new memory would cost about as much as the reads.

    Args:
        prefix: what a member begins with: its header's length, 8 bytes, and the header.
        layouts: the tensors it describes, in the order of their places.
        count: rows.
    """

    def __init__(self, prefix: bytes, layouts: Sequence[Layout], count: int) -> None:
        self.prefix = prefix
        self.count = count
        self.member_bytes = len(prefix) + layouts[-1].end
        self._layouts = list(layouts)
        # Integers, as numpy has no bf16.
        self._arrays = [np.empty((count, *layout.shape), INFINITY[layout.dtype][0]) for layout in layouts]
        self._bits = self._as_bits()
        self.parts = self._as_parts()  # of a row, in the order of the file
        self._idle = self._references()

    def _as_bits(self) -> list[tuple[np.ndarray, int]]:
        """Each tensor's values as integers, signed and unsigned, with the smallest that is not finite."""
        bits = []
        for layout, array in zip(self._layouts, self._arrays, strict=True):
            signed, positive, unsigned, negative = INFINITY[layout.dtype]
            flat = array.reshape(self.count, layout.numel)
            bits += [(flat.view(signed), positive), (flat.view(unsigned), negative)]
        return bits

    def _as_parts(self) -> list[list[memoryview]]:
        rows = [array.reshape(self.count, -1).view(np.uint8) for array in self._arrays]
        return [[part[row].data for part in rows] for row in range(self.count)]

    def _references(self) -> list[int]:
        return [sys.getrefcount(array) for array in self._arrays]

    def is_free(self) -> bool:
        """Whether nobody holds any of the tensors, or a part of one, that `tensors` has returned."""
        return self._references() == self._idle

    def tensors(self) -> dict[str, Tensor]:
        """Returns the rows as tensors by name; they lie in this memory."""
        pairs = zip(self._layouts, self._arrays, strict=True)
        return {layout.name: torch.from_numpy(array).view(layout.dtype) for layout, array in pairs}

    def has(self, row: int, checksum: str) -> bool:
        """Whether prefix and row have a member's checksum."""
        digest = xxhash.xxh128(self.prefix)
        for part in self.parts[row]:
            digest.update(part)
        return bool(digest.hexdigest() == checksum)

    def not_finite(self, rows: Sequence[int]) -> list[int]:
        """Returns those of some rows that have values which are infinite or not a number."""
        if len(rows) == self.count and all(np.maximum.reduce(bits, axis=None) < bound for bits, bound in self._bits):
            return []  # few calls: the usual case when samples are read for the first time
        return [row for row in rows if any(np.maximum.reduce(bits[row]) >= bound for bits, bound in self._bits)]

    def put(self, row: int, sample: StoredSample) -> bool:
        """Copies a sample into a row; False if it has other dtypes."""
        values = {"latents": sample.latents, "text_tokens": sample.text_tokens, "text_pooled": sample.text_pooled}
        tensors = self.tensors()
        if any(values[name].dtype != tensor.dtype for name, tensor in tensors.items()):
            return False
        for name, tensor in tensors.items():
            tensor[row].copy_(values[name])
        return True


class RowsPool:
    """Rows for micro-batches, handed out again once nobody holds what was read into them; any thread may ask.

    Args:
        max_bytes: what may be kept.
    """

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: deque[BatchRows] = deque()  # the one used longest ago first
        self._lock = threading.Lock()

    def take(self, prefix: bytes, layouts: Sequence[Layout], count: int) -> BatchRows:
        """Returns rows of any content; they belong to the caller until `give_back`."""
        with self._lock:
            for rows in self._kept:
                if rows.count == count and rows.prefix == prefix and rows.is_free():
                    self._kept.remove(rows)
                    self._bytes -= rows.count * rows.member_bytes
                    return rows
        return BatchRows(prefix, layouts, count)

    def give_back(self, rows: BatchRows) -> None:
        """Keeps rows for later; who holds their tensors may go on using them."""
        with self._lock:
            self._kept.append(rows)
            self._bytes += rows.count * rows.member_bytes
            while self._bytes > self._max_bytes:
                oldest = self._kept.popleft()  # its memory is freed with the last who holds it
                self._bytes -= oldest.count * oldest.member_bytes


Described = tuple[dict[str, Any], float, float]  # a sample's KEY.json, and its motion and visual scores in [0, 1]


class BatchRead(NamedTuple):
    """A micro-batch as it was read: descriptions with scores; latents, text_tokens and text_pooled in stored dtype."""

    described: list[Described]
    tensors: dict[str, Tensor]


def stacked(samples: Sequence[StoredSample]) -> dict[str, Tensor]:
    """Returns the tensors of some samples, one row each, in fp32 where their dtypes differ."""

    def stack(tensors: list[Tensor]) -> Tensor:
        dtypes = {tensor.dtype for tensor in tensors}
        return torch.stack(tensors if len(dtypes) == 1 else [tensor.to(torch.float32) for tensor in tensors])

    columns: dict[str, Any] = {
        "latents": [sample.latents for sample in samples],
        "text_tokens": [sample.text_tokens for sample in samples],
        "text_pooled": [sample.text_pooled for sample in samples],
    }
    return {name: stack(tensors) for name, tensors in columns.items()}
