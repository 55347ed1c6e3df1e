"""The page of `contentv analyze gradients`: cosines by noise level, what limits them, and the recommended routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contentv.report import page
from contentv.report.charts import Series, bar_chart, line_chart
from contentv.report.markup import Html, number, tag

KINDS = {"visual": "visually degraded", "motion": "motion-degraded"}
WITH_GOLDEN = {"golden": "golden", **KINDS}
X_LABEL = "sigma (0 clean, 1 noise)"
NONE = float("nan")


def gradients_page(result: Mapping[str, Any]) -> str:
    """Returns the HTML page of the content of gradients.json."""
    bins = result["bins"]
    sections = [
        page.section("What was found", _cards(result), _remarks(result["remarks"])),
        page.section(
            "Agreement with golden clips", page.charts(*agreement_figures(result["bins"])), lead=_lead(result)
        ),
        page.section("How strongly to route", page.charts(_worth(result["recommendation"])), lead=_worth_lead(result)),
        page.section("Numbers", _table(bins), *_parts(bins)),
        page.section("What was measured", page.facts(_facts(result))),
    ]
    return page.page("Gradients of imperfect clips", result["model"]["what"], sections)


def _cards(result: Mapping[str, Any]) -> Html:
    advice = result["recommendation"]
    crossing, low, high = (advice["crossing"][key] for key in ("value", "low", "high"))
    reach = f"{advice['kappa_range'][0]:g} to {advice['kappa_range'][1]:g} with a group of clips left out"
    kappa, detail = (number(advice["kappa_max"]), reach) if advice["pays"] else ("none", "routing does not pay")
    return page.cards(
        page.card("recommended kappa_max", kappa, detail),
        page.card(
            "crossing point, sigma", "none" if crossing is None else f"{crossing:.2f}",
            "no interval" if low is None else f"95 % interval {low:.2f} to {high:.2f}",
        ),
        page.card("median of the base law, sigma", f"{advice['base_median']:.2f}", result["base"]),
    )  # fmt: skip


def _remarks(found: Sequence[str]) -> Html:
    return tag("div", *(tag("p", text) for text in found), class_="panel")


def _lead(result: Mapping[str, Any]) -> str:
    return (
        f"Gradients of the loss on {result['clips']} golden clips and on their degraded twins, at the same noise "
        "levels with the same noise. The ceiling is the agreement of two halves of the golden clips: a twin above it "
        "changes a step less than drawing other golden clips would."
    )


def agreement_figures(bins: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Returns the charts of the bins of gradients.json: cosines, corrected cosines, relative errors and losses."""
    centres = [(b["sigma_low"] + b["sigma_high"]) / 2 for b in bins]
    ceiling = Series("ceiling (golden halves)", centres, [_value(b["ceiling"]["value"]) for b in bins], base=True)
    unseen = Series("golden", [], [])  # holds the golden clips' colour where they have no line
    figures = []
    for key, title, y_label, first in (
        ("cosine", "The same clips and noise", "cosine", ceiling),
        ("corrected", "Expected gradients, the sampling noise taken out", "cosine", unseen),
        ("distance", "Relative error of the gradient", "|twin - golden| / |golden|", unseen),
    ):
        lines = [Series(name, centres, [_value(b[kind][key]["value"]) for b in bins]) for kind, name in KINDS.items()]
        note = _interval_note([b[kind][key] for b in bins for kind in KINDS])
        figures.append(line_chart(title, [first, *lines], x_label=X_LABEL, y_label=y_label, note=note))
    losses = [Series(name, centres, [b["loss"][kind] for b in bins]) for kind, name in WITH_GOLDEN.items()]
    return [*figures, line_chart("Loss", losses, x_label=X_LABEL, y_label="loss")]


def _interval_note(estimates: Sequence[Mapping[str, float | None]]) -> str:
    """Says how wide the intervals are; the table has each."""
    reaches = sorted(e["high"] - e["value"] for e in estimates if e["high"] is not None and e["value"] is not None)
    return f"95 % intervals reach {number(reaches[len(reaches) // 2])} to either side (median)." if reaches else ""


def _worth(advice: Mapping[str, Any]) -> Html:
    kappas, gains = zip(*advice["gains"], strict=True)
    return line_chart("Gain over the base law", [Series("gain", kappas, gains)], x_label="kappa_max", y_label="nats")


def _worth_lead(result: Mapping[str, Any]) -> str:
    return (
        f"Over the scores of the dataset's {result['scored_clips']:,} clips: the mean over the base law's ranks of "
        "log(density x cosine squared), the log of effective golden draws. Routing raises the cosine and takes draws "
        "from the middle. The criterion is this project's own; a run decides."
    )


def _table(bins: Sequence[Mapping[str, Any]]) -> Html:
    columns = ["sigma", "of the base's draws", "ceiling"]
    for name in KINDS.values():
        columns += [f"{name}: cosine", "95 % interval", "corrected", "relative error"]
    rows = []
    for b in bins:
        place, ceiling = f"{b['sigma_low']:.2f} to {b['sigma_high']:.2f}", b["ceiling"]["value"]
        row: list[Any] = [place, f"{b['base_mass']:.1%}", _two(ceiling)]
        for kind in KINDS:
            cosine, corrected, distance = (b[kind][key] for key in ("cosine", "corrected", "distance"))
            interval = f"{_two(cosine['low'])} to {_two(cosine['high'])}"
            row += [_two(cosine["value"]), interval, _two(corrected["value"]), _two(distance["value"])]
        rows.append(row)
    return page.table(columns, rows)


def _parts(bins: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Mean cosine of each part of the model, by how often the base law trains each bin."""
    mass = [b["base_mass"] for b in bins]
    figures = []
    for kind, name in KINDS.items():
        means = {}
        for part in bins[0][kind]["cosine_by_part"]:
            pairs = [(m, b[kind]["cosine_by_part"][part]) for m, b in zip(mass, bins, strict=True)]
            known = [(m, value) for m, value in pairs if value is not None]
            means[part] = sum(m * v for m, v in known) / max(sum(m for m, _ in known), 1e-12)
        if min(means.values()) >= 0:
            figures.append(
                bar_chart(f"Cosine by part of the model, {name}", means, note="Mean over the base law's draws.")
            )
    return [page.charts(*figures)] if figures else []


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    model, twins = result["model"], result["twins"]
    kept = f"{model['gradient_entries_kept']:,} of {model['weights_compared']:,}"
    distance = {name: f"{result['latent_distance'][name]:.3f} of the latents' length" for name in KINDS}
    return {
        "checkpoint": model["checkpoint"], "weights": f"{model['weights']}, {model['precision']}",
        "gradient entries compared": kept, "bucket": result["bucket"],
        "golden clips": f"{result['clips']} of {result['golden_clips_found']}, both ranks from {result['golden']:g}",
        "groups, draws a clip and bin, seed": f"{result['groups']}, {result['draws']}, {result['seed']}",
        "degraded": "the stored clips" if result["pixels"] == "media" else "clips that the VAE decoded from latents",
        "visually": f"{twins['visual']}; {distance['visual']}", "in motion": f"{twins['motion']}; {distance['motion']}",
    }  # fmt: skip


def _value(value: float | None) -> float:
    return NONE if value is None else value


def _two(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
