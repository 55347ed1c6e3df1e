"""`contentv report`: one HTML page about a run, a dataset or a demo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from contentv.base.errors import UserError
from contentv.base.log import console, get_logger
from contentv.config.inputs import existing_folder
from contentv.config.schema import DemoConfig, ReportConfig
from contentv.data import DatasetInfo, Normaliser, read_metas
from contentv.diffusion.timesteps import TQD, build_sampler
from contentv.report.dataset import Quality, write_dataset_report
from contentv.report.run import write_run_report
from contentv.report.stored_media import stored_media


def run(config: ReportConfig, overrides: Sequence[str]) -> None:
    """Writes the page that fits what lies in the folder and prints where it is."""
    folder = existing_folder(config.path, "path", "a run, a dataset or a demo folder")
    console.print(str(write(folder, config)), highlight=False)


def write(folder: Path, config: ReportConfig | None = None) -> Path:
    """Returns the report of a folder, newly written.

    Raises:
        UserError: the folder holds none of the things reports are about.
    """
    if (folder / "dataset.json").is_file():
        return _write_dataset(folder, config or ReportConfig())
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


def _write_dataset(folder: Path, config: ReportConfig) -> Path:
    info = DatasetInfo.load(folder)
    sampler = build_sampler(config.timestep)
    return write_dataset_report(
        folder, read_metas(info), info.to_dict(), _quality(folder), folder / "report.html",
        tqd=sampler if isinstance(sampler, TQD) else None,
        global_batch_size=config.global_batch_size, media=stored_media(info),
    )  # fmt: skip


def _quality(folder: Path) -> Quality | None:
    """The dataset's normaliser; without a sound one, scores are shown as ranks."""
    try:
        return Normaliser.load(folder).scores
    except UserError as error:
        get_logger().warning(f"the page shows ranks of raw scores: {error}")
        return None
