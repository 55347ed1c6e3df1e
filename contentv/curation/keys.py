"""The names of samples."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import xxhash

from contentv.curation.records import ClipRecord, FileRecord


def sample_key(record: FileRecord, clip: ClipRecord, bucket: str) -> str:
    """Returns a name for a sample, of letters, digits, _ and -, that no other sample has.

    It is the same whenever the same file is curated: stem, scene, clip, bucket, and a checksum of the file's name and
    bytes that tells equal stems apart.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePosixPath(record.name).name.partition(".")[0]).strip("-")[:24]
    unique = xxhash.xxh64_hexdigest(f"{record.name}\0{record.xxh128}".encode())
    return f"{stem or 'clip'}-{clip.scene:03d}-{clip.clip:02d}-{bucket}-{unique}"
