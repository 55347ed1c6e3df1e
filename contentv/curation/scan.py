"""First look at a file: is it whole, how large and long is it, what are its captions, where are its scenes.

Nothing of a video stays in memory here but the times of its frames; the clips are decoded again later, one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import xxhash

from contentv.curation.captions import CaptionError, Captions, parse_captions
from contentv.curation.inputs import MediaItem
from contentv.curation.scenes import DETECTION_SIDE_PX, SceneFinder
from contentv.curation.video_io import (
    DecodeError,
    MediaFile,
    OpenVideo,
    open_video,
    read_image,
    require_complete,
)


@dataclass(frozen=True)
class Reject:
    """A file, or a clip of it, that was left out; a line of rejects.jsonl."""

    file: str
    reason: str
    scene: int | None = None
    clip: int | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    lacks_caption: bool = False


@dataclass(frozen=True)
class ScanTask:
    """A file to look at."""

    item: MediaItem
    detector: str
    threshold: float | None


@dataclass(frozen=True)
class FileScan:
    """What a usable file holds.

    `times_s` are the frames' times, from 0 and increasing; `pts` the same in the container's units, None where the
    file has no usable ones and frames must be counted. `scenes` are [start, end) frame numbers.
    """

    item: MediaItem
    captions: Captions
    xxh128: str
    height: int
    width: int
    fps: float
    times_s: npt.NDArray[np.float64]
    pts: npt.NDArray[np.int64] | None
    scenes: list[tuple[int, int]]


def scan_file(task: ScanTask) -> FileScan | Reject:
    """Returns what a file holds, or why it cannot be used."""
    item = task.item
    try:
        captions = parse_captions(item.sidecar("txt"), item.sidecar("json"))
        with item.open() as file:
            digest = _xxh128(file)
            if item.is_image:
                height, width = read_image(file, item.name).shape[:2]
                return FileScan(item, captions, digest, height, width, 0.0, np.zeros(1), None, [(0, 1)])
            with open_video(file, item.name) as video:
                return _scan_video(video, task, captions, digest)
    except CaptionError as error:
        return Reject(item.name, str(error), lacks_caption=True)
    except DecodeError as error:
        return Reject(item.name, error.reason)


def _scan_video(video: OpenVideo, task: ScanTask, captions: Captions, digest: str) -> FileScan:
    finder = SceneFinder(float(video.rate or 24), task.detector, task.threshold)
    stamps: list[int | None] = []
    size: tuple[int, int] | None = None
    for picture in video.pictures():
        if picture.is_corrupt:
            raise DecodeError(video.name, f"frame {len(stamps)} is damaged")
        if size is not None and picture.size != size:
            raise DecodeError(video.name, f"the picture's size changes at frame {len(stamps)}")
        size = picture.size
        stamps.append(picture.pts)
        finder.add(picture.to_rgb(DETECTION_SIDE_PX) if finder.wants_pixels else None)
    require_complete(video, len(stamps))
    pts = _usable(stamps)
    fps, times = _timing(pts, video.stream.time_base, video.rate, len(stamps))
    if size is None:
        raise RuntimeError(f"{video.name}: frames, but no size")
    return FileScan(task.item, captions, digest, *size, fps, times, pts, finder.finish())


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


def _xxh128(file: MediaFile) -> str:
    """Returns the checksum of a whole file and goes back to its start."""
    digest = xxhash.xxh128()
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()
