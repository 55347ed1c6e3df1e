"""A folder on a local disk that keeps what was read from a slower place, within a limit of bytes.

One file an entry, written beside and renamed, under a lock that all processes of the machine share: a kill at any
moment leaves whole entries and at most one temporary file, which the next to make room removes. Entries are not synced
to disk; whoever reads one checks it against the checksum of the dataset's index, so that a torn or altered entry is
fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.data.storage import Buffer, Check, Storage

KEPT_FRACTION = 0.9  # making room frees a tenth at once, as it has to look at every entry
_LOCK = "lock"
_COUNT = "bytes"  # how much the entries take: never less than they do
_SUFFIX = ".data"
_FOLDER = re.compile(r"[0-9a-f]{2}")
_ENTRY = re.compile(r"[0-9a-f]{32}\.(data|tmp)")  # nothing else is ever removed, whatever folder was named


class ByteCache:
    """Bytes by key, the least recently used ones given up first.

    Args:
        folder: made if it is not there; may be shared by processes and datasets.
        max_bytes: the limit.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._thread_lock = threading.Lock()
        self._full_disk = False
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._lock():
                self._make_room(0)
        except OSError as error:
            raise UserError(
                f"the cache cannot be used ({error})", where=f"data.cache_dir={folder}", remedy="name a writable folder"
            ) from error

    def _path(self, key: str) -> Path:
        name = xxhash.xxh128_hexdigest(key.encode())
        return self.folder / name[:2] / (name + _SUFFIX)

    def get(self, key: str, size: int | None = None) -> bytearray | None:
        """Returns what was kept under a key; None if nothing was, or if it has not `size` bytes."""
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            length = os.fstat(descriptor).st_size
            if size is not None and length != size:  # torn by a power cut
                self.drop(key)
                return None
            data = bytearray(length)
            if length and os.preadv(descriptor, [data], 0) != length:
                return None
            with contextlib.suppress(OSError):
                os.utime(descriptor)  # the time of the last use
            return data
        except OSError:  # a local disk that fails is no reason to stop: the source has the bytes
            return None
        finally:
            os.close(descriptor)

    def put(self, key: str, data: Buffer) -> None:
        """Keeps bytes under a key, if the limit and the disk allow."""
        if len(data) > self.max_bytes or self._full_disk:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            with self._lock():
                if not path.exists():
                    self._make_room(len(data))
                    temporary = path.with_suffix(".tmp")
                    temporary.write_bytes(data)
                    os.replace(temporary, path)
        except OSError as error:
            self._full_disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            get_logger().warning(f"data.cache_dir={self.folder}: an entry could not be kept ({error})")

    def drop(self, key: str) -> None:
        """Forgets what was kept under a key; the count is put right when room is made."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with self._thread_lock:
            descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    def _make_room(self, needed: int) -> None:
        """Counts `needed` bytes more, after giving up entries where they would pass the limit; the lock is held."""
        count = self._counted()
        if count is None or count + needed > self.max_bytes:
            count = self._evict(needed)
        # Before the entry is written: a kill in between leaves a count too high, which the next eviction puts right.
        (self.folder / _COUNT).write_text(str(count + needed), encoding="ascii")

    def _counted(self) -> int | None:
        try:
            count = int((self.folder / _COUNT).read_text(encoding="ascii"))
        except (OSError, ValueError):  # none yet, or torn by a kill
            return None
        return count if count >= 0 else None

    def _files(self) -> Iterator[os.DirEntry[str]]:
        for folder in os.scandir(self.folder):
            if _FOLDER.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False):
                for file in os.scandir(folder.path):
                    if _ENTRY.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                        yield file

    def _evict(self, needed: int) -> int:
        """Returns how many bytes the entries take after the oldest were removed so that `needed` more fit."""
        entries = []
        for file in self._files():
            if file.name.endswith(_SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    facts = file.stat()
                    entries.append((facts.st_mtime_ns, file.path, facts.st_size))
            else:  # of a writer that was killed: whoever writes holds the lock
                os.unlink(file.path)
        total = sum(size for _, _, size in entries)
        if total + needed > self.max_bytes:
            room = min(self.max_bytes - needed, int(self.max_bytes * KEPT_FRACTION))
            for _, path, size in sorted(entries):
                if total <= room:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size
        return total


class CachedStorage:
    """A storage whose checked reads are kept in a cache; what cannot be checked is read from its source each time."""

    def __init__(self, source: Storage, cache: ByteCache) -> None:
        self.url = source.url
        self.local = source.local
        self._source = source
        self._cache = cache

    def read(self, name: str, offset: int, size: int, check: Check | None = None) -> Buffer:
        """Returns the `size` bytes at `offset`, or fewer where the file ends before."""
        if check is None:
            return self._source.read(name, offset, size)
        key = f"{self.url}\n{name}\n{offset}\n{size}"
        kept = self._kept(key, size, check)
        if kept is not None:
            return kept
        data = self._source.read(name, offset, size, check)
        if len(data) == size and check(data):
            self._cache.put(key, data)
        return data

    def read_into(self, name: str, offset: int, parts: Sequence[Any]) -> int:
        """Fills nothing: bytes from afar are checked as they come, which `read` does."""
        return 0

    def read_all(self, name: str, check: Check | None = None) -> bytearray | None:
        """Returns a file's content, None if there is no such file."""
        if check is None:
            return self._source.read_all(name)
        key = f"{self.url}\n{name}"
        kept = self._kept(key, None, check)
        if kept is not None:
            return kept
        data = self._source.read_all(name, check)
        if data is not None and check(data):
            self._cache.put(key, data)
        return data

    def _kept(self, key: str, size: int | None, check: Check) -> bytearray | None:
        data = self._cache.get(key, size)
        if data is None or check(data):
            return data
        get_logger().warning(f"a cached copy is damaged or out of date and is fetched again: {key.splitlines()[1]}")
        self._cache.drop(key)
        return None

    def size(self, name: str) -> int | None:
        """Returns a file's size in bytes, None if there is no such file."""
        return self._source.size(name)

    def close(self) -> None:
        """Lets go of open files of the source."""
        self._source.close()
