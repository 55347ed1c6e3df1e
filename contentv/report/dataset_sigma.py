"""What timestep-aware quality decoupling (TQD) would make of a dataset: which clips train which noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from contentv.diffusion.tqd import TQD
from contentv.report import page
from contentv.report.charts import density_curves
from contentv.report.dataset_pictures import Pictures
from contentv.report.dataset_stats import QUADRANTS, Clip, ClipStats
from contentv.report.markup import Html, number, tag

HIGH, LOW = 0.8, 0.2  # sigma above is called high, below low
GRID = 199  # noise levels at which densities are drawn
BLOCK = 512  # clips whose densities are computed at a time
SHOWN = 8


@dataclass(frozen=True)
class Routing:
    """What TQD does with some clips; each array has one entry a clip.

    Args:
        clips: those with both scores.
        keep: probability of being trained in an epoch.
        high: probability that a draw lies above HIGH.
        low: probability that a draw lies below LOW.
    """

    clips: list[Clip]
    keep: Tensor
    high: Tensor
    low: Tensor


def route(clips: Sequence[Clip], tqd: TQD) -> Routing:
    """Returns what TQD does with the clips that have both scores."""
    scored = [clip for clip in clips if clip.quadrant is not None]
    motion, visual = _scores(scored)
    if not scored:
        return Routing([], motion, motion, motion)
    at = torch.tensor([[HIGH], [LOW]], dtype=torch.float64)
    cdf = tqd.cdf(at, motion, visual)
    return Routing(scored, tqd.keep_probability(motion, visual).double(), 1 - cdf[0], cdf[1])


def mean_density(clips: Sequence[Clip], tqd: TQD, sigma: Tensor) -> Tensor:
    """Returns the density of the noise levels trained with these clips, each weighted by how often it is kept.

    Args:
        clips: all with both scores, at least one.
        tqd: the sampler.
        sigma: noise levels (n,).
    """
    total = torch.zeros(len(sigma), dtype=torch.float64)
    weights = 0.0
    for start in range(0, len(clips), BLOCK):
        motion, visual = _scores(clips[start : start + BLOCK])
        keep = tqd.keep_probability(motion, visual).double()
        total += (tqd.log_density(sigma.double()[:, None], motion, visual).exp() * keep).sum(1)
        weights += float(keep.sum())
    return total / weights if weights > 0 else total


def sigma_section(stats: ClipStats, tqd: TQD, pictures: Pictures) -> Html:
    """Returns the section about noise levels: densities, what each quadrant trains, and clips of both ends."""
    title = "What TQD would train at high and at low noise"
    routing = route(stats.kept, tqd)
    if not routing.clips:
        return page.section(title, tag("p", "no sample has both scores, so TQD would change nothing", class_="empty"))
    drawn = density_curves("Noise levels trained", _curves(routing.clips, tqd), x_label="sigma (0 clean, 1 noise)")
    lead = (
        "Timestep-aware quality decoupling lets motion-rich clips train high noise, where motion and layout are "
        "decided, and clean-looking ones low noise, where texture is. A clip is kept in an epoch with probability "
        f"max(motion, visual): {float(routing.keep.mean()):.1%} of the samples on average. Settings: {tqd}."
    )
    table = _table(routing, tqd)
    return page.section(title, table, page.charts(drawn), *_strips(stats, tqd, pictures), lead=lead)


def _curves(clips: list[Clip], tqd: TQD) -> dict[str, tuple[list[float], list[float]]]:
    sigma = torch.linspace(0.0, 1.0, GRID + 2, dtype=torch.float64)[1:-1]
    at = sigma.tolist()
    curves = {
        "base": (at, tqd.base.log_density(sigma).exp().tolist()),
        "all samples": (at, mean_density(clips, tqd, sigma).tolist()),
    }
    for name in QUADRANTS:
        found = [clip for clip in clips if clip.quadrant == name]
        if found:
            curves[name] = (at, mean_density(found, tqd, sigma).tolist())
    return curves


def _table(routing: Routing, tqd: TQD) -> Html:
    columns = [
        "samples", "share", "kept", f"sigma > {HIGH:g}", f"sigma < {LOW:g}", "share of high", "share of low",
    ]  # fmt: skip
    names = [clip.quadrant for clip in routing.clips]
    all_high, all_low = float((routing.keep * routing.high).sum()), float((routing.keep * routing.low).sum())
    rows = []
    for name in (*QUADRANTS, "all samples"):
        mask = torch.tensor([name in (found, "all samples") for found in names])
        if not bool(mask.any()):
            continue
        keep, high, low = routing.keep[mask], routing.high[mask], routing.low[mask]
        weight = float(keep.sum())
        of_high, of_low = float((keep * high).sum()), float((keep * low).sum())
        rows.append([
            name, len(keep), f"{len(keep) / len(names):.1%}", f"{float(keep.mean()):.1%}",
            _share(of_high, weight), _share(of_low, weight), _share(of_high, all_high), _share(of_low, all_low),
        ])  # fmt: skip
    tails = tqd.base.log_tails(torch.tensor([HIGH, LOW], dtype=torch.float64))
    base = [f"{float(tails[1][0].exp()):.1%}", f"{float(tails[0][1].exp()):.1%}"]
    rows.append(["without TQD", len(names), "100.0%", "100.0%", *base, "100.0%", "100.0%"])
    return page.table(["quadrant", *columns], rows)


def _strips(stats: ClipStats, tqd: TQD, pictures: Pictures) -> list[Html]:
    """Pictures of the clips that train each end of the noise levels most often: kept and drawn there."""
    pool = stats.wanted or [clip for clip in stats.kept if clip.has_media]
    routing = route(pool, tqd)
    parts = []
    for title, share in ((f"above {HIGH:g}", routing.high), (f"below {LOW:g}", routing.low)):
        often = (routing.keep * share).tolist()
        order = sorted(range(len(often)), key=lambda i: (-often[i], routing.clips[i].key))
        clips = [routing.clips[i] for i in order]
        details = [f"in {often[i]:.0%} of epochs; motion {_two(clip.motion)}, visual {_two(clip.visual)}"
                   for i, clip in zip(order, clips, strict=True)]  # fmt: skip
        strip = pictures.strip(clips, details, SHOWN)
        if strip is not None:
            parts += [tag("h3", f"Trained most often at sigma {title}, of the samples that have a picture"), strip]
    if not parts:
        parts.append(tag("p", "no sample has a thumbnail or a stored clip, so none is shown", class_="empty"))
    return parts


def _scores(clips: Sequence[Clip]) -> tuple[Tensor, Tensor]:
    motion = torch.tensor([clip.motion for clip in clips], dtype=torch.float64)
    visual = torch.tensor([clip.visual for clip in clips], dtype=torch.float64)
    return motion.clamp(0, 1), visual.clamp(0, 1)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole > 0 and math.isfinite(part) else "n/a"


def _two(value: float) -> str:
    return number(round(value, 2))
