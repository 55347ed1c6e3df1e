"""`contentv pipeline`: the stage graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from contentv.base.log import console
from contentv.config.graph import build_graph, check_inputs, launcher_of
from contentv.config.schema import PipelineRoot
from contentv.train.pipeline import run_pipeline


def run(config: PipelineRoot, overrides: Sequence[str]) -> None:
    """Runs every stage that is not done and prints what was produced."""
    out = Path(config.out)
    stages = build_graph(config.pipeline, out)
    check_inputs(stages)
    results = run_pipeline(stages, out, launcher_of(config.pipeline), {})
    if not any(result.ran for result in results):
        console.print(f"nothing to do: all {len(results)} stages in {out} are done", highlight=False)
    for result in results:
        console.print(f"{result.name:<16} {result.seconds:8.1f} s  {out / result.name}", highlight=False)
