"""Tar shards: written whole by webdataset's writer, read at random by index with every byte checked."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import xxhash
from webdataset import TarWriter

from contentv.base.errors import UserError
from contentv.data.batch_rows import BatchRows, RowsPool
from contentv.data.dataset import DatasetInfo, ShardInfo
from contentv.data.entries import Entries, load_entries
from contentv.data.files import disk_errors, sync_folder, write_atomic
from contentv.data.index import (
    BLOCK_BYTES,
    MAX_META_BYTES,
    DamagedShardError,
    IndexEntry,
    Member,
    ShardIndex,
)
from contentv.data.sample import BadSampleError, SampleShapes, StoredSample, decode_meta, decode_tensors
from contentv.data.storage import Buffer, missing_file

OWNER = "contentv"
MAX_GAP_BYTES = 1 << 14  # read along rather than asked for apart
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


class Fetched(NamedTuple):
    """A sample whose tensors lie in a row of a batch: whose it is, what the index says, and what lay before them."""

    reader: ShardReader
    position: int
    entry: IndexEntry
    head: bytearray

    def is_new(self, key: str) -> bool:
        """Whether the row holds this sample, of that key, and its values are still to be looked at.

        Once is enough: bytes with the same checksum are finite again.
        """
        return not self.reader.known_finite[self.position] and self.entry.key == key

    def found_finite(self) -> None:
        """Notes that its values are finite."""
        self.reader.known_finite[self.position] = 1


class ShardReader:
    """Random access to the samples of one shard; any thread may read.

    Args:
        info: the dataset's record.
        shard: the shard's.
        shapes: of its bucket; shared by the readers of a bucket, they know the headers that were met.

    Raises:
        DamagedShardError: the shard has no sound index and its bytes are not those dataset.json promises.
        UserError: the tar is missing, or its source is gone.
    """

    def __init__(self, info: DatasetInfo, shard: ShardInfo, shapes: SampleShapes | None = None) -> None:
        self.shard = shard
        self.entries: Entries = load_entries(info, shard)
        self.known_finite = bytearray(len(self.entries))  # 1 for samples whose values need not be looked at again
        self._shapes = shapes or SampleShapes.of(info.latent_shape(shard.bucket), info.text)
        self._sources = info.sources
        self._storage = info.storage
        self._file = shard.file

    def entry(self, position: int) -> IndexEntry:
        """Returns what the index says of sample number `position`.

        Raises:
            BadSampleError: its line cannot be right.
        """
        try:
            return self.entries[position]
        except DamagedShardError as error:
            raise BadSampleError(str(error)) from error

    def key(self, position: int) -> str:
        """Returns the key of sample number `position`, or its place in the shard where the index does not tell."""
        try:
            return self.entries[position].key
        except DamagedShardError:
            return f"*{position}"

    def read(self, position: int) -> StoredSample:
        """Returns sample number `position`; its tensors lie in the one buffer that was read.

        Raises:
            BadSampleError: a member is cut short, altered, or not what the dataset promises.
            UserError: the tar is missing, or its source is gone.
        """
        entry = self.entry(position)
        meta_member, tensors_member = entry.members["json"], entry.members["safetensors"]
        _require_size(meta_member, MAX_META_BYTES)
        _require_size(tensors_member, self._shapes.max_bytes)
        begin = min(meta_member.offset, tensors_member.offset)
        end = max(meta_member.offset + meta_member.size, tensors_member.offset + tensors_member.size)
        if end - begin <= meta_member.size + tensors_member.size + MAX_GAP_BYTES:  # close together: one request
            data = self._read(begin, end, (meta_member, tensors_member))
            meta = self._meta(_payload(data, begin, meta_member), entry)
        else:
            meta = self._meta(self._member(meta_member), entry)
            begin = tensors_member.offset
            data = self._read(begin, begin + tensors_member.size, (tensors_member,))
        tensors = decode_tensors(_payload(data, begin, tensors_member), self._shapes)
        return StoredSample(meta, tensors["latents"], tensors["text_tokens"], tensors["text_pooled"])

    def fetch_into(self, position: int, rows: BatchRows, row: int) -> Fetched | None:
        """Reads sample number `position` into a row of `rows` and returns what `accept` needs; nothing is checked yet.

        Returns None where the sample lies otherwise, is of another size or is cut short: `read` tells which.

        Raises:
            BadSampleError: the index cannot be right.
            UserError: the tar is missing, or its source is gone.
        """
        entry = self.entry(position)
        meta, tensors = entry.members["json"], entry.members["safetensors"]
        gap = tensors.offset - meta.offset - meta.size
        if tensors.size != rows.member_bytes or not 0 <= gap <= MAX_GAP_BYTES or meta.size > MAX_META_BYTES:
            return None
        head = bytearray(meta.size + gap + len(rows.prefix))
        wanted = len(head) + tensors.size - len(rows.prefix)
        count = self._storage.read_into(self._file, meta.offset, [head, *rows.parts[row]])
        return Fetched(self, position, entry, head) if count == wanted else None

    def accept(self, fetched: Fetched, rows: BatchRows, row: int) -> dict[str, Any] | None:
        """Returns the description of a sample that was fetched into a row; None if it is not sound: `read` tells why.

        Whether its values are finite is for `BatchRows.not_finite` to say, of all rows at once.

        Raises:
            BadSampleError: the description cannot be right.
        """
        meta, head = fetched.entry.members["json"], fetched.head
        described = memoryview(head)[: meta.size]
        if (
            xxhash.xxh128_hexdigest(described) != meta.xxh128
            or not head.endswith(rows.prefix)
            or not rows.has(row, fetched.entry.members["safetensors"].xxh128)
        ):
            return None
        return self._meta(described, fetched.entry)

    def meta(self, position: int) -> dict[str, Any]:
        """Returns KEY.json of sample number `position`, checked."""
        entry = self.entry(position)
        _require_size(entry.members["json"], MAX_META_BYTES)
        return self._meta(self._member(entry.members["json"]), entry)

    def _meta(self, data: memoryview, entry: IndexEntry) -> dict[str, Any]:
        meta = decode_meta(data.tobytes(), entry.key)
        source, visual, motion = meta["source"], meta["visual_raw"], meta["motion_raw"]
        if source not in self._sources:
            raise BadSampleError(f"source {source!r} is not in dataset.json")
        if (source, visual, motion) != (entry.source, entry.visual_raw, entry.motion_raw):
            raise BadSampleError("KEY.json and the index disagree on source or scores")
        return meta

    def media(self, position: int) -> tuple[str, bytes] | None:
        """Returns (suffix, encoded clip) of sample number `position`, None if none was stored."""
        members = self.entry(position).members
        for suffix in ("mp4", "jpg"):
            if suffix in members:
                _require_size(members[suffix], self.shard.bytes)
                return suffix, self._member(members[suffix]).tobytes()
        return None

    def _member(self, member: Member) -> memoryview:
        data = self._read(member.offset, member.offset + member.size, (member,))
        return _payload(data, member.offset, member)

    def _read(self, begin: int, end: int, members: tuple[Member, ...]) -> Buffer:
        def sound(data: Buffer) -> bool:
            view = memoryview(data)
            return all(
                xxhash.xxh128_hexdigest(view[m.offset - begin : m.offset - begin + m.size]) == m.xxh128 for m in members
            )

        try:
            return self._storage.read(self._file, begin, end - begin, sound)
        except OSError as error:
            raise BadSampleError(f"the disk failed ({error})") from error


def _require_size(member: Member, max_bytes: int) -> None:
    if member.size > max_bytes:  # before any memory is taken for it
        raise BadSampleError(f"a member of {member.size} bytes where at most {max_bytes} are possible")


def _payload(data: Buffer, begin: int, member: Member) -> memoryview:
    """Returns a member's payload in what was read from byte `begin` of its shard on."""
    payload = memoryview(data)[member.offset - begin : member.offset - begin + member.size]
    if len(payload) != member.size:
        raise BadSampleError(f"the shard ends within the member at byte {member.offset} (cut short?)")
    if xxhash.xxh128_hexdigest(payload) != member.xxh128:
        raise BadSampleError(f"the member at byte {member.offset} is not what was written (checksum)")
    return payload


