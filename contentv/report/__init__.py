"""Self-contained HTML pages about a run, a dataset or a demo: inline charts and videos, no scripts, no network."""

from __future__ import annotations

from contentv.report.dataset import write_dataset_report
from contentv.report.demo import write_demo_report
from contentv.report.run import write_run_report

__all__ = ["write_dataset_report", "write_demo_report", "write_run_report"]
