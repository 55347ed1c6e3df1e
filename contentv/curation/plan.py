"""Which clips a scanned file gives, which frames they take, and which buckets they fill."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from contentv.base.types import Bucket
from contentv.curation.captions import CaptionError
from contentv.curation.filters import FilterConfig
from contentv.curation.inputs import MediaItem
from contentv.curation.scan import FileScan, Reject
from contentv.curation.scenes import cut_scene

FPS_SLACK = 1.02  # 24 fps may be sampled from 23.976, not from 12


@dataclass(frozen=True)
class ClipRules:
    """What becomes of clips; the part of the configuration that workers need."""

    buckets: tuple[Bucket, ...]
    min_clip_s: float
    max_clip_s: float
    fps: float | None
    filters: FilterConfig
    allow_upscale: bool
    max_crop: float | None
    images_from_video: bool
    keep_media: bool


@dataclass(frozen=True)
class ClipTask:
    """A clip to decode: which frames of which file, for which buckets. `stamps` are their pts, None = count."""

    item: MediaItem
    xxh128: str
    scene: int
    clip: int
    caption: str
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
    if rules.fps is not None and not scan.item.is_image and rules.fps > scan.fps * FPS_SLACK:
        return [Reject(scan.item.name, f"the video has {scan.fps:.4g} fps, less than fps={rules.fps:g}")]
    planned: list[ClipTask | Reject] = []
    for scene, (start, end) in enumerate(scan.scenes):
        start_s, end_s = float(scan.times_s[start]), _end_s(scan, end)
        try:
            caption = scan.captions.of_scene(scene, len(scan.scenes), start_s, end_s)
        except CaptionError as error:
            planned.append(Reject(scan.item.name, str(error), scene, lacks_caption=True))
            continue
        spans = [(start, end)]
        if not scan.item.is_image:
            spans = cut_scene(start, end, scan.fps, rules.min_clip_s, rules.max_clip_s)
        if not spans:
            reason = f"the scene lasts {end_s - start_s:.2f} s, less than min_clip_s={rules.min_clip_s:g}"
            planned.append(Reject(scan.item.name, reason, scene))
        planned.extend(_plan_clip(scan, rules, scene, n, span, caption) for n, span in enumerate(spans))
    return planned


def _plan_clip(
    scan: FileScan, rules: ClipRules, scene: int, clip: int, span: tuple[int, int], caption: str
) -> ClipTask | Reject:
    rate = rules.fps or scan.fps
    frames = [span[0]]
    if not scan.item.is_image:
        limit = math.ceil(rules.max_clip_s * rate)
        frames = sample_frames(scan.times_s, span, _end_s(scan, span[1]), rate, limit)
    reasons = {b: misfit(b, scan.height, scan.width, len(frames), scan.item.is_image, rules) for b in rules.buckets}
    buckets = tuple(bucket for bucket, reason in reasons.items() if reason is None)
    if not buckets:
        told = "; ".join(f"{bucket.name}: {reason}" for bucket, reason in reasons.items())
        return Reject(scan.item.name, f"the clip fills no bucket ({told})", scene, clip)
    return ClipTask(
        scan.item, scan.xxh128, scene, clip, caption, rate, scan.height, scan.width, tuple(frames),
        None if scan.pts is None else tuple(scan.pts[frames].tolist()), tuple(scan.times_s[frames].tolist()),
        buckets, rules,
    )  # fmt: skip


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
