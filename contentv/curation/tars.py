"""Media inside tars (WebDataset: KEY.mp4 with KEY.txt or KEY.json), read in place, by position.

Nothing is unpacked to disk, links inside are not followed, and headers are trusted with nothing: every size is checked
against the file's. The standard library's reader is not used, since damaged sizes can send it round in circles.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import PurePosixPath
from typing import Any

from contentv.curation.captions import MAX_SIDECAR_BYTES, CaptionError, parse_record
from contentv.curation.media import MEDIA_SUFFIXES, Extent, MediaItem, given_scores, no_file, open_regular, read_bytes
from contentv.curation.video_io import DecodeError

MAX_HEADER_BYTES = 1 << 20  # of a long name or a PAX record
_BLOCK = tarfile.BLOCKSIZE
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


@dataclass(frozen=True)
class TarMember:
    """A regular file in a tar."""

    name: str
    extent: Extent


def walk_tar(name: str, path: str) -> Iterator[TarMember]:
    """Yields the regular files of a tar in order.

    Args:
        name: what to call it in messages.
        path: where it is.

    Raises:
        DecodeError: it cannot be read, is damaged, or ends too early; what came before was yielded.
    """
    try:
        with open_regular(path) as file:
            yield from _members(file, name)
    except OSError as error:
        raise no_file(name, error) from error


def list_members(name: str, path: str) -> tuple[dict[str, TarMember], DecodeError | None]:
    """Returns {name: member} of a tar in order, the first of each name, and what is wrong with the rest of it."""
    members: dict[str, TarMember] = {}
    try:
        for member in walk_tar(name, path):
            members.setdefault(member.name, member)
    except DecodeError as error:
        return members, error
    return members, None


def tar_items(name: str, path: str, source: str, score_names: Sequence[str] = ()) -> Iterator[MediaItem | DecodeError]:
    """Yields the media of a WebDataset tar in order; a last error if it is damaged or holds none.

    Args:
        name: of the tar below the input.
        path: of the tar.
        source: of its media.
        score_names: fields of KEY.json to keep as scores.
    """
    members, damage = list_members(name, path)
    found = 0
    for member in members.values():
        path_in_tar = PurePosixPath(member.name)
        if path_in_tar.suffix.lower() in MEDIA_SUFFIXES and not path_in_tar.name.startswith("."):
            found += 1
            yield _item(name, path, source, member, members, score_names)
    if damage is None and not found:
        damage = DecodeError(name, "there is no video or image in the tar")
    if damage is not None:
        yield damage


def _item(
    tar: str, path: str, source: str, member: TarMember, members: Mapping[str, TarMember], score_names: Sequence[str]
) -> MediaItem | DecodeError:
    txt, record = (_beside(member.name, kind, members) for kind in ("txt", "json"))
    name = f"{tar}/{member.name}"
    scores: dict[str, float] = {}
    if score_names and record is not None:
        try:
            scores = given_scores(parse_record(read_bytes(path, record, MAX_SIDECAR_BYTES + 1)), score_names)
        except CaptionError as error:
            return DecodeError(name, str(error), error.rule)
        except OSError as error:
            return DecodeError(name, f"its .json cannot be read ({error.strerror or error})")
    return MediaItem(name, path, source, member.extent, txt=txt, json=record, given_scores=scores)


def _beside(name: str, kind: str, members: Mapping[str, TarMember]) -> Extent | None:
    """Returns where a member's sidecar is: that of its name, or of WebDataset's key, which ends at the first dot."""
    folder, slash, file = name.rpartition("/")
    for key in (file.rpartition(".")[0], file.partition(".")[0]):
        for suffix in (kind, kind.upper()):
            found = members.get(f"{folder}{slash}{key}.{suffix}")
            if found is not None:
                return found.extent
    return None


def _members(file: BufferedReader, name: str) -> Iterator[TarMember]:
    size = file.seek(0, 2)
    at = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = _header(file, at, size, name)
        if header is None:
            return
        data, length = at + _BLOCK, header.size if long_size is None else long_size
        if header.type in _WITHOUT_DATA:
            length = 0
        if length < 0 or data + length > size:
            raise DecodeError(name, f"the tar is damaged or cut short: it ends within {_shown(header.name)}")
        at = data + -(-length // _BLOCK) * _BLOCK
        if header.type in _LONG_NAMES or header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            file.seek(data)
            if length > MAX_HEADER_BYTES:
                raise DecodeError(name, f"the tar is damaged: a header of {length} bytes")
            content = file.read(length)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "backslashreplace")
            elif header.type not in _LONG_NAMES:
                record = _pax(content, name)
                long_name, long_size = record.get("path", long_name), _whole(record.get("size"), name)
            continue
        if header.type in _FILES and not header.name.endswith("/"):
            yield TarMember(_shown(long_name or header.name), Extent(data, length))
        long_name = long_size = None


def _header(file: BufferedReader, at: int, size: int, name: str) -> Any:
    """Returns the header at a place, None at the end of the tar."""
    if at >= size:
        raise DecodeError(
            name, "the tar has no end mark, so it may be cut short" if size else "the file is empty (0 bytes)"
        )
    file.seek(at)
    block = file.read(_BLOCK)
    if at == 0 and block[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
        raise DecodeError(name, "a compressed tar, which cannot be read by position: unpack it to a plain tar first")
    if block == bytes(_BLOCK):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise DecodeError(name, f"the tar is damaged at byte {at} ({error})") from error


def _pax(content: bytes, name: str) -> dict[str, str]:
    """Returns the records ("<length> <key>=<value>\\n") of a PAX header."""
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        key, equals, value = content[len(digits) + 1 : length].partition(b"=")
        if length <= len(digits) or not equals or not value.endswith(b"\n"):
            raise DecodeError(name, "the tar is damaged: a PAX header that cannot be read")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "backslashreplace")
        content = content[length:]
    return records


def _whole(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise DecodeError(name, f"the tar is damaged: a member of {text[:40]} bytes")
    return int(text)


def _shown(name: str) -> str:
    return PurePosixPath(name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")).as_posix()
