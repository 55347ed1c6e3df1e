"""The tables of the study's evidence in docs/tqd.md, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from measure import RESULTS

from tqd_study.clips import training_clips
from tqd_study.design import CONTROLS, DETAILS, KAPPAS, MAIN, NEITHER, RECIPE, detail_name, kappa_name, runs
from tqd_study.driver import rows_of
from tqd_study.intervals import Interval
from tqd_study.settings import Run
from tqd_study.toy import Components, predict
from tqd_study.training import build_sampler

Rows = Mapping[str, Mapping[int, dict[str, Any]]]  # name of the condition -> seed -> row
SHARE_WANTED = 0.9  # of the golden combined score, that routed imperfect clips are to reach


def rows_by_name(folder: Path = RESULTS, size: str = "small") -> Rows:
    """Returns the rows of the design's runs; those of other settings are not looked at."""
    found = rows_of(folder)
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for name, wanted in runs(size).items():
        settings = [run.settings() for run in wanted]
        rows = [row for row in found if row["settings"] in settings]
        by_name[name] = {row["settings"]["seed"]: row for row in rows}
    return by_name


def values(rows: Rows, name: str, *keys: str) -> dict[int, float]:
    """Returns one measure of a condition for each seed, such as ("speed", "score") or ("combined",)."""
    found = {}
    for seed, row in sorted(rows[name].items()):
        entry: Any = row["measured"]
        for key in keys:
            entry = entry[key]
        found[seed] = float(entry)
    return found


def paired(
    rows: Rows, first: str, second: str, make: Callable[..., Interval] = Interval.of_difference
) -> Interval | None:
    """Returns how the combined scores of two conditions compare over the seeds that both have; None without any."""
    a, b = values(rows, first, "combined"), values(rows, second, "combined")
    seeds = sorted(a.keys() & b.keys())
    return make([a[seed] for seed in seeds], [b[seed] for seed in seeds]) if seeds else None


