"""summary.json and report.html of a demo."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from contentv.data import Normaliser, read_metas
from contentv.demo.classifier import wilson_interval
from contentv.demo.evaluate import Evaluation, PromptSpec
from contentv.diffusion.timesteps import LogitNormal
from contentv.diffusion.tqd import TQD
from contentv.report.demo import write_demo_report

CORNERS = {
    "motion-rich": (0.9, 0.1),
    "clean-looking": (0.1, 0.9),
    "both": (0.9, 0.9),
    "neither": (0.1, 0.1),
}
SHOWN = 24  # videos in the report


def accuracy(specs: Sequence[PromptSpec], found: Sequence[Any], attribute: str) -> tuple[float, tuple[float, float]]:
    """Returns the share of videos whose colour or direction is the prompted one, with its 95 % Wilson interval."""
    right = sum(
        getattr(verdict, attribute) == getattr(spec, attribute) for spec, verdict in zip(specs, found, strict=True)
    )
    return right / len(specs), wilson_interval(right, len(specs))


def write_summary(
    out: Path, specs: Sequence[PromptSpec], results: Mapping[str, Evaluation], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the numbers of a demo and writes them to `summary.json`; those without a suffix are after RLHF."""
    summary: dict[str, Any] = {"prompts": len(specs)}
    for attribute in ("colour", "direction"):
        for name, suffix in (("after", ""), ("before", "_before")):
            share, interval = accuracy(specs, results[name].verdicts, attribute)
            summary[f"{attribute}_accuracy{suffix}"] = share
            summary[f"{attribute}_accuracy{suffix}_interval"] = list(interval)
        summary[f"{attribute}_accuracy_chance"] = 0.25
    for name in ("before", "after"):
        summary[f"reward_{name}"] = sum(results[name].rewards) / len(specs)
    summary["seconds_per_stage"] = dict(seconds)
    summary["seconds_total"] = sum(seconds.values())
    (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


def sigma_densities(shift: float, points: int = 200) -> dict[str, tuple[list[float], list[float]]]:
    """Returns the noise-level density of each quality corner under TQD, and the base's."""
    sigma = torch.linspace(0.005, 0.995, points)
    base = LogitNormal(shift=shift)
    tqd = TQD(base)
    curves = {"base": base.log_density(sigma).exp().tolist()}
    for name, (motion, visual) in CORNERS.items():
        scores = (torch.full((points,), motion), torch.full((points,), visual))
        curves[name] = tqd.log_density(sigma, *scores).exp().tolist()
    return {name: (sigma.tolist(), density) for name, density in curves.items()}


def write_page(
    out: Path, summary: Mapping[str, Any], specs: Sequence[PromptSpec], results: Mapping[str, Evaluation]
) -> Path:
    """Writes report.html of a demo folder and returns its path."""
    dataset = out / "dataset"
    normaliser = Normaliser.load(dataset)
    stages = list(json.loads((out / "run" / "pipeline.json").read_text(encoding="utf-8")))
    after, before = results["after"], results["before"]
    samples = []
    for index, spec in enumerate(specs[:SHOWN]):
        verdict = after.verdicts[index]
        facts = {
            "colour": verdict.colour == spec.colour,
            "direction": verdict.direction == spec.direction,
            "reward": after.rewards[index],
        }
        samples.append((spec.caption, after.paths[index], facts))
    return write_demo_report(
        out,
        summary,
        [(name, out / "run" / name) for name in stages],
        read_metas(dataset),
        sigma_densities(_shift(out / "run" / stages[-1])),
        samples,
        before={spec.caption: path for spec, path in zip(specs[:SHOWN], before.paths, strict=False)},
        quality=normaliser.scores,
    )


def _shift(run: Path) -> float:
    return float(json.loads((run / "stage.json").read_text(encoding="utf-8"))["shift"])
