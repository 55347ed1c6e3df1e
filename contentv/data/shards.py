"""Tar shards: written whole by webdataset's writer, read at random by index with every byte checked."""

from __future__ import annotations

import contextlib
import io
import os
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from webdataset import TarWriter

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.data.dataset import DatasetInfo, ShardInfo
from contentv.data.files import disk_errors, pread_exactly, sync_folder, write_atomic
from contentv.data.index import (
    BLOCK_BYTES,
    MAX_META_BYTES,
    DamagedShardError,
    IndexEntry,
    Member,
    ShardIndex,
    scan_tar,
)
from contentv.data.sample import BadSampleError, SampleShapes, StoredSample, decode_meta, decode_tensors

OWNER = "contentv"
MAX_KEY_LENGTH = 80  # KEY.safetensors must fit the 100 characters of a tar header's name


def index_path(tar: Path) -> Path:
    """Returns where the index of a tar lies: `000000.index.json` beside `000000.tar`."""
    return tar.with_name(f"{tar.stem}.index.json")


def member_bytes(size: int) -> int:
    """Returns what a payload of `size` bytes takes in a tar: its header, and itself in whole blocks."""
    return BLOCK_BYTES + -(-size // BLOCK_BYTES) * BLOCK_BYTES


class _HashedFile(io.RawIOBase):
    """A file that is written in sequence, counted and hashed on the way."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = xxhash.xxh128()
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self._stream.closed:  # tarfile empties its buffer when it is deleted, also after an abort
            self._stream.write(data)
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)


class ShardWriter:
    """Writes one tar under a temporary name; `finish` gives it its name, with its index beside it.

    The bytes depend on the samples alone: members carry no time and a fixed owner.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[IndexEntry] = []
        self._temporary = path.with_name(path.name + ".tmp")
        with disk_errors(path.parent):
            self._stream = open(self._temporary, "wb")  # noqa: SIM115  (closed by finish or abort)
        self._file = _HashedFile(self._stream)
        self._tar = TarWriter(self._file, user=OWNER, group=OWNER, mode=0o644, encoder=False, mtime=0)

    @property
    def num_bytes(self) -> int:
        """Bytes written so far, without the end mark."""
        return int(self._tar.tarstream.offset)

    def add(self, entry: IndexEntry, payloads: dict[str, bytes]) -> None:
        """Appends one sample: suffix -> payload; the places and checksums of its members go into `entry`."""
        place = self.num_bytes
        entry.members = {}
        for suffix in sorted(payloads):  # the order in which TarWriter writes them
            data = payloads[suffix]
            entry.members[suffix] = Member(place + BLOCK_BYTES, len(data), xxhash.xxh128_hexdigest(data))
            place += member_bytes(len(data))
        with disk_errors(self.path.parent, sum(map(len, payloads.values()))):
            self._tar.write({"__key__": entry.key, **payloads})
        if self.num_bytes != place:
            raise RuntimeError(f"{self.path}: the tar is at byte {self.num_bytes}, its index at {place}")
        self.entries.append(entry)

    def finish(self, name: str) -> ShardInfo:
        """Completes the tar and its index on disk and returns the shard's record under `name`."""
        with disk_errors(self.path.parent):
            self._tar.close()
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            index = ShardIndex(self._file.bytes, self.entries).to_bytes()
            write_atomic(index_path(self.path), index)
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        return ShardInfo(
            name, len(self.entries), self._file.bytes, self._file.digest.hexdigest(), xxhash.xxh128_hexdigest(index)
        )

    def abort(self) -> None:
        """Removes what was written."""
        self._stream.close()
        self._temporary.unlink(missing_ok=True)


class ShardReader:
    """Random access to the samples of one shard.

    Raises:
        DamagedShardError: the shard has no sound index and its bytes are not those dataset.json promises.
        UserError: the tar is missing.
    """

    def __init__(self, info: DatasetInfo, shard: ShardInfo) -> None:
        self.shard = shard
        path = info.shard_path(shard)
        self._shapes = SampleShapes.of(info.latent_shape(shard.bucket), info.text)
        self._sources = info.sources
        self.entries = read_index(path, shard).entries
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise missing_shard(path) from error
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def read(self, position: int) -> StoredSample:
        """Returns sample number `position`.

        Raises:
            BadSampleError: a member is cut short, altered, or not what the dataset promises.
        """
        meta = self.meta(position)
        entry = self.entries[position]
        scores = (meta["source"], _as_float(meta["visual_raw"]), _as_float(meta["motion_raw"]))
        if scores != (entry.source, entry.visual_raw, entry.motion_raw):
            raise BadSampleError("KEY.json and the index disagree on source or scores")
        data = self._member(entry.members["safetensors"], self._shapes.max_bytes)
        return StoredSample(meta, **decode_tensors(data, self._shapes))

    def meta(self, position: int) -> dict[str, Any]:
        """Returns KEY.json of sample number `position`, checked."""
        entry = self.entries[position]
        meta = decode_meta(self._member(entry.members["json"], MAX_META_BYTES), entry.key)
        if meta["source"] not in self._sources:
            raise BadSampleError(f"source {meta['source']!r} is not in dataset.json")
        return meta

    def media(self, position: int) -> tuple[str, bytes] | None:
        """Returns (suffix, encoded clip) of sample number `position`, None if none was stored."""
        for suffix in ("mp4", "jpg"):
            member = self.entries[position].members.get(suffix)
            if member is not None:
                return suffix, self._member(member, self.shard.bytes)
        return None

    def _member(self, member: Member, max_bytes: int) -> bytes:
        if member.size > max_bytes:  # before any memory is taken for it
            raise BadSampleError(f"a member of {member.size} bytes where at most {max_bytes} are possible")
        try:
            data = pread_exactly(self._descriptor, member.size, member.offset)
        except OSError as error:
            raise BadSampleError(f"the disk failed ({error})") from error
        if len(data) != member.size:
            raise BadSampleError(f"the shard ends within the member at byte {member.offset} (cut short?)")
        if xxhash.xxh128_hexdigest(data) != member.xxh128:
            raise BadSampleError(f"the member at byte {member.offset} is not what was written (checksum)")
        return data

    def close(self) -> None:
        """Closes the file."""
        self._close()


class ShardPool:
    """Shard readers by name; the least recently used are closed, so files and memory stay bounded."""

    def __init__(self, info: DatasetInfo, max_open: int = 128) -> None:
        self._info = info
        self._max_open = max_open
        self._open: OrderedDict[str, ShardReader] = OrderedDict()
        self._damaged: dict[str, str] = {}

    def reader(self, shard: ShardInfo) -> ShardReader:
        """Returns the reader of a shard.

        Raises:
            BadSampleError: the shard is damaged as a whole.
        """
        if shard.name in self._damaged:
            raise BadSampleError(self._damaged[shard.name])
        if shard.name not in self._open:
            try:
                self._open[shard.name] = ShardReader(self._info, shard)
            except DamagedShardError as error:
                self._damaged[shard.name] = f"the whole shard: {error}"
                raise BadSampleError(self._damaged[shard.name]) from error
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard.name)
        return self._open[shard.name]

    def close(self) -> None:
        """Closes all files."""
        while self._open:
            self._open.popitem()[1].close()


