"""First look at a file: is it whole, what are its captions, where are its scenes, and what are its clips like.

Nothing is decided here that needs other files. A video's frames stay in memory, shrunk, as long as they are few; those
of a longer one are decoded again clip by clip.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import xxhash

from contentv.curation.captions import CaptionError, Captions
from contentv.curation.clip_frames import covering_size, resize
from contentv.curation.look import ClipLook, Looking, look_at_clip
from contentv.curation.media import MediaItem
from contentv.curation.plan import ClipRules, ClipTask, FileScan, misfit, plan_clips
from contentv.curation.records import REJECTED, SCANNED, ClipRecord, FileRecord, Reject
from contentv.curation.scenes import DETECTION_SIDE_PX, SceneFinder
from contentv.curation.scorers import SCORE_SIDE_PX
from contentv.curation.video_io import (
    DecodeError,
    MediaFile,
    OpenVideo,
    Picture,
    open_video,
    read_image,
    require_complete,
)

KEPT_BYTES = 256 << 20  # of a video's shrunk frames that are kept for its clips
Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ScanTask:
    """A file to look at, and its place: unit of the chunk, item of the unit."""

    unit: int
    item_number: int
    item: MediaItem
    rules: ClipRules
    looking: Looking
    detector: str
    threshold: float | None
    always_caption: bool = False  # a captioner writes all captions, whatever is wrong with those that are there
    digest: str = ""  # its checksum, if it has been taken


@dataclass(frozen=True)
class ScanResult:
    """A file's record, and of each of its clips, in order, a thumbnail (JPEG) and, with an encoder, an embedding."""

    record: FileRecord
    thumbnails: list[bytes] = field(default_factory=list)
    embeddings: list[npt.NDArray[np.float32]] = field(default_factory=list)


def scan_file(task: ScanTask | FileRecord) -> ScanResult:
    """Returns what a file holds, or why it cannot be used; what is known already goes through as it is."""
    if isinstance(task, FileRecord):
        return ScanResult(task)
    item = task.item
    record = functools.partial(FileRecord, task.unit, task.item_number, item.name, item.source)
    try:
        captions = _captions(task)
        digest = task.digest or checksum(item)
        with item.open() as file:
            scan, kept = _open_and_scan(file, task, captions)
    except CaptionError as error:
        return ScanResult(record(REJECTED, entries=(Reject(item.name, str(error), rule=error.rule),)))
    except DecodeError as error:
        return ScanResult(record(REJECTED, entries=(Reject(item.name, error.reason, rule=error.rule),)))
    entries: list[ClipRecord | Reject] = []
    looks: list[ClipLook] = []
    for planned in plan_clips(scan, task.rules):
        look = planned if isinstance(planned, Reject) else _look(planned, scan, task, kept)
        if isinstance(look, ClipLook):
            looks.append(look)
        entries.append(look if isinstance(look, Reject) else look.record)
    found = record(SCANNED, content_key(digest, item), digest, scan.height, scan.width, tuple(entries))
    embeddings = [look.embedding for look in looks if look.embedding is not None]
    return ScanResult(found, [look.thumbnail for look in looks], embeddings)


def take_checksum(task: ScanTask | FileRecord) -> str | FileRecord:
    """Returns a file's checksum, or the record of one that cannot be read."""
    if isinstance(task, FileRecord):
        return task
    item = task.item
    try:
        return checksum(item)
    except DecodeError as error:
        reject = Reject(item.name, error.reason, rule=error.rule)
        return FileRecord(task.unit, task.item_number, item.name, item.source, REJECTED, entries=(reject,))


def checksum(item: MediaItem) -> str:
    """Returns the xxh128 of a file's bytes; that of the file last asked for is remembered.

    Raises:
        DecodeError: the file cannot be read.
    """
    digest = xxhash.xxh128()
    try:
        with item.open() as file:
            status = os.stat(item.path) if item.span_s is not None else None
            # A manifest may name a thousand parts of one long film.
            known = None if status is None else (item.path, item.extent, status.st_size, status.st_mtime_ns)
            if known is not None and _LAST.get("file") == known:
                return str(_LAST["digest"])
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DecodeError(item.name, f"cannot be read ({error.strerror or error})") from error
    if known is not None:
        _LAST.update(file=known, digest=digest.hexdigest())
    return digest.hexdigest()


_LAST: dict[str, object] = {}


def content_key(digest: str, item: MediaItem) -> str:
    """Returns what is equal for equal contents: the checksum of the bytes, and the part of the file that counts."""
    return digest if item.span_s is None else f"{digest}@{item.span_s[0]!r}-{item.span_s[1]!r}"


def _captions(task: ScanTask) -> Captions | CaptionError:
    """Returns the captions; a missing one is an error to pass on if a captioner may write it.

    Raises:
        CaptionError: there is none, or it cannot be used.
    """
    try:
        return task.item.captions()
    except CaptionError as error:
        if task.always_caption:
            return CaptionError("no caption")
        if task.rules.needs_caption or error.rule != "no_caption":
            raise
        return error


def _look(planned: ClipTask, scan: FileScan, task: ScanTask, kept: list[Frames] | None) -> ClipLook | Reject:
    mine = None if kept is None else {number: kept[number - scan.first] for number in planned.frames}
    try:
        return look_at_clip(planned, task.looking, look_size(scan.height, scan.width, task.rules), mine)
    except DecodeError as error:
        return Reject(planned.item.name, error.reason, planned.scene, planned.clip, rule=error.rule)


