"""Where routed imperfect clips fall short of golden ones: clips that one model begins and the other ends.

A sampler walks from sigma 1 to 0. Two models of one seed, trained on golden clips and on routed imperfect ones, share
the walk: one takes the steps above a noise level, the other those below. What the golden model mends by taking over a
part is what routing lacks there. Trained anew here; the study's rows hold no weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, append_rows, provenance

from tqd_study.design import MAIN, RECIPE, SEEDS
from tqd_study.evaluation import HELD_OUT_SEED, sample
from tqd_study.intervals import Interval
from tqd_study.measures import compare
from tqd_study.rows import rows_of_kind
from tqd_study.settings import Recipe, Run
from tqd_study.sprites import make_clips
from tqd_study.training import train

KIND = "tqd-handover"
PAIR = ("golden", "mixed tqd")
LEVELS = (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)  # sigma at which the second model takes over
CPU = torch.device("cpu")


def row_of(seed: int, recipe: Recipe = RECIPE) -> dict[str, Any]:
    """Trains both models of a seed and returns the row of all their handovers."""
    torch.set_num_threads(1)
    start = time.process_time()
    runs = {name: Run(recipe, MAIN[name], seed) for name in PAIR}
    models = {name: train(run, CPU)[0] for name, run in runs.items()}
    golden = make_clips(recipe.world, "golden", recipe.samples, HELD_OUT_SEED)
    found = [
        {
            "above": above, "below": below, "sigma": level,
            "measured": compare(sample(recipe, models[above], models[below], level), golden),
        }
        for above, below in (PAIR, PAIR[::-1])
        for level in LEVELS
    ]  # fmt: skip
    return {
        "benchmark": KIND, "settings": {name: run.settings() for name, run in runs.items()}, "handovers": found,
        "cpu_s": time.process_time() - start, **provenance(CPU),
    }  # fmt: skip


def missing(folder: Path) -> list[int]:
    """Returns the seeds that have no row."""
    done = [row["settings"] for row in rows_of_kind(folder, KIND)]
    return [s for s in SEEDS if {name: Run(RECIPE, MAIN[name], s).settings() for name in PAIR} not in done]


def make(folder: Path, jobs: int) -> None:
    """Makes the rows that are missing, each in a process of its own."""
    wanted = missing(folder)
    print(f"{len(wanted)} of {len(SEEDS)} handovers are missing", flush=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(row_of, wanted):
            append_rows([row], KIND, CPU, folder)


def table(rows: Sequence[dict[str, Any]] | None = None) -> str:
    """Returns scores by the level of the handover, of both orders."""
    rows = rows_of_kind(RESULTS, KIND) if rows is None else rows
    if not rows:
        return "No rows yet: run `python benchmarks/tqd_study --added`."
    lines = [
        "| sigma | golden above: motion | sharpness | combined | routed above: motion | sharpness | combined |",
        "|---|---|---|---|---|---|---|",
    ]
    for level in LEVELS:
        cells = [f"{level:g}"]
        for above in PAIR:
            measured = [
                entry["measured"]
                for row in rows
                for entry in row["handovers"]
                if (entry["above"], entry["sigma"]) == (above, level)
            ]
            cells += [f"{Interval.of([m[key]['score'] for m in measured]).mean:.3f}" for key in ("speed", "sharpness")]
            cells.append(str(Interval.of([m["combined"] for m in measured])))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
