"""The report of one dataset: what is in it, how its clips score, what was rejected and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contentv.base.errors import UserError
from contentv.report import page
from contentv.report.charts import bar_chart, histogram, scatter
from contentv.report.markup import Html, duration, number, size, tag
from contentv.report.metrics import read_jsonl

# The quadrants of the motion-against-visual plane, in the order the scatter draws them.
MOTION_RICH, CLEAN_LOOKING, BOTH, NEITHER = "motion-rich", "clean-looking", "both", "neither"
QUADRANTS = (MOTION_RICH, CLEAN_LOOKING, BOTH, NEITHER)
SPLIT = 0.5
MAX_DOTS = 3000  # of each quadrant

Quality = Callable[[dict[str, Any]], tuple[float, float]]


@dataclass
class ClipStats:
    """What the report needs of all clips, gathered in one pass."""

    clips: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    motion: list[float] = field(default_factory=list)
    visual: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)


def write_dataset_report(
    dataset_dir: Path,
    metas: Iterable[dict[str, Any]],
    info: Mapping[str, Any],
    quality: Quality | None,
    out: Path,
) -> Path:
    """Returns `out`, newly written: one page about a dataset.

    Args:
        dataset_dir: the dataset's folder; rejects.jsonl (one {"reason": ...} a rejected clip) is read if it is there.
        metas: the JSON record of each sample, in any order; read once.
        info: the contents of dataset.json.
        quality: record -> (motion, visual), both in [0, 1] and NaN where a clip has none. None ranks the raw scores
            within this dataset.
        out: where the page goes.

    Raises:
        UserError: a line of rejects.jsonl is malformed or names no reason.
    """
    stats = gather(metas, quality)
    sections = [
        _totals(stats, info),
        page.section("Buckets", _buckets(info)),
        quality_section(stats, ranked=quality is None),
        page.section("Scores", _score_charts(stats)),
        page.section("Rejected clips", _rejects(Path(dataset_dir) / "rejects.jsonl")),
    ]
    name = Path(dataset_dir).resolve().name
    return page.write_page(Path(out), page.page(f"Dataset report: {name}", str(dataset_dir), sections))


def gather(metas: Iterable[dict[str, Any]], quality: Quality | None) -> ClipStats:
    """Returns counts, durations and scores of all clips; motion and visual in [0, 1], NaN where a clip has none."""
    stats = ClipStats()
    for meta in metas:
        stats.clips += 1
        stats.seconds += _number(meta.get("duration_s"), missing=0.0)
        stats.kinds[str(meta.get("kind", "unknown"))] += 1
        stats.sources[str(meta.get("source", "unknown"))] += 1
        if quality is None:
            motion, visual = _number(meta.get("motion_raw")), _number(meta.get("visual_raw"))
        else:
            motion, visual = quality(meta)
        stats.motion.append(float(motion))
        stats.visual.append(float(visual))
        own = {k: meta.get(k) for k in ("motion_raw", "visual_raw")}
        for key, value in {**own, **(meta.get("scores") or {})}.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                stats.scores.setdefault(str(key), []).append(float(value))
    if quality is None:
        stats.motion, stats.visual = ranks(stats.motion), ranks(stats.visual)
    return stats


def quality_section(stats: ClipStats, *, ranked: bool) -> Html:
    """Returns the motion-against-visual scatter with its counted quadrants and the correlation."""
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in QUADRANTS}
    for m, v in zip(stats.motion, stats.visual, strict=True):
        if math.isfinite(m) and math.isfinite(v):
            points[quadrant(m, v)].append((m, v))
    counts = {name: len(found) for name, found in points.items()}
    total = sum(counts.values())
    drawn = {name: found[:: max(1, math.ceil(len(found) / MAX_DOTS))] for name, found in points.items()}
    num_drawn = sum(len(found) for found in drawn.values())
    notes = [f"{num_drawn:,} of {total:,} clips are drawn, evenly picked."] if num_drawn < total else []
    if total < stats.clips:
        notes.append(f"Clips without both scores are left out: {stats.clips - total:,}.")
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
    return page.section("Motion or looks", page.charts(chart, listing), lead=lead)


_MEANING = {
    MOTION_RICH: "moves much, looks poor: teaches layout and motion, best at high noise",
    CLEAN_LOOKING: "looks good, moves little: teaches texture, best at low noise",
    BOTH: "moves much and looks good: useful at every noise level",
    NEITHER: "moves little and looks poor: mostly dropped by a quality-aware sampler",
}


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


def correlation_sentence(a: Sequence[float], b: Sequence[float]) -> str:
    """Returns the correlation in words."""
    found = correlation(a, b)
    if found is None:
        return "There are too few scored clips for a correlation."
    r, low, high, n = found
    interval = f"95 % interval {low:+.2f} to {high:+.2f}"
    return f"The correlation of motion and visual scores is {r:+.2f} ({interval}, {n:,} clips)."


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


def _totals(stats: ClipStats, info: Mapping[str, Any]) -> Html:
    shards = info.get("shards") or []
    found = [
        page.card("samples", number(stats.clips), ", ".join(f"{n:,} {k}" for k, n in stats.kinds.most_common(3))),
        page.card("duration", duration(stats.seconds)),
        page.card("sources", number(len(stats.sources)), ", ".join(name for name, _ in stats.sources.most_common(4))),
        page.card("shards", number(len(shards)), size(sum(float(s.get("bytes", 0)) for s in shards))),
    ]
    return page.cards(*found)


def _buckets(info: Mapping[str, Any]) -> Html:
    buckets = info.get("buckets") or {}
    if not buckets:
        return tag("p", "dataset.json lists no buckets", class_="empty")
    rows = []
    for name, bucket in sorted(buckets.items()):
        shape = " x ".join(str(v) for v in bucket.get("latent_shape", []))
        rows.append([name, int(bucket.get("samples", 0)), shape or "n/a"])
    samples = {str(row[0]): float(row[1]) for row in rows}
    listing = page.table(["bucket", "samples", "latent shape (c t h w)"], rows)
    return page.charts(bar_chart("Samples in each bucket", samples), listing)


def _score_charts(stats: ClipStats) -> Html:
    if not stats.scores:
        return tag("p", "no clip carries a score", class_="empty")
    return page.charts(*(histogram(k, v, x_label=k) for k, v in stats.scores.items()))


def _rejects(path: Path) -> Html:
    if not path.is_file():
        return tag("p", "there is no rejects.jsonl: nothing is known of rejected clips", class_="empty")
    reasons: Counter[str] = Counter()
    for where, row in read_jsonl(path):
        if not isinstance(row.get("reason"), str):
            raise UserError(f'"reason" is {row.get("reason")!r}, not a text', where=where)
        reasons[row["reason"]] += 1
    if not reasons:
        return tag("p", "no clip was rejected", class_="empty")
    values = {reason: float(count) for reason, count in reasons.most_common(20)}
    return page.charts(bar_chart(f"{sum(reasons.values()):,} rejected, by reason", values))


def _number(value: Any, missing: float = math.nan) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else missing
