"""Rows of CSV, JSON lines and Parquet files, by number, without holding them all in memory.

Text files are read through once, to note where every n-th row begins. A row that cannot be parsed takes its place in
the count, so that numbers do not depend on what is wrong with it.
"""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from contentv.base.errors import UserError
from contentv.curation.media import open_regular

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
MANIFEST_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
MAX_ROW_BYTES = 4 << 20
MAX_GROUP_BYTES = 256 << 20  # of Parquet row groups that are kept; a larger one is read batch by batch
HEADER_ROWS = 100  # of JSON lines, whose fields are the columns


@dataclass(frozen=True)
class Row:
    """A row of a manifest; `problem` says what is wrong with one that could not be parsed."""

    line: int  # in the file, from 1; of Parquet the row's number
    values: dict[str, Any]
    problem: str = ""


@runtime_checkable
class RowFile(Protocol):
    """A manifest whose rows can be read from the first of any unit on."""

    columns: list[str]
    count: int  # rows

    def rows(self, first: int, last: int) -> Iterator[Row]:
        """Yields rows by their numbers from 0, `last` not included; `first` is a multiple of the unit."""


def open_rows(path: Path, unit: int) -> RowFile:
    """Returns a manifest's rows.

    Args:
        path: of the file; its suffix says what it is.
        unit: rows that are read together.

    Raises:
        UserError: it is not there, empty, no such table, or pyarrow is not installed.
    """
    try:
        return _ParquetRows(path, unit) if path.suffix.lower() == ".parquet" else _TextRows(path, unit)
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror or error})", where=str(path), remedy="name a manifest that is there"
        ) from error


class _Lines:
    """The lines of a file as text, and where the last record began; what csv.reader reads from."""

    def __init__(self, file: BufferedReader, line: int) -> None:
        self._file = file
        self.offset, self.line = file.tell(), line  # of the next line
        self.start: tuple[int, int] | None = None  # offset and line of the record under way

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        data = self._file.readline(MAX_ROW_BYTES)
        if not data:
            raise StopIteration
        if self.start is None:
            self.start = self.offset, self.line
        length = len(data)
        while length >= MAX_ROW_BYTES and not data.endswith(b"\n"):
            data = self._file.readline(MAX_ROW_BYTES)
            length += len(data)
            if not data:
                break
        self.offset += length
        self.line += 1
        if length >= MAX_ROW_BYTES:
            raise ValueError(f"the line has {length} bytes, more than {MAX_ROW_BYTES}")
        # Bytes that are no UTF-8 stay recognisable: they may be a path, and are an error in a caption only.
        return data.decode("utf-8", "surrogateescape")


