"""Bytes a second that collectives reach between the processes of this job, measured with messages like a layer's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from contentv.base import device as devices
from contentv.parallel.collectives import all_to_all, gather, gather_json, scatter_sum

MESSAGE_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20, "npu": 128 * 2**20}
WARMUPS, REPEATS = 2, 5


@dataclass(frozen=True)
class LinkRates:
    """Bytes a second that a rank sends; 0 = there is only one process.

    Attributes:
        exchange_bytes_s: in an all-to-all.
        ring_bytes_s: in ZeRO's collectives: two all-gathers to one reduce-scatter.
    """

    exchange_bytes_s: float = 0.0
    ring_bytes_s: float = 0.0


def measure_links(device: torch.device, dtype: torch.dtype) -> LinkRates:
    """Returns the rates between all processes of this job. Collective.

    Args:
        device: this process's.
        dtype: of the numbers that are sent.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return LinkRates()
    size, world = MESSAGE_BYTES[device.type], dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    rows = torch.zeros((world, size // world // dtype.itemsize), dtype=dtype, device=device)
    sent = rows.numel() * dtype.itemsize * (world - 1) / world
    exchange = _seconds(lambda: all_to_all(rows, group), device)
    zero = 2 * _seconds(lambda: gather(rows[0], group), device) + _seconds(lambda: scatter_sum(rows, group), device)
    return LinkRates(sent / exchange, 3 * sent / zero)


def _seconds(collective: Callable[[], Tensor], device: torch.device) -> float:
    """Returns the shortest time of a collective, which is that of its slowest rank."""
    times = []
    for _ in range(WARMUPS + REPEATS):
        dist.barrier()
        devices.synchronize(device)
        begin = time.perf_counter()
        collective()
        devices.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(largest(times[WARMUPS:], device))


def largest(values: list[float], device: torch.device) -> list[float]:
    """Returns of each value the largest over all processes. Collective."""
    return [max(column) for column in zip(*gather_json(values, None, device), strict=True)]