def look_size(height: int, width: int, rules: ClipRules) -> tuple[int, int]:
    """Returns the height and width at which a file's clips are looked at: those of its largest bucket, about."""
    fitting = [b for b in rules.buckets if misfit(b, height, width, b.frames, False, rules) is None]
    return covering_size(height, width, fitting, SCORE_SIDE_PX)


def _open_and_scan(
    file: MediaFile, task: ScanTask, captions: Captions | CaptionError
) -> tuple[FileScan, list[Frames] | None]:
    if task.item.is_image:
        picture = read_image(file, task.item.name)
        height, width = picture.shape[:2]
        kept = [resize(picture, *look_size(height, width, task.rules))]
        return FileScan(task.item, captions, height, width, 0.0, np.zeros(1), None, [(0, 1)]), kept
    with open_video(file, task.item.name) as video:
        return _scan_video(video, task, captions)


def _scan_video(
    video: OpenVideo, task: ScanTask, captions: Captions | CaptionError
) -> tuple[FileScan, list[Frames] | None]:
    finder = SceneFinder(float(video.rate or 24), task.detector, task.threshold)
    stamps: list[int | None] = []
    size: tuple[int, int] | None = None
    kept: list[Frames] | None = []
    target = (0, 0)
    part = _Part(video, task.item)
    for picture in part.pictures():
        if picture.is_corrupt:
            raise DecodeError(video.name, f"frame {part.first + len(stamps)} is damaged")
        if size is not None and picture.size != size:
            raise DecodeError(video.name, f"the picture's size changes at frame {part.first + len(stamps)}")
        if size is None:
            target = look_size(*picture.size, task.rules)
        size = picture.size
        stamps.append(picture.pts)
        finder.add(picture.to_rgb(DETECTION_SIDE_PX) if finder.wants_pixels else None)
        if kept is not None and len(stamps) * target[0] * target[1] * 3 > KEPT_BYTES:
            kept = None
        if kept is not None:
            kept.append(resize(picture.to_rgb(), *target))
    part.require_complete(len(stamps))
    pts = _usable(stamps)
    fps, times = _timing(pts, video.stream.time_base, video.rate, len(stamps))
    if size is None:
        raise RuntimeError(f"{video.name}: frames, but no size")
    start_s = part.start_s(pts, fps)
    return FileScan(task.item, captions, *size, fps, times + start_s, pts, finder.finish(), part.first), kept


class _Part:
    """The frames of a video that count: all, or those between two times."""

    def __init__(self, video: OpenVideo, item: MediaItem) -> None:
        self._video = video
        self._span_s = item.span_s
        self._base = video.stream.time_base
        self._zero = int(video.stream.start_time or 0)
        self.first = 0  # number of the first frame

    def pictures(self) -> Iterator[Picture]:
        """Yields the frames in order."""
        if self._span_s is None:
            yield from self._video.pictures()
            return
        start_s, end_s = self._span_s
        if start_s > 0 and self._base:
            self._video.seek(self._zero + int(start_s / float(self._base)))
        begun = False
        for count, picture in enumerate(self._video.pictures()):
            time_s = self._time_s(picture.pts)
            if time_s is None:
                raise DecodeError(self._video.name, "its frames have no times, so a part of it cannot be found")
            if time_s >= end_s - 1e-6:
                break
            if time_s >= start_s - 1e-6:
                self.first = self.first if begun else count
                begun = True
                yield picture

    def _time_s(self, pts: int | None) -> float | None:
        return None if pts is None or not self._base else (pts - self._zero) * float(self._base)

    def start_s(self, pts: npt.NDArray[np.int64] | None, fps: float) -> float:
        """Returns the first frame's time in the whole file."""
        if self._span_s is None or pts is None:
            return 0.0
        return self._time_s(int(pts[0])) or 0.0

    def require_complete(self, frames: int) -> None:
        """Passes over a video of which all that counts was there.

        Raises:
            DecodeError: it had no frame there, or fewer pieces than promised.
        """
        if self._span_s is None:
            require_complete(self._video, frames)
        elif frames == 0:
            start_s, end_s = self._span_s
            raise DecodeError(
                self._video.name, f"there are no frames from {start_s:g} to {end_s:g} s", rule="too_short"
            )


def _usable(stamps: list[int | None]) -> npt.NDArray[np.int64] | None:
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < len(stamps):
        return None
    pts = np.array(known, np.int64)
    return pts if bool(np.all(np.diff(pts) > 0)) else None


def _timing(
    pts: npt.NDArray[np.int64] | None, time_base: Fraction | None, rate: Fraction | None, frames: int
) -> tuple[float, npt.NDArray[np.float64]]:
    """Returns frames per second and the frames' times; the container's rate counts where the times agree with it."""
    nominal = float(rate) if rate else 24.0
    if pts is None or not time_base:
        return nominal, np.arange(frames) / nominal
    times = (pts - pts[0]).astype(np.float64) * float(time_base)
    if frames < 2:
        return nominal, times
    measured = (frames - 1) / float(times[-1])
    return (nominal if abs(measured / nominal - 1) < 0.01 else measured), times