def main_table(rows: Rows) -> str:
    """Returns the scores of every condition that is no part of a sweep."""
    lines = [
        "| clips, routing | seeds | motion | sharpness | combined | golden-like clips |",
        "|---|---|---|---|---|---|",
    ]
    for name in (*MAIN, *CONTROLS, *NEITHER):
        if not rows.get(name):
            continue
        columns = (("speed", "score"), ("sharpness", "score"), ("combined",), ("golden_like",))
        cells = [str(Interval.of(list(values(rows, name, *keys).values()))) for keys in columns]
        cells[:2] = [cell.split(" ")[0] for cell in cells[:2]]
        lines.append(f"| {name} | {len(rows[name])} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else NO_ROWS


def verdict_table(rows: Rows) -> str:
    """Returns what was expected beforehand, and what came out."""
    lines = ["| expected | measured | |", "|---|---|---|"]
    for claim, found, holds in verdicts(rows):
        lines.append(f"| {claim} | {found} | {'yes' if holds else 'no'} |")
    return "\n".join(lines) if len(lines) > 2 else NO_ROWS


def verdicts(rows: Rows) -> list[tuple[str, str, bool]]:
    """Returns (claim, what was measured, whether it holds) for each claim of README.md that has its rows."""
    found: list[tuple[str, str, bool]] = []

    def difference(claim: str, first: str, second: str, test: Callable[[Interval], bool]) -> None:
        interval = paired(rows, first, second)
        if interval is not None:
            found.append((claim, f"{first} - {second}: {interval}", test(interval)))

    difference("H1 routing imperfect clips helps", "mixed tqd", "mixed", lambda d: d.low > 0)
    difference("H2 routing them the wrong way hurts", "mixed reversed", "mixed", lambda d: d.high < 0)
    ratio = paired(rows, "mixed tqd", "golden", Interval.of_ratio)
    if ratio is not None:
        claim = f"H3 it reaches {SHARE_WANTED:g} of what golden clips give"
        found.append((claim, f"mixed tqd / golden: {ratio}", ratio.mean >= SHARE_WANTED))
    difference("H4 the levels do it", "mixed levels only", "mixed", lambda d: d.low > 0)
    difference("H4 dropping alone does not", "mixed drop only", "mixed", lambda d: d.low <= 0)
    difference(
        "H5 dropping helps where some clips are neither", "with neither drop only", "with neither", lambda d: d.low > 0
    )
    difference("H6 routing golden clips does no harm", "golden tqd", "golden", lambda d: d.high >= 0)
    strongest, best = kappa_name(max(KAPPAS)), _best_kappa(rows)
    if best is not None:
        difference("H7 routing can be too strong", strongest, best, lambda d: d.high < 0)
    gains = {detail: paired(rows, *(detail_name(n, detail) for n in ("mixed tqd", "mixed"))) for detail in details()}
    if all(gains.values()):
        shown = ", ".join(f"{gain.mean:.3f} at detail {detail:g}" for detail, gain in gains.items() if gain)
        means = [gain.mean for gain in gains.values() if gain]
        found.append(("H8 the gain shrinks as the scales near each other", shown, means == sorted(means, reverse=True)))
    return found + _gradient_verdicts(rows)


def details() -> list[float]:
    """Returns the amplitudes of detail that were trained, ascending."""
    return sorted((RECIPE.world.detail, *DETAILS))


def kappas() -> list[float]:
    """Returns the kappa_max that were trained, ascending."""
    return sorted((MAIN["mixed tqd"].kappa_max, *KAPPAS))


def _best_kappa(rows: Rows) -> str | None:
    means = {}
    for kappa in kappas():
        scores = values(rows, kappa_name(kappa), "combined")
        common = [scores[seed] for seed in rows[kappa_name(max(KAPPAS))] if seed in scores]
        if common:
            means[kappa_name(kappa)] = sum(common) / len(common)
    return max(means, key=lambda name: means[name]) if len(means) == len(kappas()) else None


def _gradient_verdicts(rows: Rows) -> list[tuple[str, str, bool]]:
    """Upper against lower half of sigma, on the models of the mixed condition."""
    cosines = [row["gradients"] for row in rows["mixed"].values() if "gradients" in row]
    found = []
    for twin, word, test in (
        ("visual", "rises", lambda rise: rise.low > 0),
        ("motion", "falls", lambda rise: rise.high < 0),
    ):
        if cosines:
            half = len(cosines[0][twin]) // 2
            rises = [sum(c[twin][half:]) / half - sum(c[twin][:half]) / half for c in cosines]
            claim = f"H9 cos(golden, {twin}ly degraded) {word} with sigma".replace("motionly", "motion-")
            rise = Interval.of(rises)
            found.append((claim.replace("motion- ", "motion-"), f"upper - lower half of sigma: {rise}", test(rise)))
    return found


@cache
def expected(run: Run) -> dict[str, float]:
    """Returns what the closed-form model expects of a run on imperfect clips, from its scores and its world alone."""
    world, clips = run.recipe.world, training_clips(run.recipe, run.condition, run.seed)
    first = run.recipe.clips // 2
    energy = (3.141592653589793 * world.size[0] * world.size[1]) ** 0.5  # of the blob's profile, as an amplitude
    parts = Components(
        motion=world.amplitude * energy, detail=world.detail * energy, static=sum(world.slow) / sum(world.fast),
        blurred=_stripes_left(world),
    )  # fmt: skip
    scores = [(clips.motion[part], clips.visual[part]) for part in (slice(0, first, 8), slice(first, None, 8))]
    return predict(build_sampler(run.recipe, run.condition), scores[0], scores[1], parts)


def _stripes_left(world: Any) -> float:
    """Returns the share of the stripes' amplitude that the blur of blurred clips leaves."""
    width = sum(world.soft) / 2
    return float(2.718281828459045 ** (-2 * (3.141592653589793 * width / world.stripe) ** 2))


def kappa_table(rows: Rows) -> str:
    """Returns combined scores by kappa_max, beside what the closed-form model expects."""
    lines = ["| kappa_max | combined | golden-like clips | closed form |", "|---|---|---|---|"]
    for name in ("mixed", *map(kappa_name, kappas())):
        if rows[name]:
            shown = [str(Interval.of(list(values(rows, name, key).values()))) for key in ("combined", "golden_like")]
            label = "no routing" if name == "mixed" else f"{runs()[name][0].condition.kappa_max:g}"
            lines.append(f"| {label} | {' | '.join(shown)} | {expected(runs()[name][0])['combined']:.3f} |")
    return "\n".join(lines) if len(lines) > 2 else NO_ROWS


def share_table(rows: Rows) -> str:
    """Returns how much of the golden combined score routed imperfect clips reach, by what is changed about the run."""
    lines = ["| changed | golden-like clips | share of golden's combined score |", "|---|---|---|"]
    changes = {"nothing": ("mixed tqd", "golden")}
    changes |= {f"kappa_max {kappa:g}": (kappa_name(kappa), "golden") for kappa in KAPPAS if kappa > 8}
    changes |= {f"detail {d:g}": (detail_name("mixed tqd", d), detail_name("golden", d)) for d in DETAILS}
    changes["scores by minmax, not ranks"] = ("mixed tqd minmax", "golden")
    changes["twice the steps, golden too"] = ("mixed tqd longer", "golden longer")
    changes["twice the width, golden too"] = ("mixed tqd wider", "golden wider")
    for change, (routed, golden) in changes.items():
        share = paired(rows, routed, golden, Interval.of_ratio)
        if share is not None:
            like = Interval.of(list(values(rows, routed, "golden_like").values()))
            lines.append(f"| {change} | {like} | {share} |")
    return "\n".join(lines) if len(lines) > 2 else NO_ROWS


def detail_table(rows: Rows) -> str:
    """Returns scores by the amplitude of detail: the nearer to the blob's, the less are the scales apart."""
    lines = ["| blob / detail | golden | mixed | mixed tqd | gain | closed form's gain |", "|---|---|---|---|---|---|"]
    for detail in details():
        names = [detail_name(name, detail) for name in ("golden", "mixed", "mixed tqd")]
        gain = paired(rows, names[2], names[1])
        if gain is None or not rows[names[0]]:
            continue
        means = [f"{Interval.of(list(values(rows, name, 'combined').values())).mean:.3f}" for name in names]
        theory = expected(runs()[names[2]][0])["combined"] - expected(runs()[names[1]][0])["combined"]
        lines.append(f"| {RECIPE.world.amplitude / detail:.3g} | {' | '.join(means)} | {gain} | {theory:.3f} |")
    return "\n".join(lines) if len(lines) > 2 else NO_ROWS


def large_table() -> str:
    """Returns the scores of the larger version's conditions."""
    table = main_table(rows_by_name(size="large"))
    return "No rows yet: no GPU could be had." if table == NO_ROWS else table


NO_ROWS = "No rows yet: run `make study-tqd`."
TABLES = {
    "study main": main_table,
    "study verdicts": verdict_table,
    "study shares": share_table,
    "study kappa": kappa_table,
    "study detail": detail_table,
}
