"""A planned clip, decoded, scored, filtered and brought to the shape of its buckets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from contentv.base.types import Bucket
from contentv.curation.filters import failures
from contentv.curation.plan import ClipTask
from contentv.curation.scan import Reject
from contentv.curation.scorers import SCORE_SIDE_PX, ClipScores, score_clip
from contentv.curation.video_io import (
    DecodeError,
    OpenVideo,
    encode_jpg_bytes,
    encode_mp4_bytes,
    open_video,
    read_image,
)

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CutSample:
    """A clip in the shape of one bucket."""

    bucket: Bucket
    frames: UInt8[np.ndarray, "T H W 3"]
    scores: ClipScores
    start_s: float
    fps: float  # 0 for single pictures
    media: bytes | None
    media_suffix: str


@dataclass(frozen=True)
class CutClip:
    """What became of a clip."""

    samples: tuple[CutSample, ...]
    rejects: tuple[Reject, ...]


def cut_clip(task: ClipTask | Reject) -> CutClip:
    """Returns the samples of a clip: decoded, scored, filtered, cropped. What is no clip goes through as it is."""
    if isinstance(task, Reject):
        return CutClip((), (task,))
    try:
        return _cut(task)
    except DecodeError as error:
        return CutClip((), (Reject(task.item.name, error.reason, task.scene, task.clip),))


def _cut(task: ClipTask) -> CutClip:
    longest = max(bucket.frames for bucket in task.buckets)
    middle = len(task.frames) // 2
    places = list(range(longest)) if longest > 1 else []
    if any(bucket.frames == 1 for bucket in task.buckets) and middle not in places:
        places.append(middle)
    pictures = _decode(task, places)
    samples: list[CutSample] = []
    rejects: list[Reject] = []
    for is_still in (True, False):
        buckets = [bucket for bucket in task.buckets if (bucket.frames == 1) == is_still]
        if not buckets:
            continue
        clip = np.stack([pictures[middle]] if is_still else [pictures[place] for place in range(longest)])
        scores = score_clip(clip, task.fps if task.fps > 0 else 1.0)
        broken = failures(task.rules.filters, scores)
        if broken:
            told = {"visual_raw": scores.visual_raw, "motion_raw": scores.motion_raw, **scores.scores}
            names = ", ".join(bucket.name for bucket in buckets)
            rejects.append(Reject(task.item.name, f"{'; '.join(broken)} ({names})", task.scene, task.clip, told))
            continue
        start_s = task.times_s[middle if is_still else 0]
        samples.extend(_sample(task, bucket, clip, scores, start_s) for bucket in buckets)
    return CutClip(tuple(samples), tuple(rejects))


def _sample(task: ClipTask, bucket: Bucket, clip: Frames, scores: ClipScores, start_s: float) -> CutSample:
    frames = np.stack([fit_to_bucket(picture, bucket) for picture in clip[: bucket.frames]])
    is_still = bucket.frames == 1
    media = None
    if task.rules.keep_media:
        media = encode_jpg_bytes(frames[0]) if is_still else encode_mp4_bytes(frames, task.fps)
    fps = 0.0 if is_still else task.fps
    return CutSample(bucket, frames, scores, start_s, fps, media, "jpg" if is_still else "mp4")


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


def _decode(task: ClipTask, places: list[int]) -> dict[int, Frames]:
    """Returns the sampled frames at `places`, no larger than the largest bucket and the scores need them."""
    sides = [max(b.height / task.height, b.width / task.width) for b in task.buckets]
    scale = min(1.0, max(*sides, SCORE_SIDE_PX / min(task.height, task.width)))
    height, width = round(task.height * scale), round(task.width * scale)

    def shrink(picture: Frames) -> Frames:
        return resize(picture, height, width)

    numbers = sorted({task.frames[place] for place in places})
    if task.item.is_image:
        with task.item.open() as file:
            found = {task.frames[0]: shrink(read_image(file, task.item.name))}
    else:
        found = _pick(task, numbers, shrink)
    return {place: found[task.frames[place]] for place in places}


def _pick(task: ClipTask, numbers: list[int], shrink: Callable[[Frames], Frames]) -> dict[int, Frames]:
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


def _collect(
    video: OpenVideo, wanted: dict[int, int], shrink: Callable[[Frames], Frames], by_pts: bool
) -> dict[int, Frames]:
    found: dict[int, Frames] = {}
    for count, picture in enumerate(video.pictures()):
        stamp = picture.pts if by_pts else count
        if stamp in wanted and not picture.is_corrupt:
            found[wanted[stamp]] = shrink(picture.to_rgb())
            if len(found) == len(wanted):
                break
    return found
