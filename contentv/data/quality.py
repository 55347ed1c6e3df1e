"""Raw scores to [0, 1]: the percentile rank of a clip within its source or the whole dataset, by knots in quality.json.

Shards hold raw scores only, and quality.json the statistics that every form needs, so a run chooses the form and the
scope, and the statistics can be fitted again without touching the shards. Ranks make the scores uniform, which timestep
samplers driven by quality rely on; min-max (clipped to the 1 % and 99 % quantiles) and the logistic function of the
z-score keep distances, and are for scores whose scale means something.

Ranks within a source judge a clip among its own kind: each source then trains all noise levels. Ranks within the corpus
let a source that is worse throughout say so; they need scores that mean the same in all sources.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contentv.base.errors import UserError
from contentv.data.dataset import QUALITY_FILE, read_record
from contentv.data.files import to_json, write_atomic
from contentv.data.storage import Storage, open_storage

QUALITY_VERSION = 1
SCORE_NAMES = ("visual_raw", "motion_raw")
MODES = ("quantile", "minmax", "zsigmoid")
SCOPES = ("source", "corpus")
DRIFT_SHARE = 0.1  # of new clips outside the old 1 % .. 99 % quantiles, where 2 % are to be expected
_LEAST_CLIPS = 50  # fewer say nothing about drift
_LEVELS = 100  # knots at 0 %, 1 %, ... 100 %
_REMEDY = "run contentv.data.refit_quality on the dataset's folder"


@dataclass
class ScoreStatistics:
    """Of one raw score in one source: how many clips have it, its 101 quantiles, mean and standard deviation."""

    count: int
    knots: list[float]
    mean: float
    std: float

    def __post_init__(self) -> None:
        if len(self.knots) != (_LEVELS + 1 if self.count else 0):
            raise ValueError(f"{len(self.knots)} knots for {self.count} scores")
        if any(b < a for a, b in zip(self.knots, self.knots[1:], strict=False)) or not math.isfinite(sum(self.knots)):
            raise ValueError("knots must be finite and ascend")

    @classmethod
    def fit(cls, raw: Iterable[float]) -> ScoreStatistics:
        """Returns the statistics of some raw scores."""
        values = np.fromiter(raw, dtype=np.float64)
        if not len(values):
            return cls(0, [], 0.0, 0.0)
        knots = np.maximum.accumulate(np.quantile(values, np.linspace(0.0, 1.0, _LEVELS + 1)))
        return cls(len(values), [float(k) for k in knots], float(values.mean()), float(values.std()))

    def outside(self, raw: NDArray[np.float64], tails: int = 0) -> NDArray[np.bool_]:
        """Returns which raw scores lie outside the range that was fitted; NaN does not.

        Args:
            raw: scores.
            tails: how many percent to leave out at either end of that range, 0..49.
        """
        if not self.count:
            return ~np.isnan(raw)
        low, high = self.knots[tails], self.knots[_LEVELS - tails]
        rounding = 1e-6 * max(abs(low), abs(high))  # columns of scores may be fp32
        found: NDArray[np.bool_] = (raw < low - rounding) | (raw > high + rounding)
        return found


@dataclass
class Normaliser:
    """Maps raw scores to [0, 1] with the statistics of their source, or of all of them together.

    Args:
        sources: source -> raw score's name -> statistics.
        mode: quantile (percentile rank), minmax (between the 1 % and 99 % quantiles, clipped) or zsigmoid (logistic
            function of the z-score).
        corpus: raw score's name -> statistics of all sources together; used for every source that `sources` knows.

    Raises:
        UserError: the mode is unknown.
    """

    sources: Mapping[str, Mapping[str, ScoreStatistics]]
    mode: str = "quantile"
    corpus: Mapping[str, ScoreStatistics] | None = None

    def __post_init__(self) -> None:
        if self.corpus is not None:
            self.sources = dict.fromkeys(self.sources, self.corpus)
        if self.mode not in MODES:
            raise UserError(
                f'quality mode "{self.mode}" is unknown', where="data.quality_mode", remedy=f"use {', '.join(MODES)}"
            )

    def apply(self, source: str, name: str, raw: float | None) -> float:
        """Returns one score in [0, 1], NaN where the clip has none (`raw` None or NaN)."""
        if self.mode == "quantile" and raw is not None and raw == raw:
            of_source = self.sources.get(source)
            statistics = None if of_source is None else of_source.get(name)
            if statistics is not None and statistics.count:
                return _rank_of(raw, statistics.knots)
        return float(self.apply_many(source, name, np.array([math.nan if raw is None else raw]))[0])

    def scores(self, meta: Mapping[str, Any]) -> tuple[float, float]:
        """Returns (motion, visual) in [0, 1] of a clip's record, NaN where it has no score."""
        source, motion, visual = meta["source"], meta["motion_raw"], meta["visual_raw"]
        return self.apply(source, "motion_raw", motion), self.apply(source, "visual_raw", visual)

    def apply_many(self, source: str, name: str, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns scores in [0, 1] for clips of one source, NaN where `raw` is NaN.

        Raises:
            UserError: the source or score was not there when quality.json was fitted.
        """
        result = np.full(len(raw), math.nan)
        known = ~np.isnan(raw)
        if not known.any():
            return result
        statistics = self.sources.get(source, {}).get(name)
        if statistics is None or not statistics.count:
            raise UserError(f'no statistics of {name} in source "{source}"', where=QUALITY_FILE, remedy=_REMEDY)
        values = raw[known].astype(np.float64)
        if self.mode == "quantile":
            result[known] = _percentile_rank(values, np.asarray(statistics.knots))
        elif self.mode == "minmax":
            low, high = statistics.knots[1], statistics.knots[_LEVELS - 1]
            result[known] = np.clip((values - low) / (high - low), 0.0, 1.0) if high > low else 0.5
        else:
            z = (values - statistics.mean) / statistics.std if statistics.std > 0 else np.zeros_like(values)
            result[known] = 1.0 / (1.0 + np.exp(-np.clip(z, -50.0, 50.0)))
        return result

    @classmethod
    def load(cls, folder: Path | Storage, mode: str = "quantile", scope: str = "source") -> Normaliser:
        """Returns the normaliser kept in a dataset's quality.json.

        Args:
            folder: the dataset.
            mode: as above.
            scope: source, or corpus: every clip among the whole dataset.

        Raises:
            UserError: the file is missing, damaged or of another version, has no statistics of the corpus (older ones
                have none), or the mode or scope is unknown.
        """
        if scope not in SCOPES:
            raise UserError(f'"{scope}" is not one of {", ".join(SCOPES)}', where="data.quality_scope")
        storage = open_storage(folder) if isinstance(folder, Path) else folder
        record = read_record(storage, QUALITY_FILE, "a complete dataset", _REMEDY)
        try:
            if record["version"] != QUALITY_VERSION:
                raise ValueError(f"version {record['version']!r} is not {QUALITY_VERSION}")
            sources = {
                source: {name: ScoreStatistics(**scores[name]) for name in SCORE_NAMES}
                for source, scores in record["sources"].items()
            }
            corpus = None
            if scope == "corpus":
                corpus = {name: ScoreStatistics(**record["corpus"][name]) for name in SCORE_NAMES}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            where = f"{storage.url}/{QUALITY_FILE}"
            raise UserError(f"quality.json is not valid ({error})", where=where, remedy=_REMEDY) from error
        return cls(sources, mode, corpus)

    def drift(self, source: str, name: str, raw: NDArray[np.float64]) -> str:
        """Returns a sentence if raw scores do not look like those of their source that were fitted, else "".

        A tenth of them or more outside the fitted 1 % .. 99 % quantiles is drift; of fewer than 50 nothing is said.
        """
        known = raw[~np.isnan(raw)]
        statistics = self.sources.get(source, {}).get(name)
        if statistics is None or min(statistics.count, len(known)) < _LEAST_CLIPS:
            return ""
        share = float(statistics.outside(known, tails=1).mean())
        if share < DRIFT_SHARE:
            return ""
        low, high = statistics.knots[1], statistics.knots[_LEVELS - 1]
        return (
            f'{name} of source "{source}": {share:.0%} of {len(known)} new clips lie outside {low:.4g} .. {high:.4g}, '
            f"where 98% of the {statistics.count} earlier ones are"
        )


def write_quality(folder: Path, scores: Iterable[tuple[str, float | None, float | None]]) -> None:
    """Fits quality.json to (source, visual_raw, motion_raw) of every clip of a dataset and writes it in one step."""
    raw: dict[str, dict[str, list[float]]] = {}
    for source, visual, motion in scores:
        columns = raw.setdefault(source, {name: [] for name in SCORE_NAMES})
        for name, value in zip(SCORE_NAMES, (visual, motion), strict=True):
            if value is not None:
                columns[name].append(value)
    sources: dict[str, Any] = {
        source: {name: vars(ScoreStatistics.fit(columns[name])) for name in SCORE_NAMES}
        for source, columns in sorted(raw.items())
    }
    corpus = {
        name: vars(ScoreStatistics.fit(itertools.chain.from_iterable(columns[name] for columns in raw.values())))
        for name in SCORE_NAMES
    }
    write_atomic(folder / QUALITY_FILE, to_json({"version": QUALITY_VERSION, "sources": sources, "corpus": corpus}))


def drifted(
    folder: Path, scores: Iterable[tuple[str, float | None, float | None]], known: int | None = None
) -> list[str]:
    """Returns sentences about clips whose raw scores are unlike those that quality.json was fitted to.

    Without a sound quality.json nothing can be said.

    Args:
        folder: the dataset, before it is fitted again.
        scores: (source, visual_raw, motion_raw) of every clip.
        known: how many of the first ones are no news; None: quality.json knows none of them.
    """
    try:
        fitted = Normaliser.load(folder)
    except UserError:
        return []
    raw: dict[tuple[str, str], list[float]] = {}
    for source, visual, motion in itertools.islice(scores, known or 0, None):
        for name, value in zip(SCORE_NAMES, (visual, motion), strict=True):
            if value is not None:
                raw.setdefault((source, name), []).append(value)
    found = [fitted.drift(source, name, np.array(values)) for (source, name), values in sorted(raw.items())]
    return [sentence for sentence in found if sentence]


def _rank_of(value: float, knots: list[float]) -> float:
    """Returns what `_percentile_rank` returns, for one value and fifty times as fast."""
    levels = len(knots) - 1
    first = bisect.bisect_left(knots, value)
    if first > levels:
        return 1.0
    if knots[first] == value:
        return (first + bisect.bisect_right(knots, value, first) - 1) / 2 / levels
    if first == 0:
        return 0.0
    below = knots[first - 1]  # less than the value, which is less than the next knot
    return (first - 1 + (value - below) / (knots[first] - below)) / levels


def _percentile_rank(values: NDArray[np.float64], knots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the share of the source below each value; in the middle of its tie where a value fills several knots."""
    levels = len(knots) - 1
    first = np.searchsorted(knots, values, side="left")
    last = np.searchsorted(knots, values, side="right")
    below, above = np.clip(first - 1, 0, levels), np.clip(first, 0, levels)
    width = knots[above] - knots[below]
    between = below + np.where(width > 0, (values - knots[below]) / np.where(width > 0, width, 1.0), 0.0)
    on_knots = (first + last - 1) / 2
    return np.clip(np.where(last > first, on_knots, between) / levels, 0.0, 1.0)
