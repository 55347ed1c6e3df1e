"""Where each member of a tar lies: the index beside a shard, and the scan that makes one.

Reading by index needs no tar header, so a damaged header costs nothing, a damaged member costs one sample, and nothing
is lost in silence. The scan walks the headers itself: it never allocates what a header merely claims, never follows
links, always moves forward, and reports an archive that ends early, which tar readers commonly pass over.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import xxhash

from contentv.data.files import pread_exactly

INDEX_VERSION = 1
BLOCK_BYTES = 512
CHUNK_BYTES = 1 << 22
MAX_META_BYTES = 1 << 20
_KEY_PART = re.compile(r"[\w\-+=@,~ ()]+", re.ASCII)
_PLAIN_KEY = re.compile(r"[\w\-]{1,200}", re.ASCII)

SUFFIXES = ("json", "safetensors", "mp4", "jpg")  # all that is ever read; other members are left alone
Bytes = Annotated[int, msgspec.Meta(ge=0)]
Score = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)] | None  # JSON has neither infinities nor NaN


class DamagedShardError(Exception):
    """A shard (or its index) is not what it should be as a whole."""


class Member(msgspec.Struct, frozen=True):
    """The payload of one tar member: place and size in bytes, and its xxh128 in hex."""

    offset: Bytes
    size: Bytes
    xxh128: Annotated[str, msgspec.Meta(min_length=32, max_length=32)]


class IndexEntry(msgspec.Struct):
    """One sample of a shard: its members by suffix, and what the order of training needs to know about it."""

    key: str
    members: dict[str, Member]
    source: str | None = None
    visual_raw: Score = None
    motion_raw: Score = None


class _IndexFile(msgspec.Struct):
    version: int
    bytes: Bytes
    samples: list[IndexEntry]


_ENTRY = msgspec.json.Decoder(IndexEntry)
_INDEX_FILE = msgspec.json.Decoder(_IndexFile)


@dataclass
class ShardIndex:
    """The samples of one shard in file order; `num_bytes` is the size of the tar it describes."""

    num_bytes: int
    entries: list[IndexEntry]

    def to_bytes(self) -> bytes:
        """Returns the index file's content; the same tar always gives the same bytes."""
        samples = [
            {
                "key": entry.key,
                "source": entry.source,
                "visual_raw": entry.visual_raw,
                "motion_raw": entry.motion_raw,
                "members": {suffix: msgspec.structs.asdict(member) for suffix, member in sorted(entry.members.items())},
            }
            for entry in self.entries
        ]
        lines = ",\n".join(json.dumps(sample, ensure_ascii=False, allow_nan=False) for sample in samples)
        return f'{{"version": {INDEX_VERSION}, "bytes": {self.num_bytes}, "samples": [\n{lines}\n]}}\n'.encode()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray) -> ShardIndex:
        """Returns the index written in `data`.

        Raises:
            DamagedShardError: it is not an index of this version, or names or places in it cannot be right.
        """
        try:
            record = _INDEX_FILE.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DamagedShardError(f"the index cannot be read ({error})") from error
        if record.version != INDEX_VERSION:
            raise DamagedShardError(f"index version {record.version} is unknown")
        return cls(record.bytes, [checked_entry(entry, record.bytes) for entry in record.samples])


@dataclass
class ScanResult:
    """What a scan found: the index, the whole file's xxh128, members refused by name or kind, and why it stopped."""

    index: ShardIndex
    xxh128: str
    refused: list[str] = field(default_factory=list)
    damage: str | None = None


def split_member(name: str) -> tuple[str, str]:
    """Returns (key, suffix) of a member name, cut at the first dot of its last part as WebDataset does.

    Raises:
        ValueError: the name is absolute, climbs with `..`, is too long, or has characters a key may not have.
    """
    if len(name) > 255:
        raise ValueError(f"member name of {len(name)} characters is too long")
    if name.startswith("/"):
        raise ValueError(f"member name {name!r} is absolute")
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    if not all(_KEY_PART.fullmatch(part) for part in key.split("/")):
        raise ValueError(f"member name {name!r} is not a plain relative name")
    return key, suffix


