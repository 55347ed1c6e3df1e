"""Randomness as a function of (seed, step, sample index, stream), never a state.

Every rank that handles a sample makes the same draws for it without talking to the others, and a checkpoint holds no
generator states. Draws are made on the CPU, so they do not depend on the device either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def keyed_generator(seed: int, step: int, index: int, stream: str) -> torch.Generator:
    """Returns a CPU generator that depends on its four keys alone.

    Args:
        seed: the run's seed.
        step: optimiser step (or epoch, for draws of the data order).
        index: the sample's position in the run's global order.
        stream: what the draws are for, such as "noise" or "sigma"; streams are independent.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_generators(seed: int, step: int, indices: Tensor | Sequence[int], stream: str) -> list[torch.Generator]:
    """Returns one `keyed_generator` per sample index."""
    return [keyed_generator(seed, step, int(index), stream) for index in indices]


def keyed_normal(shape: Sequence[int], seed: int, step: int, indices: Tensor | Sequence[int], stream: str) -> Tensor:
    """Returns standard normal draws (len(indices), *shape), fp32 on the CPU, row i keyed by indices[i]."""
    rows = [torch.randn(tuple(shape), generator=g) for g in keyed_generators(seed, step, indices, stream)]
    return torch.stack(rows)


def keyed_uniform(seed: int, step: int, indices: Tensor | Sequence[int], stream: str) -> Tensor:
    """Returns draws from [0, 1), shape (len(indices),), fp32 on the CPU, entry i keyed by indices[i]."""
    return torch.stack([torch.rand((), generator=g) for g in keyed_generators(seed, step, indices, stream)])
