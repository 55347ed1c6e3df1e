"""Room for a micro-batch that samples are read into, so that nothing is copied after the read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from contentv.data.sample import INFINITY, Layout, StoredSample


class BatchRows:
    """One tensor of each name, a row a sample, for samples whose KEY.safetensors has exactly this header.

    Args:
        prefix: what a member begins with: its header's length, 8 bytes, and the header.
        layouts: the tensors it describes, in the order of their places.
        count: rows.
    """

    def __init__(self, prefix: bytes, layouts: Sequence[Layout], count: int) -> None:
        self.prefix = prefix
        self.member_bytes = len(prefix) + layouts[-1].end
        self.tensors = {layout.name: torch.empty((count, *layout.shape), dtype=layout.dtype) for layout in layouts}
        self._bytes = [self.tensors[layout.name].view(count, -1).view(torch.uint8).numpy() for layout in layouts]
        self._bits: list[tuple[np.ndarray, int]] = []  # the same as integers, and the smallest that is not finite
        for layout, values in zip(layouts, self._bytes, strict=True):
            signed, positive, unsigned, negative = INFINITY[layout.dtype]
            self._bits += [(values.view(signed), positive), (values.view(unsigned), negative)]

    def parts(self, row: int) -> list[np.ndarray]:
        """Returns a row's bytes, tensor by tensor in the order of the file."""
        return [values[row] for values in self._bytes]

    def is_sound(self, row: int, checksum: str) -> bool:
        """Whether prefix and row have a member's checksum, and all of the row's values are finite."""
        digest = xxhash.xxh128(self.prefix)
        for values in self._bytes:
            digest.update(values[row].data)
        if digest.hexdigest() != checksum:
            return False
        return all(np.maximum.reduce(bits[row]) < infinity for bits, infinity in self._bits)

    def put(self, row: int, sample: StoredSample) -> bool:
        """Copies a sample into a row; False if it has other dtypes."""
        values = {"latents": sample.latents, "text_tokens": sample.text_tokens, "text_pooled": sample.text_pooled}
        if any(values[name].dtype != tensor.dtype for name, tensor in self.tensors.items()):
            return False
        for name, tensor in self.tensors.items():
            tensor[row].copy_(values[name])
        return True


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
