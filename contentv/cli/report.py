"""`contentv report`: one HTML page about a run, a dataset or a demo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from contentv.base.errors import UserError
from contentv.base.log import console
from contentv.config.inputs import existing_folder
from contentv.config.schema import DemoConfig, ReportConfig
from contentv.data import Normaliser, read_metas
from contentv.report.dataset import write_dataset_report
from contentv.report.run import write_run_report


def run(config: ReportConfig, overrides: Sequence[str]) -> None:
    """Writes the page that fits what lies in the folder and prints where it is."""
    folder = existing_folder(config.path, "path", "a run, a dataset or a demo folder")
    console.print(str(write(folder)), highlight=False)


def write(folder: Path) -> Path:
    """Returns the report of a folder, newly written.

    Raises:
        UserError: the folder holds none of the things reports are about.
    """
    if (folder / "dataset.json").is_file():
        info = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        quality = Normaliser.load(folder).scores
        return write_dataset_report(folder, read_metas(folder), info, quality, folder / "report.html")
    if (folder / "demo.json").is_file():
        from contentv.demo.run import Ledger, measure

        settings = json.loads((folder / "demo.json").read_text(encoding="utf-8"))["settings"]
        measure(DemoConfig(**settings, out=str(folder)), folder, Ledger.open(folder / "demo.json", settings))
        return folder / "report.html"
    if (folder / "metrics.jsonl").is_file():
        return write_run_report(folder)
    raise UserError(
        "holds no run (metrics.jsonl), dataset (dataset.json) or demo (demo.json)", where=f"path={folder}",
        remedy="name the out= of a train or demo command, or the output= of a curate command",
    )  # fmt: skip
