"""Where a dataset lies: a folder on this machine, or a URL. All of its files are read through one small protocol.

A `Storage` says three things apart: a file that is not there (None, or a UserError where it is needed), a source that
does not answer (UserError after retries: the run stops, and going on later loses nothing), and bytes that end early
(returned short: damage, which costs single samples).
"""

from __future__ import annotations

import errno
import os
import random
import re
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from contentv.base.errors import UserError
from contentv.base.log import get_logger

Buffer = bytearray | memoryview  # bytes that may be written over by whoever asked for them
Check = Callable[[Buffer], bool]  # whether bytes are what was written
T = TypeVar("T")

MAX_OPEN_FILES = 128
MAX_WAIT_S = 30.0
_POOLED_BYTES = (1 << 16, 1 << 24)
_LOOKED_AT = 16
_IDLE = 3  # references to a buffer that nobody holds: the pool's, the variable's and the argument's
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):")
# A network disk that has gone away. A bad sector (EIO) is damage instead, and a file that is not there is neither.
_GONE = frozenset(
    {errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENXIO,
     errno.ENETUNREACH, errno.ENODEV, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE}
)  # fmt: skip


@dataclass
class StorageConfig:
    """How a dataset's files are fetched and kept."""

    cache_dir: str = field(
        default="",
        metadata={"help": "folder on a local disk that keeps what was read of data.path; empty: nothing is kept"},
    )
    cache_bytes: int = field(default=50_000_000_000, metadata={"help": "most bytes in cache_dir, > 0"})
    retries: int = field(
        default=8, metadata={"help": "times a failed request for data is made again before the run stops, >= 0"}
    )
    retry_s: float = field(
        default=0.5,
        metadata={"help": "wait before the first retry, seconds, > 0; doubled each time up to 30 s, each wait varied"},
    )
    timeout_s: float = field(
        default=60.0, metadata={"help": "a request for data that takes longer has failed, seconds, > 0"}
    )

    def __post_init__(self) -> None:
        for name, ok, remedy in (
            ("cache_bytes", self.cache_bytes > 0, "use a positive number of bytes, or leave data.cache_dir empty"),
            ("retries", self.retries >= 0, "use 0 or more"),
            ("retry_s", 0 < self.retry_s < float("inf"), "use a positive number of seconds"),
            ("timeout_s", 0 < self.timeout_s < float("inf"), "use a positive number of seconds"),
        ):
            if not ok:
                raise UserError(f"{getattr(self, name)} is not possible", where=f"data.{name}", remedy=remedy)


@runtime_checkable
class Storage(Protocol):
    """The files of one dataset, by name relative to it, such as `shards/f17_h96_w96/000000.tar`; any thread may read.

    Attributes:
        url: where it is, for messages.
        local: the folder, if it is one on this machine.
    """

    url: str
    local: Path | None

    def read(self, name: str, offset: int, size: int, check: Check | None = None) -> Buffer:
        """Returns the `size` bytes at `offset`, or fewer where the file ends before.

        Args:
            check: tells sound bytes, so that a copy kept nearby or a faulty transfer is not taken for the file.

        Raises:
            UserError: the file is missing, or its source is gone.
            OSError: the disk failed at this place (EIO).
        """
        ...

    def read_into(self, name: str, offset: int, parts: Sequence[Any]) -> int:
        """Fills buffers one after another from `offset` on and returns how many bytes came; 0 where `read` is better.

        What came is not checked: where it is not sound or not all, `read` has to be asked.
        """
        ...

    def read_all(self, name: str, check: Check | None = None) -> bytearray | None:
        """Returns a file's content, None if there is no such file."""
        ...

    def size(self, name: str) -> int | None:
        """Returns a file's size in bytes, None if there is no such file."""
        ...

    def close(self) -> None:
        """Lets go of open files; the next read opens them again."""
        ...


