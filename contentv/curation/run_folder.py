"""The work folder of a curation, DATASET/curation/run-0001: a plan, and one file for every chunk that a phase has done.

Every file appears whole or not at all: whatever ends a run, the next start finds complete chunks and redoes the rest.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contentv.base.errors import UserError
from contentv.base.files import disk_errors, to_json, write_atomic
from contentv.curation.records import read_rows, write_rows

CURATION_FOLDER = "curation"
PLAN_FILE = "plan.json"
SUMMARY_FILE = "summary.json"  # written last: a run that has it is finished
INDEX_FILE = "index.safetensors"
REJECTS_FILE = "rejects.jsonl"
THUMBNAILS_FILE = "thumbnails.jsonl"
THUMBNAILS_FOLDER = "thumbnails"
PLAN_VERSION = 1
SCAN, DECIDE, CAPTION, ENCODE, MERGE = "scan", "decide", "captions", "encode", "merge"
_RUN = re.compile(r"run-(\d{4,})")

Settings = dict[str, dict[str, Any]]  # phase from which on they count -> key -> value


@dataclass(frozen=True)
class Plan:
    """What a run is about.

    Attributes:
        input: where its files were found.
        settings: what the result depends on, by the phase that it enters in.
        chunks: the units of each chunk, in the order they are taken.
    """

    input: str
    settings: Settings
    chunks: list[list[str]]


class RunFolder:
    """One run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        match = _RUN.fullmatch(path.name)
        self.number = int(match[1]) if match else 0

    @property
    def name(self) -> str:
        """`run-0001`."""
        return self.path.name

    @property
    def prefix(self) -> str:
        """What the names of its shards and thumbnails begin with, such as `r0001`."""
        return f"r{self.number:04d}"

    @property
    def is_finished(self) -> bool:
        """Whether its last file is there."""
        return (self.path / SUMMARY_FILE).is_file()

    def chunk_prefix(self, chunk: int) -> str:
        """Returns what the names of a chunk's shards begin with, such as `r0001-c000000`."""
        return f"{self.prefix}-c{chunk:06d}"

    def chunk_path(self, phase: str, chunk: int, suffix: str = "jsonl") -> Path:
        """Returns where a phase's file of a chunk lies."""
        return self.path / phase / f"{chunk:06d}.{suffix}"

    def has(self, phase: str, chunk: int) -> bool:
        """Whether a phase is done with a chunk."""
        return self.chunk_path(phase, chunk).is_file()

    def done(self, phase: str) -> int:
        """Returns how many chunks a phase is done with."""
        return sum(1 for _ in (self.path / phase).glob("*.jsonl"))

    def write(self, phase: str, chunk: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes a phase's lines of a chunk; with that it is done with it."""
        path = self.chunk_path(phase, chunk)
        with disk_errors(self.path):
            path.parent.mkdir(exist_ok=True)
        write_rows(path, rows)

    def write_bytes(self, phase: str, chunk: int, suffix: str, data: bytes) -> None:
        """Writes a further file of a chunk; before `write`."""
        path = self.chunk_path(phase, chunk, suffix)
        with disk_errors(self.path, len(data)):
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, data)

    def read(self, phase: str, chunk: int) -> Iterator[dict[str, Any]]:
        """Yields a phase's lines of a chunk.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.chunk_path(phase, chunk)
        try:
            yield from read_rows(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"a file of the curation is missing or damaged ({error})", where=str(path),
                remedy="remove it and run the same command again: this chunk is done again",
            ) from error  # fmt: skip

    def read_plan(self) -> Plan:
        """Returns the run's plan.

        Raises:
            UserError: it is missing or damaged, or of another version.
        """
        path = self.path / PLAN_FILE
        try:
            record = json.loads(path.read_bytes())
            if record["version"] != PLAN_VERSION:
                raise ValueError(f"version {record['version']!r} is not {PLAN_VERSION}")
            return Plan(record["input"], record["settings"], record["chunks"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the plan of an unfinished curation cannot be read ({error})", where=str(path),
                remedy="begin the run again with restart=true",
            ) from error  # fmt: skip

    def write_plan(self, plan: Plan) -> None:
        """Writes the run's plan; with that there is a run."""
        record = {"version": PLAN_VERSION, "input": plan.input, "settings": plan.settings, "chunks": plan.chunks}
        with disk_errors(self.path.parent):
            self.path.mkdir(exist_ok=True)
            write_atomic(self.path / PLAN_FILE, to_json(record))

    def read_summary(self) -> dict[str, Any]:
        """Returns the summary of a finished run."""
        summary: dict[str, Any] = json.loads((self.path / SUMMARY_FILE).read_bytes())
        return summary

    def remove(self) -> None:
        """Removes all of it, the plan first: what is left by a kill meanwhile is no run."""
        (self.path / PLAN_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def list_runs(output: Path) -> list[RunFolder]:
    """Returns the runs of a dataset that have a plan, oldest first."""
    folder = output / CURATION_FOLDER
    paths = [p for p in folder.glob("run-*") if _RUN.fullmatch(p.name) and (p / PLAN_FILE).is_file()]
    return sorted((RunFolder(path) for path in paths), key=lambda run: run.number)


def next_run(output: Path, runs: list[RunFolder]) -> RunFolder:
    """Returns the folder of the run after the last; it has no plan yet."""
    number = 1 + max((run.number for run in runs), default=0)
    folder = RunFolder(output / CURATION_FOLDER / f"run-{number:04d}")
    if folder.path.is_dir():  # without a plan: of a run that was being removed
        shutil.rmtree(folder.path)
    return folder


def differences(old: Settings, new: Settings) -> dict[str, list[str]]:
    """Returns, by phase, a sentence for every setting that differs, such as `filters.min_motion was 0.1, is 0.2`."""
    told: dict[str, list[str]] = {}
    for phase in dict.fromkeys((*old, *new)):
        before, after = old.get(phase, {}), new.get(phase, {})
        for key in dict.fromkeys((*before, *after)):
            if before.get(key) != after.get(key):
                told.setdefault(phase, []).append(f"{key} was {before.get(key)}, is {after.get(key)}")
    return told
