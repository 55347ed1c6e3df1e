"""What `contentv plan` predicts against what real steps took and held, on this machine.

The rates are fitted to the shapes that `calibrate=true` runs. What is compared here are other shapes, which the fit has
not seen: other numbers of layers, tokens, clips and another recompute. Memory needs no fit: its formulas are compared
as they are, at three sizes, for the backward pass or for the optimiser's step as the fullest moment.

On the CPU memory is what is resident, over that before the engine was made, with an allocator that gives back what is
freed (glibc otherwise keeps it: a real process holds more); time is the process's own, in one thread.

    OMP_NUM_THREADS=1 python benchmarks/plan_accuracy.py              # about three minutes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict

import torch
from measure import append_rows, provenance

from contentv.base import device as devices
from contentv.config.planning.probing import Shape, calibrate, clock, shapes_of
from contentv.models.mmdit import MMDiTConfig

FAMILY = MMDiTConfig()
TEXT_TOKENS = 64


def unseen(device: torch.device) -> tuple[list[Shape], list[Shape]]:
    """Returns shapes to time and shapes to weigh, none of which a calibration runs."""
    timed, weighed = shapes_of(FAMILY, device)
    if device.type == "cpu":
        narrow, wide = timed[0].heads, weighed[0].heads
        return (
            [Shape(3, narrow, 3, 12), Shape(2, narrow, 5, 12, 2), Shape(5, narrow, 1, 16, 2),
             Shape(2, narrow, 6, 16, 1, "full")],
            [Shape(1, wide, 3, 12, 4), Shape(3, wide, 5, 12, 2), Shape(6, wide, 5, 16, 1, "full")],
        )  # fmt: skip
    heads = timed[0].heads
    return (
        [Shape(3, heads, 8, 32), Shape(2, heads, 24, 32), Shape(3, heads, 24, 32, 1, "full")],
        [Shape(3, heads, 8, 32), Shape(2, heads, 24, 32), Shape(4, heads, 32, 32, 1, "full")],
    )


def rows_of(precision: str, device: torch.device) -> list[dict[str, object]]:
    """Returns a row for every unseen shape, and one for the calibration."""
    timed, weighed = unseen(device)
    found = calibrate(FAMILY, precision, TEXT_TOKENS, device, weighed=weighed, budget_s=600.0)
    rows: list[dict[str, object]] = [
        {
            "what": "calibration", "precision": precision, **{k: v for k, v in asdict(found).items()
                                                              if k not in ("probes", "weighed")},
            "fitted": [{**p.shape, "measured_s": p.step_s, "predicted_s": found.seconds(p)} for p in found.probes],
        }
    ]  # fmt: skip
    for row in found.weighed:
        ratio = row.predicted_bytes / row.measured_bytes if row.measured_bytes else None
        rows.append({"what": "memory", "precision": precision, **asdict(row), "predicted_over_measured": ratio})
    for shape in timed:
        seen = clock(FAMILY, shape, precision, TEXT_TOKENS, device, repeats=5)
        rows.append({
            "what": "step time", "precision": precision, "shape": seen.shape, "measured_s": seen.step_s,
            "predicted_s": found.seconds(seen), "predicted_over_measured": found.seconds(seen) / seen.step_s,
        })  # fmt: skip
    return rows


def main() -> None:
    """Compares in both precisions and appends the rows to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, write none")
    arguments = parser.parse_args()
    if len(arguments.precision) > 1:  # each in a process of its own: memory that one has kept is used again by the next
        for precision in arguments.precision:
            rest = ["--device", arguments.device, *(["--dry-run"] if arguments.dry_run else [])]
            subprocess.run([sys.executable, __file__, "--precision", precision, *rest], check=True)
        return
    device = devices.select(arguments.device)
    rows = []
    for precision in arguments.precision:
        for row in rows_of(precision, device):
            rows.append({"benchmark": "plan_accuracy", **row, **provenance(device)})
            print(json.dumps(row), flush=True)
    if not arguments.dry_run:
        print(append_rows(rows, "plan_accuracy", device))


if __name__ == "__main__":
    main()