class Retry:
    """Calls functions that reach over a network, again and again with growing waits when they fail for the moment.

    Args:
        config: how often and how long.
        transient: tells failures that may pass from those that stay.
    """

    def __init__(self, config: StorageConfig, transient: Callable[[Exception], bool]) -> None:
        self._config = config
        self._transient = transient
        self._random = random.Random()  # its own: waits must not move the random numbers of anything else

    def __call__(self, what: str, function: Callable[[], T]) -> T:
        """Returns the function's result.

        Raises:
            UserError: it failed for the moment `retries` + 1 times; other exceptions of it pass.
        """
        start = time.monotonic()
        for attempt in range(self._config.retries + 1):
            try:
                return function()
            except Exception as error:
                if isinstance(error, UserError) or not self._transient(error):
                    raise
                if attempt == self._config.retries:
                    raise gone(
                        what, f"{_told(error)}, {attempt + 1} times in {time.monotonic() - start:.0f} s"
                    ) from error
                wait = min(MAX_WAIT_S, self._config.retry_s * 2.0**attempt) * self._random.uniform(0.5, 1.5)
                get_logger().warning(f"{what}: {_told(error)}; trying again in {wait:.1f} s")
                time.sleep(wait)
        raise RuntimeError("unreachable")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def gone(where: str, why: str) -> UserError:
    """Returns the error of a source that does not answer."""
    return UserError(
        f"the source of the data is gone ({why})",
        where=where,
        remedy="check the network, the server and the access rights; then run the same command again, and it goes on "
        "from its last checkpoint (data.retries, data.retry_s and data.timeout_s say how long to wait)",
    )


def missing_file(where: str) -> UserError:
    """Returns the error of a file that the dataset lists and its source does not have."""
    return UserError(
        "a file listed in dataset.json is missing", where=where,
        remedy="copy it back, or curate the dataset again",
    )  # fmt: skip


def check_name(name: str) -> str:
    """Returns the name of a file inside a dataset.

    Raises:
        ValueError: it is absolute or climbs out.
    """
    if name.startswith("/") or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} is not the name of a file inside a dataset")
    return name


