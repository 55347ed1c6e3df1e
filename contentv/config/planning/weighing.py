"""How much memory a process has held since: device allocations, or on the CPU what is resident.

On the CPU this needs an allocator that gives memory back, and that one is slow.
"""

from __future__ import annotations

import ctypes
import gc
import platform
from pathlib import Path

import torch

from contentv.base import device as devices

# Of malloc.h: larger blocks go back to the system when they are freed. glibc by itself raises the threshold to 32 MiB.
M_MMAP_THRESHOLD, SMALLEST_BYTES, LARGEST_BYTES = -3, 128 * 1024, 32 * 2**20


def start_weighing(device: torch.device) -> int:
    """Returns the bytes held now; the highest count starts anew."""
    gc.collect()
    if device.type != "cpu":
        module = devices.module(device)
        module.empty_cache()
        module.reset_peak_memory_stats(device)
        return int(module.memory_allocated(device))
    if platform.libc_ver()[0] != "glibc":
        return 0
    # glibc would keep what was freed below a threshold that grows as it is used: what is held would not be seen.
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_THRESHOLD, SMALLEST_BYTES)
    library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def stop_weighing(device: torch.device) -> None:
    """Lets the CPU's allocator keep what is freed again, as in training."""
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)


def peak_bytes(device: torch.device) -> int:
    """Returns the highest count since, or 0 where the system does not tell."""
    if device.type != "cpu":
        return devices.peak_memory_bytes(device)
    return _status("VmHWM") if platform.libc_ver()[0] == "glibc" else 0


def _status(key: str) -> int:
    """Returns a count of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return 0