class ShardPool:
    """Shard readers by name, for any number of threads; the least recently used are given up, so memory stays bounded.

    Args:
        info: the dataset's record.
        max_bytes: what the indexes of the readers may take.
    """

    def __init__(self, info: DatasetInfo, max_bytes: int = 256 << 20) -> None:
        self._info = info
        self._max_bytes = max_bytes
        self._bytes = 0
        self._open: OrderedDict[str, ShardReader] = OrderedDict()
        self._damaged: dict[str, str] = {}
        self._shapes: dict[str, SampleShapes] = {}
        self._rows = RowsPool()
        self._lock = threading.Lock()

    def reader(self, shard: ShardInfo) -> ShardReader:
        """Returns the reader of a shard.

        Raises:
            BadSampleError: the shard is damaged as a whole.
            UserError: it is missing, or its source is gone.
        """
        name = shard.name
        with self._lock:
            reader = self._open.get(name)
            if reader is not None:
                self._open.move_to_end(name)
                return reader
            if name in self._damaged:
                raise BadSampleError(self._damaged[name])
            shapes = self._shapes.get(shard.bucket)
            if shapes is None:
                shapes = SampleShapes.of(self._info.latent_shape(shard.bucket), self._info.text)
                self._shapes[shard.bucket] = shapes
        try:
            # Outside the lock, as it may wait for a network. Two threads may open the same shard: one reader is kept.
            reader = ShardReader(self._info, shard, shapes)
        except DamagedShardError as error:
            with self._lock:
                self._damaged[name] = f"the whole shard: {error}"
            raise BadSampleError(f"the whole shard: {error}") from error
        return self._keep(name, reader)

    def _keep(self, name: str, reader: ShardReader) -> ShardReader:
        with self._lock:
            if name in self._open:
                return self._open[name]
            self._open[name] = reader
            self._bytes += reader.entries.num_bytes
            while self._bytes > self._max_bytes and len(self._open) > 1:
                self._bytes -= self._open.popitem(last=False)[1].entries.num_bytes
        return reader

    def rows(self, bucket: str, count: int) -> BatchRows | None:
        """Returns room for samples like the last of a bucket that had a new header; None before the first was read."""
        shapes = self._shapes.get(bucket)
        if shapes is None or not shapes.known:
            return None
        header, layouts = list(shapes.known.items())[-1]  # a copy: other threads may add to it
        return self._rows.take(len(header).to_bytes(8, "little") + header, layouts, count)

    def give_back(self, rows: BatchRows) -> None:
        """Takes back what `rows` has returned, with its tensors still in use or not."""
        self._rows.give_back(rows)

    def close(self) -> None:
        """Forgets the readers and closes their files; both come back with the next read."""
        with self._lock:
            self._open.clear()
            self._bytes = 0
        self._info.storage.close()


def missing_shard(path: Path) -> UserError:
    """Returns the error of a shard that dataset.json lists and the disk does not have."""
    return missing_file(str(path))
