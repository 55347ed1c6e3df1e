"""The pixels of a clip's frames, found again in their file."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import cv2
import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from contentv.base.types import Bucket
from contentv.curation.plan import ClipTask
from contentv.curation.video_io import DecodeError, OpenVideo, open_video, read_image

Frames = npt.NDArray[np.uint8]
Shrink = Callable[[Frames], Frames]


def read_frames(task: ClipTask, places: Iterable[int], height: int, width: int) -> dict[int, Frames]:
    """Returns sampled frames of a clip by their place among them, RGB.

    Args:
        task: the clip.
        places: which of `task.frames`.
        height: that the frames are resized to, in pixels.
        width: likewise.

    Raises:
        DecodeError: the file cannot be read, or is not the one that was scanned.
    """

    def shrink(picture: Frames) -> Frames:
        return resize(picture, height, width)

    wanted = sorted(set(places))
    if task.item.is_image:
        with task.item.open() as file:
            picture = shrink(read_image(file, task.item.name))
        return dict.fromkeys(wanted, picture)
    found = _pick(task, sorted({task.frames[place] for place in wanted}), shrink)
    return {place: found[task.frames[place]] for place in wanted}


def fit_to_bucket(picture: UInt8[np.ndarray, "H W 3"], bucket: Bucket) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a picture resized so that it just covers the bucket's height and width, and cropped around its middle."""
    height, width = picture.shape[:2]
    scale = max(bucket.height / height, bucket.width / width)
    covering = resize(picture, max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale)))
    top, left = (covering.shape[0] - bucket.height) // 2, (covering.shape[1] - bucket.width) // 2
    return np.ascontiguousarray(covering[top : top + bucket.height, left : left + bucket.width])


def resize(picture: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a picture of another size: area-averaged when it shrinks, cubic when it grows."""
    if picture.shape[:2] == (height, width):
        return picture
    shrinks = height <= picture.shape[0] and width <= picture.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(picture, (width, height), interpolation=method).astype(np.uint8, copy=False)


def covering_size(height: int, width: int, buckets: Iterable[Bucket], short_side_px: int = 0) -> tuple[int, int]:
    """Returns the least size, at most the picture's own, that covers every bucket and has a short side of so much.

    Args:
        height: of the picture, in pixels.
        width: likewise.
        buckets: whose height and width count.
        short_side_px: least short side; 0 = any.
    """
    sides = [max(bucket.height / height, bucket.width / width) for bucket in buckets]
    scale = min(1.0, max([*sides, short_side_px / min(height, width)]))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _pick(task: ClipTask, numbers: list[int], shrink: Shrink) -> dict[int, Frames]:
    """Returns frames by their number in the file, from the nearest key frame on where frames have usable times."""
    wanted = {number: number for number in numbers}
    if task.stamps is not None:
        stamp_of = dict(zip(task.frames, task.stamps, strict=True))
        wanted = {stamp_of[number]: number for number in numbers}
    # Some files have key frames that later ones reach back over; decoding from the start is always right.
    for first in (None,) if task.stamps is None else (min(wanted), None):
        with task.item.open() as file, open_video(file, task.item.name) as video:
            if first is not None:
                video.seek(first)
            found = _collect(video, wanted, shrink, by_pts=task.stamps is not None)
            if len(found) == len(wanted):
                return found
    raise DecodeError(task.item.name, "frames that were there at the first reading are not there at the second")


def _collect(video: OpenVideo, wanted: dict[int, int], shrink: Shrink, by_pts: bool) -> dict[int, Frames]:
    found: dict[int, Frames] = {}
    for count, picture in enumerate(video.pictures()):
        stamp = picture.pts if by_pts else count
        if stamp in wanted and not picture.is_corrupt:
            found[wanted[stamp]] = shrink(picture.to_rgb())
            if len(found) == len(wanted):
                break
    return found
