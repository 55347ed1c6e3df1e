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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from contentv.data.files import pread_exactly

INDEX_VERSION = 1
BLOCK_BYTES = 512
CHUNK_BYTES = 1 << 20
MAX_META_BYTES = 1 << 20
SUFFIXES = ("json", "safetensors", "mp4", "jpg")  # all that is ever read; other members are left alone
_KEY_PART = re.compile(r"[\w\-+=@,~ ()]+", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{32}")


class DamagedShardError(Exception):
    """A shard (or its index) is not what it should be as a whole."""


class Member(NamedTuple):
    """The payload of one tar member: place and size in bytes, and its xxh128 in hex."""

    offset: int
    size: int
    xxh128: str


@dataclass
class IndexEntry:
    """One sample of a shard: its members by suffix, and what the order of training needs to know about it."""

    key: str
    members: dict[str, Member]
    source: str | None = None
    visual_raw: float | None = None
    motion_raw: float | None = None


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
                "members": {suffix: member._asdict() for suffix, member in sorted(entry.members.items())},
            }
            for entry in self.entries
        ]
        lines = ",\n".join(json.dumps(sample, ensure_ascii=False, allow_nan=False) for sample in samples)
        return f'{{"version": {INDEX_VERSION}, "bytes": {self.num_bytes}, "samples": [\n{lines}\n]}}\n'.encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> ShardIndex:
        """Returns the index written in `data`.

        Raises:
            DamagedShardError: it is not an index of this version, or names or places in it cannot be right.
        """
        try:
            record = json.loads(data)
            if record["version"] != INDEX_VERSION:
                raise DamagedShardError(f"index version {record['version']!r} is unknown")
            index = cls(_count(record["bytes"]), [_entry(sample) for sample in record["samples"]])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedShardError(f"the index cannot be read ({error})") from error
        for entry in index.entries:
            for suffix, member in entry.members.items():
                if member.offset + member.size > index.num_bytes:
                    raise DamagedShardError(f"the index places {entry.key}.{suffix} past the end of the tar")
        return index


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
    """Returns the index of a tar made by reading all of it once for its checksum and once by member.

    Samples without both `.json` and `.safetensors` and members of other kinds are left out and named in `refused`.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        samples: dict[str, dict[str, Member]] = {}
        refused: list[str] = []
        damage = None
        try:
            for name, is_file, offset, length in _walk(descriptor, size):
                _place(samples, refused, name, is_file, Member(offset, length, _hash(descriptor, offset, length)))
        except DamagedShardError as error:
            damage = str(error)
        for key in [key for key, members in samples.items() if not {"json", "safetensors"} <= members.keys()]:
            refused.append(f"{key}: no .json or no .safetensors")
            del samples[key]
        entries = [_described(descriptor, key, members) for key, members in samples.items()]
        return ScanResult(ShardIndex(size, entries), _hash(descriptor, 0, size), refused, damage)
    finally:
        os.close(descriptor)


def _place(samples: dict[str, dict[str, Member]], refused: list[str], name: str, is_file: bool, member: Member) -> None:
    try:
        key, suffix = split_member(name)
    except ValueError as error:
        refused.append(str(error))
        return
    if not is_file:
        refused.append(f"{name}: not a regular file")
    elif suffix not in SUFFIXES:
        refused.append(f"{name}: members of this kind are never read")
    elif suffix in samples.setdefault(key, {}):
        refused.append(f"{name}: a second member of this name")
    else:
        samples[key][suffix] = member


def _walk(descriptor: int, size: int) -> Iterator[tuple[str, bool, int, int]]:
    """Yields (name, is a regular file, payload offset, payload size) of each member; raises on an unsound archive."""
    offset = 0
    long_name: str | None = None
    while True:
        header = pread_exactly(descriptor, BLOCK_BYTES, offset)
        if len(header) < BLOCK_BYTES:
            raise DamagedShardError(f"the tar ends at byte {size} without an end mark (cut short?)")
        if not any(header):
            _check_end(descriptor, offset)
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise DamagedShardError(f"no valid tar header at byte {offset} ({error})") from error
        start = offset + BLOCK_BYTES
        if info.size < 0 or start + info.size > size:
            raise DamagedShardError(f"the member at byte {offset} claims {info.size} bytes; the tar has {size}")
        offset = start + -(-info.size // BLOCK_BYTES) * BLOCK_BYTES
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            long_name = _long_name(descriptor, info, start) or long_name
        elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            if info.type != tarfile.DIRTYPE:
                yield long_name or info.name, info.type in (tarfile.REGTYPE, tarfile.AREGTYPE), start, info.size
            long_name = None


def _long_name(descriptor: int, info: tarfile.TarInfo, start: int) -> str | None:
    """Returns the name that a GNU or pax extension header gives to the next member, None if it gives none."""
    if info.size > MAX_META_BYTES:
        raise DamagedShardError(f"the extension header at byte {start} has {info.size} bytes")
    data = pread_exactly(descriptor, info.size, start)
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


def _check_end(descriptor: int, offset: int) -> None:
    """Raises if anything but zeros follows: an end mark in the middle is a wiped header."""
    place = offset
    while chunk := pread_exactly(descriptor, CHUNK_BYTES, place):
        if chunk.count(0) != len(chunk):
            raise DamagedShardError(f"the tar has an end mark at byte {offset} but goes on after it")
        place += len(chunk)
    if place - offset < 2 * BLOCK_BYTES:
        raise DamagedShardError(f"the tar ends at byte {place} within its end mark (cut short?)")


def _hash(descriptor: int, offset: int, size: int) -> str:
    digest = xxhash.xxh128()
    end = offset + size
    while offset < end:
        chunk = pread_exactly(descriptor, min(CHUNK_BYTES, end - offset), offset)
        if not chunk:
            break
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()


def _described(descriptor: int, key: str, members: dict[str, Member]) -> IndexEntry:
    """Returns the entry with source and raw scores from KEY.json; left empty where that cannot be read."""
    member = members["json"]
    if member.size > MAX_META_BYTES:
        return IndexEntry(key, members)
    try:
        meta = json.loads(pread_exactly(descriptor, member.size, member.offset))
        source = meta.get("source")
        return IndexEntry(
            key, members, source if isinstance(source, str) else None,
            _score(meta.get("visual_raw")), _score(meta.get("motion_raw")),
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError, RecursionError):
        return IndexEntry(key, members)  # the reader will refuse the sample and say why


def _entry(sample: Any) -> IndexEntry:
    members = {
        suffix: Member(_count(m["offset"]), _count(m["size"]), _checksum(m["xxh128"]))
        for suffix, m in sample["members"].items()
    }
    if split_member(f"{sample['key']}.json")[0] != sample["key"] or not set(members) <= set(SUFFIXES):
        raise ValueError(f"sample {sample['key']!r} has a name or members that are not allowed")
    if not {"json", "safetensors"} <= members.keys():
        raise ValueError(f"sample {sample['key']!r} lacks .json or .safetensors")
    source = sample["source"]
    if source is not None and not isinstance(source, str):
        raise ValueError(f"source {source!r} is not a name")
    return IndexEntry(sample["key"], members, source, _score(sample["visual_raw"]), _score(sample["motion_raw"]))


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a number of bytes")
    return value


def _checksum(value: Any) -> str:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise ValueError(f"{value!r} is not an xxh128")
    return value


def _score(value: Any) -> float | None:
    """Returns a finite number as float, None for null; anything else raises ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300 or value != value:
        raise ValueError(f"{value!r} is not a finite score")
    return float(value)
