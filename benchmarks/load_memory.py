"""Host memory of a rank while weights are loaded into partitions, exported and converted, at two model sizes.

The bound: while it works, a rank takes at most its own partition, which it keeps, and one safetensors file. So the peak
over what is resident afterwards is compared with the largest file. Two gloo processes on the CPU; every row is a fresh
start, after an engine of a tiny model has been made and closed, so that libraries and their buffers count on no side.
Peaks are the kernel's (VmHWM, reset between phases); those of anonymous and of file-backed memory apart are sampled
every two milliseconds, so a shorter spike may be missing from them.

    python benchmarks/load_memory.py             # about 15 minutes on two cores, 8 GB of memory, 3 GB of disk
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, append_rows, provenance

from contentv.engine import frozen, zero
from contentv.engine.optim import OptimConfig
from contentv.models.io import initial_weights, load_whole, open_transformer, write_transformer
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.parallel.collectives import barrier, start, stop
from contentv.parallel.mesh import ParallelConfig, build_mesh

CPU = torch.device("cpu")
TINY = MMDiTConfig(
    num_layers=1, num_attention_heads=1, attention_head_dim=64, joint_attention_dim=64, pooled_projection_dim=64
)
FILES, RANKS, SAMPLE_S = 6, 2, 0.002
# The small config of this repository, and one of about 2.5 times as many weights at the same widths.
SIZES = {"small": 10, "small x2.5": 26}
JOBS = (
    "train zero3 bf16", "train zero3 fp32", "train zero1 bf16", "reference zero3 fp32", "export", "convert",
    "train zero3 bf16 from a whole model",
)  # fmt: skip


def config_of(layers: int) -> MMDiTConfig:
    """Returns a shape with the real text widths."""
    return MMDiTConfig(num_layers=layers, num_attention_heads=8, attention_head_dim=64)


def status() -> dict[str, int]:
    """Returns the kernel's counts of this process's resident memory, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    counts = (line.split() for line in lines if line.startswith(("VmHWM", "VmRSS", "Rss")))
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in counts}


class Meter:
    """Resident memory over that at the start: peaks by phase, and what stays."""

    def __init__(self) -> None:
        self.phases: dict[str, int] = {}
        self.sampled = {"RssAnon": 0, "RssFile": 0}
        self._phase = "begin"
        settle()
        self.before = status()
        self._reset()
        self._running = True
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        """Ends a phase and begins another."""
        peak = status()["VmHWM"] - self.before["VmRSS"]
        self.phases[self._phase] = max(peak, self.phases.get(self._phase, 0))
        self._phase = name
        self._reset()

    def result(self) -> dict[str, Any]:
        """Returns the peaks, what is resident now, and the bytes of the tensors that exist."""
        self.phase("after")
        self._running = False
        self._thread.join()
        settle()
        now = status()
        steady = {key: now[key] - self.before[key] for key in ("VmRSS", "RssAnon", "RssFile")}
        phases = {name: peak for name, peak in self.phases.items() if peak > 0}
        return {
            "peak_bytes": max(phases.values()), "peak_by_phase_bytes": phases,
            "peak_anonymous_bytes": self.sampled["RssAnon"] - self.before["RssAnon"],
            "peak_file_bytes": self.sampled["RssFile"] - self.before["RssFile"],
            "steady_bytes": steady["VmRSS"], "steady_file_bytes": steady["RssFile"], "tensor_bytes": tensor_bytes(),
        }  # fmt: skip

    def _reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def _sample(self) -> None:
        while self._running:
            now = status()
            for key in self.sampled:
                self.sampled[key] = max(self.sampled[key], now[key])
            time.sleep(SAMPLE_S)


