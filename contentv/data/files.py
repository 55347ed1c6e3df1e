"""Files that are either whole or absent (see `contentv.base.files`), and reads that are whole or end with the file."""

from __future__ import annotations

import os

from contentv.base.files import disk_errors, sync_folder, to_json, write_atomic

__all__ = ["disk_errors", "pread_exactly", "sync_folder", "to_json", "write_atomic"]


def pread_exactly(descriptor: int, size: int, offset: int) -> bytes:
    """Returns the `size` bytes at `offset`, or fewer where the file ends before."""
    parts: list[bytes] = []
    while size > 0:
        part = os.pread(descriptor, size, offset)
        if not part:
            break
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