def read_index(tar: Path, shard: ShardInfo) -> ShardIndex:
    """Returns a shard's index; where none that fits lies beside the tar, one is made, and kept if the folder allows.

    Raises:
        DamagedShardError: no index fits, and the tar is not the one dataset.json describes either.
        UserError: the tar is missing.
    """
    try:
        data = index_path(tar).read_bytes()
        _require_index(data, shard)
        return _matching(ShardIndex.from_bytes(data), shard)
    except FileNotFoundError:
        get_logger().info(f"{shard.name} has no index; making one")
    except DamagedShardError as error:
        get_logger().warning(f"{shard.name}: {error}; making the index again")
    try:
        scan = scan_tar(tar)
    except FileNotFoundError as error:
        raise missing_shard(tar) from error
    if scan.xxh128 != shard.xxh128:
        raise DamagedShardError(f"no sound index, and the tar is not what was written ({scan.damage or 'checksum'})")
    index = _matching(scan.index, shard)
    with contextlib.suppress(OSError):  # a dataset on a read-only disk is read as well, only slower to open
        write_atomic(index_path(tar), index.to_bytes())
    return index


def missing_shard(path: Path) -> UserError:
    """Returns the error of a shard that dataset.json lists and the disk does not have."""
    return UserError(
        "a shard listed in dataset.json is missing",
        where=str(path),
        remedy="copy the shard back, or curate the dataset again",
    )


def _require_index(data: bytes, shard: ShardInfo) -> None:
    if shard.index_xxh128 is not None and xxhash.xxh128_hexdigest(data) != shard.index_xxh128:
        raise DamagedShardError("the index is not what was written (checksum)")


def _matching(index: ShardIndex, shard: ShardInfo) -> ShardIndex:
    if (index.num_bytes, len(index.entries)) != (shard.bytes, shard.samples):
        raise DamagedShardError(
            f"the index describes {len(index.entries)} samples in {index.num_bytes} bytes, "
            f"dataset.json {shard.samples} in {shard.bytes}"
        )
    return index


def _as_float(value: Any) -> float | None:
    return None if value is None else float(value)
