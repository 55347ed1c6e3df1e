"""How a dataset came about: its curation runs, where their time went, and the shapes of the files they looked at."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contentv.report import page
from contentv.report.charts import bar_chart
from contentv.report.markup import Html, duration, tag

MAX_RUNS = 50  # the newest are shown
MAX_CHUNKS = 200  # files of a run's scan that shapes are counted in
RATIOS = {"9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1.0, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9,
          "2:1": 2.0, "21:9": 21 / 9}  # fmt: skip
MAX_OFF = 1.12  # a picture is named after a ratio that its own is within this factor of
COUNTS = ("files", "clips", "kept", "rejected", "skipped")


def runs_section(folder: Path) -> Html:
    """Returns the section about a dataset's curation runs."""
    title = "Curation runs"
    runs = sorted(path for path in (folder / "curation").glob("run-*") if path.is_dir())
    if not runs:
        return page.section(title, tag("p", "not recorded: there is no curation/run-*", class_="empty"))
    rows, phases = [], []
    newest: dict[str, float] = {}
    for run in runs[-MAX_RUNS:]:
        summary = _summary(run)
        if summary is None:
            state = "its summary cannot be read" if (run / "summary.json").is_file() else "not finished"
            rows.append([run.name, *["n/a"] * len(COUNTS), state, "n/a", "n/a"])
            continue
        rows.append(_row(run.name, summary))
        found = _phases(run.name, summary)
        phases += found
        newest = {row[1]: row[-1] for row in found}
    columns = ["run", *COUNTS, "time", "clips per second", "workers"]
    tables = [page.table(columns, rows)]
    if phases:
        listing = page.table(
            ["run", "phase", "time", "items", "items per second", "CPU in use"], [row[:-1] for row in phases]
        )
        tables += [listing, page.charts(bar_chart("Seconds in each phase of the newest run", newest, unit="s"))]
    lead = "CPU in use: computing time of a phase's workers and its main process, over its time and number of workers."
    return page.section(title, *tables, lead=lead)


def shapes_chart(folder: Path) -> Html:
    """Returns how many files of each aspect ratio the runs looked at."""
    chunks = sorted((folder / "curation").glob("run-*/scan/*.jsonl"))
    title = "Aspect ratios of the files that went in"
    if not chunks:
        return tag("p", f"{title}: not recorded", class_="empty")
    picked = chunks[:: max(1, math.ceil(len(chunks) / MAX_CHUNKS))]
    found: Counter[str] = Counter()
    for chunk in picked:
        with open(chunk, encoding="utf-8", errors="replace") as file:
            for line in file:
                name = _ratio_of_line(line)
                if name is not None:
                    found[name] += 1
    if not found:
        return tag("p", f"{title}: no file of the scan has a size", class_="empty")
    names = [name for name in (*RATIOS, "other") if found[name]]
    note = f"Counted in {len(picked):,} of {len(chunks):,} chunks." if len(picked) < len(chunks) else ""
    return bar_chart(title, {name: float(found[name]) for name in names}, unit="files", note=note)


def ratio_name(width: int, height: int) -> str:
    """Returns the common name of a picture's shape, such as 16:9, or `other`."""
    shape = width / height
    name = min(RATIOS, key=lambda key: abs(math.log(RATIOS[key] / shape)))
    return name if abs(math.log(RATIOS[name] / shape)) <= math.log(MAX_OFF) else "other"


def _ratio_of_line(line: str) -> str | None:
    try:
        row = json.loads(line)
        width, height = row["width"], row["height"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = isinstance(width, int) and isinstance(height, int)
    return ratio_name(width, height) if whole and width > 0 and height > 0 else None


def _summary(run: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((run / "summary.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _row(name: str, summary: Mapping[str, Any]) -> list[Any]:
    seconds, clips = _number(summary, "seconds"), _number(summary, "clips")
    speed = clips / seconds if clips is not None and seconds else None
    counts = [_whole(summary, key) for key in COUNTS]
    return [name, *counts, "n/a" if seconds is None else duration(seconds), speed, _whole(summary, "workers")]


def _phases(run: str, summary: Mapping[str, Any]) -> list[list[Any]]:
    """Rows of the phases' table, each with its seconds as a last number that is not shown."""
    phases = summary.get("phases")
    rows: list[list[Any]] = []
    for name, phase in phases.items() if isinstance(phases, dict) else ():
        seconds = _number(phase, "seconds")
        if seconds is None:
            continue
        items = _number(phase, "items")
        busy = (_number(phase, "cpu_s") or 0.0) + (_number(phase, "worker_cpu_s") or 0.0)
        workers = max(1.0, _number(summary, "workers") or 1.0)
        share = f"{busy / (seconds * workers):.0%}" if seconds > 0 and busy else "n/a"
        speed = items / seconds if items is not None and seconds > 0 else None
        rows.append([run, str(name), duration(seconds), _whole(phase, "items"), speed, share, seconds])
    return rows


def _number(record: Any, key: str) -> float | None:
    value = record.get(key) if isinstance(record, dict) else None
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable and value is not None else None


def _whole(record: Any, key: str) -> int | None:
    value = _number(record, key)
    return None if value is None else int(value)
