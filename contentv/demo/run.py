"""`contentv demo`: the whole product on one machine, each part done once and remembered.

videos -> dataset -> image, low-res, high-res, RLHF stages -> samples before and after RLHF -> summary and report.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from contentv.base.errors import UserError
from contentv.base.lock import lock_folder
from contentv.base.log import console, get_logger
from contentv.config.compose import load_config
from contentv.config.curating import curate_dataset
from contentv.config.graph import build_graph
from contentv.config.schema import DemoConfig
from contentv.curation.synth import synthesize
from contentv.demo.evaluate import Evaluation, evaluate, prompts
from contentv.demo.summary import write_page, write_summary
from contentv.train.pipeline import launch, local_launcher, run_pipeline

ASSETS = Path(__file__).parent / "assets"
BUCKETS = ("f1_h64_w64", "f9_h64_w64", "f17_h80_w80")


@dataclass
class Ledger:
    """What has been done, with what settings and how long it took; `demo.json` in the demo's folder."""

    path: Path
    done: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Ledger:
        """Returns the ledger of a demo folder.

        Raises:
            UserError: the folder holds a demo made with other settings, or the ledger is damaged.
        """
        if not path.is_file():
            return cls(path, {"settings": settings})
        try:
            done = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"is damaged ({error})", where=str(path), remedy="remove the folder and start again"
            ) from None
        if done.get("settings") != settings:
            raise UserError(
                "this folder holds a demo made with other settings", where=str(path.parent),
                remedy="use another out=, or remove the folder",
            )  # fmt: skip
        return cls(path, done)

    def once(self, name: str, action: Callable[[], Any]) -> bool:
        """Runs `action` unless it has been done, and remembers it with its seconds; returns whether it ran."""
        if name in self.done:
            return False
        console.rule(name)
        started = time.perf_counter()
        action()
        self.done[name] = {"seconds": time.perf_counter() - started}
        self.save()
        return True

    def save(self) -> None:
        """Writes the ledger, whole or not at all."""
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text(json.dumps(self.done, indent=1), encoding="utf-8")
        temporary.replace(self.path)

    def seconds(self, name: str) -> float:
        """Returns how long a part took."""
        return float(self.done[name]["seconds"])


def run_demo(config: DemoConfig) -> Path:
    """Does every part that is not done and returns the path of the report."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out, "running this demo")
    try:
        return _run(config, out)
    finally:
        os.close(lock)


def _run(config: DemoConfig, out: Path) -> Path:
    settings = {key: value for key, value in asdict(config).items() if key != "out"}
    ledger = Ledger.open(out / "demo.json", settings)
    ran = ledger.once("videos", lambda: make_videos(config, out))
    ran |= ledger.once("shards", lambda: make_dataset(config, out))
    ran |= ledger.once("stages", lambda: train_stages(config, out, ledger))
    for name, stage in (("before", "highres_video"), ("after", "rlhf")):
        ran |= ledger.once(f"samples {name} RLHF", lambda n=name, s=stage: make_samples(config, out, n, s))  # type: ignore[misc]
    ran |= ledger.once("report", lambda: measure(config, out, ledger))
    report = out / "report.html"
    if not ran:
        console.print(f"nothing to do: the demo in {out} is complete", highlight=False)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for key in ("colour_accuracy", "direction_accuracy", "reward_before", "reward_after"):
        console.print(f"{key:<20} {summary[key]:.3f}", highlight=False)
    console.print(f"videos: {out / 'samples'}\nreport: {report}", highlight=False)
    return report


def make_videos(config: DemoConfig, out: Path) -> None:
    """Writes the source clips, some of them blurred, noisy, static, jittery or joined by cuts."""
    synthesize(out / "videos", config.clips, config.seed)


def make_dataset(config: DemoConfig, out: Path) -> None:
    """Curates the clips into shards of three buckets."""
    torch.set_num_threads(max(torch.get_num_threads(), config.nproc))
    overrides = [
        f"input={out / 'videos'}", f"output={out / 'dataset'}", f"buckets=[{','.join(BUCKETS)}]",
        f"vae.path={ASSETS / 'vae'}", f"text.path={ASSETS / 'image_model'}", f"workers={config.nproc}",
        "min_clip_s=1.5", "max_clip_s=6",
    ]  # fmt: skip
    report = curate_dataset(load_config("curate", overrides))
    get_logger().info("%d samples kept, %d rejected", report.kept, report.rejected)


def train_stages(config: DemoConfig, out: Path, ledger: Ledger) -> None:
    """Runs the stage graph through torchrun."""
    pipeline = load_config("pipeline", [f"pipeline={config.pipeline}"]).pipeline
    common = [
        *pipeline.overrides, f"data.path={out / 'dataset'}", f"vae.path={ASSETS / 'vae'}",
        f"text.path={ASSETS / 'image_model'}", f"reward.path={ASSETS / 'reward'}", f"train.seed={config.seed}",
        *config.overrides,
    ]  # fmt: skip
    pipeline = replace(pipeline, nproc=config.nproc, init=str(ASSETS / "image_model"), overrides=common)
    stages = build_graph(pipeline, out / "run")
    results = run_pipeline(stages, out / "run", local_launcher(config.nproc), {"OMP_NUM_THREADS": "1"})
    ledger.done["seconds_per_stage"] = {result.name: result.seconds for result in results}


def make_samples(config: DemoConfig, out: Path, name: str, stage: str) -> None:
    """Samples the demo's prompts from a stage's weights, on every process."""
    folder = out / "samples" / name
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "prompts.txt"
    listing.write_text(
        "\n".join(spec.caption for spec in prompts(config.prompts, config.seed)) + "\n", encoding="utf-8"
    )
    sample = [
        "-m", "contentv", "sample", f"checkpoint={out / 'run' / stage}", f"prompts={listing}", f"out={folder}",
        f"steps={config.sample_steps}", f"guidance_scale={config.guidance_scale}", f"seed={config.seed}",
        "batch_size=16",
    ]  # fmt: skip
    code = launch([*local_launcher(config.nproc), *sample], {"OMP_NUM_THREADS": "1"})
    if code != 0:
        raise RuntimeError(f"sampling from {stage} failed with exit code {code}; its output is above")


def measure(config: DemoConfig, out: Path, ledger: Ledger) -> None:
    """Classifies and scores the samples, and writes summary.json and report.html."""
    specs = prompts(config.prompts, config.seed)
    results: dict[str, Evaluation] = {
        name: evaluate(specs, out / "samples" / name, ASSETS / "reward") for name in ("before", "after")
    }
    seconds: dict[str, float] = {
        "videos": ledger.seconds("videos"), "shards": ledger.seconds("shards"), **ledger.done["seconds_per_stage"],
        "samples": ledger.seconds("samples before RLHF") + ledger.seconds("samples after RLHF"),
    }  # fmt: skip
    summary = write_summary(out, specs, results, seconds)
    write_page(out, summary, specs, results)


def stage_names(out: Path) -> Sequence[str]:
    """Returns the stages of a demo folder in the order they ran."""
    return list(json.loads((out / "run" / "pipeline.json").read_text(encoding="utf-8")))
