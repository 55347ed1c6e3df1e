"""The part of a run's report about noise levels: what was trained, for which clips, and at what loss."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from contentv.base.errors import UserError
from contentv.diffusion.noise_levels import BINS, QUADRANTS, bins_text, starved
from contentv.report import page
from contentv.report.charts import Series, density_curves, line_chart
from contentv.report.markup import Html
from contentv.report.metrics import read_jsonl

Table = Sequence[Sequence[float | int]]  # quadrants x sigma bins
EXPECTED = "noise_levels.json"
MIDDLES = [(i + 0.5) / BINS for i in range(BINS)]


def noise_section(run_dir: Path) -> Html | None:
    """Returns the section, None for a run that logged nothing of it.

    Args:
        run_dir: a run's folder; metrics.jsonl and noise_levels.json are read where they exist.

    Raises:
        UserError: a file is malformed.
    """
    first, second = tallies(run_dir / "metrics.jsonl")
    counts = _plus(first[0], second[0])
    total = sum(map(sum, counts))
    if not total:
        return None
    expected = _expected(run_dir / EXPECTED)
    drawn = [sum(column) / total for column in zip(*counts, strict=True)]
    scored = total - sum(counts[-1])
    facts = f"{total:,.0f} draws, {scored / total:.1%} of them for clips with both scores."
    if expected is not None:
        facts += f" Sampler: {expected['sampler']}."
        bins = starved(expected["base"], drawn)
        if bins:
            facts += f" Starved, less than a quarter of what the base sampler gives: sigma {bins_text(bins)}."
    figures = [_histogram(drawn, expected)]
    if scored:
        figures += [_shares(counts), _losses("Loss by noise level and quality, second half of the run", *second)]
        table = [_quadrants(counts, total)]
    else:
        figures.append(_losses("Loss by noise level, second half of the run", *second))
        table = []
    return page.section("Noise levels", *table, page.charts(*figures), lead=facts)


def tallies(path: Path) -> tuple[tuple[Table, Table], tuple[Table, Table]]:
    """Returns (counts, sums of losses) of the first and of the second half of a run's logged rows.

    A step logged again after a resume counts once, as it was logged last.

    Raises:
        UserError: a line is not a JSON object, or its tallies have another shape.
    """
    rows: dict[tuple[str, int], tuple[Table, Table]] = {}
    for where, row in read_jsonl(path):
        if "sigma_counts" in row:
            counts, losses = row["sigma_counts"], row.get("sigma_losses")
            if not (_is_table(counts) and _is_table(losses)):
                raise UserError(f"sigma_counts and sigma_losses are not {len(QUADRANTS)} x {BINS} numbers", where=where)
            rows[str(row.get("stage") or ""), int(row["step"])] = counts, losses
    halves = [(_zeros(), _zeros()), (_zeros(), _zeros())]
    for i, (counts, losses) in enumerate(rows.values()):
        half = halves[i >= len(rows) // 2]
        halves[i >= len(rows) // 2] = _plus(half[0], counts), _plus(half[1], losses)
    return halves[0], halves[1]


def _histogram(drawn: list[float], expected: dict[str, Any] | None) -> Html:
    """Shares of the bins as densities, drawn as steps."""
    edges = [i / BINS for i in range(BINS + 1)]
    x = [edge for pair in itertools.pairwise(edges) for edge in pair]

    def steps(shares: list[float]) -> tuple[list[float], list[float]]:
        return x, [share * BINS for share in shares for _ in range(2)]

    curves = {"trained": steps(drawn)}
    if expected is not None:
        curves = {"base sampler": steps(expected["base"]), "expected": steps(expected["trained"]), **curves}
    return density_curves("Noise levels trained", curves, x_label="sigma (0 clean, 1 noise)", base="base sampler")


def _shares(counts: Table) -> Html:
    """Whose clips train each noise level."""
    of_bin = [sum(column) for column in zip(*counts, strict=True)]
    series = [
        Series(name, MIDDLES, [n / whole if whole else math.nan for n, whole in zip(row, of_bin, strict=True)])
        for name, row in zip(QUADRANTS, counts, strict=True)
        if sum(row)
    ]
    return line_chart("Whose clips train which noise level", series, x_label="sigma", y_label="share of the draws")


def _losses(title: str, counts: Table, losses: Table) -> Html:
    series = [
        Series(name, MIDDLES, [loss / n if n else math.nan for loss, n in zip(row, drawn, strict=True)])
        for name, row, drawn in zip(QUADRANTS, losses, counts, strict=True)
        if sum(drawn)
    ]
    return line_chart(title, series, x_label="sigma", y_label="loss", note="Without weights; gaps were never drawn.")


def _quadrants(counts: Table, total: float) -> Html:
    rows = []
    for name, row in zip(QUADRANTS, counts, strict=True):
        if clips := sum(row):
            mean = sum(n * middle for n, middle in zip(row, MIDDLES, strict=True)) / clips
            rows.append([name, f"{clips:,.0f}", f"{clips / total:.1%}", f"{mean:.2f}"])
    return page.table(["quadrant (motion, visual score)", "draws", "share", "mean sigma"], rows)


def _expected(path: Path) -> dict[str, Any] | None:
    """What was written before the first step, None without the file."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not all(len(record[key]) == BINS for key in ("base", "trained")):
            raise ValueError(f"base and trained need {BINS} shares each")
        return {key: record[key] for key in ("sampler", "base", "trained")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"not a record of noise levels ({error})", where=str(path), remedy="delete the file") from error


def _zeros() -> Table:
    return [[0.0] * BINS for _ in QUADRANTS]


def _plus(a: Table, b: Table) -> Table:
    return [[x + y for x, y in zip(row, other, strict=True)] for row, other in zip(a, b, strict=True)]


def _is_table(value: object) -> TypeGuard[Table]:
    return (
        isinstance(value, list)
        and len(value) == len(QUADRANTS)
        and all(isinstance(row, list) and len(row) == BINS for row in value)
        and all(isinstance(n, (int, float)) for row in value for n in row)
    )