def settle() -> None:
    """Gives memory that was freed back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def tensor_bytes() -> int:
    """Returns the bytes behind all tensors that Python knows."""
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.device.type == "cpu":
            storages[item.untyped_storage()._cdata] = item.untyped_storage().nbytes()
    return sum(storages.values())


@contextlib.contextmanager
def phases(meter: Meter) -> Iterator[None]:
    """Marks the steps of the engine's construction: room for the weights, DeepSpeed's set-up, reading, our states."""
    before = {(module, name): getattr(module, name) for module in (zero, frozen) for name in ("make_room", "fill")}

    def marked(name: str, function: Callable[..., Any], then: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            meter.phase(name)
            out = function(*args, **kwargs)
            meter.phase(then)
            return out

        return run

    for (module, name), function in before.items():
        setattr(module, name, marked(name, function, "deepspeed" if name == "make_room" else "after fill"))
    try:
        yield
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


def shapes_alone(config: MMDiTConfig) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(config)


def make_engine(config: MMDiTConfig, weights: Any, stage: int, precision: str, model: Any = None) -> Any:
    """Returns the engine over all ranks."""
    parallel = ParallelConfig(zero_stage=stage)
    mesh = build_mesh(parallel, RANKS, int(os.environ["RANK"]))
    return zero.build_engine(
        model or shapes_alone(config), mesh, OptimConfig(ema_decay=0.99), precision=precision, parallel=parallel,
        max_steps=10, device=CPU, weights=weights,
    )  # fmt: skip


def work(job: str, folder: Path, to: Path) -> dict[str, Any]:
    """Runs in every process: does a job and returns what it cost."""
    if job == "convert":
        from contentv.config import converting
        from contentv.config.schema import ConvertConfig

        meter = Meter()
        size_gb = shard_bytes(folder) / 1e9
        converting.convert(
            ConvertConfig(source=str(folder), to=str(to), layout="transformer", max_shard_gb=size_gb)
        )  # fmt: skip
        return meter.result()
    start(CPU)
    make_engine(TINY, initial_weights(TINY, 0).tensors, 3, "bf16").close()
    source = open_transformer(folder)
    words = job.split()
    if job == "export":
        engine = make_engine(source.config, source.tensors, 3, "bf16")
        close(source)
        meter = Meter()
        stream = engine.state_tensors(ema=True)
        if os.environ["RANK"] == "0":
            write_transformer(stream, to, source.config, dtype=torch.float32, max_shard_bytes=shard_bytes(folder))
        else:
            for _ in stream:
                pass
        return meter.result()
    meter = Meter()
    kept: Any = None
    with phases(meter):
        if words[0] == "reference":
            parallel = ParallelConfig()
            mesh = build_mesh(parallel, RANKS, int(os.environ["RANK"]))
            kept = frozen.frozen_model(
                shapes_alone(source.config), mesh, parallel, "fp32", CPU, weights=source.tensors
            )  # fmt: skip
        elif "whole" in words:
            kept = make_engine(source.config, None, 3, "bf16", load_whole(source, torch.float32))
        else:
            kept = make_engine(source.config, source.tensors, int(words[1][-1]), words[2])
    close(source)
    barrier()
    result = meter.result()
    del kept
    return result


def close(source: Any) -> None:
    """Lets go of the file that is mapped."""
    next(iter(source.tensors.values()))._owner.close()


def shard_bytes(folder: Path) -> int:
    """Returns the size of the largest file of weights."""
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def run(job: str, folder: Path) -> list[dict[str, Any]]:
    """Returns what a job cost each rank, in processes of their own."""
    ranks = 1 if job == "convert" else RANKS
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            str(Path(__file__).resolve()), "--child", job, str(folder), out,
        ]  # fmt: skip
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{job}: {done.stderr[-3000:]}")
        return [json.loads(Path(out, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def child(job: str, folder: str, out: str) -> None:
    """Runs in every process of a job."""
    rank = os.environ["RANK"]
    result = work(job, Path(folder), Path(out) / "written")
    Path(out, f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    barrier()
    stop()


def main() -> None:
    """Runs all jobs at both sizes and appends a row each to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--child", nargs=3, metavar=("JOB", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    rows: list[dict[str, object]] = []
    for size in arguments.sizes:
        config = config_of(SIZES[size])
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "transformer"
            weights = initial_weights(config, 0).tensors
            numels = [p.numel() for p in shapes_alone(config).parameters()]
            numel = sum(numels)
            write_transformer(weights.items(), folder, config, dtype=torch.float32, max_shard_bytes=4 * numel // FILES)
            for job in arguments.jobs:
                ranks = run(job, folder)
                shard = shard_bytes(folder)
                over = max(rank["peak_bytes"] - rank["steady_bytes"] for rank in ranks)
                row: dict[str, object] = {
                    "benchmark": "load_memory", "job": job, "size": size, "parameters": numel, "ranks": len(ranks),
                    "largest_file_bytes": shard, "largest_weight_bytes": 4 * max(numels), "over_steady_bytes": over,
                    "within_bound": over <= shard,
                    "by_rank": ranks, **provenance(CPU),
                }  # fmt: skip
                rows.append(row)
                print(json.dumps({k: row[k] for k in ("job", "size", "largest_file_bytes", "over_steady_bytes")}
                                 | {"peaks": [r["peak_bytes"] for r in ranks]}), flush=True)  # fmt: skip
    print(append_rows(rows, "load_memory", CPU))


if __name__ == "__main__":
    main()
