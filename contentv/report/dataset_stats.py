"""What a report needs of a dataset's samples, gathered in one pass: exact counts, and an even pick of the samples."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from contentv.base.errors import UserError

# The quadrants of the motion-against-visual plane, in the order the scatter draws them.
MOTION_RICH, CLEAN_LOOKING, BOTH, NEITHER = "motion-rich", "clean-looking", "both", "neither"
QUADRANTS = (MOTION_RICH, CLEAN_LOOKING, BOTH, NEITHER)
SPLIT = 0.5
MAX_KEPT = 20_000  # samples that charts are drawn from; the memory of a report does not grow beyond them
MAX_CAPTIONS = 1_000_000  # different captions that are told apart when copies are counted
MAX_TEXT = 240  # characters of a caption or name that a page shows

_BUCKET = re.compile(r"-f\d+_h\d+_w\d+-")

Quality = Callable[[dict[str, Any]], tuple[float, float]]


@dataclass(frozen=True)
class Clip:
    """A sample that charts and strips are made from; scores in [0, 1], NaN where it has none."""

    key: str
    caption: str
    source: str
    bucket: str
    motion: float
    visual: float
    scores: Mapping[str, float]
    has_media: bool = False

    @property
    def quadrant(self) -> str | None:
        """The name of its quadrant, None without both scores."""
        scored = math.isfinite(self.motion) and math.isfinite(self.visual)
        return quadrant(self.motion, self.visual) if scored else None


@dataclass
class SourceStats:
    """Sums over the samples of one source; `sums` holds (sum, count) of each score."""

    samples: int = 0
    images: int = 0
    seconds: float = 0.0
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """Counts a score, unless it is not finite."""
        if math.isfinite(value):
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def mean(self, name: str) -> float | None:
        """Returns the mean of a score, None where no sample has it."""
        total, count = self.sums.get(name, (0.0, 0))
        return total / count if count else None


@dataclass
class CaptionStats:
    """How long captions are, and which more than one sample of a bucket has."""

    words: Counter[int] = field(default_factory=Counter)
    empty: int = 0
    counts: dict[int, int] = field(default_factory=dict)  # checksum of bucket and caption -> samples
    texts: dict[int, tuple[str, str]] = field(default_factory=dict)  # the same -> both, of those that come again
    complete: bool = True

    def add(self, caption: str, bucket: str) -> None:
        """Counts one."""
        stripped = caption.strip()
        self.words[len(stripped.split())] += 1
        if not stripped:
            self.empty += 1
            return
        digest = hashlib.blake2b(f"{bucket}\0{stripped}".encode("utf-8", "replace"), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        if key in self.counts:
            self.counts[key] += 1
            if len(self.texts) < MAX_CAPTIONS // 100:
                self.texts.setdefault(key, (stripped[:MAX_TEXT], bucket))
        elif len(self.counts) < MAX_CAPTIONS:
            self.counts[key] = 1
        else:
            self.complete = False

    @property
    def repeated(self) -> int:
        """Samples whose caption an earlier one of the bucket has."""
        return sum(self.counts.values()) - len(self.counts)

    def most_common(self, count: int) -> list[tuple[str, str, int]]:
        """Returns captions that come more than once, their bucket and how often, the most frequent first."""
        found = sorted(self.texts.items(), key=lambda item: (-self.counts[item[0]], item[1]))
        return [(*text, self.counts[key]) for key, text in found[:count]]


@dataclass
class ClipStats:
    """Counts over all samples, and every `stride`-th of them.

    Attributes:
        clips: samples seen.
        unscored: those without both scores.
        kept: every `stride`-th, in order, at most MAX_KEPT.
        wanted: those of the clips that were asked for.
        faults: what was wrong with the scores of how many.
    """

    clips: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    sources: dict[str, SourceStats] = field(default_factory=dict)
    quadrants: Counter[str] = field(default_factory=Counter)
    unscored: int = 0
    captions: CaptionStats = field(default_factory=CaptionStats)
    kept: list[Clip] = field(default_factory=list)
    wanted: list[Clip] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    stride: int = 1

    @property
    def motion(self) -> list[float]:
        """Motion scores of the kept samples."""
        return [clip.motion for clip in self.kept]

    @property
    def visual(self) -> list[float]:
        """Visual scores of the kept samples."""
        return [clip.visual for clip in self.kept]

    def score_names(self) -> list[str]:
        """Returns the names of all scores that a kept sample has, in the order they appear."""
        return list(dict.fromkeys(name for clip in self.kept for name in clip.scores))

    def keep(self, clip: Clip) -> None:
        """Keeps the sample if it is its turn; once there are too many, every second one is let go."""
        if (self.clips - 1) % self.stride:
            return
        if len(self.kept) == MAX_KEPT:
            self.kept = self.kept[::2]
            self.stride *= 2
            if (self.clips - 1) % self.stride:
                return
        self.kept.append(clip)


def clip_name(key: str) -> str:
    """Returns what the samples of one clip share: their key without the bucket that curation writes into it."""
    return _BUCKET.sub("-", key)


def gather(metas: Iterable[dict[str, Any]], quality: Quality | None, wanted: Collection[str] = ()) -> ClipStats:
    """Returns the statistics of all samples.

    Args:
        metas: the JSON record of each, in any order; read once.
        quality: record -> (motion, visual) in [0, 1], NaN where there is none. None ranks the raw scores among the
            kept samples; quadrants are then counted among them as well.
        wanted: keys of samples to keep in any case, with the other samples of the same clips.
    """
    stats = ClipStats()
    clips = frozenset(map(clip_name, wanted))
    for meta in metas:
        clip = _clip(meta, quality, stats)
        _count(meta, clip, stats)
        stats.keep(clip)
        if clip_name(clip.key) in clips:
            stats.wanted.append(clip)
    if quality is None:
        _rank(stats)
    return stats


def _count(meta: Mapping[str, Any], clip: Clip, stats: ClipStats) -> None:
    stats.clips += 1
    seconds = _number(meta.get("duration_s"), missing=0.0)
    kind = str(meta.get("kind", "unknown"))
    stats.seconds += seconds
    stats.kinds[kind] += 1
    source = stats.sources.setdefault(clip.source, SourceStats())
    source.samples += 1
    source.images += kind == "image"
    source.seconds += 0.0 if kind == "image" else seconds
    for name, value in clip.scores.items():
        source.add(name, value)
    source.add("motion", clip.motion)
    source.add("visual", clip.visual)
    stats.captions.add(str(meta.get("caption", "")), clip.bucket)
    found = clip.quadrant
    if found is None:
        stats.unscored += 1
    else:
        stats.quadrants[found] += 1


def _clip(meta: dict[str, Any], quality: Quality | None, stats: ClipStats) -> Clip:
    motion, visual = _number(meta.get("motion_raw")), _number(meta.get("visual_raw"))
    if quality is not None:
        try:
            motion, visual = quality(meta)
        except UserError as error:  # a source that quality.json does not know: it was not fitted again
            stats.faults[error.what] += 1
            motion = visual = math.nan
    raw = {"motion_raw": meta.get("motion_raw"), "visual_raw": meta.get("visual_raw"), **(meta.get("scores") or {})}
    scores = {str(k): float(v) for k, v in raw.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    key, caption, bucket = (str(meta.get(name, "")) for name in ("key", "caption", "bucket"))
    source = str(meta.get("source", "unknown"))[:MAX_TEXT]
    has_media = meta.get("media_xxh128") is not None
    return Clip(key, caption[:MAX_TEXT], source, bucket, float(motion), float(visual), scores, has_media)


def _rank(stats: ClipStats) -> None:
    """Puts ranks in the place of raw scores, and counts the quadrants of the kept samples by them."""
    motion, visual = ranks(stats.motion), ranks(stats.visual)
    stats.kept = [replace(c, motion=m, visual=v) for c, m, v in zip(stats.kept, motion, visual, strict=True)]
    by_key = {clip.key: clip for clip in stats.kept}
    stats.wanted = [by_key[clip.key] for clip in stats.wanted if clip.key in by_key]
    found = [clip.quadrant for clip in stats.kept]
    stats.quadrants = Counter(name for name in found if name is not None)
    stats.unscored = found.count(None)


def quadrant(motion: float, visual: float, split: float = SPLIT) -> str:
    """Returns the name of the quadrant that a pair of scores lies in."""
    if motion >= split:
        return BOTH if visual >= split else MOTION_RICH
    return CLEAN_LOOKING if visual >= split else NEITHER


def correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float, int] | None:
    """Returns Pearson's correlation, its 95 % interval (Fisher's z) and the number of pairs; None under four pairs.

    Pairs with a value that is not finite are left out; None as well where one side does not vary.
    """
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if math.isfinite(x) and math.isfinite(y)]
    n = len(pairs)
    if n < 4:
        return None
    mean_a, mean_b = math.fsum(x for x, _ in pairs) / n, math.fsum(y for _, y in pairs) / n
    var_a = math.fsum((x - mean_a) ** 2 for x, _ in pairs)
    var_b = math.fsum((y - mean_b) ** 2 for _, y in pairs)
    if var_a <= 0 or var_b <= 0:
        return None
    r = math.fsum((x - mean_a) * (y - mean_b) for x, y in pairs) / math.sqrt(var_a * var_b)
    r = max(-1.0, min(1.0, r))
    z, width = math.atanh(max(-0.9999999, min(0.9999999, r))), 1.96 / math.sqrt(n - 3)
    return r, math.tanh(z - width), math.tanh(z + width), n


def ranks(values: Sequence[float]) -> list[float]:
    """Returns each value's rank within the finite ones, scaled to [0, 1]; equal values share their mean rank."""
    order = sorted((i for i, v in enumerate(values) if math.isfinite(v)), key=lambda i: values[i])
    result = [math.nan] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        share = (start + end - 1) / 2 / max(len(order) - 1, 1) if len(order) > 1 else 0.5
        for i in order[start:end]:
            result[i] = share
        start = end
    return result


def _number(value: Any, missing: float = math.nan) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else missing
