"""Index files, opened in the time it takes to read them: lines are parsed when their samples are asked for.

An epoch visits shards in random order and a large dataset has more of them than memory holds parsed indexes for. An
index is therefore kept as the bytes of its file, about 350 for a sample, after its checksum has been compared.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import overload

import numpy as np
import xxhash

from contentv.base.log import get_logger
from contentv.data.dataset import DatasetInfo, ShardInfo
from contentv.data.files import write_atomic
from contentv.data.index import (
    INDEX_VERSION,
    MAX_META_BYTES,
    DamagedShardError,
    IndexEntry,
    ScanResult,
    ShardIndex,
    entry_of,
    scan,
)
from contentv.data.sample import BadSampleError, SampleShapes, decode_meta, decode_tensors
from contentv.data.storage import Storage, missing_file

_MAX_ENTRY_BYTES = 1 << 13
_HEAD = re.compile(rb'\{"version": (\d+), "bytes": (\d+), "samples": \[')


class IndexEntries(Sequence[IndexEntry]):
    """The samples of one shard, in file order.

    Args:
        data: an index file as `ShardIndex.to_bytes` writes it, one line a sample, and that is known
            to be what was written.
        shard: the shard's record.

    Raises:
        DamagedShardError: it describes another number of samples or bytes, or has another layout.
    """

    def __init__(self, data: bytes | bytearray, shard: ShardInfo) -> None:
        self.num_bytes = len(data)
        self._lines = memoryview(data)
        self._shard = shard
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        head = _HEAD.fullmatch(data, 0, int(ends[0])) if len(ends) else None
        found = (int(head[1]), int(head[2]), len(ends) - 2) if head else None
        if found != (INDEX_VERSION, shard.bytes, shard.samples):
            raise DamagedShardError("the index has another layout than one line a sample")
        self._ends = ends.astype(np.int64 if len(data) >> 32 else np.uint32)

    def __len__(self) -> int:
        return self._shard.samples

    @overload
    def __getitem__(self, position: int) -> IndexEntry: ...

    @overload
    def __getitem__(self, position: slice) -> list[IndexEntry]: ...

    def __getitem__(self, position: int | slice) -> IndexEntry | list[IndexEntry]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not 0 <= position < len(self):
            raise IndexError(position)
        first, end = int(self._ends[position]) + 1, int(self._ends[position + 1])
        if self._lines[end - 1] == ord(","):
            end -= 1
        try:
            return entry_of(self._lines[first:end], self._shard.bytes)
        except DamagedShardError as error:
            raise DamagedShardError(f"line {position + 2} of the index: {error}") from error


class ParsedEntries(list[IndexEntry]):
    """The samples of a shard whose index had to be parsed as a whole; `num_bytes` is about what they take."""

    @property
    def num_bytes(self) -> int:
        """Bytes of memory, roughly."""
        return 1500 * len(self)


Entries = IndexEntries | ParsedEntries


def load_entries(info: DatasetInfo, shard: ShardInfo) -> Entries:
    """Returns what a shard holds; where no index that fits lies beside it, one is made, and kept if the folder allows.

    Raises:
        DamagedShardError: no index fits, and the tar is not the one dataset.json describes either.
        UserError: the tar is missing, or its source is gone.
    """
    try:
        return stored_entries(info.storage, shard)
    except DamagedShardError as error:
        get_logger().warning(f"{shard.name}: {error}; making the index again")
    index = made_index(info, shard)
    if info.storage.local is not None:
        with contextlib.suppress(OSError):  # a dataset on a read-only disk is read as well, only slower to open
            write_atomic(info.storage.local / shard.index_file, index.to_bytes())
    return ParsedEntries(index.entries)


def stored_entries(storage: Storage, shard: ShardInfo) -> Entries:
    """Returns what the index beside a shard says.

    Raises:
        DamagedShardError: there is no index, or it is not that of the shard that dataset.json describes.
    """
    expected = shard.index_xxh128
    check = None if expected is None else lambda data: xxhash.xxh128_hexdigest(data) == expected
    size = storage.size(shard.index_file) if storage.local is not None else 0
    if size is not None and size > (shard.samples + 1) * _MAX_ENTRY_BYTES:  # before any memory is taken for it
        raise DamagedShardError(f"an index of {size} bytes for {shard.samples} samples")
    data = storage.read_all(shard.index_file, check)
    if data is None:
        raise DamagedShardError("it has no index")
    if check is not None:
        if not check(data):
            raise DamagedShardError("the index is not what was written (checksum)")
        with contextlib.suppress(DamagedShardError):
            return IndexEntries(data, shard)
    return ParsedEntries(_matching(ShardIndex.from_bytes(data), shard).entries)


def made_index(info: DatasetInfo, shard: ShardInfo) -> ShardIndex:
    """Returns a shard's index, made by reading all of the tar.

    Raises:
        DamagedShardError: the tar is not the one dataset.json describes.
        UserError: the tar is missing, or its source is gone.
    """
    scan = scan_shard(info.storage, shard.file)
    if scan.xxh128 != shard.xxh128:
        raise DamagedShardError(f"no sound index, and the tar is not what was written ({scan.damage or 'checksum'})")
    if len(scan.index.entries) != shard.samples:  # adopted without the samples that were faulty
        leave_out_faulty(info, shard.name, scan)
    return _matching(scan.index, shard)


def scan_shard(storage: Storage, name: str) -> ScanResult:
    """Returns what a scan of a tar found.

    Raises:
        UserError: the tar is missing.
    """
    size = storage.size(name)
    if size is None:
        raise missing_file(f"{storage.url}/{name}")
    return scan(lambda offset, count: storage.read(name, offset, count), size)


def leave_out_faulty(info: DatasetInfo, name: str, scan: ScanResult) -> list[str]:
    """Takes the samples that the dataset may not use out of a tar's index and returns one line for each: what and why.

    Args:
        name: of the shard, `<bucket>/<file>.tar`.
        scan: of the tar; its index is changed.
    """
    bucket = name.split("/")[0]
    shapes = SampleShapes.of(info.latent_shape(bucket), info.text)
    shard = ShardInfo(name, len(scan.index.entries), scan.index.num_bytes, scan.xxh128)
    sound, faults = [], []
    for entry in scan.index.entries:
        try:
            check_sample(info.storage, shard, entry, shapes)
            sound.append(entry)
        except BadSampleError as error:
            faults.append(f"{entry.key}: {error}")
    scan.index.entries = sound
    return faults


def check_sample(storage: Storage, shard: ShardInfo, entry: IndexEntry, shapes: SampleShapes) -> None:
    """Passes over a sample whose members the dataset may use.

    Raises:
        BadSampleError: what is wrong with it.
    """
    meta, tensors = entry.members["json"], entry.members["safetensors"]
    for member, limit in ((meta, MAX_META_BYTES), (tensors, shapes.max_bytes)):
        if member.size > limit:
            raise BadSampleError(f"a member of {member.size} bytes where at most {limit} are possible")
    decode_meta(bytes(storage.read(shard.file, meta.offset, meta.size)), entry.key)
    decode_tensors(storage.read(shard.file, tensors.offset, tensors.size), shapes)


def _matching(index: ShardIndex, shard: ShardInfo) -> ShardIndex:
    if (index.num_bytes, len(index.entries)) != (shard.bytes, shard.samples):
        raise DamagedShardError(
            f"the index describes {len(index.entries)} samples in {index.num_bytes} bytes, "
            f"dataset.json {shard.samples} in {shard.bytes}"
        )
    return index
