"""`contentv curate`: files to shards."""

from __future__ import annotations

from collections.abc import Sequence

from contentv.base.log import console, is_main_process
from contentv.config.curating import curate_dataset
from contentv.config.schema import CurateRoot
from contentv.curation.progress import summary_tables


def run(config: CurateRoot, overrides: Sequence[str]) -> None:
    """Curates and prints what was kept and rejected, and where the time went."""
    report = curate_dataset(config)
    if not is_main_process():
        return
    for table in summary_tables(report):
        console.print(table)
    console.print(
        f"{report.kept} samples kept, {report.rejected} rejected (rejects.jsonl), {report.seconds:.0f} s: "
        f"{config.output}",
        highlight=False,
    )