class _TextRows:
    """Rows of a CSV or JSON lines file."""

    def __init__(self, path: Path, unit: int) -> None:
        self._path, self._unit = path, unit
        self._is_csv = path.suffix.lower() in (".csv", ".tsv")
        self._delimiter = ","
        self.columns: list[str] = []
        self.count = 0
        self._offsets, self._line_numbers = array("q"), array("q")  # of the first row of every unit
        with open_regular(path) as file:
            lines = _Lines(file, 1)
            self._skip_mark(file, lines)
            if self._is_csv:
                self._read_header(lines)
            self._index(lines)
        if not self.columns:
            raise UserError("there are no rows", where=str(path), remedy="give a table with a header and rows")

    def rows(self, first: int, last: int) -> Iterator[Row]:
        """Yields rows by their numbers; see `RowFile`."""
        if first >= min(last, self.count):
            return
        unit, into = divmod(first, self._unit)
        with open_regular(self._path) as file:
            file.seek(self._offsets[unit])
            lines = _Lines(file, self._line_numbers[unit])
            for _, row in islice(self._records(lines), into, into + last - first):
                yield row

    def _skip_mark(self, file: BufferedReader, lines: _Lines) -> None:
        mark = file.read(4)
        if mark[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError("the manifest is UTF-16", where=str(self._path), remedy="save it as UTF-8")
        lines.offset = 3 if mark[:3] == b"\xef\xbb\xbf" else 0
        file.seek(lines.offset)

    def _read_header(self, lines: _Lines) -> None:
        try:
            header = next(lines, "")
        except ValueError as error:
            raise UserError(str(error), where=str(self._path), remedy="give a table with a header") from error
        delimiters = "\t,;" if self._path.suffix.lower() == ".tsv" else ",\t;"
        self._delimiter = max(delimiters, key=header.count)
        self.columns = [name.strip() for name in next(csv.reader([header], delimiter=self._delimiter), [])]
        lines.start = None

    def _index(self, lines: _Lines) -> None:
        names: dict[str, None] = {}
        for start, row in self._records(lines):
            if self.count % self._unit == 0:
                self._offsets.append(start[0])
                self._line_numbers.append(start[1])
            self.count += 1
            if not self._is_csv and self.count <= HEADER_ROWS:
                names |= dict.fromkeys(row.values)
        if not self._is_csv:
            self.columns = list(names)

    def _records(self, lines: _Lines) -> Iterator[tuple[tuple[int, int], Row]]:
        """Yields the rows from here on, each with its offset and line; blank lines are none."""
        source = csv.reader(lines, delimiter=self._delimiter) if self._is_csv else lines
        while True:
            lines.start = None
            problem, values = "", {}
            try:
                values = self._parsed(next(source))
            except StopIteration:
                return
            except (csv.Error, ValueError, RecursionError) as error:
                problem = str(error)
            if lines.start is not None and (values or problem):
                yield lines.start, Row(lines.start[1], values, problem)

    def _parsed(self, record: Any) -> dict[str, Any]:
        """Returns a record's values, {} for a blank line."""
        if not self._is_csv:
            if not record.strip():
                return {}
            values = json.loads(record)
            if not isinstance(values, dict) or not values:
                raise ValueError("the line holds no JSON object with fields")
            return values
        if record and len(record) != len(self.columns):
            raise ValueError(f"{len(record)} fields for {len(self.columns)} columns (quote texts with commas in them)")
        return dict(zip(self.columns, record, strict=False))


class _ParquetRows:
    """Rows of a Parquet file; only the columns that are asked for are read."""

    def __init__(self, path: Path, unit: int) -> None:
        del unit  # row groups tell where rows are
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                "Parquet needs pyarrow, which is not installed",
                where=str(path),
                remedy="pip install 'contentv[curation]', or pip install pyarrow",
            ) from error
        self._arrow, self._path = pyarrow, path
        with open_regular(path):
            pass
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"not a Parquet file, or damaged ({error})", where=str(path)) from error
        self.columns = list(self._file.schema_arrow.names)
        self.wanted = self.columns
        groups = self._file.metadata
        self._sizes = [groups.row_group(n).num_rows for n in range(groups.num_row_groups)]
        self.count = sum(self._sizes)
        self._kept: dict[int, tuple[Any, int]] = {}  # row groups and their bytes
        if not self.count:
            raise UserError("there are no rows", where=str(path), remedy="give a table with rows")

    def rows(self, first: int, last: int) -> Iterator[Row]:
        """Yields rows by their numbers; see `RowFile`."""
        before = 0
        for group, size in enumerate(self._sizes):
            start, stop = max(first, before), min(last, before + size)
            if start < stop:
                try:
                    yield from self._group_rows(group, start - before, stop - before, before)
                except (self._arrow.ArrowException, OSError, ValueError) as error:
                    yield Row(start + 1, {}, f"rows {start + 1} to {stop} cannot be read ({error})")
            before += size

    def _group_rows(self, group: int, start: int, stop: int, before: int) -> Iterator[Row]:
        columns = [name for name in self.wanted if name in self.columns]
        about = self._file.metadata.row_group(group)
        size = sum(
            about.column(n).total_uncompressed_size
            for n in range(about.num_columns)
            if about.column(n).path_in_schema.split(".")[0] in columns
        )
        if size <= MAX_GROUP_BYTES:
            batches = [self._whole_group(group, columns, size)]
        else:
            batches = self._file.iter_batches(batch_size=4096, row_groups=[group], columns=columns)
        at = 0
        for batch in batches:
            part = batch.slice(max(0, start - at), max(0, stop - max(at, start)))
            values = {name: self._values(part.column(name)) for name in columns}
            for n in range(part.num_rows):
                number = before + max(at, start) + n
                yield Row(number + 1, {name: column[n] for name, column in values.items()})
            at += batch.num_rows
            if at >= stop:
                return

    def _whole_group(self, group: int, columns: list[str], size: int) -> Any:
        """Returns the columns of a row group, which stay in memory while there is room: units come in any order."""
        if group not in self._kept:
            while self._kept and size + sum(kept for _, kept in self._kept.values()) > MAX_GROUP_BYTES:
                self._kept.pop(next(iter(self._kept)))
            self._kept[group] = (self._file.read_row_group(group, columns=columns), size)
        self._kept[group] = self._kept.pop(group)  # the last used is the last to go
        return self._kept[group][0]

    def _values(self, column: Any) -> list[Any]:
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            kind = column.type
            binary = self._arrow.large_binary() if self._arrow.types.is_large_string(kind) else self._arrow.binary()
            return [
                None if value is None else value.decode("utf-8", "surrogateescape")
                for value in column.cast(binary).to_pylist()
            ]
