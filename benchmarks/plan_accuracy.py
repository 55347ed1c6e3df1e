"""What `contentv plan` predicts against what real steps took and held, on this machine.

The rates are fitted to the shapes that `calibrate=true` runs. What is compared here are other shapes, which the fit has
not seen: other numbers of layers, tokens, clips and another recompute. Memory needs no fit: its formulas are compared
as they are, at three sizes, for the backward pass or for the optimiser's step as the fullest moment.

On the CPU memory is what is resident, over that before the engine was made, with an allocator that gives back what is
freed (glibc otherwise keeps it: a real process holds more); time is the process's own, in one thread. Two processes,
by default run after the single one, are weighed and timed as ZeRO-3 and ZeRO-1 over data and sequence ranks; they wait
for each other, so that theirs is the clock's time and wants a machine with nothing else to do.

    OMP_NUM_THREADS=1 python benchmarks/plan_accuracy.py              # about six minutes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

from measure import append_rows, provenance

from contentv.base import device as devices
from contentv.config.compose import load_config
from contentv.config.planning.calibration import Calibration, Probe
from contentv.config.planning.layout import Job
from contentv.config.planning.probing import Setting, Shape, calibrate, clock, shapes_of
from contentv.config.planning.speed import step_time
from contentv.models.mmdit import MMDiTConfig
from contentv.parallel.collectives import start, stop

FAMILY = MMDiTConfig()
TEXT_TOKENS = 64


def unseen(setting: Setting) -> tuple[list[Shape], list[Shape]]:
    """Returns shapes to time and shapes to weigh, none of which a calibration runs."""
    timed, weighed = shapes_of(setting)
    heads = timed[0].heads
    if setting.device.type == "cpu":
        wide, world = weighed[0].heads, setting.world
        if world > 1:
            return (
                [Shape(3, heads, 3, 12, 1, sp=world), Shape(2, heads, 5, 12, 2, sp=world),
                 Shape(5, heads, 1, 16, 2), Shape(3, heads, 5, 12, 2, sp=world, zero_stage=1)],
                [Shape(1, wide, 3, 12, 4, sp=world), Shape(3, wide, 5, 12, 2, sp=world), Shape(4, wide, 5, 16)],
            )  # fmt: skip
        return (
            [Shape(3, heads, 3, 12), Shape(2, heads, 5, 12, 2), Shape(5, heads, 1, 16, 2),
             Shape(2, heads, 6, 16, 1, "full")],
            [Shape(1, wide, 3, 12, 4), Shape(3, wide, 5, 12, 2), Shape(6, wide, 5, 16, 1, "full")],
        )  # fmt: skip
    return (
        [Shape(3, heads, 8, 32), Shape(2, heads, 24, 32), Shape(3, heads, 24, 32, 1, "full")],
        [Shape(3, heads, 8, 32), Shape(2, heads, 24, 32), Shape(4, heads, 32, 32, 1, "full")],
    )


def planned_s(setting: Setting, found: Calibration, shape: Shape) -> float:
    """Returns a step's seconds as `contentv plan calibration=...` has them."""
    cluster = load_config("plan", ["cluster=cpu"]).cluster
    cluster = replace(cluster, device=setting.device.type, devices_per_node=setting.world)
    job = Job(shape.model(setting.family), setting.precision, device=setting.device.type)
    dp = setting.world // shape.sp
    return step_time(
        found.applied(cluster, setting.precision), job, shape.layout, dp, setting.tokens(shape), 1
    ).total  # fmt: skip


def rows_of(setting: Setting) -> list[dict[str, object]]:
    """Returns a row for every unseen shape, and one for the calibration."""
    timed, weighed = unseen(setting)
    found = calibrate(setting, weighed=weighed, budget_s=600.0)
    head = {"precision": setting.precision, "processes": setting.world}

    def fitted(probe: Probe) -> dict[str, object]:
        return {**probe.shape, "measured_s": probe.step_s, "predicted_s": found.seconds(probe)}

    rates = {k: v for k, v in asdict(found).items() if k not in ("probes", "weighed")}
    rows: list[dict[str, object]] = [
        {"what": "calibration", **head, **rates, "fitted": [fitted(probe) for probe in found.probes]}
    ]
    for row in found.weighed:
        ratio = row.predicted_bytes / row.measured_bytes if row.measured_bytes else None
        rows.append({"what": "memory", **head, **asdict(row), "predicted_over_measured": ratio})
    for shape in timed:
        seen, planned = clock(setting, shape, repeats=5), planned_s(setting, found, shape)
        rows.append({
            "what": "step time", **head, "shape": seen.shape, "measured_s": seen.step_s, "predicted_s": planned,
            "predicted_over_measured": planned / seen.step_s,
        })  # fmt: skip
    return rows


def main() -> None:
    """Compares in both precisions and appends the rows to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, write none")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:  # each in processes of its own: memory that one has kept is used again by the next
        rest = ["--device", arguments.device, *(["--dry-run"] if arguments.dry_run else [])]
        for count in arguments.processes:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            for precision in arguments.precision:
                command = [sys.executable, *launch, __file__, "--precision", precision, *rest]
                subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return
    device = devices.select(arguments.device)
    rank, world = start(device)
    overlap = load_config("plan", ["cluster=cpu"]).cluster.overlap if device.type == "cpu" else 0.8
    rows = rows_of(Setting(FAMILY, arguments.precision[0], TEXT_TOKENS, device, rank, world, overlap))
    if rank == 0:
        rows = [{"benchmark": "plan_accuracy", **row, **provenance(device)} for row in rows]
        for row in rows:
            print(json.dumps(row), flush=True)
        if not arguments.dry_run:
            print(append_rows(rows, "plan_accuracy", device))
    stop()


if __name__ == "__main__":
    main()
