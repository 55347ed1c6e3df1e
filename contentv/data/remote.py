"""Datasets behind a URL: ranged requests by fsspec, retries, time limits, and one message when a source is gone."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import sync

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.data.storage import Buffer, Check, Retry, StorageConfig, check_name, gone, missing_file

# Plain stores of files. Protocols that run commands, wrap others or unpack archives (pipe, filecache, zip, ...) are not
# among them, so a URL can do nothing but read.
PROTOCOLS = (
    "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf", "hdfs", "webhdfs",
    "sftp", "ssh", "smb", "ftp", "memory",
)  # fmt: skip
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.+)", re.DOTALL)
_LIBRARIES = {
    "aiohttp", "requests", "urllib3", "http", "botocore", "aiobotocore", "s3fs", "gcsfs", "google", "adlfs", "azure",
    "ossfs", "ocifs", "huggingface_hub", "httpx", "httpcore", "paramiko", "smbprotocol", "ftplib",
}  # fmt: skip
_PASSING = (408, 409, 425, 429)  # and 5xx: worth asking again


class ShortResponseError(OSError):
    """A response with fewer bytes than were asked for and than the file has."""


class RemoteStorage:
    """The files below a URL.

    Args:
        url: of the dataset's folder.
        config: retries and time limits.

    Raises:
        UserError: the URL cannot be used, or the package that speaks its protocol is missing.
    """

    def __init__(self, url: str, config: StorageConfig) -> None:
        self.local: Path | None = None
        self._protocol = _checked_protocol(url)
        self.url = url.rstrip("/")
        self._config = config
        self._retry = Retry(config, _is_transient)
        self._system: tuple[int, Any] | None = None  # of this process: connections do not outlive a fork
        self._filesystem()

    def _filesystem(self) -> Any:
        if self._system is None or self._system[0] != os.getpid():
            self._system = (os.getpid(), _connect(self._protocol, self.url, self._config.timeout_s))
        return self._system[1]

    def _call(self, method: str, path: str, **options: Any) -> Any:
        """Calls a filesystem's method, with the time limit where the filesystem is asynchronous."""
        system = self._filesystem()
        if system.async_impl:
            return sync(system.loop, getattr(system, f"_{method}"), path, timeout=self._config.timeout_s, **options)
        return getattr(system, method)(path, **options)

    def _where(self, name: str) -> str:
        return f"{self.url}/{check_name(name)}"

    def read(self, name: str, offset: int, size: int, check: Check | None = None) -> Buffer:
        """Returns the `size` bytes at `offset`, or fewer where the file ends before."""
        where = self._where(name)
        try:
            data = self._retry(where, lambda: self._fetch(where, offset, size))
            if check is not None and len(data) == size and not check(data):
                get_logger().warning(f"{where}: bytes {offset} to {offset + size} are not as written; asking once more")
                data = self._retry(where, lambda: self._fetch(where, offset, size))
        except FileNotFoundError as error:
            raise missing_file(where) from error
        except Exception as error:
            raise _final(error, where) from error
        return data

    def _fetch(self, where: str, offset: int, size: int) -> bytearray:
        if size == 0:
            return bytearray()
        try:
            data = bytearray(self._call("cat_file", where, start=offset, end=offset + size))
        except Exception as error:
            if getattr(error, "status", None) != 416:  # the range begins past the end
                raise
            data = bytearray()
        if len(data) > size:
            raise UserError(
                f"the server sent {len(data)} bytes where {size} were asked for: it knows no ranges", where=where,
                remedy="serve it with support for HTTP ranges (nginx, Apache, object storage), or copy it here",
            )  # fmt: skip
        if len(data) < size:
            end = self._call("info", where)["size"]
            if not isinstance(end, int) or end > offset + len(data):
                raise ShortResponseError(f"{len(data)} of {size} bytes came")
        return data

    def read_into(self, name: str, offset: int, parts: Sequence[Any]) -> int:
        """Fills nothing: bytes from afar are checked as they come, which `read` does."""
        return 0

    def read_all(self, name: str, check: Check | None = None) -> bytearray | None:
        """Returns a file's content, None if there is no such file."""
        where = self._where(name)
        try:
            data = self._retry(where, lambda: bytearray(self._call("cat_file", where)))
            if check is not None and not check(data):
                data = self._retry(where, lambda: bytearray(self._call("cat_file", where)))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _final(error, where) from error
        return data

    def size(self, name: str) -> int | None:
        """Returns a file's size in bytes, None if there is no such file."""
        where = self._where(name)
        try:
            found = self._retry(where, lambda: self._call("info", where)["size"])
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _final(error, where) from error
        if not isinstance(found, int):
            raise UserError("the server does not tell the file's size", where=where, remedy="copy the dataset here")
        return found

    def close(self) -> None:
        """Does nothing: connections are kept by fsspec and shared."""


def _checked_protocol(url: str) -> str:
    match = _URL.fullmatch(url)
    if match is None or "::" in url or match[1].lower() not in PROTOCOLS:
        raise UserError(
            f'"{_shown(url)}" is not a place that data is read from', where="data.path",
            remedy=f"use a folder, or a URL of one of {', '.join(PROTOCOLS)}",
        )  # fmt: skip
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f'"{_shown(url)}": a URL with a password, a query or a fragment', where="data.path",
            remedy="name the folder alone; logins belong into ~/.netrc, the environment or fsspec's configuration "
            "(~/.config/fsspec), where no run writes them down",
        )  # fmt: skip
    return match[1].lower()


def _shown(url: str) -> str:
    """Returns a URL without what may be secret in it."""
    return re.sub(r"//[^/@]*@", "//", re.split(r"[?#]", url)[0])


def _connect(protocol: str, url: str, timeout_s: float) -> Any:
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            # identity: a range of a compressed answer is of no use. trust_env: proxies, and logins of ~/.netrc.
            options = {
                "client_kwargs": {"timeout": aiohttp.ClientTimeout(total=timeout_s), "trust_env": True},
                "headers": {"Accept-Encoding": "identity"},
            }
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise UserError(
            f"the package that reads {protocol}:// is not installed ({error})", where=url,
            remedy="pip install 'contentv[storage]' has those of S3 and Google Cloud; others are named in brackets",
        ) from error  # fmt: skip


def _status(error: Exception) -> int | None:
    """Returns the HTTP status behind an exception, None if it has none."""
    status = getattr(error, "status", None)
    if status is None and error.__cause__ is not None:
        status = getattr(error.__cause__, "status", None)  # fsspec calls every failure to see a file's size "not found"
    return status if isinstance(status, int) else None


def _is_transient(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _PASSING
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__
        return cause is not None and not isinstance(cause, FileNotFoundError) and _is_transient_kind(cause)
    return not isinstance(error, PermissionError) and _is_transient_kind(error)


def _is_transient_kind(error: BaseException) -> bool:
    kinds = {base.__module__.split(".")[0] for base in type(error).__mro__}
    return isinstance(error, (OSError, TimeoutError, EOFError)) or bool(kinds & (_LIBRARIES | {"asyncio"}))


def _final(error: Exception, where: str) -> Exception:
    """Returns what to raise for a failure that another attempt would not mend."""
    if isinstance(error, UserError):
        return error
    status = _status(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        return UserError(
            f"access is denied ({error})", where=where,
            remedy="give this machine the right to read: ~/.netrc, the cloud's environment variables, or a role",
        )  # fmt: skip
    if status is not None or isinstance(error, OSError) or _is_transient_kind(error):
        return gone(where, f"{type(error).__name__}: {error}")
    return error
