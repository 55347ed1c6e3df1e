"""Manifests: tables (CSV, JSON lines, Parquet) whose rows name media files, their captions and the part that counts.

A row becomes a `MediaItem`; a row that cannot is a `DecodeError` with its line. The names that other tools give to
columns are known; where a manifest has others, the configuration names them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from contentv.base.errors import UserError, nearest
from contentv.base.log import get_logger
from contentv.curation.captions import CaptionError, checked_caption
from contentv.curation.manifest_rows import Row, RowFile, open_rows
from contentv.curation.media import DEFAULT_SOURCE, MEDIA_SUFFIXES, MediaItem, given_scores, shown, source_of
from contentv.curation.video_io import IMAGE_SUFFIXES, DecodeError

LAYOUTS = ("auto", "files", "webdataset", "cosmos")
# What other tools call their columns; the first that is there counts.
KNOWN_COLUMNS = {
    "path": ("path", "video", "video_path", "file", "file_name", "filename", "file_path", "filepath", "media_path",
             "image", "image_path", "clip_path"),
    "caption": ("caption", "cap", "text", "prompt"),
    "source": ("source", "dataset"),
    "start": ("start_s", "start", "start_time"),
    "end": ("end_s", "end", "end_time"),
}  # fmt: skip
MAX_SOURCE_CHARS = 200


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ManifestConfig:
    """How inputs are laid out, and what the columns of a manifest are called."""

    layout: str = _doc("auto", "auto | files | webdataset | cosmos: what a folder given as input holds")
    path_column: str = _doc("", "column with the file's path; empty = path, video, video_path, file, file_name, ...")
    caption_column: str = _doc("", "column with the caption; empty = caption, cap, text or prompt, if there is one")
    source_column: str = _doc("", "column with the source's name; empty = source or dataset, else the first folder of "
                                  "the path")  # fmt: skip
    start_column: str = _doc("", "column with the first second that counts (number or h:mm:ss); empty = start_s, start "
                                 "or start_time, if there is one")  # fmt: skip
    end_column: str = _doc("", "column with the second after the last; empty = end_s, end or end_time, if there is one")
    score_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "columns (or fields of KEY.json, a.b for nested ones) with numbers to keep as given_<name>"},
    )
    root: str = _doc("", "folder that relative paths start from; empty = the manifest's own")
    rows_per_unit: int = _doc(32, "rows of a manifest that are handed out together; 1 or more")

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(
                f"layout={self.layout} is not known", where="manifest.layout",
                remedy=f"use one of {', '.join(LAYOUTS)}; {nearest(self.layout, LAYOUTS)}".rstrip("; "),
            )  # fmt: skip
        if self.rows_per_unit < 1:
            raise UserError(
                f"rows_per_unit={self.rows_per_unit}", where="manifest.rows_per_unit", remedy="use 1 or more"
            )


class ManifestInputs:
    """A manifest as inputs: some rows are a unit, named by the numbers of its first and last row.

    Args:
        path: of the manifest.
        config: what its columns are called, and where relative paths start.

    Attributes:
        units: names of the units, in the manifest's order, which is sorted.

    Raises:
        UserError: the manifest cannot be read, or lacks a column.
    """

    def __init__(self, path: Path, config: ManifestConfig) -> None:
        self._config, self._name = config, shown(path.name)
        self._root = Path(config.root or path.parent)
        if not self._root.is_dir():
            raise UserError(f'"{config.root}" is not a folder', where="manifest.root", remedy="name a folder")
        self._file: RowFile = open_rows(path, config.rows_per_unit)
        self._columns = _resolve(self._file.columns, config, str(path))
        if hasattr(self._file, "wanted"):  # of Parquet, nothing else is read
            self._file.wanted = [*self._columns.values(), *(name.partition(".")[0] for name in config.score_columns)]
        told = ", ".join(f"{meaning} = {column}" for meaning, column in self._columns.items())
        get_logger().info(f"{path}: {self._file.count} rows; columns: {told}")
        firsts = range(0, self._file.count, config.rows_per_unit)
        self.units = [self._unit(first, min(first + config.rows_per_unit, self._file.count)) for first in firsts]

    def items(self, unit: str) -> Iterator[MediaItem | DecodeError]:
        """Yields the media of some rows; a unit of a plan made before rows were added is read as it was.

        Raises:
            UserError: the manifest has no such rows any more, or they were handed out in other groups.
        """
        digits = unit.rpartition("#")[2].split("-")
        first, last = int(digits[0]) - 1, int(digits[1])
        if first % self._config.rows_per_unit or last > self._file.count:
            raise UserError(
                f"rows {first + 1} to {last} are not to be had from {self._name}: it has {self._file.count} rows, "
                f"{self._config.rows_per_unit} a unit", where="input",
                remedy="go on with the manifest and the manifest.rows_per_unit that the run was begun with",
            )  # fmt: skip
        for row in self._file.rows(first, last):
            yield self._item(row)

    def _unit(self, first: int, last: int) -> str:
        return f"{self._name}#{first + 1:012d}-{last:012d}"

    def _item(self, row: Row) -> MediaItem | DecodeError:
        place = f"{self._name}:{row.line}"
        if row.problem:
            return DecodeError(place, row.problem, "bad_row")
        text = self._get(row, "path")
        if not isinstance(text, str) or not text.strip():
            return DecodeError(place, f"the row names no file in {self._columns['path']}", "bad_row")
        try:
            name, path = self._place(text.strip())
        except ValueError as error:
            return DecodeError(place, str(error), "bad_row")
        try:
            is_image = name.lower().endswith(IMAGE_SUFFIXES)
            span = None if is_image else _span(self._get(row, "start"), self._get(row, "end"))
            caption = self._get(row, "caption")
            return MediaItem(
                name if span is None else f"{name}#t={span[0]:g},{'' if span[1] == float('inf') else f'{span[1]:g}'}",
                path, self._source(row, name), caption=None if caption in (None, "") else _caption(caption),
                span_s=span, given_scores=given_scores(row.values, self._config.score_columns),
            )  # fmt: skip
        except CaptionError as error:
            return DecodeError(name, f"{place}: {error}", error.rule)

    def _get(self, row: Row, meaning: str) -> Any:
        return row.values.get(self._columns.get(meaning, ""))

    def _place(self, text: str) -> tuple[str, str]:
        """Returns the name below the root and the path of what a row names."""
        if "://" in text[:12]:
            raise ValueError(f"{text[:200]} is an address; fetch the file and name its path")
        if "\0" in text:
            raise ValueError("the path has a zero byte in it")
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            raise ValueError("the path is no text that a file system can hold") from None
        path = os.path.normpath(os.path.join(self._root, text))
        if PurePath(path).suffix.lower() not in MEDIA_SUFFIXES:
            raise ValueError(f"{shown(text)[:200]} ends in none of {', '.join(MEDIA_SUFFIXES)}")
        inside = PurePath(path).is_relative_to(os.path.normpath(self._root)) and not os.path.isabs(text)
        return shown(os.path.relpath(path, self._root) if inside else path), path

    def _source(self, row: Row, name: str) -> str:
        given = self._get(row, "source")
        if given in (None, ""):
            return DEFAULT_SOURCE if PurePosixPath(name).is_absolute() else source_of(name)
        if not isinstance(given, str):
            given = str(given)
        given = given.strip()
        if not given or len(given) > MAX_SOURCE_CHARS or not given.isprintable():
            raise CaptionError(f"a source cannot be called {given[:40]!r}", "bad_row")
        return given


def _resolve(columns: list[str], config: ManifestConfig, where: str) -> dict[str, str]:
    """Returns {meaning: column} of the columns that are there."""
    found: dict[str, str] = {}
    for meaning, known in KNOWN_COLUMNS.items():
        named = getattr(config, f"{meaning}_column")
        if named:
            _require_column(named, columns, f"manifest.{meaning}_column", where)
            found[meaning] = named
            continue
        by_lower = {column.lower(): column for column in reversed(columns)}
        column = next((by_lower[name] for name in known if name in by_lower), None)
        if column is not None:
            found[meaning] = column
    for name in config.score_columns:
        _require_column(
            name.partition(".")[0] if name not in columns else name, columns, "manifest.score_columns", where
        )
    if "path" not in found:
        raise UserError(
            f"none of its columns ({', '.join(columns)[:300]}) is known to hold paths", where=where,
            remedy="name it: manifest.path_column=COLUMN",
        )  # fmt: skip
    return found


def _require_column(name: str, columns: list[str], key: str, where: str) -> None:
    if name not in columns:
        raise UserError(
            f'{where} has no column "{name}"; it has {", ".join(columns)[:300]}', where=key,
            remedy=nearest(name, columns) or "name a column that is there",
        )  # fmt: skip


def _caption(value: object) -> str | None:
    return checked_caption(value, empty=True) or None


def _span(start: object, end: object) -> tuple[float, float] | None:
    """Returns the part of the file that a row names, None for all of it."""
    if start in (None, "") and end in (None, ""):
        return None
    first = 0.0 if start in (None, "") else _time(start)
    last = float("inf") if end in (None, "") else _time(end)
    if not 0 <= first < last:
        raise CaptionError(f"no part of a file: from {start!r} to {end!r}"[:200], "bad_row")
    return first, last


def _time(value: object) -> float:
    """Returns seconds: of a number, or of h:mm:ss."""
    total = 0.0
    try:
        parts = [float(part) for part in str(value).split(":")]
    except ValueError:
        parts = [float("nan")]
    for part in parts[:3]:
        total = total * 60 + part
    if len(parts) > 3 or not 0 <= total < 1e9 or isinstance(value, bool):
        raise CaptionError(f"no time: {value!r}"[:200], "bad_row")
    return total