def scan_tar(path: Path) -> ScanResult:
    """Returns the index of a tar on this machine, made by reading all of it once.

    Samples without both `.json` and `.safetensors` and members of other kinds are left out and named in `refused`.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        return scan(lambda offset, count: pread_exactly(descriptor, count, offset), size)
    finally:
        os.close(descriptor)


def scan(read: Callable[[int, int], bytes | bytearray | memoryview], size: int) -> ScanResult:
    """Returns the index of a tar of `size` bytes, made by reading all of it once, from front to back.

    Args:
        read: (offset, count) -> the bytes there, fewer where the tar ends before.
    """
    stream = _Forward(read, size)
    samples: dict[str, IndexEntry] = {}
    refused: list[str] = []
    damage = None
    try:
        for name, is_file, member, content in _walk(stream):
            _place(samples, refused, name, is_file, member, content)
    except DamagedShardError as error:
        damage = str(error)
    stream.skip(size)
    for key in [key for key, entry in samples.items() if not {"json", "safetensors"} <= entry.members.keys()]:
        refused.append(f"{key}: no .json or no .safetensors")
        del samples[key]
    return ScanResult(ShardIndex(size, list(samples.values())), stream.digest.hexdigest(), refused, damage)


class _Forward:
    """A tar's bytes from front to back: each is fetched once, and all are hashed."""

    def __init__(self, read: Callable[[int, int], bytes | bytearray | memoryview], size: int) -> None:
        self.size = size
        self.place = 0
        self.digest = xxhash.xxh128()
        self._read = read
        self._fetched = 0
        self._chunk = memoryview(b"")

    def pieces(self, count: int) -> Iterator[memoryview]:
        """Yields the next `count` bytes in pieces, fewer where the tar ends before."""
        while count > 0:
            if not self._chunk:
                chunk = self._read(self._fetched, min(CHUNK_BYTES, self.size - self._fetched))
                self.digest.update(chunk)
                self._fetched += len(chunk)
                self._chunk = memoryview(chunk)
                if not chunk:
                    return
            piece = self._chunk[:count]
            self._chunk = self._chunk[len(piece) :]
            self.place += len(piece)
            count -= len(piece)
            yield piece

    def take(self, count: int) -> bytes:
        """Returns the next `count` bytes, fewer where the tar ends before."""
        return b"".join(self.pieces(count))

    def skip(self, count: int) -> None:
        """Passes over the next `count` bytes."""
        for _ in self.pieces(count):
            pass


def _place(
    samples: dict[str, IndexEntry], refused: list[str], name: str, is_file: bool, member: Member, content: bytes
) -> None:
    try:
        key, suffix = split_member(name)
    except ValueError as error:
        refused.append(str(error))
        return
    if not is_file:
        refused.append(f"{name}: not a regular file")
    elif suffix not in SUFFIXES:
        refused.append(f"{name}: members of this kind are never read")
    elif suffix in samples.setdefault(key, IndexEntry(key, {})).members:
        refused.append(f"{name}: a second member of this name")
    else:
        samples[key].members[suffix] = member
        if suffix == "json":
            _describe(samples[key], content)


