"""Raw scores to [0, 1]: the percentile rank of a clip within its source, by quantile knots kept in quality.json.

Shards hold raw scores only, so the normaliser can be fitted again without touching them. Ranks make the scores uniform
over a source, which timestep samplers driven by quality rely on; min-max and z-score forms are there to compare with.
"""

from __future__ import annotations

import bisect
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


@dataclass
class Normaliser:
    """Maps raw scores to [0, 1] with the statistics of their source.

    Args:
        sources: source -> raw score's name -> statistics.
        mode: quantile (percentile rank), minmax (between the 1 % and 99 % quantiles, clipped) or zsigmoid (logistic
            function of the z-score).
    """

    sources: Mapping[str, Mapping[str, ScoreStatistics]]
    mode: str = "quantile"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(
                f'quality mode "{self.mode}" is unknown', where="data.quality_mode", remedy=f"use {', '.join(MODES)}"
            )

    def apply(self, source: str, name: str, raw: float | None) -> float:
        """Returns one score in [0, 1], NaN where the clip has none (`raw` None or NaN)."""
        statistics = self.sources.get(source, {}).get(name)
        if raw is not None and self.mode == "quantile" and raw == raw and statistics is not None and statistics.count:
            return _rank_of(raw, statistics.knots)
        return float(self.apply_many(source, name, np.array([math.nan if raw is None else raw]))[0])

    def scores(self, meta: Mapping[str, Any]) -> tuple[float, float]:
        """Returns (motion, visual) in [0, 1] of a clip's record, NaN where it has no score."""
        source = str(meta.get("source", ""))
        return self.apply(source, "motion_raw", meta.get("motion_raw")), self.apply(
            source, "visual_raw", meta.get("visual_raw")
        )

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
    def load(cls, folder: Path | Storage, mode: str = "quantile") -> Normaliser:
        """Returns the normaliser kept in a dataset's quality.json.

        Raises:
            UserError: the file is missing, damaged or of another version, or the mode is unknown.
        """
        storage = open_storage(folder) if isinstance(folder, Path) else folder
        record = read_record(storage, QUALITY_FILE, "a complete dataset", _REMEDY)
        try:
            if record["version"] != QUALITY_VERSION:
                raise ValueError(f"version {record['version']!r} is not {QUALITY_VERSION}")
            sources = {
                source: {name: ScoreStatistics(**scores[name]) for name in SCORE_NAMES}
                for source, scores in record["sources"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            where = f"{storage.url}/{QUALITY_FILE}"
            raise UserError(f"quality.json is not valid ({error})", where=where, remedy=_REMEDY) from error
        return cls(sources, mode)


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
    write_atomic(folder / QUALITY_FILE, to_json({"version": QUALITY_VERSION, "sources": sources}))


def _rank_of(value: float, knots: list[float]) -> float:
    """Returns what `_percentile_rank` returns, for one value and fifty times as fast."""
    levels = len(knots) - 1
    first, last = bisect.bisect_left(knots, value), bisect.bisect_right(knots, value)
    if last > first:
        return min(max((first + last - 1) / 2 / levels, 0.0), 1.0)
    below, above = min(max(first - 1, 0), levels), min(first, levels)
    width = knots[above] - knots[below]
    return min(max((below + ((value - knots[below]) / width if width > 0 else 0.0)) / levels, 0.0), 1.0)


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
