"""`contentv sample`: prompts to videos."""

from __future__ import annotations

from collections.abc import Sequence

from contentv.base.log import console
from contentv.config.sampling import sample_to_files
from contentv.config.schema import SampleConfig


def run(config: SampleConfig, overrides: Sequence[str]) -> None:
    """Samples every prompt and prints where the videos are."""
    for path in sample_to_files(config):
        console.print(str(path), highlight=False)
