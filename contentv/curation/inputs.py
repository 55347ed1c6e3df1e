"""What is curated: the units of the input, and the media files in each.

A unit is a file, a tar, or some rows of a manifest. Units are names, so that a plan can be kept on disk and gone on
with. Links are followed, each folder is read once, and what cannot be used becomes an error in its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.curation import cosmos
from contentv.curation.manifest_rows import MANIFEST_SUFFIXES
from contentv.curation.manifests import ManifestConfig, ManifestInputs
from contentv.curation.media import DEFAULT_SOURCE, MEDIA_SUFFIXES, Extent, MediaItem, shown, source_of
from contentv.curation.tars import tar_items
from contentv.curation.video_io import DecodeError

__all__ = ["DEFAULT_SOURCE", "Extent", "InputSettings", "Inputs", "MediaItem", "open_inputs"]

PACKED_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
METADATA_FILES = tuple(f"metadata{suffix}" for suffix in MANIFEST_SUFFIXES)  # as Hugging Face's folders have them


@runtime_checkable
class InputSettings(Protocol):
    """The part of the configuration that inputs need."""

    input: str
    manifest: ManifestConfig


@runtime_checkable
class Inputs(Protocol):
    """The input, listed."""

    @property
    def units(self) -> list[str]:
        """Names of the units, sorted, without repeats."""

    def items(self, unit: str) -> Iterator[MediaItem | DecodeError]:
        """Yields the media of a unit in a fixed order; what cannot be used as an error."""


def open_inputs(config: InputSettings, leave_out: str | Path | None = None) -> Inputs:
    """Returns the input of a configuration, listed.

    Args:
        config: `input` is a folder or a manifest; `manifest` says how it is laid out.
        leave_out: a folder that is not looked into, such as the output.

    Raises:
        UserError: there is no such folder or manifest, or there is nothing in it.
    """
    path, layout = Path(config.input), config.manifest.layout
    if path.is_dir():
        metadata = [path / name for name in METADATA_FILES if (path / name).is_file()]
        if layout == "auto" and metadata:
            get_logger().info(f"{metadata[0]} names the files (manifest.layout=files would take the folder as it is)")
            return ManifestInputs(metadata[0], config.manifest)
        return FolderInputs(path, config.manifest, leave_out)
    if path.suffix.lower() in MANIFEST_SUFFIXES and path.is_file():
        return ManifestInputs(path, config.manifest)
    kinds = ", ".join(MANIFEST_SUFFIXES)
    raise UserError(
        f'"{config.input}" is neither a folder nor a manifest ({kinds})', where="input",
        remedy="name a folder of video and image files, or a manifest that is there",
    )  # fmt: skip


class FolderInputs:
    """A folder as inputs: each media file and each tar is a unit.

    Args:
        root: the folder.
        config: its layout.
        leave_out: a folder that is not looked into.

    Attributes:
        units: paths below the folder, with forward slashes, sorted.

    Raises:
        UserError: there is nothing in it, or not what the layout asks for.
    """

    def __init__(self, root: Path, config: ManifestConfig, leave_out: str | Path | None = None) -> None:
        self._root, self._config = root, config
        found = _walk(root, None if leave_out is None else Path(leave_out))
        self._paths = {shown(path): path for path in found}
        self._problems = {shown(path): reason for path, reason in found.items() if reason}
        self._layout = _layout(root, list(self._paths), config.layout)
        names = list(self._paths)
        if self._layout == "cosmos":
            names = cosmos.unit_names(names)
        elif self._layout == "webdataset":
            names = [name for name in names if name.lower().endswith(PACKED_SUFFIXES)]
        if not names:
            raise UserError(
                "there are no video or image files", where=f"input={root}",
                remedy=f"put files ending in {', '.join(MEDIA_SUFFIXES)} there, each with a caption in NAME.txt, or "
                f"WebDataset tars of them; or name a manifest (manifest.layout={config.layout})",
            )  # fmt: skip
        self.units = sorted(names)

    def items(self, unit: str) -> Iterator[MediaItem | DecodeError]:
        """Yields the media of a file or tar; what is wrong with it as an error."""
        if unit in self._problems:
            yield DecodeError(unit, self._problems[unit])
        elif self._layout == "cosmos":
            yield from cosmos.cosmos_items(self._root, unit)
        elif unit.lower().endswith(PACKED_SUFFIXES):
            yield from tar_items(unit, self._path(unit), source_of(unit), self._config.score_columns)
        else:
            yield MediaItem(unit, self._path(unit), source_of(unit))

    def _path(self, unit: str) -> str:
        return str(self._root / self._paths.get(unit, unit))


def _layout(root: Path, names: list[str], asked: str) -> str:
    if asked != "auto":
        return asked
    if cosmos.is_split(root) or any(cosmos.is_shard(name) for name in names):
        get_logger().info(f"{root}: read as cosmos-curate's output (manifest.layout=files would read all files alike)")
        return "cosmos"
    return "files"


def _walk(root: Path, leave_out: Path | None) -> dict[str, str]:
    """Returns {path below the root: what is wrong with it, or ""} of media files and tars.

    Real folders are read first and links to folders afterwards, so that a file's name does not depend on a link.
    """
    found: dict[str, str] = {}
    seen = set() if leave_out is None or not leave_out.exists() else {_identity(leave_out)}
    folders, links = [""], list[str]()
    while folders or links:
        if folders:
            place = folders.pop()
        else:
            links.sort(reverse=True)
            place = links.pop()
        try:
            identity = _identity(root / place)
            if identity in seen:
                if not (leave_out is not None and identity == _identity(leave_out)):
                    found[place] = "a link to a folder that is read already"
                continue
            seen.add(identity)
            with os.scandir(root / place) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found[place] = f"the folder cannot be read ({error.strerror or error})"
            continue
        for entry in listed:
            if not entry.name.startswith("."):
                _sort_in(entry, place, found, folders, links)
    return found


def _sort_in(entry: os.DirEntry[str], place: str, found: dict[str, str], folders: list[str], links: list[str]) -> None:
    path = f"{place}/{entry.name}" if place else entry.name
    is_media = PurePosixPath(entry.name).suffix.lower() in MEDIA_SUFFIXES
    if _is_folder(entry):
        (links if entry.is_symlink() else folders).append(path)
        if is_media:
            found[path] = "a folder, no file"
    elif is_media or entry.name.lower().endswith(PACKED_SUFFIXES):
        found[path] = ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say; opening it will tell
        return False


def _identity(folder: Path) -> tuple[int, int]:
    about = os.stat(folder)
    return about.st_dev, about.st_ino
