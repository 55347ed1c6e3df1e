"""The report of a demo: data, the sampler, every training stage, and what the model draws at the end, on one page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contentv.base.errors import UserError
from contentv.report import page
from contentv.report.charts import bar_chart, density_curves
from contentv.report.dataset import Quality, gather, quality_section
from contentv.report.markup import Html, duration, number, tag
from contentv.report.media import MAX_PAGE_BYTES, inline_video
from contentv.report.metrics import read_metrics
from contentv.report.run import curves, stage_facts

SHARES = (("colour_accuracy", "Right colour"), ("direction_accuracy", "Right direction"))
Density = tuple[Sequence[float], Sequence[float]]
Sample = tuple[str, Path, dict[str, Any]]


def write_demo_report(
    demo_dir: Path,
    summary: Mapping[str, Any],
    stages: Sequence[tuple[str, Path]],
    metas: Iterable[dict[str, Any]],
    sigma_density: Mapping[str, Density],
    samples: Sequence[Sample],
    *,
    before: Mapping[str, Path] | None = None,
    quality: Quality | None = None,
) -> Path:
    """Returns the path of `report.html` in the demo's folder, newly written.

    Args:
        demo_dir: the demo's folder.
        summary: prompts (a list or their number), colour_accuracy and direction_accuracy in [0, 1], reward_before,
            reward_after, seconds_per_stage {stage: s}. A number NAME may come with NAME_interval [low, high] and, for
            an accuracy, NAME_chance and NAME_before (RLHF). Missing numbers are left out.
        stages: name and run folder of each stage, in order.
        metas: the JSON record of each sample of the dataset.
        sigma_density: for each quality corner (noise levels, densities); the one named "base" is the unrouted sampler.
        samples: prompt, MP4 file, verdict. True and false entries of a verdict are shown as right and wrong, numbers
            and texts beside their name.
        before: for a prompt, the video of the same noise before RLHF; shown beside the final one.
        quality: record -> (motion, visual) in [0, 1]; None ranks the raw scores within the dataset.

    Raises:
        UserError: a metrics line is malformed, or an interval is not a pair of numbers.
    """
    demo_dir = Path(demo_dir)
    stats = gather(metas, quality)
    title = "Noise levels drawn for each kind of clip"
    densities = density_curves(title, sigma_density, x_label="sigma (0 clean, 1 noise)")
    routing = page.section(
        "The same clips, other noise levels",
        page.charts(densities),
        lead="Timestep-aware quality decoupling trains motion-rich clips mostly at high noise and clean-looking clips "
        "mostly at low noise; clips that score alike in both stay at or near the base distribution.",
    )
    sections = [
        page.section("Result", headline(summary), lead=_prompt_count(summary)),
        sample_section(samples, before or {}),
        quality_section(stats, ranked=quality is None),
        routing,
        _time(summary),
        *(_stage(name, Path(folder)) for name, folder in stages),
    ]
    document = page.page("Demo report", f"{demo_dir}: from video files to a trained model, on this machine", sections)
    return page.write_page(demo_dir / "report.html", document)


def headline(summary: Mapping[str, Any]) -> Html:
    """Returns the headline numbers of a demo with their 95 % intervals."""
    found = []
    for key, name in SHARES:
        if summary.get(key) is not None:
            chance = summary.get(f"{key}_chance")
            chance = None if chance is None else float(chance)
            before = summary.get(f"{key}_before")
            note = None if before is None else f"before RLHF {float(before):.1%}"
            found.append(page.share_card(name, float(summary[key]), _interval(summary, key), chance, note))
    for key, name in (("reward_before", "Reward before RLHF"), ("reward_after", "Reward after RLHF")):
        if summary.get(key) is not None:
            found.append(page.card(name, number(float(summary[key])), _reward_detail(summary, key)))
    total = sum(_seconds(summary).values())
    if total:
        found.append(page.card("Total time", duration(total), f"{len(_seconds(summary))} parts"))
    return page.cards(*found) if found else tag("p", "summary.json holds no result yet", class_="empty")


def sample_section(samples: Sequence[Sample], before: Mapping[str, Path]) -> Html:
    """Returns the sampled videos in a grid, with prompts and verdicts; those with an earlier one come as pairs."""
    if not samples:
        return page.section("Samples", tag("p", "no video was sampled", class_="empty"))
    pairs: list[Html] = []
    singles: list[Html] = []
    left = MAX_PAGE_BYTES
    for prompt, path, verdict in samples:
        earlier = Path(before[prompt]) if prompt in before else None
        left -= sum(f.stat().st_size for f in (Path(path), earlier) if f is not None and f.is_file())
        if left < 0:
            break
        (singles if earlier is None else pairs).append(_sample(prompt, Path(path), verdict, earlier))
    rest = len(samples) - len(singles) - len(pairs)
    lead = "Every video was drawn from its prompt alone; the verdict was measured on its pixels."
    lead += f" Not on this page, to keep it small: {rest:,} of {len(samples):,}." if rest else ""
    grids = [tag("div", *singles, class_="videos")] if singles else []
    if pairs:
        grids += [
            tag("h3", "The same prompt and noise, before and after RLHF"),
            tag("div", *pairs, class_="videos pairs"),
        ]
    return page.section("Samples", *grids, lead=lead)


def _sample(prompt: str, path: Path, verdict: dict[str, Any], earlier: Path | None) -> Html:
    video = inline_video(path, prompt)
    if earlier is not None:
        old = inline_video(earlier, f"{prompt}, before RLHF")
        video = tag(
            "div",
            tag("div", tag("p", "before RLHF", class_="note"), old),
            tag("div", tag("p", "after RLHF", class_="note"), video),
            class_="pair",
        )
    return tag("div", video, tag("div", prompt, class_="prompt"), page.verdict_chips(verdict), class_="panel sample")


def _stage(name: str, folder: Path) -> Html:
    found = read_metrics(folder / "metrics.jsonl")
    numbers = [page.facts(stage_facts(stage)) for stage in found]
    return page.section(f"Stage: {name}", *numbers, curves(found, brief=True))


def _time(summary: Mapping[str, Any]) -> Html:
    seconds = _seconds(summary)
    if not seconds:
        return page.section("Time", tag("p", "summary.json holds no times", class_="empty"))
    return page.section("Time", page.charts(bar_chart("Seconds in each part of the demo", seconds, unit="s")))


def _seconds(summary: Mapping[str, Any]) -> dict[str, float]:
    return {str(k): float(v) for k, v in (summary.get("seconds_per_stage") or {}).items()}


def _prompt_count(summary: Mapping[str, Any]) -> str:
    prompts = summary.get("prompts")
    if prompts is None:
        return ""
    count = prompts if isinstance(prompts, int) else len(prompts)
    return f"Measured on {count:,} prompts."


def _reward_detail(summary: Mapping[str, Any], key: str) -> str:
    facts = []
    if interval := _interval(summary, key):
        facts.append(f"95 % interval {number(interval[0])} to {number(interval[1])}")
    before, after = summary.get("reward_before"), summary.get("reward_after")
    if key == "reward_after" and before is not None and after is not None:
        facts.append(f"change {float(after) - float(before):+.3g}")
    return ", ".join(facts)


def _interval(summary: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    found = summary.get(f"{key}_interval")
    if found is None:
        return None
    if not isinstance(found, (list, tuple)) or len(found) != 2 or not all(isinstance(v, (int, float)) for v in found):
        raise UserError(f"{found!r} is not a pair of numbers [low, high]", where=f"summary.json: {key}_interval")
    return float(found[0]), float(found[1])
