"""Files that are either whole or absent: write beside, sync, rename; and what a full disk says."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from contentv.base.errors import UserError


def sync_folder(folder: Path) -> None:
    """Makes the renames done in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | Callable[[BinaryIO], object]) -> None:
    """Writes a file so that `path` holds either its old content or all of `data`, whatever interrupts the process.

    Args:
        data: the content, or a function that writes it.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            if callable(data):
                data(stream)
            else:
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared dataset from its other readers
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Gives a text file that takes the place of `path` when the block ends well; for files too large for the memory.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path.parent):
            with open(temporary, "w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any) -> bytes:
    """Returns `value` as indented UTF-8 JSON; NaN and Infinity, which JSON has no words for, raise ValueError."""
    return (json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def disk_errors(folder: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turns a full or read-only disk met inside the block into a UserError that says how much room there is.

    Raises:
        UserError: no space left, quota exceeded, read-only, or no permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder).free
            raise UserError(
                f"no space left on the disk ({needed_bytes} bytes needed, {free} free)",
                where=str(folder),
                remedy="free some space or write elsewhere; finished shards are intact",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(
                f"cannot write here ({error.strerror})", where=str(folder), remedy="choose a writable folder"
            ) from error
        raise
