"""Pictures for a dataset's page: thumbnails that curation left, or else the stored clips; few, and of bounded size.

What names a picture was written by others: a path that leaves the dataset's folder is not followed, and bytes that are
no picture are not shown.
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import av
from PIL import Image, UnidentifiedImageError

from contentv.report.dataset_stats import MAX_TEXT, Clip, clip_name
from contentv.report.markup import Html, tag

THUMBNAILS_FILE = "thumbnails.jsonl"
MAX_ROWS = 5_000  # of thumbnails.jsonl that are considered; with more, every second is let go until they fit
MAX_LINE = 1 << 16
MAX_PICTURE_BYTES = 256 * 1024
MAX_PAGE_BYTES = 8 * 1024 * 1024
MAX_MEDIA_BYTES = 32 * 1024 * 1024
SIDE_PX = 192
FORMATS = ("JPEG", "PNG", "WEBP")

Media = Callable[[Clip], "tuple[str, bytes] | None"]


@dataclass(frozen=True)
class Thumbnail:
    """A line of thumbnails.jsonl: where the picture is and of what; `rule` is why the clip was left out, or None."""

    path: str
    key: str | None
    file: str
    scene: int | None
    clip: int | None
    rule: str | None


class Pictures:
    """The pictures there are, and how many bytes of them the page may still take.

    Args:
        folder: the dataset's.
        media: clip -> suffix and bytes of the stored clip, or None; used for clips that have no thumbnail.
        max_bytes: of all pictures together.
    """

    def __init__(self, folder: Path, media: Media | None = None, max_bytes: int = MAX_PAGE_BYTES) -> None:
        self._folder = folder.resolve()
        self._media = media
        self._left = max_bytes
        self.damaged = 0  # lines of thumbnails.jsonl that say nothing
        self.is_recorded = (folder / THUMBNAILS_FILE).is_file()
        rows = list(self._rows()) if self.is_recorded else []
        self._kept = {clip_name(row.key): row for row in rows if row.key and row.rule is None}
        self._left_out: dict[str, list[Thumbnail]] = {}
        self._clips: dict[tuple[str, int | None, int | None], Thumbnail] = {}
        for row in rows:
            self._clips.setdefault((row.file, row.scene, row.clip), row)
            if row.rule is not None:
                self._left_out.setdefault(row.rule, []).append(row)

    @property
    def keys(self) -> list[str]:
        """Keys of samples whose clips have a thumbnail."""
        return [row.key for row in self._kept.values() if row.key]

    def of_rule(self, rule: str) -> list[Thumbnail]:
        """Returns the thumbnails of clips that a rule left out."""
        return self._left_out.get(rule, [])

    def of_place(self, file: str, scene: int | None, clip: int | None) -> Thumbnail | None:
        """Returns the thumbnail of a clip of a file, or of any clip of it where it has no own one."""
        exact = self._clips.get((file, scene, clip))
        return exact or next((row for (name, _, _), row in self._clips.items() if name == file), None)

    def files(self) -> list[str]:
        """Returns the names of files that have a thumbnail, the longest first."""
        return sorted({file for file, _, _ in self._clips}, key=len, reverse=True)

    def strip(self, clips: Sequence[Clip], details: Sequence[str], count: int) -> Html | None:
        """Returns the first `count` clips that have a picture, side by side; None if none has one."""
        shown = []
        for clip, detail in zip(clips, details, strict=True):
            picture = self.of_clip(clip)
            if picture is not None:
                shown.append(_panel(picture, clip.caption, detail))
            if len(shown) == count:
                break
        return tag("div", *shown, class_="videos small") if shown else None

    def thumbnails(self, rows: Sequence[Thumbnail], count: int) -> Html | None:
        """Returns the first `count` thumbnails that can be read, side by side; None if none can."""
        shown = []
        for row in rows:
            picture = self.of_row(row)
            if picture is not None:
                shown.append(_panel(picture, row.file[:MAX_TEXT], ""))
            if len(shown) == count:
                break
        return tag("div", *shown, class_="videos small") if shown else None

    def of_clip(self, clip: Clip) -> Html | None:
        """Returns the picture of a sample: its thumbnail, or the first frame of the stored clip."""
        row = self._kept.get(clip_name(clip.key))
        if row is not None:
            return self.of_row(row)
        if self._media is None or not clip.has_media or self._left <= 0:
            return None
        found = self._media(clip)
        return None if found is None else self._image(_first_frame(found[1]), clip.key)

    def of_row(self, row: Thumbnail) -> Html | None:
        """Returns a thumbnail as an image; None if it cannot be read or the page is full."""
        return self._image(read_picture(self._folder, row.path), row.file[:MAX_TEXT]) if self._left > 0 else None

    def _image(self, data: bytes | None, label: str) -> Html | None:
        kind = None if data is None else _format(data)
        if data is None or kind is None or len(data) > self._left:
            return None
        self._left -= len(data)
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return tag("img", src=source, alt=label, loading="lazy")

    def _rows(self) -> Iterator[Thumbnail]:
        rows: list[Thumbnail] = []
        stride, count = 1, 0
        with open(self._folder / THUMBNAILS_FILE, encoding="utf-8", errors="replace") as file:
            while line := file.readline(MAX_LINE):
                row = _thumbnail(line)
                if row is None:
                    self.damaged += bool(line.strip())
                    continue
                if count % stride == 0:
                    if len(rows) == MAX_ROWS:
                        rows, stride = rows[::2], stride * 2
                    rows.append(row)
                count += 1
        yield from rows


def read_picture(folder: Path, path: str) -> bytes | None:
    """Returns a small file of the folder, or a member of a tar in it (`x.tar/member`); None if there is no such one."""
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts or "\0" in path:
        return None
    tars = [i for i, part in enumerate(parts) if part.endswith(".tar")]
    outer = parts[: tars[0] + 1] if tars else parts
    file = folder.joinpath(*outer)
    if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
        return None
    try:
        if not tars:
            return file.read_bytes() if file.stat().st_size <= MAX_PICTURE_BYTES else None
        return _member(file, "/".join(parts[tars[0] + 1 :]))
    except OSError:
        return None


def _member(tar: Path, name: str) -> bytes | None:
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.name == name:
                    file = archive.extractfile(member) if member.isreg() and member.size <= MAX_PICTURE_BYTES else None
                    return None if file is None else file.read()
    except (tarfile.TarError, EOFError):
        pass
    return None


def _format(data: bytes) -> str | None:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return str(image.format).lower()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return None


def _first_frame(data: bytes) -> bytes | None:
    """A small JPEG of the first frame of a stored clip or picture."""
    if len(data) > MAX_MEDIA_BYTES:
        return None
    try:
        with av.open(io.BytesIO(data)) as container:
            frame = next(container.decode(video=0), None) if container.streams.video else None
            image = None if frame is None else frame.to_image()
    except (av.FFmpegError, ValueError):
        return None
    if image is None:
        return None
    image.thumbnail((SIDE_PX, SIDE_PX))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _thumbnail(line: str) -> Thumbnail | None:
    try:
        row: Any = json.loads(line)
        path, key, rule = row["path"], row.get("key"), row.get("rule")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(path, str) or not isinstance(key, (str, type(None))) or not isinstance(rule, (str, type(None))):
        return None
    numbers = [n if isinstance(n := row.get(name), int) else None for name in ("scene", "clip")]
    return Thumbnail(path, key, str(row.get("file", "")), numbers[0], numbers[1], rule)


def _panel(picture: Html, text: str, detail: str) -> Html:
    parts = [picture, tag("div", text, class_="prompt")]
    if detail:
        parts.append(tag("div", detail, class_="note"))
    return tag("div", *parts, class_="panel sample")
