"""What people see of a curation: where clips will go, how far each phase is, and what came of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from contentv.base.types import Bucket
from contentv.curation.config import CurateConfig
from contentv.curation.curate_report import CurateReport
from contentv.curation.plan import alike


@runtime_checkable
class PhaseProgress(Protocol):
    """How far a phase is."""

    def __call__(self, chunks: int, items: int) -> None:
        """Takes note of further chunks and items that are done."""


@runtime_checkable
class Reporter(Protocol):
    """Shows how far a curation is."""

    def phase(self, name: str, chunks: int, done: int, unit: str) -> Any:
        """Returns a block that gives a `PhaseProgress`.

        Args:
            name: of the phase.
            chunks: to be done in all.
            done: of them, before.
            unit: of the items that are counted, such as "clips".
        """


class Silent:
    """Shows nothing."""

    @contextmanager
    def phase(self, name: str, chunks: int, done: int, unit: str) -> Iterator[PhaseProgress]:
        """See `Reporter.phase`."""
        yield lambda chunks, items: None


class Bars:
    """Shows a bar for each phase, with items per second.

    Args:
        console: where.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def phase(self, name: str, chunks: int, done: int, unit: str) -> Iterator[PhaseProgress]:
        """See `Reporter.phase`."""
        columns = (
            TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TextColumn("chunks"),
            TimeElapsedColumn(), TextColumn("{task.fields[rate]}"),
        )  # fmt: skip
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(name, total=chunks, completed=done, rate="")
            seen = 0

            def advance(chunks: int, items: int) -> None:
                nonlocal seen
                seen += items
                elapsed = progress.tasks[0].elapsed or 0.0
                rate = f"{seen} {unit}, {seen / elapsed:.1f}/s" if elapsed > 0.5 else f"{seen} {unit}"
                progress.update(task, advance=chunks, rate=rate)

            yield advance


def bucket_table(config: CurateConfig) -> Table:
    """Returns which clips go to which bucket, and why."""
    table = Table(title="Where clips go", title_justify="left", caption=_rules(config), caption_justify="left")
    for name in ("bucket", "takes", "at least", "width : height"):
        table.add_column(name)
    buckets = [Bucket.parse(name) for name in config.buckets]
    shapes = _shapes(buckets, config.aspect)
    for bucket in buckets:
        kind = "stills and middle frames" if config.images_from_video else "stills"
        if bucket.frames > 1:
            kind = "videos"
        rate = f" = {bucket.frames / config.fps:.2f} s" if config.fps else ""
        size = "" if config.allow_upscale else f", {bucket.height} x {bucket.width} px"
        table.add_row(
            bucket.name, kind, f"{bucket.frames} frame{'s' if bucket.frames > 1 else ''}{rate}{size}", shapes[bucket]
        )
    return table


def summary_tables(report: CurateReport) -> list[Table]:
    """Returns where the time of a run went, and what was kept and rejected, for a terminal."""
    times = Table(title="Where the time went", title_justify="left")
    for name in ("phase", "seconds", "items", "items/s", "workers busy"):
        times.add_column(name, justify="left" if name == "phase" else "right")
    for name, phase in report.phases.items():
        seconds = phase["seconds"]
        rate = f"{phase['items'] / seconds:.1f}" if seconds > 0 and phase["items"] else ""
        busy = phase["cpu_s"] + phase["worker_cpu_s"]
        share = f"{busy / (seconds * report.workers):.0%}" if seconds > 0 else ""
        times.add_row(name, f"{seconds:.1f}", str(phase["items"]), rate, share)
    counts = Table(title="What came of the clips", title_justify="left")
    counts.add_column("")
    counts.add_column("number", justify="right")
    for name, count in report.buckets.items():
        counts.add_row(f"samples kept, {name}", str(count))
    for rule, count in sorted(report.rules.items(), key=lambda pair: (-pair[1], pair[0])):
        counts.add_row(f"rejected, {rule}", str(count))
    if report.skipped:
        counts.add_row("files that were there before", str(report.skipped))
    return [times, counts]


def _rules(config: CurateConfig) -> str:
    every = "to every shape" if config.aspect == "every" else "of shapes alike in area to the nearest"
    frames = "every length that it fills" if config.frames == "every" else "the longest length that it fills"
    crop = "" if config.max_crop is None else f"; at most {config.max_crop:.0%} is cropped away"
    return (
        f"Scenes are cut into clips of {config.min_clip_s:g} to {config.max_clip_s:g} s. A clip goes to {frames}, "
        f"and {every} (aspect={config.aspect}, frames={config.frames}){crop}."
    )


def _shapes(buckets: Sequence[Bucket], aspect: str) -> dict[Bucket, str]:
    """Returns the range of aspect ratios that each bucket takes."""
    shapes = dict.fromkeys(buckets, "any")
    for group in [] if aspect == "every" else alike(buckets):
        ordered = sorted(group, key=lambda bucket: bucket.width / bucket.height)
        ratios = [bucket.width / bucket.height for bucket in ordered]
        edges = [math.sqrt(a * b) for a, b in itertools.pairwise(ratios)]
        for n, bucket in enumerate(ordered):
            if len(group) > 1:
                low = f"{edges[n - 1]:.2f}" if n > 0 else "0"
                shapes[bucket] = f"{low} to {edges[n]:.2f}" if n < len(edges) else f"{low} and wider"
    return shapes
