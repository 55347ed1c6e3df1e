"""One media file as the inputs give it: where its bytes are, and what came with it. Small, and sent to workers."""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from contentv.curation.captions import (
    MAX_SIDECAR_BYTES,
    CaptionError,
    Captions,
    SceneCaption,
    checked_caption,
    parse_captions,
)
from contentv.curation.video_io import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DecodeError, MediaFile

MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
DEFAULT_SOURCE = "default"


@dataclass(frozen=True)
class Extent:
    """Where a tar's member lies, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class MediaItem:
    """One media file, on disk or in a tar, or the part of one that a manifest names.

    Attributes:
        name: its path below the input, with forward slashes (for a member: tar/member); parts of a file end in
            `#t=<start>,<end>`. Always valid Unicode, whatever the file system holds.
        path: of the file on disk (for a member: of the tar).
        source: what it is counted under; "default" where nothing tells.
        extent: of the member; None = the whole file.
        txt, json: of a member's sidecars in the same tar. Those of a file lie beside it.
        caption: that came with it; None = see its sidecars (`captions` looks at all of them).
        scenes: captions of parts, with times; they go before `caption`.
        span_s: only this part of the file, [start, end) in seconds; the end may be infinite. None = all of it.
        given_scores: numbers that came with it, kept in the samples as `given_<name>`.
    """

    name: str
    path: str
    source: str
    extent: Extent | None = None
    txt: Extent | None = None
    json: Extent | None = None
    caption: str | None = None
    scenes: tuple[SceneCaption, ...] = ()
    span_s: tuple[float, float] | None = None
    given_scores: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def is_image(self) -> bool:
        """Whether this is a still."""
        name = self.name if self.span_s is None else self.name.rpartition("#t=")[0]
        return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES

    def open(self) -> MediaFile:
        """Returns the media's bytes as a seekable file; a tar's member is read in place.

        Raises:
            DecodeError: the file is not there, is no file, is empty, or cannot be read.
        """
        try:
            file = open_regular(self.path)
            size = os.fstat(file.fileno()).st_size
            if self.extent is not None:
                if self.extent.offset + self.extent.size > size:
                    file.close()
                    raise DecodeError(self.name, "the tar ends within it")
                size = self.extent.size
                file = io.BufferedReader(Window(file, self.extent), 1 << 16)
        except OSError as error:
            raise no_file(self.name, error) from error
        if size == 0:
            file.close()
            raise DecodeError(self.name, "the file is empty (0 bytes)")
        return file

    def sidecar(self, kind: str) -> bytes | None:
        """Returns the content of the `txt` or `json` beside the media, None if there is none.

        Raises:
            DecodeError: it is there and cannot be read.
        """
        extent = self.txt if kind == "txt" else self.json
        if self.extent is not None and extent is None:
            return None
        path = self.path if self.extent is not None else str(Path(self.path).with_suffix(f".{kind}"))
        try:
            return read_bytes(path, extent, MAX_SIDECAR_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DecodeError(self.name, f"its .{kind} cannot be read ({error.strerror or error})") from error

    def captions(self) -> Captions:
        """Returns the captions that came with the item or lie beside it.

        Raises:
            CaptionError: there is none (rule `no_caption`), or it cannot be used (rule `bad_caption`).
            DecodeError: a sidecar is there and cannot be read.
        """
        if self.scenes:
            return Captions(self.scenes, for_all=len(self.scenes) == 1)
        if self.caption is not None:
            return Captions((SceneCaption(checked_caption(self.caption)),), for_all=True)
        found = parse_captions(self.sidecar("txt"), self.sidecar("json"))
        if self.span_s is None or found.for_all:
            return found
        # Times in a sidecar are of the whole file, as the part's are: only captions without times cannot be placed.
        if any(scene.start_s is None for scene in found.scenes):
            raise CaptionError("the sidecar has a caption a scene, but this is a part of the file", "bad_caption")
        return found


class Window(io.RawIOBase):
    """A part of an open file, as a file of its own that closes the other."""

    def __init__(self, file: io.BufferedReader, extent: Extent) -> None:
        super().__init__()
        self._file, self._extent, self._at = file, extent, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a place in the part and returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._extent.size}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Returns the place in the part."""
        return self._at

    def readinto(self, buffer: object) -> int:
        """Fills a buffer and returns how many bytes it got."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        count = max(0, min(len(view), self._extent.size - self._at))
        data = os.pread(self._file.fileno(), count, self._extent.offset + self._at)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Closes the file too."""
        self._file.close()
        super().close()


def open_regular(path: str | Path) -> io.BufferedReader:
    """Returns a regular file, opened; pipes and devices, which may never end, are refused.

    Raises:
        OSError: it is not there, no regular file, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no regular file")
    return open(descriptor, "rb")


def read_bytes(path: str | Path, extent: Extent | None = None, limit: int | None = None) -> bytes:
    """Returns a file's content, or a part of it, up to a number of bytes.

    Raises:
        OSError: it cannot be read, or ends within the part.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if extent is None:
            return file.read(size if limit is None else min(size, limit))
        if extent.offset + extent.size > size:
            raise OSError(f"the tar ends within the member at byte {extent.offset}")
        file.seek(extent.offset)
        return file.read(extent.size if limit is None else min(extent.size, limit))


def no_file(name: str, error: OSError) -> DecodeError:
    """Returns the error for a file that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return DecodeError(name, "there is no such file", rule="no_file")
    return DecodeError(name, f"cannot be read ({error.strerror or error})")


def given_scores(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """Returns the numbers of a record under some names; what is missing, null, empty or not finite is left out.

    Args:
        record: a row or a JSON object.
        names: its fields; `a.b` is the field b of the object a. In the result, dots are underscores.

    Raises:
        CaptionError: there is something else than a number (rule `bad_row`).
    """
    found: dict[str, float] = {}
    for name in names:
        value = _field(record, name)
        if value in (None, "") or isinstance(value, bool):
            continue
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise CaptionError(f"{name} is no number: {str(value)[:40]!r}", "bad_row") from error
        if math.isfinite(number):
            found[name.replace(".", "_")] = number
    return found


def _field(record: Mapping[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    here: Any = record
    for part in name.split("."):
        if not isinstance(here, Mapping):
            return None
        here = here.get(part)
    return here


def source_of(name: str) -> str:
    """Returns the name of the first sub-folder in a path below the input, or "default"."""
    folders = PurePosixPath(name).parts[:-1]
    return folders[0] if folders and folders[0] not in ("/", "..", ".") else DEFAULT_SOURCE


def shown(path: str) -> str:
    """Returns a path with forward slashes in which bytes that are no UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace").replace(os.sep, "/")
