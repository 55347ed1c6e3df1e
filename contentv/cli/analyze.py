"""`contentv analyze gradients`: which noise levels imperfect clips are good for, on a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from contentv.base.errors import UserError
from contentv.base.log import console, is_main_process
from contentv.config.analyzing import analyze_gradients
from contentv.config.schema import AnalyzeRoot
from contentv.models.folders import write_json
from contentv.report.gradients import gradients_page
from contentv.report.page import write_page


def run(config: AnalyzeRoot, overrides: Sequence[str]) -> None:
    """Writes gradients.json and report.html, and prints what they say and where they are."""
    out = Path(config.out)
    result = analyze_gradients(config)
    if not is_main_process():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(result, out / "gradients.json")
        written = write_page(out / "report.html", gradients_page(result))
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror or error})", where=f"out={out}", remedy="choose another out="
        ) from None
    for text in result["remarks"]:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print(str(written), highlight=False, soft_wrap=True)
