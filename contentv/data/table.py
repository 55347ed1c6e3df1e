"""The table of all samples: what their order may depend on, in one file beside dataset.json.

Columns are mapped into memory, not read, so a hundred million samples are planned without opening their shards. Rows
run by bucket (sorted by name), and within a bucket through its shards in the order of dataset.json: a bucket is one
stretch. The file is a safetensors file of three tensors, n = number of samples:

    key_hash  n      U64      xxh64 of the sample's KEY
    source    n      U16/U32  place in the list of sources, the largest number for none
    scores    n x 2  F32      visual_raw and motion_raw, NaN where there is none

A dataset without the file (made by an earlier version) is read from its indexes instead, with the same result.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from contentv.base.errors import UserError
from contentv.data.dataset import TABLE_FILE, DatasetInfo, ShardInfo, TableInfo
from contentv.data.files import write_atomic
from contentv.data.index import IndexEntry

_CHUNK_BYTES = 16 << 20
_MAX_HEADER_BYTES = 1 << 24
_DTYPES: dict[str, np.dtype[Any]] = {
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
}
_REMEDY = "restore the file from a copy, or run `contentv index path=DATASET`"


@dataclass(frozen=True)
class Columns:
    """The rows of one bucket of one dataset, in the order of its samples' numbers.

    Attributes:
        key_hash: xxh64 of each KEY.
        source: place of each sample's source in `sources`, `len(sources)` or more for none.
        scores: visual_raw and motion_raw, fp32, NaN where there is none.
        sources: names.
    """

    key_hash: NDArray[np.uint64]
    source: NDArray[Any]
    scores: NDArray[np.float32]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.key_hash)


def release(column: NDArray[Any]) -> None:
    """Gives back the memory of a mapped column's pages that were looked at; they come back when needed."""
    mapped = getattr(column, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def bucket_shards(info: DatasetInfo) -> dict[str, list[ShardInfo]]:
    """Returns the shards of each bucket that has samples, buckets sorted by name, shards in the dataset's order."""
    groups: dict[str, list[ShardInfo]] = {}
    for shard in info.shards:
        if shard.samples:
            groups.setdefault(shard.bucket, []).append(shard)
    return dict(sorted(groups.items()))


def columns_of(entries: Sequence[IndexEntry], sources: Sequence[str]) -> Columns:
    """Returns the rows of some index entries."""
    places = {name: i for i, name in enumerate(sources)}
    none, dtype = _source_dtype(len(sources))
    scores = [[_score(entry.visual_raw), _score(entry.motion_raw)] for entry in entries]
    with np.errstate(over="ignore"):
        return Columns(
            np.fromiter((xxhash.xxh64_intdigest(entry.key.encode()) for entry in entries), "<u8", len(entries)),
            np.fromiter((places.get(entry.source or "", none) for entry in entries), dtype, len(entries)),
            np.array(scores, dtype=np.float64).reshape(-1, 2).astype("<f4"),
            tuple(sources),
        )


def _score(value: float | None) -> float:
    return math.nan if value is None else value


def _source_dtype(count: int) -> tuple[int, np.dtype[Any]]:
    name = "U16" if count < 0xFFFF else "U32"
    return (0xFFFF if name == "U16" else 0xFFFFFFFF), _DTYPES[name]


def write_table(info: DatasetInfo, entries_of: Callable[[ShardInfo], Sequence[IndexEntry]]) -> TableInfo:
    """Writes the table of a dataset in one step and returns its record, for dataset.json.

    Args:
        info: the dataset; its shards are complete, its sources known.
        entries_of: the index entries of a shard, as many as it has samples.

    Raises:
        ValueError: a shard has another number of entries.
    """
    sources = sorted(info.sources)
    shapes = {"key_hash": [info.samples], "source": [info.samples], "scores": [info.samples, 2]}
    dtypes = {"key_hash": _DTYPES["U64"], "source": _source_dtype(len(sources))[1], "scores": _DTYPES["F32"]}
    header, offsets = _header(shapes, dtypes, sources)
    digests = {name: xxhash.xxh128() for name in shapes}

    def write(stream: BinaryIO) -> None:
        stream.write(header)
        places = dict(offsets)
        for shard in (shard for shards in bucket_shards(info).values() for shard in shards):
            columns = columns_of(entries_of(shard), sources)
            if len(columns) != shard.samples:
                raise ValueError(f"{shard.name} has {len(columns)} index entries for {shard.samples} samples")
            for name in shapes:
                data = getattr(columns, name).tobytes()
                digests[name].update(data)
                stream.seek(places[name])
                places[name] += stream.write(data)

    write_atomic(info.path / TABLE_FILE, write)
    return TableInfo(TABLE_FILE, info.samples, {name: digest.hexdigest() for name, digest in digests.items()})


def _header(
    shapes: dict[str, list[int]], dtypes: dict[str, np.dtype[Any]], sources: Sequence[str]
) -> tuple[bytes, dict[str, int]]:
    """Returns the file's first bytes, and where each column begins."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    record: dict[str, Any] = {"__metadata__": {"sources": json.dumps(list(sources))}}
    begins, place = {}, 0
    for name, shape in shapes.items():
        begins[name] = place
        place += math.prod(shape) * dtypes[name].itemsize
        record[name] = {"dtype": names[dtypes[name]], "shape": shape, "data_offsets": [begins[name], place]}
    text = json.dumps(record).encode()
    text += b" " * (-len(text) % 8)  # columns begin on multiples of 8 bytes
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + begin for name, begin in begins.items()}


class SampleTable:
    """The table of a dataset, by bucket; a column's checksum is compared when it is first asked for.

    Args:
        info: the dataset.
        entries_of: bucket -> the index entries of its shards, for datasets without the file.
    """

    def __init__(self, info: DatasetInfo, entries_of: Callable[[str], Iterable[Sequence[IndexEntry]]]) -> None:
        self._info = info
        self._entries_of = entries_of
        self._columns: dict[str, NDArray[Any]] = {}
        self._firsts: dict[str, tuple[int, int]] = {}
        first = 0
        for bucket, shards in bucket_shards(info).items():
            count = sum(shard.samples for shard in shards)
            self._firsts[bucket] = (first, first + count)
            first += count
        self._where = f"{info.storage.url}/{TABLE_FILE}"
        self.sources = tuple(sorted(info.sources))

    def columns(self, bucket: str, needed: Sequence[str] = ("key_hash", "source", "scores")) -> Columns:
        """Returns the rows of a bucket; columns that are not needed are neither read nor checked, but mapped.

        Raises:
            UserError: the file that dataset.json lists is missing or not what was written.
        """
        if self._info.table is None:
            entries = [entry for shard in self._entries_of(bucket) for entry in shard]
            return columns_of(entries, self.sources)
        first, last = self._firsts[bucket]
        places = self._places()
        rows = [self._column(name, *places[name], check=name in needed)[first:last] for name in places]
        return Columns(rows[0], rows[1], rows[2], self.sources)

    def _places(self) -> dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]]:
        """Returns where each column lies, its type and shape, as the file's header says."""
        storage, total = self._info.storage, self._info.samples
        expected = {"key_hash": (total,), "source": (total,), "scores": (total, 2)}
        try:
            length = int.from_bytes(storage.read(TABLE_FILE, 0, 8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(bytes(storage.read(TABLE_FILE, 8, length)))
            if tuple(json.loads(header["__metadata__"]["sources"])) != self.sources:
                raise ValueError("its sources are not those of dataset.json")
            found = {}
            for name, shape in expected.items():
                dtype, begin = _DTYPES[header[name]["dtype"]], int(header[name]["data_offsets"][0])
                if tuple(header[name]["shape"]) != shape or begin < 0:
                    raise ValueError(f"{name} has the shape {header[name]['shape']} and not {list(shape)}")
                found[name] = (8 + length + begin, dtype, shape)
            return found
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
            raise UserError(f"the table of samples is not valid ({error})", where=self._where, remedy=_REMEDY) from None

    def _column(
        self, name: str, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...], check: bool
    ) -> NDArray[Any]:
        local = self._info.storage.local
        size = math.prod(shape) * dtype.itemsize
        if name not in self._columns and local is None and not check:
            return np.broadcast_to(np.zeros((), dtype), shape)  # behind a URL nothing is fetched that nobody asked for
        if name not in self._columns:
            if local is None:
                data = self._info.storage.read(TABLE_FILE, offset, size)
                self._columns[name] = np.frombuffer(data, dtype)[: math.prod(shape)].reshape(shape)
            elif (local / TABLE_FILE).stat().st_size < offset + size:
                raise UserError("the table of samples is cut short", where=self._where, remedy=_REMEDY)
            else:
                self._columns[name] = np.memmap(local / TABLE_FILE, dtype, "r", offset, shape)
        if check and f"{name} is sound" not in self._columns:
            self._check(name, offset, size)
            self._columns[f"{name} is sound"] = np.empty(0)
        return self._columns[name]

    def _check(self, name: str, offset: int, size: int) -> None:
        table = self._info.table
        digest = xxhash.xxh128()
        for first in range(0, size, _CHUNK_BYTES):
            digest.update(self._info.storage.read(TABLE_FILE, offset + first, min(_CHUNK_BYTES, size - first)))
        if table is None or digest.hexdigest() != table.xxh128.get(name):
            raise UserError(
                f"column {name} of the table of samples is not what was written (checksum)", where=self._where,
                remedy=_REMEDY,
            )  # fmt: skip


def table_faults(info: DatasetInfo) -> list[str]:
    """Returns what is wrong with a dataset's table, one line a fault; none if it has no table."""
    if info.table is None:
        return []
    try:
        for bucket in bucket_shards(info):
            SampleTable(info, lambda _: ()).columns(bucket)
            break
    except UserError as error:
        return [f"{TABLE_FILE}: {error.what}"]
    return []
