"""`contentv train`: one stage."""

from __future__ import annotations

from collections.abc import Sequence

from contentv.config.build import run_stage
from contentv.config.schema import TrainRoot


def run(config: TrainRoot, overrides: Sequence[str]) -> None:
    """Trains the stage to its end, or goes on from the newest checkpoint."""
    run_stage(config)
