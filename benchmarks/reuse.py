"""Does reuse pay? Steps that the image-initialised low-res stage needs to reach the loss of a from-scratch run.

For each seed, two runs of the demo's low-res stage, alike in all but where they start: random weights, or the image
stage's. The learning rate stays constant after warm-up, so that a run's state at a step does not depend on where the
run ends. The loss is measured on clips that no stage has seen (videos of another seed), with the moving average of the
weights, at the same noise and the same noise levels every time. The target is the from-scratch run's loss at its last
step; the answer is the first measured step at which the other run's loss is no larger.

    python benchmarks/reuse.py --demo demo-out            # after `make demo`: uses its dataset and its image stage
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import ROOT, append_rows, provenance

from contentv.base.types import Batch
from contentv.data import open_dataset
from contentv.diffusion.timesteps import TimestepConfig, build_sampler
from contentv.engine.checkpoint_files import checkpoints, read_weights
from contentv.models.io import read_config
from contentv.models.mmdit import MMDiT
from contentv.objectives.flow import FlowMatching

STAGE = "lowres_video"
HELD_OUT_SEED = 1_000_003  # of the videos no stage has seen; the demo's own is 0
HELD_OUT_VIDEOS = 128
BATCH = 32


def stage_settings() -> list[str]:
    """Returns the demo's overrides of its low-res stage."""
    pipeline = yaml.safe_load((ROOT / "conf" / "pipeline" / "demo.yaml").read_text(encoding="utf-8"))
    stage = next(node for node in pipeline["stages"] if node["name"] == STAGE)
    return [f"stage={stage['stage']}", *pipeline["overrides"], *stage.get("overrides", [])]


def contentv(*arguments: str, nproc: int = 0) -> None:
    """Runs a command of contentv, under torchrun for `nproc` processes; its output is shown if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)] if nproc else []
    command = [sys.executable, *launcher, "-m", "contentv", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def held_out_batches(demo: Path, folder: Path, bucket: str) -> tuple[list[Batch], FlowMatching]:
    """Returns every held-out clip of a bucket once, and the loss to measure on them."""
    stage = json.loads((demo / "run" / STAGE / "stage.json").read_text(encoding="utf-8"))
    contentv("synth", f"out={folder / 'videos'}", f"clips={HELD_OUT_VIDEOS}", f"seed={HELD_OUT_SEED}")
    contentv(
        "curate", f"input={folder / 'videos'}", f"output={folder / 'dataset'}", f"buckets=[{bucket}]",
        f"vae.path={stage['vae_path']}", f"text.path={stage['text_path']}", "min_clip_s=1.5", "max_clip_s=6",
    )  # fmt: skip
    source = open_dataset(folder / "dataset", global_batch_size=BATCH, micro_batch_size=BATCH, prefetch=0)
    clips = json.loads((folder / "dataset" / "dataset.json").read_text(encoding="utf-8"))["shards"]
    batches = [next(source)[0] for _ in range(sum(shard["samples"] for shard in clips) // BATCH)]
    sampler = build_sampler(TimestepConfig(kind="uniform"))
    return batches, FlowMatching(sampler, seed=HELD_OUT_SEED, null_text=source.null_text, text_dropout=0)


@torch.no_grad()
def held_out_loss(model: MMDiT, batches: list[Batch], objective: FlowMatching) -> float:
    """Returns the mean loss over the clips."""
    sums = [objective(model, batch, step) for step, batch in enumerate(batches)]
    return sum(float(s.loss_sum) for s in sums) / sum(s.samples for s in sums)


def curve(run: Path, batches: list[Batch], objective: FlowMatching) -> dict[int, float]:
    """Returns the held-out loss at every checkpoint of a run, by step."""
    model = MMDiT(read_config(run / "export" / "ema"))
    losses = {}
    for folder in reversed(checkpoints(run / "checkpoints")):
        model.load_state_dict(dict(read_weights(folder, ema=True)))
        losses[int(folder.name.rpartition("-")[2])] = held_out_loss(model, batches, objective)
    return losses


def reached(losses: dict[int, float], target: float) -> int | None:
    """Returns the first step whose loss is at most `target`, or None."""
    return next((step for step, loss in sorted(losses.items()) if loss <= target), None)


def main() -> None:
    """Runs both arms for every seed and appends a row each to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"), help="folder of a finished demo")
    parser.add_argument("--steps", type=int, default=600, help="steps of every run")
    parser.add_argument("--every", type=int, default=20, help="steps between measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nproc", type=int, default=2)
    arguments = parser.parse_args()
    demo, image = arguments.demo.resolve(), arguments.demo.resolve() / "run" / "image"
    if not (image / "stage.json").is_file():
        raise SystemExit(f"{demo} holds no finished image stage: run `make demo` first, or name one with --demo")
    bucket = json.loads((demo / "run" / STAGE / "stage.json").read_text(encoding="utf-8"))["buckets"][0]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as held_out:
        batches, objective = held_out_batches(demo, Path(held_out), bucket)
        for seed in arguments.seeds:
            losses = {}
            for arm, init in (("scratch", "none"), ("image_init", str(image))):
                with tempfile.TemporaryDirectory() as folder:
                    contentv(
                        "train", *stage_settings(), f"data.path={demo / 'dataset'}", f"out={folder}", f"init={init}",
                        f"train.seed={seed}", f"train.max_steps={arguments.steps}", "optim.schedule=constant",
                        f"train.checkpoint_every={arguments.every}", "train.keep_checkpoints=0",
                        nproc=arguments.nproc,
                    )  # fmt: skip
                    losses[arm] = curve(Path(folder), batches, objective)
            target = losses["scratch"][arguments.steps]
            step = reached(losses["image_init"], target)
            row = {
                "benchmark": "reuse", "seed": seed, "steps": arguments.steps, "scratch_loss": target,
                "image_init_reached_at": step, "share": None if step is None else step / arguments.steps,
                "image_init_loss": losses["image_init"][arguments.steps], "clips": len(batches) * BATCH,
                "bucket": bucket, "curves": losses, **provenance(torch.device("cpu")),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps({k: row[k] for k in ("seed", "scratch_loss", "image_init_reached_at", "share")}), flush=True)
    print(append_rows(rows, "reuse", torch.device("cpu")))


if __name__ == "__main__":
    main()
