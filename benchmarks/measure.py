"""What the GPU benchmarks share: interleaved timing, the machine's own ceilings, rows with their origin."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "diffusers", "flash_attn")

with contextlib.suppress(ImportError):
    import contentv_kernels  # noqa: F401
if "contentv_kernels" not in sys.modules:  # run from a checkout that is not installed
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def time_once(function: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds one call takes: by device events on CUDA, by the clock on the CPU."""
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def interleave(
    candidates: dict[str, Callable[[], Any]], warmups: int, repeats: int, device: torch.device, prepared: bool = False
) -> dict[str, list[float]]:
    """Returns seconds of each candidate's timed calls, taken in turns A-B-A-B so that drift meets all alike.

    With `prepared`, calling a candidate is not timed: it returns the function that is (a backward after its forward).
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for function in candidates.values():
        for _ in range(warmups):
            time_once(function() if prepared else function, device)
    for _ in range(repeats):
        for name, function in candidates.items():
            times[name].append(time_once(function() if prepared else function, device))
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Returns median, 10th and 90th percentile in milliseconds, and the number of calls."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    values = {"median_ms": statistics.median(times), "p10_ms": cuts[0], "p90_ms": cuts[-1]}
    return {name: round(value * 1000, 5) for name, value in values.items()} | {"repeats": len(times)}


def median_seconds(function: Callable[[], object], device: torch.device, warmups: int = 3, repeats: int = 20) -> float:
    """Returns the median time of one call after warm-up."""
    return statistics.median(interleave({"": function}, warmups, repeats, device)[""])


def gemm_flops_per_s(sizes: list[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> float:
    """Returns the best rate of torch's matrix product over the given (m, k, n), on random data."""
    rates = []
    for m, k, n in sizes:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        rates.append(2 * m * k * n / median_seconds(lambda a=a, b=b: a @ b, device))
    return max(rates)


def attention_flops_per_s(b: int, s: int, heads: int, dh: int, dtype: torch.dtype, device: torch.device) -> float:
    """Returns the best rate of attention forward and backward over the implementations that run here.

    A backward counts twice the forward's 4 b s^2 heads dh, as in MFU; the recomputation inside it is not counted.
    """
    from contentv_kernels import attention, available

    q, k, v = (torch.randn(b, s, heads, dh, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    cotangent = torch.randn_like(q)
    rates = []
    for impl, reason in available("attention", device.type, dtype).items():
        if reason is None and impl != "math":
            seconds = median_seconds(
                lambda impl=impl: torch.autograd.grad(attention(q, k, v, impl=impl), (q, k, v), cotangent), device
            )
            rates.append(12 * b * s * s * heads * dh / seconds)
    return max(rates)


def copy_bytes_per_s(device: torch.device, size_bytes: int = 2**31) -> float:
    """Returns the bandwidth of a copy within the device's memory, bytes read plus bytes written."""
    source = torch.randint(0, 127, (size_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / median_seconds(lambda: target.copy_(source), device)


def peak_flops(device: torch.device) -> float | None:
    """Returns the device's data-sheet bf16 rate, the denominator of MFU, or None where it is not known."""
    from contentv.base.device import peak_flops as known

    return known(device) or None


def device_name(device: torch.device) -> str:
    """Returns the accelerator's or processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Returns the norm of the difference over the norm of the truth."""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def provenance(device: torch.device) -> dict[str, object]:
    """Returns what every row carries: date, device, versions, commit and command."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": versions,
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def commit() -> str:
    """Returns the checkout's commit, with "+changes" where tracked files other than results differ from it."""
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if revision.returncode != 0:
        return "unknown"
    status = ["git", "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"]
    changed = subprocess.run(status, cwd=ROOT, capture_output=True, check=True).stdout
    return revision.stdout.strip() + ("+changes" if changed.strip() else "")


def append_rows(rows: list[dict[str, object]], kind: str, device: torch.device, folder: Path = RESULTS) -> Path:
    """Appends rows as JSON lines to <folder>/<date>_<device>_<kind>.jsonl and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in device_name(device)).strip("-").lower()
    path = folder / f"{datetime.date.today().isoformat()}_{name}_{kind}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
