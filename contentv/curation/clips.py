"""A clip that is kept, decoded and brought to the shape of its buckets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from contentv.base.types import Bucket
from contentv.curation.clip_frames import covering_size, fit_to_bucket, read_frames
from contentv.curation.plan import ClipTask
from contentv.curation.records import Reject
from contentv.curation.video_io import DecodeError, encode_jpg_bytes, encode_mp4_bytes

__all__ = ["CutSample", "cut_clip", "fit_to_bucket"]


@dataclass(frozen=True)
class CutSample:
    """A clip in the shape of one bucket."""

    bucket: Bucket
    frames: UInt8[np.ndarray, "T H W 3"]
    start_s: float
    fps: float  # 0 for single pictures
    media: bytes | None
    media_suffix: str


def cut_clip(task: ClipTask) -> list[CutSample] | Reject:
    """Returns a clip once for each of its buckets; a video gives its middle frame to those of one frame."""
    longest = max(bucket.frames for bucket in task.buckets)
    middle = len(task.frames) // 2
    places = {*range(longest)} if longest > 1 else set()
    if any(bucket.frames == 1 for bucket in task.buckets):
        places.add(middle)
    try:
        pictures = read_frames(task, places, *covering_size(task.height, task.width, task.buckets))
    except DecodeError as error:
        return Reject(task.item.name, error.reason, task.scene, task.clip, rule=error.rule)
    return [_sample(task, bucket, pictures, middle) for bucket in task.buckets]


def _sample(task: ClipTask, bucket: Bucket, pictures: dict[int, UInt8[np.ndarray, "H W 3"]], middle: int) -> CutSample:
    is_still = bucket.frames == 1
    places = [middle] if is_still else list(range(bucket.frames))
    frames = np.stack([fit_to_bucket(pictures[place], bucket) for place in places])
    media = None
    if task.rules.keep_media:
        media = encode_jpg_bytes(frames[0]) if is_still else encode_mp4_bytes(frames, task.fps)
    start_s = task.times_s[places[0]]
    return CutSample(bucket, frames, start_s, 0.0 if is_still else task.fps, media, "jpg" if is_still else "mp4")