class BufferPool:
    """Memory for reads, handed out again once nobody holds it: the page faults of new memory cost more than the read.

    Args:
        max_bytes: what may lie ready.
    """

    def __init__(self, max_bytes: int = 128 << 20) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._buffers: dict[int, deque[bytearray]] = {}  # by size, the one handed out longest ago first
        self._lock = threading.Lock()

    def take(self, size: int) -> Buffer:
        """Returns `size` writable bytes of any content."""
        if not _POOLED_BYTES[0] <= size <= _POOLED_BYTES[1]:
            return bytearray(size)
        capacity = -(-size // _POOLED_BYTES[0]) * _POOLED_BYTES[0]
        with self._lock:
            buffers = self._buffers.setdefault(capacity, deque())
            for _ in range(min(len(buffers), _LOOKED_AT)):
                buffer = buffers[0]
                buffers.rotate(-1)
                if sys.getrefcount(buffer) == _IDLE:  # tensors, views and slices of it would each count
                    return memoryview(buffer)[:size]
            buffer = bytearray(capacity)
            buffers.append(buffer)
            self._bytes += capacity
            while self._bytes > self._max_bytes:
                self._forget()
        return memoryview(buffer)[:size]

    def _forget(self) -> None:
        capacity, buffers = max(self._buffers.items(), key=lambda item: item[0] * len(item[1]))
        buffers.popleft()  # its memory is freed with the last who holds it
        self._bytes -= capacity


class _OpenFile:
    """A descriptor that is closed when the last thread that reads from it has let go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)
        self.size = os.fstat(self.descriptor).st_size

    def read(self, offset: int, size: int, buffers: BufferPool) -> Buffer:
        size = max(0, min(size, self.size - offset))  # no more memory than the file has bytes, whatever an index claims
        data = buffers.take(size)
        done = os.preadv(self.descriptor, [data], offset) if size else 0
        while done < size:
            part = os.preadv(self.descriptor, [memoryview(data)[done:]], offset + done)
            if part == 0:
                return data[:done]
            done += part
        return data


class LocalStorage:
    """A folder on this machine, or on a mounted disk."""

    def __init__(self, folder: Path, config: StorageConfig | None = None) -> None:
        self.local: Path | None = folder
        self.url = str(folder)
        self._folder = folder
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._buffers = BufferPool()
        self._retry = Retry(config or StorageConfig(), lambda e: isinstance(e, OSError) and e.errno in _GONE)

    def _open(self, name: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(name)
            if file is not None:
                self._files.move_to_end(name)
                return file
        file = _OpenFile(self._folder / check_name(name))
        with self._lock:
            self._files[name] = file
            while len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def read(self, name: str, offset: int, size: int, check: Check | None = None) -> Buffer:
        """Returns the `size` bytes at `offset`, or fewer where the file ends before."""
        try:
            return self._open(name).read(offset, size, self._buffers)
        except OSError as error:
            if error.errno not in _GONE:
                raise self._known(error, name) from error
        return self._retry(f"{self.url}/{name}", lambda: self._reopened(name).read(offset, size, self._buffers))

    def read_into(self, name: str, offset: int, parts: Sequence[Any]) -> int:
        """Fills buffers one after another from `offset` on and returns how many bytes the file had for them."""
        try:
            return os.preadv(self._open(name).descriptor, parts, offset)
        except OSError:
            return 0  # `read` waits, or says what is wrong

    def _reopened(self, name: str) -> _OpenFile:
        with self._lock:
            self._files.pop(name, None)
        return self._open(name)

    def _known(self, error: OSError, name: str) -> OSError | UserError:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return missing_file(f"{self.url}/{name}")
        if isinstance(error, (PermissionError, IsADirectoryError)):
            return UserError(
                f"cannot be read ({error.strerror})", where=f"{self.url}/{name}", remedy="give read access"
            )
        return error

    def read_all(self, name: str, check: Check | None = None) -> bytearray | None:
        """Returns a file's content, None if there is no such file."""
        path = self._folder / check_name(name)
        try:
            return self._retry(str(path), lambda: bytearray(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._known(error, name) from error

    def size(self, name: str) -> int | None:
        """Returns a file's size in bytes, None if there is no such file."""
        path = self._folder / check_name(name)
        try:
            return self._retry(str(path), lambda: path.stat().st_size)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def close(self) -> None:
        """Closes the files that nobody reads; the next read opens them again."""
        with self._lock:
            self._files.clear()


def is_url(place: str | Path) -> bool:
    """Whether a dataset's place is a URL rather than a path on this machine; `file://` counts as a path."""
    match = _SCHEME.match(place) if isinstance(place, str) else None
    if match is None or match[1].lower() == "file":
        return False
    return match.string[match.end() :].startswith("//") or not Path(place).exists()


def local_path(place: str | Path) -> Path:
    """Returns the path of a place that is no URL."""
    return Path(re.sub("^file://", "", place) if isinstance(place, str) else place)


def open_storage(place: str | Path, config: StorageConfig | None = None) -> Storage:
    """Returns the storage of the dataset at a path or URL; nothing is read yet, but its protocol is one we can speak.

    Raises:
        UserError: the protocol is unknown, its package is not installed, or the cache's folder cannot be used.
    """
    config = config or StorageConfig()
    storage: Storage
    if is_url(place):
        from contentv.data.remote import RemoteStorage

        storage = RemoteStorage(str(place), config)
    else:
        storage = LocalStorage(local_path(place), config)
    if config.cache_dir:
        from contentv.data.cache import ByteCache, CachedStorage

        storage = CachedStorage(storage, ByteCache(Path(config.cache_dir), config.cache_bytes))
    return storage