def _walk(stream: _Forward) -> Iterator[tuple[str, bool, Member, bytes]]:
    """Yields name, whether it is a regular file, place, and a description's content of each member.

    Raises:
        DamagedShardError: the archive is not sound from here on.
    """
    long_name: str | None = None
    while True:
        offset = stream.place
        header = stream.take(BLOCK_BYTES)
        if len(header) < BLOCK_BYTES:
            raise DamagedShardError(f"the tar ends at byte {stream.size} without an end mark (cut short?)")
        if not any(header):
            _check_end(stream)
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise DamagedShardError(f"no valid tar header at byte {offset} ({error})") from error
        start = stream.place
        if info.size < 0 or start + info.size > stream.size:
            raise DamagedShardError(f"the member at byte {offset} claims {info.size} bytes; the tar has {stream.size}")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            long_name = _long_name(stream, info) or long_name
        elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            if info.type != tarfile.DIRTYPE:
                name = long_name or info.name
                member, content = _payload(stream, info.size, name)
                yield name, info.type in (tarfile.REGTYPE, tarfile.AREGTYPE), member, content
            long_name = None
        stream.skip(start + -(-info.size // BLOCK_BYTES) * BLOCK_BYTES - stream.place)


def _payload(stream: _Forward, size: int, name: str) -> tuple[Member, bytes]:
    """Returns a payload's place and checksum, and its content if it is a description."""
    place, digest = stream.place, xxhash.xxh128()
    keep = name.endswith(".json") and size <= MAX_META_BYTES
    kept: list[bytes] = []
    for piece in stream.pieces(size):
        digest.update(piece)
        if keep:
            kept.append(bytes(piece))
    return Member(place, size, digest.hexdigest()), b"".join(kept)


def _long_name(stream: _Forward, info: tarfile.TarInfo) -> str | None:
    """Returns the name that a GNU or pax extension header gives to the next member, None if it gives none."""
    if info.size > MAX_META_BYTES:
        raise DamagedShardError(f"the extension header at byte {stream.place} has {info.size} bytes")
    start, data = stream.place, stream.take(info.size)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "replace")
    name = None
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise DamagedShardError(f"the extension header at byte {start} is not valid")
        keyword, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if keyword == b"size":
            raise DamagedShardError("members larger than 8 GiB are not supported")
        if keyword == b"path":
            name = value.decode("utf-8", "replace")
        data = data[int(length) :]
    return name


def _check_end(stream: _Forward) -> None:
    """Checks that nothing but zeros follows: an end mark in the middle is a wiped header."""
    offset = stream.place - BLOCK_BYTES
    for piece in stream.pieces(stream.size):
        if piece.tobytes().count(0) != len(piece):
            raise DamagedShardError(f"the tar has an end mark at byte {offset} but goes on after it")
    if stream.place - offset < 2 * BLOCK_BYTES:
        raise DamagedShardError(f"the tar ends at byte {stream.place} within its end mark (cut short?)")


def _describe(entry: IndexEntry, content: bytes) -> None:
    """Notes source and raw scores from KEY.json; they stay empty where that cannot be read."""
    try:
        meta = json.loads(content)
        source, visual, motion = meta.get("source"), _score(meta.get("visual_raw")), _score(meta.get("motion_raw"))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return  # the reader will refuse the sample and say why
    entry.source = source if isinstance(source, str) else None
    entry.visual_raw, entry.motion_raw = visual, motion


def entry_of(line: bytes | memoryview, num_bytes: int) -> IndexEntry:
    """Returns the sample that a line of an index describes.

    Args:
        num_bytes: of the tar.

    Raises:
        DamagedShardError: it cannot be right.
    """
    try:
        return checked_entry(_ENTRY.decode(line), num_bytes)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedShardError(f"the index cannot be read ({error})") from error


def checked_entry(entry: IndexEntry, num_bytes: int) -> IndexEntry:
    """Returns `entry`, whose types are right, if its names and places can be too.

    Raises:
        DamagedShardError: they cannot.
    """
    key, members = entry.key, entry.members
    if not (_PLAIN_KEY.fullmatch(key) or _is_plain(key)):
        raise DamagedShardError(f"the index names a sample {key!r}, which is not allowed")
    if "json" not in members or "safetensors" not in members:
        raise DamagedShardError(f"sample {key!r} lacks .json or .safetensors in the index")
    for suffix, member in members.items():
        if suffix not in SUFFIXES:
            raise DamagedShardError(f"the index names {key}.{suffix}, which is not allowed")
        if member.offset + member.size > num_bytes:
            raise DamagedShardError(f"the index places {key}.{suffix} past the end of the tar")
    return entry


def _is_plain(key: str) -> bool:
    try:
        return split_member(f"{key}.json")[0] == key
    except ValueError:
        return False


def _score(value: Any) -> float | None:
    """Returns a finite number as float, None for null; anything else raises ValueError."""
    if value is None or (type(value) is float and -1e300 <= value <= 1e300):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300 or value != value:
        raise ValueError(f"{value!r} is not a finite score")
    return float(value)
