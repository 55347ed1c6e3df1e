"""The report of one run: its curves, its configuration, its samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from contentv.base.errors import UserError
from contentv.report import page
from contentv.report.charts import Series, line_chart
from contentv.report.markup import Html, duration, join, number, short, size, tag
from contentv.report.media import MAX_PAGE_BYTES, inline_video
from contentv.report.metrics import StageMetrics, read_config, read_metrics
from contentv.report.run_noise import noise_section

# key, title, unit; drawn when a run logged the key at all
OPTIONAL_PANELS = (
    ("reward", "Reward", "reward"),
    ("kl", "Distance from the reference", "mean squared velocity difference"),
    ("flow_loss", "Flow-matching loss beside the reward", "loss"),
    ("eval_loss", "Held-out loss", "loss"),
    ("weighted_loss", "Loss with its weights", "loss"),
    ("sigma_mean", "Mean noise level of a step", "sigma"),
    ("keep_rate", "Clips that count by their scores", "share"),
    ("unscored", "Clips without scores", "share"),
    ("mfu", "Model FLOP utilisation", "share of peak"),
)
LOSS_PARTS = ("loss_", "flow_loss_")


def write_run_report(run_dir: Path) -> Path:
    """Returns the path of `report.html` in a run's folder, newly written.

    Args:
        run_dir: a run's folder; metrics.jsonl, config.yaml and samples/*.mp4 are read where they exist.

    Raises:
        UserError: the folder does not exist, or a file in it is malformed (named with its line).
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError("there is no such folder", where=str(run_dir), remedy="give the out= folder of a run")
    stages = read_metrics(run_dir / "metrics.jsonl")
    config = read_config(run_dir / "config.yaml")
    name = run_dir.resolve().name
    names = ", ".join(s.stage for s in stages if s.stage and s.stage != name)
    sections = [
        _headline(stages),
        page.section("Curves", curves(stages)),
        noise_section(run_dir) or Html(""),
        _samples(run_dir / "samples"),
        page.section("Configuration", page.facts(config) if config else _empty("there is no config.yaml in this run")),
    ]
    title = f"Run report: {name}" + (f" ({names})" if names else "")
    return page.write_page(run_dir / "report.html", page.page(title, str(run_dir), sections))


def curves(stages: Sequence[StageMetrics], *, brief: bool = False) -> Html:
    """Returns the training curves of one or more stages, or a sentence where nothing was logged.

    Args:
        stages: what was logged; stages share the figures.
        brief: shows what tells most and folds the rest away.
    """
    if not stages:
        return _empty("metrics.jsonl is missing or empty: no step was logged")
    main = [_loss_chart(stages)]
    rest = [
        line_chart("Gradient norm (log scale)", _series(stages, "grad_norm"), y_label="norm", log_y=True, smooth=True),
        line_chart("Learning rate", _series(stages, "lr"), y_label="rate"),
        line_chart("Throughput", _series(stages, "tokens_per_s"), y_label="tokens per second", smooth=True),
        _wait_chart(stages),
    ]
    for key, title, unit in OPTIONAL_PANELS:
        if any(s.finite(key) for s in stages):
            figure = line_chart(title, _series(stages, key), y_label=unit, smooth=key != "eval_loss")
            (main if key == "reward" else rest).append(figure)
    rest.extend(_loss_parts(stages))
    if not brief:
        return page.charts(*main, *rest)
    if len(main) == 1:
        main.append(rest.pop(0))
    return join([page.charts(*main), tag("details", tag("summary", "More curves"), page.charts(*rest))])


def _loss_chart(stages: Sequence[StageMetrics]) -> Html:
    loss = [v for s in stages for v in s.finite("loss")]
    log = bool(loss) and min(loss) > 0 and max(loss) > 4 * min(loss)  # a reward objective's loss may be negative
    repeated = sum(s.repeated for s in stages)
    note = f"{repeated:,} steps were logged again after a resume; the later values are shown." if repeated else ""
    title = "Loss (log scale)" if log else "Loss"
    return line_chart(title, _series(stages, "loss"), y_label="loss", log_y=log, smooth=True, note=note)


def data_wait_share(stage: StageMetrics) -> list[float]:
    """Returns for each step the share of its time that was spent waiting for data; NaN where it was not logged."""
    pairs = [(row.get("data_wait_s", math.nan), row.get("step_s", math.nan)) for row in stage.rows]
    return [wait / time if time > 0 else math.nan for wait, time in pairs]


def stage_facts(stage: StageMetrics) -> dict[str, str]:
    """Returns the few numbers that sum a stage up, as text; those that were not logged are missing."""
    found = {"steps": f"{stage.rows[-1]['step']:,.0f}"}
    if loss := stage.finite("loss"):
        tail = loss[-max(1, len(loss) // 10) :]
        found["loss (mean of the last tenth)"] = number(sum(tail) / len(tail))
    for key, name in (("samples_seen", "samples seen"), ("tokens_seen", "tokens seen")):
        if values := stage.finite(key):
            found[name] = short(values[-1])
    if speed := stage.finite("tokens_per_s"):
        found["tokens per second (median)"] = short(median(speed))
    if times := stage.finite("step_s"):
        found["step time (median)"] = duration(median(times))
    if shares := [v for v in data_wait_share(stage) if math.isfinite(v)]:
        found["waiting for data (median)"] = f"{median(shares):.1%}"
    if memory := stage.finite("peak_memory_bytes"):
        found["peak memory"] = size(max(memory))
    return found


def _headline(stages: Sequence[StageMetrics]) -> Html:
    return join(join([tag("h3", stage.stage) if len(stages) > 1 else Html(""), _fact_cards(stage)]) for stage in stages)


def _fact_cards(stage: StageMetrics) -> Html:
    return page.cards(*(page.card(name, value) for name, value in stage_facts(stage).items()))


def _series(stages: Sequence[StageMetrics], key: str) -> list[Series]:
    return [Series(s.stage or key, *s.column(key)) for s in stages]


def _wait_chart(stages: Sequence[StageMetrics]) -> Html:
    shares = [Series(s.stage or "share", [row["step"] for row in s.rows], data_wait_share(s)) for s in stages]
    return line_chart("Waiting for data", shares, y_label="share of the step time", smooth=True)


def _loss_parts(stages: Sequence[StageMetrics]) -> list[Html]:
    """Losses logged in parts (`loss_...`, such as one for each range of noise levels): one figure a stage."""
    figures = []
    for stage in stages:
        parts = [Series(key, *stage.column(key)) for key in stage.names() if key.startswith(LOSS_PARTS)]
        if parts:
            title = "Loss in parts" + (f": {stage.stage}" if len(stages) > 1 else "")
            figures.append(line_chart(title, parts[:6], y_label="loss", smooth=True))
    return figures


def _samples(folder: Path) -> Html:
    files = sorted(folder.glob("*.mp4"))
    if not files:
        return page.section("Samples", _empty("there are no samples/*.mp4 in this run"))
    shown, left = [], MAX_PAGE_BYTES
    for path in files:
        left -= path.stat().st_size
        if left < 0:
            break
        video = inline_video(path, path.stem)
        shown.append(tag("div", video, tag("div", path.stem, class_="prompt"), class_="panel sample"))
    rest = len(files) - len(shown)
    note = (
        f"Videos that are not on this page, to keep it small: {rest:,} of {len(files):,} in {folder}." if rest else ""
    )
    return page.section("Samples", tag("div", *shown, class_="videos"), lead=note)


def _empty(text: str) -> Html:
    return tag("p", text, class_="empty")
