"""`contentv plan`: memory, speed, days and cost of a stage on a cluster, before it is launched."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from contentv.base.errors import UserError
from contentv.config.planning.calibration import DEFAULT_FILE
from contentv.config.planning.planner import make_plan
from contentv.config.planning.table import render
from contentv.config.schema import PlanRoot

PIPE_WIDTH = 160  # of a table that goes into a file or another program


def run(config: PlanRoot, overrides: Sequence[str]) -> None:
    """Prints the plan and writes it to `out=`; with `calibrate=true` it measures this machine first."""
    if config.calibrate:
        _calibrate(config)
    if os.environ.get("RANK", "0") != "0":
        return  # measuring takes all processes, planning one
    plan = make_plan(config)
    if config.out:
        path = Path(config.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    console = Console() if Console().is_terminal else Console(width=PIPE_WIDTH)
    console.print(render(plan), soft_wrap=True)


def _calibrate(config: PlanRoot) -> None:
    """Measures real steps on this machine, in all processes of this job, and writes what the plan then uses."""
    from contentv.base import device as devices
    from contentv.config.planning.probing import Setting, calibrate
    from contentv.parallel.collectives import start

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != int(os.environ.get("LOCAL_WORLD_SIZE", str(world))):
        raise UserError(
            f"{world} processes on several machines: their network would count as the links of one",
            where="calibrate", remedy="measure on one machine; cluster.inter_gb_s says what is between machines",
        )  # fmt: skip
    config.calibration = config.calibration or DEFAULT_FILE
    device = devices.select(config.cluster.device)
    rank = start(device)[0] if world > 1 else 0
    cluster = config.cluster
    setting = Setting(config.model, config.train.precision, config.text_tokens, device, rank, world, cluster.overlap)
    found = calibrate(setting)
    if rank != 0:
        return
    found.write(Path(config.calibration))
    for probe in found.probes:
        Console().print(
            f"{_words(probe.shape)}: a step took {probe.step_s:.3f} s, {found.seconds(probe):.3f} s by the rates",
            highlight=False,
        )  # fmt: skip
    for row in found.weighed:
        measured = f"{row.measured_bytes / 2**20:.0f} MiB" if row.measured_bytes else "an unknown amount"
        Console().print(
            f"{_words(row.shape)}: needed {measured}, {row.predicted_bytes / 2**20:.0f} MiB by the formulas",
            highlight=False,
        )  # fmt: skip


def _words(shape: dict[str, Any]) -> str:
    return f"{shape['layers']} layers of {shape['width']}, {shape['batch']} x {shape['video_tokens']} tokens"
