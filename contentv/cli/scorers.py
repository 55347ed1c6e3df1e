"""`contentv curate --scorers`: what clips are scored by."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from contentv.config.compose import compose_config, to_object
from contentv.curation.scorers import list_scorers


def print_scorers(overrides: Sequence[str]) -> None:
    """Prints a table of every scorer, for the configuration that the overrides make."""
    config = to_object(compose_config("curate", list(overrides)))
    table = Table(title="what clips are scored by", title_justify="left")
    for column in ("score", "kind", "measures", "range", "needs", "here"):
        table.add_column(column, overflow="fold")
    for info in list_scorers(config.scoring):
        span = f"{info.range} ({info.unit})" if info.unit else info.range
        table.add_row(info.name, info.kind, info.meaning, span, info.needs, "yes" if info.available else "no")
    console = Console()  # standard output, as --help
    console.print(table, highlight=False)
    console.print(
        "visual_raw = scoring.visual, motion_raw = scoring.motion; scoring.skip=[NAME] leaves one out; "
        "filters.bounds={NAME: [least, most]} bounds any", highlight=False, markup=False,
    )  # fmt: skip
