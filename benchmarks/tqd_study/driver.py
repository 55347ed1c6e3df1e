"""Makes the runs that have no row yet, each in a process of its own with one thread, and appends their rows."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, ROOT, append_rows, provenance

from tqd_study import handover
from tqd_study.design import ADDED, SIZES, in_turn, runs
from tqd_study.evaluation import evaluate
from tqd_study.rows import rows_of_kind
from tqd_study.settings import Run
from tqd_study.training import train

KIND = "tqd-study"
CPU = torch.device("cpu")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the study's rows, of all days and machines."""
    return rows_of_kind(folder, KIND)


def missing(folder: Path, size: str = "small", added: bool = True) -> list[tuple[str, Run]]:
    """Returns the runs of the design that have no row, in the order to make them; those added later if `added`."""
    done = [row["settings"] for row in rows_of(folder)]
    wanted = [(name, run) for name, run in in_turn(runs(size)) if added or name not in ADDED]
    return [(name, run) for name, run in wanted if run.settings() not in done]


def row_of(name: str, run: Run, device: torch.device = CPU) -> dict[str, Any]:
    """Makes a run in this process and returns its row."""
    torch.set_num_threads(1)
    model, told = train(
        run, device, say=lambda line: print(f"{name}, seed {run.seed}: {line}", file=sys.stderr, flush=True)
    )
    return {
        "benchmark": KIND, "name": name, "settings": run.settings(), **told, **evaluate(run, model),
        **provenance(device), "sources": sources_digest(),
    }  # fmt: skip


def sources_digest() -> str:
    """Returns a digest of the code that a run's numbers follow from: the library's and the study's."""
    digest = hashlib.sha256()
    for folder in ("contentv", "kernels/contentv_kernels", "benchmarks/tqd_study"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def make(place: int, left: int, folder: Path, size: str, device: torch.device) -> None:
    """Makes one run in a process of its own and appends its row; raises if it fails."""
    name, run = in_turn(runs(size))[place]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "row.json"
        command = [sys.executable, str(Path(__file__).parent), "--one", str(place), "--out", str(out)]
        command += ["--size", size, "--device", str(device)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        append_rows([json.loads(out.read_text(encoding="utf-8"))], KIND, device, folder)
    print(f"{name}, seed {run.seed}: done in {time.monotonic() - start:.0f} s, {left} to start", flush=True)


def main() -> bool:
    """Makes all missing runs, or one of them; returns whether the page is to be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="large: on one GPU, see README.md")
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu, or cuda:0")
    parser.add_argument("--added", action="store_true", help="also what was added after the results: see README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--list", action="store_true", help="show what is missing and make nothing")
    parser.add_argument("--page-only", action="store_true", help="make nothing, write tables and figures")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # place of a run in the design: make it here
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {arguments.device}: no CUDA device is here; leave it out to train on the CPU")
    if arguments.one is not None:
        row = row_of(*in_turn(runs(arguments.size))[arguments.one], arguments.device)
        arguments.out.write_text(json.dumps(row), encoding="utf-8")
        return False
    everything = in_turn(runs(arguments.size))
    wanted = missing(arguments.results, arguments.size, arguments.added)
    handovers = arguments.added and arguments.size == "small"
    print(f"{len(wanted)} runs are missing", flush=True)
    if arguments.list:
        lines = [f"{name}, seed {run.seed}" for name, run in wanted]
        if handovers:
            lines += [f"handover, seed {seed}" for seed in handover.missing(arguments.results)]
        for line in lines:
            print(line)
    if arguments.list or arguments.page_only:
        return bool(arguments.page_only)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        left = range(len(wanted) - 1, -1, -1)
        make_one = partial(make, folder=arguments.results, size=arguments.size, device=arguments.device)
        list(pool.map(make_one, map(everything.index, wanted), left))
    if handovers:
        handover.make(arguments.results, arguments.jobs)
    return arguments.results == RESULTS
