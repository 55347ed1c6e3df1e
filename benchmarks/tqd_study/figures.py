"""The figures of the study's evidence: standalone SVG for curves, one PNG of clips. Written to docs/images/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from measure import ROOT
from PIL import Image, ImageDraw, ImageFont

from contentv.report import axes
from contentv.report.axes import Scale
from contentv.report.markup import Html, join, tag
from tqd_study.design import CONTROLS, MAIN, kappa_name, runs
from tqd_study.evaluation import BINS, HELD_OUT_SEED, SHOWN
from tqd_study.intervals import Interval
from tqd_study.sprites import make_clips
from tqd_study.summary import Rows, expected, kappas, values

FOLDER = ROOT / "docs" / "images"
COLOURS = ("#0b63b5", "#b8560b", "#0b7a57", "#8a3fa0", "#7d6a00", "#4a5a6a", "#b3261e")
STYLE = """text{font:11.5px system-ui,sans-serif;fill:#566070}.grid{stroke:#e9ecf1}.axis,.mark{stroke:#7a8594}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.name{fill:#1c2430}"""
LINE = 16.0  # height of a line of a legend
CELL, GAP, TEXT = 7, 6, 150  # of the picture, in pixels: a clip's pixel, between clips, room for names
Points = Sequence[tuple[float, float]]


def draw_all(rows: Rows, folder: Path = FOLDER) -> list[Path]:
    """Writes the figures that the rows are there for and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (draw, _) in FIGURES.items():
        figure = draw(rows)
        if figure is not None:
            paths.append(folder / name)
            if isinstance(figure, Image.Image):
                figure.save(paths[-1], optimize=True)
            else:
                paths[-1].write_text(figure + "\n", encoding="utf-8")
    return paths


def links(rows: Rows) -> str:
    """Returns the figures that the rows are there for, as they are shown on the page."""
    shown = [f"![{caption}](images/{name})" for name, (draw, caption) in FIGURES.items() if draw(rows) is not None]
    return "\n\n".join(shown) or "No figures yet."


def scores_figure(rows: Rows) -> Html | None:
    """Returns the combined score of every seed, one line a condition."""
    scores = {name: list(values(rows, name, "combined").values()) for name in (*MAIN, *CONTROLS) if rows[name]}
    if not scores:
        return None
    x, step, top, left = Scale(0.0, 1.0, 170.0, axes.WIDTH - 20), 24.0, 10.0, 160.0
    bottom = top + step * len(scores)
    parts = []
    for value in x.ticks():
        parts.append(tag("line", class_="grid", x1=x(value), x2=x(value), y1=top, y2=bottom))
        parts.append(tag("text", f"{value:g}", x=x(value), y=bottom + 16, text_anchor="middle"))
    for i, (name, found) in enumerate(scores.items()):
        y, interval = top + step * (i + 0.5), Interval.of(found)
        parts.append(tag("text", name, class_="name", x=left, y=y + 4, text_anchor="end"))
        if len(found) > 1:
            ends = (x(max(interval.low, 0.0)), x(min(interval.high, 1.0)))
            parts.append(
                tag("line", x1=ends[0], x2=ends[1], y1=y, y2=y, stroke=COLOURS[0], stroke_width=9, opacity="0.25")
            )
        parts += [tag("circle", cx=x(value), cy=y, r=3.0, fill=COLOURS[0]) for value in found]
    parts.append(tag("text", "combined score of each seed, and the mean's 95 % interval", x=x(0.5), y=bottom + 34,
                     text_anchor="middle"))  # fmt: skip
    return svg(join(parts), bottom + 42)


def loss_figure(rows: Rows) -> Html | None:
    """Returns the loss on held-out golden clips by sigma, over that of the model trained on golden clips."""
    if not rows["golden"]:
        return None
    golden = _mean_loss(rows, "golden")
    lines = {
        name: [((i + 0.5) / BINS, loss / golden[i]) for i, loss in enumerate(_mean_loss(rows, name))]
        for name in ("golden", "mixed", "mixed tqd", "mixed reversed")
        if rows[name]
    }
    return line_figure(lines, "sigma", "loss on golden clips over golden model's", log_y=True)


def _mean_loss(rows: Rows, name: str) -> list[float]:
    losses = [row["golden_loss"] for row in rows[name].values()]
    return [sum(column) / len(losses) for column in zip(*losses, strict=True)]


def kappa_figure(rows: Rows) -> Html | None:
    """Returns the combined score by kappa_max, as measured and as the closed form expects, and without routing."""
    measured = {k: Interval.of(list(values(rows, kappa_name(k), "combined").values())).mean
                for k in kappas() if rows[kappa_name(k)]}  # fmt: skip
    if len(measured) < 2 or not rows["mixed"]:
        return None
    ends, mixed = (min(measured), max(measured)), Interval.of(list(values(rows, "mixed", "combined").values())).mean
    lines = {
        "measured": list(measured.items()),
        "closed form": [(k, expected(runs()[kappa_name(k)][0])["combined"]) for k in measured],
        "measured without routing": [(k, mixed) for k in ends],
        "closed form without routing": [(k, expected(runs()["mixed"][0])["combined"]) for k in ends],
    }
    return line_figure(lines, "kappa_max", "combined score", log_x=True)


def gradient_figure(rows: Rows) -> Html | None:
    """Returns the cosines of the gradients of golden clips and their twins by sigma, mean over the seeds."""
    cosines = [row["gradients"] for row in rows["mixed"].values() if "gradients" in row]
    if not cosines:
        return None
    names = {"visual": "blurred twins", "motion": "slowed twins", "ceiling": "other golden clips"}
    lines = {
        name: [((i + 0.5) / BINS, sum(c[key][i] for c in cosines) / len(cosines)) for i in range(BINS)]
        for key, name in names.items()
    }
    return line_figure(lines, "sigma", "cosine with golden clips' gradient")


def line_figure(
    lines: Mapping[str, Points], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False
) -> Html:
    """Returns a standalone SVG of named lines with a legend under it."""
    points = [point for line in lines.values() for point in line]
    x = axes.fit((p[0] for p in points), axes.LEFT, axes.WIDTH - axes.RIGHT, log=log_x, pad=0.02)
    y = axes.y_fit((p[1] for p in points), log=log_y)
    parts = [axes.frame(x, y, x_label, y_label)]
    for i, (name, line) in enumerate(lines.items()):
        path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line)
        dash = ("none", "7 4", "2 4", "9 3 2 3")[i % 4]
        parts.append(tag("path", class_="line", d=path, stroke=COLOURS[i % len(COLOURS)], stroke_dasharray=dash))
        at = axes.HEIGHT + LINE * (i + 0.5)
        parts.append(tag("path", class_="line", d=f"M{axes.LEFT:.0f} {at - 4:.1f}h26", stroke=COLOURS[i % len(COLOURS)],
                         stroke_dasharray=dash))  # fmt: skip
        parts.append(tag("text", name, class_="name", x=axes.LEFT + 34, y=at))
    return svg(join(parts), axes.HEIGHT + LINE * (len(lines) + 0.5))


def svg(body: Html, height: float) -> Html:
    """Returns a standalone SVG on white of the standard width."""
    box = f"0 0 {axes.WIDTH:g} {height:g}"
    white = tag("rect", width="100%", height="100%", fill="#fff")
    return tag("svg", tag("style", Html(STYLE)), white, body, xmlns="http://www.w3.org/2000/svg", viewBox=box)


def clips_picture(rows: Rows) -> Image.Image | None:
    """Returns the first generated clips of each condition, the first seed's, as pictures of place against time."""
    if not all(rows[name] for name in MAIN):
        return None
    world = runs()["golden"][0].recipe.world
    held_out = make_clips(world, "golden", SHOWN, HELD_OUT_SEED)[:, 0, :, world.rows // 2].numpy()
    shown = {"held-out golden clips": held_out}
    shown |= {name: np.array(rows[name][min(rows[name])]["shown"]) / 100 for name in MAIN}
    width, height = world.columns * CELL + GAP, world.frames * CELL * 2 + GAP
    page = Image.new("RGB", (TEXT + width * SHOWN, height * len(shown) + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    top = world.amplitude + 1.5 * world.detail
    for row, (name, clips) in enumerate(shown.items()):
        draw.text((GAP, GAP + row * height + height // 3), name, fill="black", font=font)
        for column, clip in enumerate(clips):
            grey = np.clip(clip / top * 255, 0, 255).astype(np.uint8)
            picture = Image.fromarray(grey).resize(
                (world.columns * CELL, world.frames * CELL * 2), Image.Resampling.NEAREST
            )
            page.paste(picture, (TEXT + column * width, GAP + row * height))
    return page


FIGURES: Mapping[str, tuple[Callable[[Rows], Html | Image.Image | None], str]] = {
    "tqd_clips.png": (clips_picture, "Clips as place (across) against time (down): slanted = moving, striped = sharp"),
    "tqd_scores.svg": (scores_figure, "Combined score of every seed, by condition"),
    "tqd_golden_loss.svg": (
        loss_figure,
        "Loss on golden clips by sigma, over the golden model's",
    ),
    "tqd_kappa.svg": (kappa_figure, "Combined score by kappa_max, measured and by the closed form"),
    "tqd_gradients.svg": (gradient_figure, "Cosines of golden clips' gradient with their degraded twins', by sigma"),
}
