"""`contentv curate`: files to shards."""

from __future__ import annotations

from collections.abc import Sequence

from contentv.base.log import console
from contentv.config.curating import curate_dataset
from contentv.config.schema import CurateRoot


def run(config: CurateRoot, overrides: Sequence[str]) -> None:
    """Curates and prints what was kept and rejected."""
    report = curate_dataset(config)
    console.print(
        f"{report.kept} samples kept, {report.rejected} rejected (rejects.jsonl), {report.seconds:.0f} s: "
        f"{config.output}",
        highlight=False,
    )
