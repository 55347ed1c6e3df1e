"""The report of one dataset: what is in it, how its clips score, what they would train, what was rejected and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from contentv.base.types import Bucket
from contentv.diffusion.samplers import LogitNormal
from contentv.diffusion.tqd import TQD
from contentv.report import page
from contentv.report.charts import bar_chart, histogram, scatter
from contentv.report.dataset_pictures import Media, Pictures
from contentv.report.dataset_rejects import rejects_section
from contentv.report.dataset_runs import ratio_name, runs_section, shapes_chart
from contentv.report.dataset_sigma import sigma_section
from contentv.report.dataset_stats import (
    BOTH,
    CLEAN_LOOKING,
    MAX_TEXT,
    MOTION_RICH,
    NEITHER,
    QUADRANTS,
    SPLIT,
    ClipStats,
    Quality,
    SourceStats,
    correlation,
    gather,
    quadrant,
    ranks,
)
from contentv.report.markup import Html, duration, join, number, size, tag

__all__ = [
    "BOTH", "CLEAN_LOOKING", "MOTION_RICH", "NEITHER", "QUADRANTS", "Quality", "correlation", "correlation_sentence",
    "gather", "quadrant", "quality_section", "ranks", "write_dataset_report",
]  # fmt: skip

MAX_DOTS = 3000  # of each quadrant
MAX_SOURCES = 40
MAX_SCORES = 40
SHOWN = 6
PATCH = 2  # of latents a side, that are one token


def write_dataset_report(
    dataset_dir: Path,
    metas: Iterable[dict[str, Any]],
    info: Mapping[str, Any],
    quality: Quality | None,
    out: Path,
    *,
    tqd: TQD | None = None,
    global_batch_size: int = 32,
    media: Media | None = None,
) -> Path:
    """Returns `out`, newly written: one page about a dataset.

    Args:
        dataset_dir: the dataset's folder; rejects.jsonl, thumbnails.jsonl and curation/ are read where they exist.
        metas: the JSON record of each sample, in any order, with its `bucket`; read once.
        info: the contents of dataset.json.
        quality: record -> (motion, visual), both in [0, 1] and NaN where a clip has none. None ranks the raw scores
            within this dataset.
        out: where the page goes.
        tqd: the sampler whose noise levels are shown; None = its defaults over logit-normal.
        global_batch_size: clips of an optimiser step, for the steps in an epoch.
        media: clip -> suffix and bytes of the stored clip, for pictures of clips without a thumbnail.
    """
    folder = Path(dataset_dir)
    pictures = Pictures(folder, media)
    stats = gather(metas, quality, pictures.keys)
    sections = [
        _totals(stats, info),
        page.section("Sources", _sources(stats)),
        _buckets(folder, info, global_batch_size),
        quality_section(stats, ranked=quality is None, pictures=pictures),
        sigma_section(stats, tqd or TQD(LogitNormal()), pictures),
        page.section("Scores", _score_charts(stats), lead=_picked(stats)),
        _captions(stats),
        rejects_section(folder, pictures),
        runs_section(folder),
    ]
    name = folder.resolve().name
    return page.write_page(Path(out), page.page(f"Dataset report: {name}", str(dataset_dir), sections))


def quality_section(stats: ClipStats, *, ranked: bool, pictures: Pictures | None = None) -> Html:
    """Returns the motion-against-visual scatter with its counted quadrants, the correlation, and clips of each."""
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in QUADRANTS}
    for clip in stats.kept:
        if clip.quadrant is not None:
            points[clip.quadrant].append((clip.motion, clip.visual))
    counts = {name: stats.quadrants[name] for name in QUADRANTS}
    total = sum(counts.values())
    drawn = {name: found[:: max(1, math.ceil(len(found) / MAX_DOTS))] for name, found in points.items()}
    num_drawn = sum(len(found) for found in drawn.values())
    notes = [f"{num_drawn:,} of {total:,} clips are drawn, evenly picked."] if num_drawn < total else []
    if stats.unscored:
        notes.append(f"Clips without both scores are left out: {stats.unscored:,}.")
    notes += [f"{count:,} samples: {what}." for what, count in stats.faults.most_common(3)]
    chart = scatter(
        "Motion against visual quality", drawn, x_label="motion score", y_label="visual score", counts=counts,
        split=SPLIT, note=" ".join(notes),
    )  # fmt: skip
    rows = [
        [name, counts[name], f"{counts[name] / total:.1%}" if total else "n/a", _MEANING[name]] for name in QUADRANTS
    ]
    lead = (
        "Do the clips that move most look worst? "
        + correlation_sentence(stats.motion, stats.visual)
        + (" Scores are shown as ranks within this dataset." if ranked else " Scores are normalised to 0..1.")
    )
    listing = page.table(["quadrant", "clips", "share", "meaning"], rows)
    strips = [] if pictures is None else _quadrant_strips(stats, pictures)
    return page.section("Motion or looks", page.charts(chart, listing), *strips, lead=lead)


_MEANING = {
    MOTION_RICH: "moves much, looks poor: teaches layout and motion, best at high noise",
    CLEAN_LOOKING: "looks good, moves little: teaches texture, best at low noise",
    BOTH: "moves much and looks good: useful at every noise level",
    NEITHER: "moves little and looks poor: mostly dropped by a quality-aware sampler",
}


def correlation_sentence(a: list[float], b: list[float]) -> str:
    """Returns the correlation in words."""
    found = correlation(a, b)
    if found is None:
        return "There are too few scored clips for a correlation."
    r, low, high, n = found
    interval = f"95 % interval {low:+.2f} to {high:+.2f}"
    return f"The correlation of motion and visual scores is {r:+.2f} ({interval}, {n:,} clips)."


def _quadrant_strips(stats: ClipStats, pictures: Pictures) -> list[Html]:
    pool = stats.wanted or [clip for clip in stats.kept if clip.has_media]
    parts = []
    for name in QUADRANTS:
        clips = [clip for clip in pool if clip.quadrant == name]
        details = [f"motion {number(round(c.motion, 2))}, visual {number(round(c.visual, 2))}" for c in clips]
        strip = pictures.strip(clips, details, SHOWN)
        if strip is not None:
            parts += [tag("h3", f"Clips of {name}"), strip]
    return parts


def _totals(stats: ClipStats, info: Mapping[str, Any]) -> Html:
    shards = info.get("shards") or []
    largest = sorted(stats.sources, key=lambda name: -stats.sources[name].samples)[:4]
    found = [
        page.card("samples", number(stats.clips), ", ".join(f"{n:,} {k}" for k, n in stats.kinds.most_common(3))),
        page.card("duration", duration(stats.seconds)),
        page.card("sources", number(len(stats.sources)), ", ".join(largest)),
        page.card("shards", number(len(shards)), size(sum(float(s.get("bytes", 0)) for s in shards))),
    ]
    return page.cards(*found)


def _sources(stats: ClipStats) -> Html:
    order = sorted(stats.sources.items(), key=lambda item: (-item[1].samples, item[0]))
    rows = [_source_row(name, source) for name, source in order[:MAX_SOURCES]]
    columns = ["source", "samples", "images", "hours of video", "motion raw", "visual raw", "motion", "visual"]
    rest = order[MAX_SOURCES:]
    note = f"{len(rest):,} smaller sources with {sum(s.samples for _, s in rest):,} samples are not shown. "
    told = (note if rest else "") + "Scores are means; motion and visual without `raw` lie in 0..1."
    if not rows:
        return tag("p", "there are no samples", class_="empty")
    return join([page.table(columns, rows), tag("p", told, class_="note")])


def _source_row(name: str, source: SourceStats) -> list[Any]:
    means = [source.mean(key) for key in ("motion_raw", "visual_raw", "motion", "visual")]
    return [name, source.samples, source.images, source.seconds / 3600, *means]


def _buckets(folder: Path, info: Mapping[str, Any], global_batch_size: int) -> Html:
    buckets = info.get("buckets") or {}
    if not buckets:
        return page.section("Buckets", tag("p", "dataset.json lists no buckets", class_="empty"), shapes_chart(folder))
    text = (info.get("text") or {}).get("num_tokens")
    total = sum(int(bucket.get("samples", 0)) for bucket in buckets.values())
    tokens = {name: _tokens(bucket, text) for name, bucket in buckets.items()}
    all_tokens = sum(count * int(buckets[name].get("samples", 0)) for name, count in tokens.items() if count)
    rows = []
    for name, bucket in sorted(buckets.items()):
        samples = int(bucket.get("samples", 0))
        shape = " x ".join(str(v) for v in bucket.get("latent_shape", []))
        count = tokens[name]
        of_all = f"{count * samples / all_tokens:.1%}" if count and all_tokens else "n/a"
        share = f"{samples / total:.1%}" if total else "n/a"
        steps = samples / global_batch_size
        rows.append([name, _ratio(name), samples, share, shape or "n/a", count, of_all, round(steps, 1)])
    columns = ["bucket", "aspect ratio", "samples", "share", "latent shape (c t h w)", "tokens each", "share of tokens",
               "steps in an epoch"]  # fmt: skip
    lead = (
        f"Tokens are those of a model with patches of {PATCH} x {PATCH} latents, text included. An epoch is "
        f"{total / global_batch_size:,.1f} steps of {global_batch_size:,} clips; all clips of a step are of one bucket."
    )
    bars = bar_chart("Samples in each bucket", {str(row[0]): float(row[2]) for row in rows})
    return page.section(
        "Buckets", page.table(columns, rows), page.charts(bars, shapes_chart(folder)), lead=lead
    )  # fmt: skip


def _tokens(bucket: Mapping[str, Any], text: Any) -> int | None:
    shape = bucket.get("latent_shape")
    if not isinstance(shape, (list, tuple)) or len(shape) != 4 or not all(isinstance(v, int) for v in shape):
        return None
    _, t, h, w = shape
    return t * (h // PATCH) * (w // PATCH) + (text if isinstance(text, int) else 0)


def _ratio(name: str) -> str:
    try:
        bucket = Bucket.parse(name)
    except ValueError:
        return "n/a"
    if min(bucket) < 1:
        return "n/a"
    found = ratio_name(bucket.width, bucket.height)
    return found if found != "other" else f"{bucket.width / bucket.height:.2f}:1"


def _score_charts(stats: ClipStats) -> Html:
    names = stats.score_names()
    if not names:
        return tag("p", "no clip carries a score", class_="empty")
    found = {name: [clip.scores[name] for clip in stats.kept if name in clip.scores] for name in names[:MAX_SCORES]}
    drawn = [histogram(name[:MAX_TEXT], values, x_label=name[:40]) for name, values in found.items()]
    rest = len(names) - len(drawn)
    return page.charts(*drawn, *([tag("p", f"{rest:,} further scores are not drawn", class_="note")] if rest else []))


def _picked(stats: ClipStats) -> str:
    return f"Drawn from every {stats.stride:,}th sample." if stats.stride > 1 else ""


def _captions(stats: ClipStats) -> Html:
    found = stats.captions
    if not stats.clips:
        return page.section("Captions", tag("p", "there are no samples", class_="empty"))
    total = sum(found.words.values())
    mean = sum(words * count for words, count in found.words.items()) / total
    lengths = [float(words) for words, count in sorted(found.words.items()) for _ in range(_thinned(count, total))]
    about = "" if found.complete else f" Among the first {len(found.counts):,} different ones."
    cards = page.cards(
        page.card("words on average", number(mean)),
        page.card("empty captions", number(found.empty), f"{found.empty / total:.1%} of the samples"),
        page.card("captions that come again", number(found.repeated),
                  f"samples whose caption another of the bucket has, beyond the first.{about}"),
    )  # fmt: skip
    rows = found.most_common(10)
    listing = page.table(["most frequent captions", "bucket", "samples"], rows) if rows else tag(
        "p", "no caption comes more than once in a bucket", class_="empty"
    )  # fmt: skip
    drawn = histogram("Words of a caption", lengths, x_label="words", note=_thinning(total))
    return page.section("Captions", cards, page.charts(drawn, listing))


def _thinned(count: int, total: int, most: int = 20_000) -> int:
    return count if total <= most else max(1, round(count * most / total))


def _thinning(total: int, most: int = 20_000) -> str:
    return f"Counts are scaled down from {total:,} samples to {most:,}." if total > most else ""
