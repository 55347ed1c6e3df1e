"""The demo's pipeline under a real Slurm of two nodes, preempted on its way, against the finished demo's own stages.

python benchmarks/slurm_demo.py --demo demo-out       # after `make demo`; needs root and Debian's Slurm and munge

Starts a Slurm on this machine (tests/launch/local_slurm.py) and submits `launch/slurm.sbatch pipeline pipeline=demo`
with the demo's dataset, one process on each node. In the second and the last stage the job is told to stop
(`scancel --batch --signal=USR1`), is requeued and goes on. The row holds, for each stage, the steps, how many of them
trained the very clips of the demo's run, and the largest differences of loss and weights: the demo ran on two processes
under torchrun without a stop, so they are expected to be nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, append_rows, provenance
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "tests" / "launch"))
from local_slurm import Job, LocalSlurm, why_not

PATIENCE_S = 3600.0
STOPPED_AT = {"lowres_video": 30, "rlhf": 3}  # rows of metrics.jsonl that are awaited before the signal


def main() -> None:
    """Runs the pipeline, appends the row, and prints the file's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"), help="folder of a finished demo")
    demo = parser.parse_args().demo.resolve()
    if not (demo / "summary.json").is_file():
        raise SystemExit(f"{demo} holds no finished demo: run `make demo` first, or name one with --demo")
    if why_not():
        raise SystemExit(f"slurm_demo: {why_not()}")
    seed = json.loads((demo / "demo.json").read_text(encoding="utf-8"))["settings"]["seed"]
    device = torch.device("cpu")
    row = provenance(device) | {"benchmark": "slurm_demo"}  # the commit is the one at the start
    with tempfile.TemporaryDirectory(prefix="slurm-demo.") as folder, LocalSlurm() as slurm:
        row |= run(slurm, Path(folder), demo, seed)
    print(append_rows([row], "slurm-demo", device))


def run(slurm: LocalSlurm, folder: Path, demo: Path, seed: int) -> dict[str, Any]:
    """Returns what is measured of one job, from its submission to its end."""
    out, begun = folder / "run", time.monotonic()
    extra = f"pipeline.extra=[data.path={demo / 'dataset'},train.seed={seed}]"
    job = Job(slurm, folder / "job", "pipeline", "pipeline=demo", f"out={out}", extra)
    saved = {}
    for stage, wanted in STOPPED_AT.items():

        def ready(stage: str = stage, wanted: int = wanted) -> bool:
            if slurm.state(job.id) not in ("PENDING", "CONFIGURING", "RUNNING"):
                raise SystemExit(f"the job has ended:\n{(folder / 'job' / 'job.out').read_text()[-5000:]}")
            return len(rows_of(out / stage)) >= wanted

        job.wait(ready, f"{stage} does not train", PATIENCE_S)
        slurm.run("scancel", "--batch", "--signal=USR1", job.id)
        job.wait_for("PENDING")
        saved[stage] = max(path.name for path in (out / stage / "checkpoints").glob("step-*"))
        job.go_on()
    state = job.wait_for("COMPLETED", "FAILED", "CANCELLED", patience_s=PATIENCE_S)
    if state != "COMPLETED":
        raise SystemExit(f"the job ended as {state}:\n{(folder / 'job' / 'job.out').read_text()[-5000:]}")
    stages = {
        path.parent.name: compare(path.parent, demo / "run" / path.parent.name) for path in out.glob("*/stage.json")
    }
    return {
        "state": state, "restarts": int(slurm.field(job.id, "Restarts")), "stopped_and_saved": saved, "nodes": 2,
        "stages": stages, "seconds": time.monotonic() - begun, "demo_settings_seed": seed,
    }  # fmt: skip


def compare(run: Path, other: Path) -> dict[str, Any]:
    """Returns how a stage's run differs from another of the same stage."""
    ours, theirs = ({row["step"]: row for row in rows_of(path)} for path in (run, other))
    ledger, expected = (rows_of(path, "ledger") for path in (run, other))
    common = sorted(ours.keys() & theirs.keys())
    losses = [abs(ours[step]["loss"] - theirs[step]["loss"]) for step in common]
    weights = {}
    for name in ("raw", "ema"):
        (first,), (second,) = (list((path / "export" / name).rglob("*.safetensors")) for path in (run, other))
        a, b = load_file(first), load_file(second)
        if a.keys() != b.keys():
            raise SystemExit(f"{first} and {second} hold other tensors")
        differences = [(a[key].double() - b[key].double()).abs().max() for key in a]
        weights[name] = float(torch.stack(differences).max())  # NaN if any is, which Python's max would pass over
    return {
        "steps": len(ledger), "each_step_once": [row["step"] for row in ledger] == list(range(1, len(ledger) + 1)),
        "steps_of_the_same_clips": sum(a == b for a, b in zip(ledger, expected, strict=True)),
        "losses_compared": len(common), "max_loss_difference": max(losses), "max_weight_difference": weights,
    }  # fmt: skip


def rows_of(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """Returns the whole lines of a run's jsonl file; none if there is no such file yet."""
    path = run / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


if __name__ == "__main__":
    main()
