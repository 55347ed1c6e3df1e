"""What a clip is like: scores, a perceptual hash, a thumbnail and, with an encoder, an embedding, of one decoding."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from contentv.curation.clip_frames import read_frames, resize
from contentv.curation.embed import ImageEmbedder
from contentv.curation.perceptual_hash import HASHED_FRAMES, hash_clip
from contentv.curation.plan import ClipTask
from contentv.curation.records import ClipRecord
from contentv.curation.scorers import ClipScores, score_clip
from contentv.curation.scoring.config import ScoringConfig

THUMBNAIL_SIDE_PX = 160  # longer side

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Looking:
    """What is looked at: the part of the configuration that workers need."""

    scoring: ScoringConfig
    encoder: str = ""


@dataclass(frozen=True)
class ClipLook:
    """A clip's record, its thumbnail as JPEG, and its embedding."""

    record: ClipRecord
    thumbnail: bytes
    embedding: npt.NDArray[np.float32] | None


def look_at_clip(
    task: ClipTask, looking: Looking, size: tuple[int, int], kept: dict[int, Frames] | None = None
) -> ClipLook:
    """Returns what a clip is like.

    A clip is scored as a video over the frames of its longest bucket, as a still over its middle frame; what it looks
    like is told by frames that are evenly spaced over all of it.

    Args:
        task: the clip.
        looking: what to look at.
        size: height and width to look at it in pixels.
        kept: its frames of that size by their number in the file, if they are in memory; None = decode them.

    Raises:
        DecodeError: the clip's file is not what it was.
    """
    longest = max(bucket.frames for bucket in task.buckets)
    middle = len(task.frames) // 2
    spread = spread_places(len(task.frames))
    places = {middle, *spread, *(range(longest) if longest > 1 else ())}
    if kept is None:
        pictures = read_frames(task, places, *size)
    else:
        pictures = {place: kept[task.frames[place]] for place in places}

    def scored(chosen: list[int]) -> ClipScores:
        frames = np.stack([pictures[place] for place in chosen])
        fps = task.fps if task.fps > 0 else 1.0
        return score_clip(frames, fps, looking.scoring, task.caption or "", task.item.given_scores)

    video = scored(list(range(longest))) if longest > 1 else None
    still = scored([middle]) if any(bucket.frames == 1 for bucket in task.buckets) else None
    shown = [pictures[place] for place in spread]
    record = ClipRecord(
        task.scene, task.clip, task.caption, task.fps, task.frames, task.stamps, task.times_s,
        tuple(bucket.name for bucket in task.buckets), video, still, hash_clip(shown),
    )  # fmt: skip
    embedding = None
    if looking.encoder:
        embedding = _embedder(looking.encoder).embed(np.stack(shown)).astype(np.float32)
    return ClipLook(record, thumbnail(pictures[middle]), embedding)


def spread_places(frames: int) -> list[int]:
    """Returns the places of the frames that tell what a clip looks like; of a still or a very short clip, all."""
    count = 1 if frames == 1 else HASHED_FRAMES
    places: list[int] = ((np.arange(count) + 0.5) * frames / count).astype(int).tolist()
    return places


def thumbnail(picture: Frames) -> bytes:
    """Returns a small JPEG of an RGB picture."""
    height, width = picture.shape[:2]
    scale = min(1.0, THUMBNAIL_SIDE_PX / max(height, width))
    small = resize(picture, max(1, round(height * scale)), max(1, round(width * scale)))
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    if not ok:
        raise RuntimeError(f"OpenCV could not encode {small.shape} as JPEG")
    return bytes(data)


@functools.cache
def _embedder(path: str) -> ImageEmbedder:
    return ImageEmbedder.from_folder(path)
