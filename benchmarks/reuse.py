"""Does reuse pay? Steps that the image-initialised low-res stage needs to reach the loss of a from-scratch run.

For each seed: a from-scratch low-res run of N steps, and one of the same data, noise and settings that starts from the
image stage's weights. Both see the same clips at the same noise levels in the same order, so their losses are compared
step by step. The from-scratch loss is its mean over the last WINDOW steps; the other run has reached it at the first
step at which its mean over the last WINDOW steps is no larger.

    python benchmarks/reuse.py --demo demo-out            # after `make demo`: uses its dataset and its image stage
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import append_rows, provenance

WINDOW = 40
SETTINGS = ["stage=lowres_video", "model=tiny", "timestep=tqd", "train.precision=fp32", "train.global_batch_size=32",
            "train.checkpoint_every=0", "train.log_every=1", "optim.lr=2.0e-3", "optim.warmup_steps=20"]  # fmt: skip


def losses(dataset: Path, out: Path, seed: int, steps: int, init: str, nproc: int) -> list[float]:
    """Returns the loss of every step of one run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), "-m", "contentv"]
    keys = [f"data.path={dataset}", f"out={out}", f"train.seed={seed}", f"train.max_steps={steps}", f"init={init}"]
    done = subprocess.run(
        [sys.executable, *launcher, "train", *SETTINGS, *keys], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def reached(curve: list[float], target: float) -> int | None:
    """Returns the first step at which the mean over the last WINDOW losses is at most `target`, or None."""
    for step in range(WINDOW, len(curve) + 1):
        if sum(curve[step - WINDOW : step]) / WINDOW <= target:
            return step
    return None


def main() -> None:
    """Runs both arms for every seed and appends a row each to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"), help="folder of a finished demo")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nproc", type=int, default=2)
    arguments = parser.parse_args()
    if not (arguments.demo / "run" / "image" / "stage.json").is_file():
        raise SystemExit(
            f"{arguments.demo} holds no finished image stage: run `make demo` first, or name one with --demo"
        )
    rows: list[dict[str, object]] = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            dataset, image = arguments.demo / "dataset", arguments.demo / "run" / "image"
            common = (seed, arguments.steps)
            scratch = losses(dataset, Path(folder) / "scratch", *common, "none", arguments.nproc)
            warm = losses(dataset, Path(folder) / "warm", *common, str(image), arguments.nproc)
        target = sum(scratch[-WINDOW:]) / WINDOW
        step = reached(warm, target)
        row = {
            "benchmark": "reuse", "seed": seed, "steps": arguments.steps, "window": WINDOW, "scratch_loss": target,
            "image_init_reached_at": step, "share": None if step is None else step / arguments.steps,
            "image_init_loss": sum(warm[-WINDOW:]) / WINDOW, **provenance(torch.device("cpu")),
        }  # fmt: skip
        rows.append(row)
        sys.stdout.write(
            json.dumps({k: row[k] for k in ("seed", "scratch_loss", "image_init_reached_at", "share")}) + "\n"
        )
    print(append_rows(rows, "reuse", torch.device("cpu")))


if __name__ == "__main__":
    main()
