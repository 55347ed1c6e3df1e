"""`contentv demo`: the whole product on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from contentv.config.schema import DemoConfig
from contentv.demo.run import run_demo


def run(config: DemoConfig, overrides: Sequence[str]) -> None:
    """Runs every part of the demo that is not done."""
    run_demo(config)
