"""`contentv synth`: procedural captioned clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from contentv.base.log import console
from contentv.config.schema import SynthRoot
from contentv.curation.synth import SynthConfig, synthesize


def run(config: SynthRoot, overrides: Sequence[str]) -> None:
    """Writes the clips and says how many."""
    values = {key: value for key, value in vars(config).items() if key != "out"}
    written = synthesize(Path(config.out), config.clips, config.seed, SynthConfig(**values))
    console.print(f"{len(written)} files in {config.out}", highlight=False)
