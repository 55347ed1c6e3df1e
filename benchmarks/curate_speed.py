"""Speed of `contentv curate` on 200 synthetic clips: clips per second of each phase, where the time goes, busy cores.

    python benchmarks/curate_speed.py [--clips 200] [--workers 2] [--repeats 2]

Each run is a process of its own, with the demo's VAE and text encoders; its computing time is that of all its
processes, as the system counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure  # before contentv: it finds the checkout
import torch

from contentv.curation.synth import synthesize

ASSETS = measure.ROOT / "contentv" / "demo" / "assets"
BUCKETS = "[f1_h64_w64,f9_h64_w64,f17_h80_w80]"  # the demo's


def curate(folder: Path, output: Path, workers: int) -> dict[str, float]:
    """Curates a folder anew and returns seconds on the clock and of computing, start-up and imports included."""
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable, "-m", "contentv", "curate", f"input={folder}", f"output={output}", f"buckets={BUCKETS}",
        f"vae.path={ASSETS / 'vae'}", f"text.path={ASSETS / 'image_model'}", f"workers={workers}", "min_clip_s=1.5",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(measure.ROOT), str(measure.ROOT / "kernels")])}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, env=env, cwd=measure.ROOT, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_s": used}


def row(summary: dict, process: dict[str, float], clips: int, workers: int) -> dict[str, object]:
    """Returns a row: the phases, their share of the time, and how busy the cores were."""
    phases = {}
    for name, phase in summary["phases"].items():
        busy = phase["cpu_s"] + phase["worker_cpu_s"]
        phases[name] = {
            "seconds": phase["seconds"],
            "clips_per_s": round(summary["clips"] / phase["seconds"], 2) if phase["seconds"] else None,
            "share_of_time": round(phase["seconds"] / summary["seconds"], 4),
            "cpu_s": round(busy, 3),
            "busy": round(busy / (phase["seconds"] * workers), 4) if phase["seconds"] else None,
        }
    inside = sum(phase["cpu_s"] for phase in phases.values())
    return {
        "what": "curate", "files": clips, "clips": summary["clips"], "samples": summary["kept"], "workers": workers,
        "cores": os.cpu_count(), "seconds": summary["seconds"],
        "clips_per_s": round(summary["clips"] / summary["seconds"], 2), "phases": phases,
        "busy_while_curating": round(inside / (summary["seconds"] * workers), 4),
        "process_seconds": round(process["seconds"], 3), "process_cpu_s": round(process["cpu_s"], 3),
        "busy_with_start": round(process["cpu_s"] / (process["seconds"] * workers), 4),
    }  # fmt: skip


def main() -> None:
    """Curates, one worker and several in turns, and appends a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    rows = []
    with tempfile.TemporaryDirectory(prefix="contentv-curate-") as scratch:
        folder, output = Path(scratch) / "videos", Path(scratch) / "dataset"
        synthesize(folder, arguments.clips, 0)
        for _ in range(arguments.repeats):
            for workers in sorted({1, arguments.workers}):
                process = curate(folder, output, workers)
                summary = json.loads((output / "curation" / "run-0001" / "summary.json").read_text())
                rows.append({**row(summary, process, arguments.clips, workers), **measure.provenance(device)})
                print(json.dumps({k: v for k, v in rows[-1].items() if k not in ("versions", "command")}, indent=1))
    print(measure.append_rows(rows, "curate-speed", device))


if __name__ == "__main__":
    main()
