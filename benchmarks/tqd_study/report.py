"""Writes the tables of the evidence in docs/tqd.md, and its figures, from the rows."""

from __future__ import annotations

from functools import partial

from measure import ROOT

from contentv.config.figures import filled
from tqd_study import handover
from tqd_study.figures import draw_all, links
from tqd_study.summary import TABLES, Rows, large_table, rows_by_name

PAGE = ROOT / "docs" / "tqd.md"


def page(text: str, rows: Rows) -> str:
    """Returns docs/tqd.md with the study's tables made anew."""
    made = {name: partial(make, rows) for name, make in {**TABLES, "study figures": links}.items()}
    return filled(text, made | {"study large": large_table, "study handover": handover.table})


def write() -> None:
    """Writes tables and figures."""
    rows = rows_by_name()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    for path in (PAGE, *draw_all(rows)):
        print(path.relative_to(ROOT))
