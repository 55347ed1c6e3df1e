"""Which clips a scanned file gives, which frames they take, and which buckets they fill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from contentv.base.types import Bucket
from contentv.curation.captions import CaptionError, Captions
from contentv.curation.media import MediaItem
from contentv.curation.records import Reject
from contentv.curation.scenes import cut_scene

FPS_SLACK = 1.02  # 24 fps may be sampled from 23.976, not from 12
LIKE_AREA = 0.75  # buckets whose areas are within this ratio are one choice of shape


@dataclass(frozen=True)
class ClipRules:
    """What becomes of clips; the part of the configuration that workers need."""

    buckets: tuple[Bucket, ...]
    min_clip_s: float
    max_clip_s: float
    fps: float | None
    allow_upscale: bool
    max_crop: float | None
    images_from_video: bool
    keep_media: bool
    aspect: str = "nearest"
    frames: str = "every"
    needs_caption: bool = True  # no captioner writes those that are missing


@dataclass(frozen=True)
class FileScan:
    """What a usable file holds.

    `times_s` are the frames' times, increasing, from 0 for a whole file; `pts` the same in the container's units, None
    where the file has no usable ones and frames must be counted. `first` is the number of the first of them. `scenes`
    are [start, end) places in `times_s`.
    """

    item: MediaItem
    captions: Captions | CaptionError
    height: int
    width: int
    fps: float
    times_s: npt.NDArray[np.float64]
    pts: npt.NDArray[np.int64] | None
    scenes: list[tuple[int, int]]
    first: int = 0


@dataclass(frozen=True)
class ClipTask:
    """A clip: which frames of which file, for which buckets. `stamps` are their pts, None = count."""

    item: MediaItem
    scene: int
    clip: int
    caption: str | None
    fps: float
    height: int
    width: int
    frames: tuple[int, ...]  # numbers in the file, one per sampled frame; a frame may repeat
    stamps: tuple[int, ...] | None
    times_s: tuple[float, ...]
    buckets: tuple[Bucket, ...]
    rules: ClipRules


def plan_clips(scan: FileScan, rules: ClipRules) -> list[ClipTask | Reject]:
    """Returns the clips of a file in order, and what of it makes none."""
    name = scan.item.name
    if rules.fps is not None and not scan.item.is_image and rules.fps > scan.fps * FPS_SLACK:
        return [Reject(name, f"the video has {scan.fps:.4g} fps, less than fps={rules.fps:g}", rule="low_fps")]
    planned: list[ClipTask | Reject] = []
    for scene, (start, end) in enumerate(scan.scenes):
        start_s, end_s = float(scan.times_s[start]), _end_s(scan, end)
        try:
            caption = _caption(scan, rules, scene, start_s, end_s)
        except CaptionError as error:
            planned.append(Reject(name, str(error), scene, rule=error.rule))
            continue
        spans = [(start, end)]
        if not scan.item.is_image:
            spans = cut_scene(start, end, scan.fps, rules.min_clip_s, rules.max_clip_s)
        if not spans:
            reason = f"the scene lasts {end_s - start_s:.2f} s, less than min_clip_s={rules.min_clip_s:g}"
            planned.append(Reject(name, reason, scene, rule="too_short"))
        planned.extend(_plan_clip(scan, rules, scene, n, span, caption) for n, span in enumerate(spans))
    return planned


def _caption(scan: FileScan, rules: ClipRules, scene: int, start_s: float, end_s: float) -> str | None:
    try:
        if isinstance(scan.captions, CaptionError):
            raise scan.captions
        return scan.captions.of_scene(scene, len(scan.scenes), start_s, end_s)
    except CaptionError as error:
        if rules.needs_caption or error.rule != "no_caption":
            raise
        return None


def _plan_clip(
    scan: FileScan, rules: ClipRules, scene: int, clip: int, span: tuple[int, int], caption: str | None
) -> ClipTask | Reject:
    rate = rules.fps or scan.fps
    frames = [span[0]]
    if not scan.item.is_image:
        limit = math.ceil(rules.max_clip_s * rate)
        frames = sample_frames(scan.times_s, span, _end_s(scan, span[1]), rate, limit)
    reasons = {b: misfit(b, scan.height, scan.width, len(frames), scan.item.is_image, rules) for b in rules.buckets}
    fitting = [bucket for bucket, reason in reasons.items() if reason is None]
    if not fitting:
        told = "; ".join(f"{bucket.name}: {reason}" for bucket, reason in reasons.items())
        return Reject(scan.item.name, f"the clip fills no bucket ({told})", scene, clip, rule="no_bucket")
    return ClipTask(
        scan.item, scene, clip, caption, 0.0 if scan.item.is_image else rate, scan.height, scan.width,
        tuple(scan.first + n for n in frames),
        None if scan.pts is None else tuple(scan.pts[frames].tolist()), tuple(scan.times_s[frames].tolist()),
        choose_buckets(fitting, scan.height, scan.width, rules), rules,
    )  # fmt: skip


def choose_buckets(fitting: list[Bucket], height: int, width: int, rules: ClipRules) -> tuple[Bucket, ...]:
    """Returns the buckets a clip goes to, in the order of the configuration.

    Args:
        fitting: those it fills, in that order.
        height: of the clip, in pixels.
        width: likewise.
        rules: of several frame counts `frames` keeps all or the largest; of one frame count's buckets of like area
            `aspect` keeps the nearest in aspect ratio, or all.
    """
    videos = [bucket.frames for bucket in fitting if bucket.frames > 1]
    if rules.frames == "longest" and videos:
        fitting = [bucket for bucket in fitting if bucket.frames in (1, max(videos))]
    if rules.aspect == "every":
        return tuple(fitting)
    shape = math.log(width / height)
    groups = [[bucket for bucket in group if bucket in fitting] for group in alike(rules.buckets)]
    chosen = {min(g, key=lambda b: abs(math.log(b.width / b.height) - shape)) for g in groups if g}
    return tuple(bucket for bucket in fitting if bucket in chosen)


def alike(buckets: Sequence[Bucket]) -> list[list[Bucket]]:
    """Returns the buckets in groups of equal frames and like area.

    Areas are alike within a ratio of 0.75 to the largest of their group.
    """
    groups: list[list[Bucket]] = []
    for bucket in sorted(buckets, key=lambda b: (-b.frames, -b.height * b.width)):
        largest = groups[-1][0] if groups else None
        same = largest is not None and largest.frames == bucket.frames
        if same and bucket.height * bucket.width >= LIKE_AREA * largest.height * largest.width:  # type: ignore[union-attr]
            groups[-1].append(bucket)
        else:
            groups.append([bucket])
    order = {bucket: place for place, bucket in enumerate(buckets)}
    return [sorted(group, key=order.__getitem__) for group in groups]


def sample_frames(
    times_s: npt.NDArray[np.float64], span: tuple[int, int], end_s: float, fps: float, limit: int
) -> list[int]:
    """Returns the frames nearest to times 1/fps apart, from the first of a [start, end) span on.

    Args:
        times_s: of all frames of the file, increasing.
        span: the clip's first frame and the one after its last.
        end_s: when the clip's last frame ends.
        fps: sampling rate.
        limit: most frames; a file may claim any time.
    """
    start, end = span
    own = times_s[start:end]
    count = max(1, min(limit, int((end_s - own[0]) * fps + 0.01)))
    if len(own) == 1:
        return [start] * count
    wanted = own[0] + np.arange(count) / fps
    later = np.clip(np.searchsorted(own, wanted), 1, len(own) - 1)
    nearest = np.where(wanted - own[later - 1] <= own[later] - wanted, later - 1, later)
    return [start + int(i) for i in nearest]


def misfit(bucket: Bucket, height: int, width: int, frames: int, is_image: bool, rules: ClipRules) -> str | None:
    """Returns why a clip of so many pixels and frames cannot go to a bucket, None if it can."""
    if is_image and bucket.frames > 1:
        return "not for stills"
    if bucket.frames == 1 and not is_image and not rules.images_from_video:
        return "not for videos"
    if frames < bucket.frames:
        return f"{frames} frames are too few"
    if not rules.allow_upscale and (height < bucket.height or width < bucket.width):
        return f"{height} x {width} pixels are too few"
    scale = max(bucket.height / height, bucket.width / width)
    lost = 1 - bucket.height * bucket.width / (height * scale * width * scale)
    if rules.max_crop is not None and lost > rules.max_crop:
        return f"cropping would lose {lost:.0%}"
    return None


def _end_s(scan: FileScan, end: int) -> float:
    """Returns when frame `end - 1` ends."""
    if end < len(scan.times_s):
        return float(scan.times_s[end])
    return float(scan.times_s[end - 1]) + (1 / scan.fps if scan.fps > 0 else 0.0)
