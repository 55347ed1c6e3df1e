"""Does reuse pay? Steps that the image-initialised low-res stage needs to reach the loss of a from-scratch run.

For each seed, two runs of the demo's low-res stage, alike in all but where they start: random weights, or the image
stage's. The learning rate stays constant after warm-up, so that a run's state at a step does not depend on where the
run ends. The loss is measured on clips that no stage has seen (videos of another seed), with the moving average of the
weights, at the same noise and the same noise levels every time: levels drawn as the stage draws them (its base law and
shift, without TQD), and, for contrast, evenly spread ones. For each of several numbers of steps N the target is the
from-scratch run's loss at step N, and the answer the first measured step at which the other run's loss is no larger.

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
TARGETS = (50, 100, 150, 200, 300, 400, 600, 900, 1300)  # steps of the from-scratch run, as far as it goes


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


def held_out_batches(demo: Path, folder: Path, bucket: str) -> tuple[list[Batch], dict[str, FlowMatching]]:
    """Returns every held-out clip of a bucket once, and the losses to measure on them."""
    stage = json.loads((demo / "run" / STAGE / "stage.json").read_text(encoding="utf-8"))
    contentv("synth", f"out={folder / 'videos'}", f"clips={HELD_OUT_VIDEOS}", f"seed={HELD_OUT_SEED}")
    contentv(
        "curate", f"input={folder / 'videos'}", f"output={folder / 'dataset'}", f"buckets=[{bucket}]",
        f"vae.path={stage['vae_path']}", f"text.path={stage['text_path']}", "min_clip_s=1.5", "max_clip_s=6",
    )  # fmt: skip
    source = open_dataset(folder / "dataset", global_batch_size=BATCH, micro_batch_size=BATCH, prefetch=0)
    clips = json.loads((folder / "dataset" / "dataset.json").read_text(encoding="utf-8"))["shards"]
    batches = [
        next(source)[0].to(torch.device("cpu")) for _ in range(sum(shard["samples"] for shard in clips) // BATCH)
    ]
    laws = {"stage": TimestepConfig(kind="logit_normal", shift=stage["shift"]), "even": TimestepConfig(kind="uniform")}
    return batches, {
        name: FlowMatching(build_sampler(law), seed=HELD_OUT_SEED, null_text=source.null_text, text_dropout=0)
        for name, law in laws.items()
    }


@torch.no_grad()
def held_out_loss(model: MMDiT, batches: list[Batch], objective: FlowMatching) -> float:
    """Returns the mean loss over the clips."""
    sums = [objective(model, batch, step) for step, batch in enumerate(batches)]
    return sum(float(s.loss_sum) for s in sums) / sum(s.samples for s in sums)


def curves(run: Path, batches: list[Batch], objectives: dict[str, FlowMatching]) -> dict[str, dict[int, float]]:
    """Returns the held-out losses at every checkpoint of a run: by law of the noise level, then by step."""
    model = MMDiT(read_config(run / "export" / "ema"))
    losses: dict[str, dict[int, float]] = {law: {} for law in objectives}
    for folder in reversed(checkpoints(run / "checkpoints")):
        model.load_state_dict(dict(read_weights(folder, ema=True)))
        for law, objective in objectives.items():
            losses[law][int(folder.name.rpartition("-")[2])] = held_out_loss(model, batches, objective)
    return losses


def reached(losses: dict[int, float], target: float) -> int | None:
    """Returns the first step whose loss is at most `target`, or None."""
    return next((step for step, loss in sorted(losses.items()) if loss <= target), None)


def compare(steps: int, scratch: dict[int, float], image_init: dict[int, float]) -> dict[str, Any]:
    """Returns when the image-initialised run reaches the loss of `steps` steps from scratch."""
    step = reached(image_init, scratch[steps])
    return {
        "steps": steps, "scratch_loss": scratch[steps], "image_init_loss": image_init[steps],
        "image_init_reached_at": step, "share": None if step is None else step / steps,
    }  # fmt: skip


def main() -> None:
    """Runs both arms for every seed and appends a row each to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"), help="folder of a finished demo")
    parser.add_argument("--steps", type=int, default=300, help="steps of every run")
    parser.add_argument("--every", type=int, default=10, help="steps between measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nproc", type=int, default=2)
    arguments = parser.parse_args()
    demo, image = arguments.demo.resolve(), arguments.demo.resolve() / "run" / "image"
    if not (image / "stage.json").is_file():
        raise SystemExit(f"{demo} holds no finished image stage: run `make demo` first, or name one with --demo")
    bucket = json.loads((demo / "run" / STAGE / "stage.json").read_text(encoding="utf-8"))["buckets"][0]
    image_steps = json.loads((image / "stage.json").read_text(encoding="utf-8"))["steps"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as held_out:
        batches, objectives = held_out_batches(demo, Path(held_out), bucket)
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
                    losses[arm] = curves(Path(folder), batches, objectives)
            answers = {
                law: [
                    compare(n, losses["scratch"][law], losses["image_init"][law])
                    for n in TARGETS
                    if n <= arguments.steps
                ]
                for law in objectives
            }
            row = {
                "benchmark": "reuse", "seed": seed, "steps": arguments.steps, "answers": answers,
                "clips": len(batches) * BATCH, "bucket": bucket, "image_steps": image_steps, "curves": losses,
                **provenance(torch.device("cpu")),
            }  # fmt: skip
            rows.append(row)
            shares = {law: {a["steps"]: a["share"] for a in some} for law, some in answers.items()}
            print(json.dumps({"seed": seed, "share": shares}), flush=True)
    print(append_rows(rows, "reuse", torch.device("cpu")))


if __name__ == "__main__":
    main()
