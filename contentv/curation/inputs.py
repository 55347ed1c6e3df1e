"""What is curated: video and image files below a folder, and those inside WebDataset tars there.

Tars are read in place, by position; nothing is unpacked to disk and links inside are not followed.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from contentv.base.errors import UserError
from contentv.curation.captions import MAX_SIDECAR_BYTES
from contentv.curation.video_io import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DecodeError, MediaFile

MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
DEFAULT_SOURCE = "default"


@dataclass(frozen=True)
class Extent:
    """Where a tar's member lies."""

    offset: int
    size: int


@dataclass(frozen=True)
class MediaItem:
    """One media file, on disk or in a tar.

    `name` is its path below the input folder (for a member: tar/member), with forward slashes.
    """

    name: str
    path: str
    source: str
    extent: Extent | None = None  # None: the whole file
    txt: Extent | None = None  # of a member's sidecars; those of a file lie beside it
    json: Extent | None = None

    @property
    def is_image(self) -> bool:
        """Whether this is a still."""
        return PurePosixPath(self.name).suffix.lower() in IMAGE_SUFFIXES

    def open(self) -> MediaFile:
        """Returns the media's bytes as a seekable file.

        Raises:
            DecodeError: the file is not there or cannot be read.
        """
        try:
            if self.extent is None:
                return open(self.path, "rb")
            return io.BytesIO(_read(self.path, self.extent))
        except OSError as error:
            raise DecodeError(self.name, f"cannot be read ({error.strerror or error})") from error

    def sidecar(self, kind: str) -> bytes | None:
        """Returns the content of the `txt` or `json` beside the media, None if there is none.

        Raises:
            DecodeError: it is there and cannot be read.
        """
        try:
            if self.extent is not None:
                extent = self.txt if kind == "txt" else self.json
                return None if extent is None else _read(self.path, extent, MAX_SIDECAR_BYTES + 1)
            with open(Path(self.path).with_suffix(f".{kind}"), "rb") as file:
                return file.read(MAX_SIDECAR_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DecodeError(self.name, f"its .{kind} cannot be read ({error.strerror or error})") from error


def list_files(folder: str | Path, leave_out: str | Path | None = None) -> list[str]:
    """Returns the paths below `folder`, with forward slashes and sorted, of media files and tars.

    Args:
        folder: the input.
        leave_out: a folder that is not looked into, such as the output.

    Raises:
        UserError: there is no such folder, or there are no such files in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f'"{folder}" is not a folder', where="input", remedy="name a folder of video and image files")
    hidden = None if leave_out is None else Path(leave_out).resolve()
    found: list[str] = []
    for place, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and (Path(place) / f).resolve() != hidden]
        wanted = (f for f in files if not f.startswith(".") and Path(f).suffix.lower() in (*MEDIA_SUFFIXES, ".tar"))
        found.extend((Path(place) / file).relative_to(root).as_posix() for file in wanted)
    if not found:
        raise UserError(
            "there are no video or image files",
            where=f"input={folder}",
            remedy=f"put files ending in {', '.join(MEDIA_SUFFIXES)} there, each with a caption in NAME.txt, "
            "or WebDataset tars of them",
        )
    return sorted(found)


def list_items(folder: str | Path, names: Iterable[str]) -> Iterator[MediaItem | DecodeError]:
    """Yields the media files of `names` (see `list_files`), tars member by member; an error for a damaged tar."""
    for name in names:
        path = str(Path(folder) / name)
        if name.lower().endswith(".tar"):
            yield from _tar_items(name, path)
        else:
            yield MediaItem(name, path, source_of(name))


def source_of(name: str) -> str:
    """Returns the name of the first sub-folder in a path below the input, or "default"."""
    folders = PurePosixPath(name).parts[:-1]
    return folders[0] if folders else DEFAULT_SOURCE


def _tar_items(name: str, path: str) -> Iterator[MediaItem | DecodeError]:
    samples: dict[str, dict[str, tuple[str, Extent]]] = {}
    damage: DecodeError | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                key, dot, suffix = file.partition(".")
                if member.isreg() and dot and not member.sparse:
                    extent = Extent(member.offset_data, member.size)
                    samples.setdefault(f"{folder}/{key}", {})[f".{suffix.lower()}"] = (member.name, extent)
    except (tarfile.TarError, OSError) as error:
        damage = DecodeError(name, f"the tar is damaged ({error})")
    for members in samples.values():
        for suffix in MEDIA_SUFFIXES:
            if suffix in members:
                member_name, extent = members[suffix]
                yield MediaItem(
                    f"{name}/{member_name}", path, source_of(name), extent,
                    txt=members.get(".txt", (None, None))[1], json=members.get(".json", (None, None))[1],
                )  # fmt: skip
    if damage is not None:
        yield damage


def _read(path: str, extent: Extent, limit: int | None = None) -> bytes:
    size = extent.size if limit is None else min(extent.size, limit)
    with open(path, "rb") as file:
        file.seek(extent.offset)
        data = file.read(size)
    if len(data) != size:
        raise OSError(f"the tar ends within the member at byte {extent.offset}")
    return data
