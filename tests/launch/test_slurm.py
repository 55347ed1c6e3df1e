"""launch/slurm.sbatch under a real Slurm of two nodes: preempted, a node lost, cancelled; no step lost, none twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_slurm import Job, LocalSlurm, why_not

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "contentv" / "demo" / "assets"
STEPS = 24

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.skipif(bool(why_not()), reason=why_not())]


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    with LocalSlurm() as running:
        yield running


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("slurm")
    for arguments in (
        ["synth", f"out={root / 'videos'}", "clips=8", "seed=3"],
        ["curate", f"input={root / 'videos'}", f"output={root / 'dataset'}", "buckets=[f1_h32_w32,f9_h32_w32]",
         f"vae.path={ASSETS / 'vae'}", f"text.path={ASSETS / 'image_model'}", "min_clip_s=1.0", "max_clip_s=6"],
    ):  # fmt: skip
        subprocess.run([sys.executable, "-m", "contentv", *arguments], cwd=ROOT, check=True, capture_output=True)
    return root / "dataset"


def rows(run: Path, name: str = "metrics") -> list[dict[str, object]]:
    path = run / f"{name}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def settings(dataset: Path) -> list[str]:
    return [
        "model=tiny", "timestep=tqd", "train.precision=fp32", "train.global_batch_size=4", "train.log_every=1",
        "train.checkpoint_every=4", "optim.warmup_steps=2", "optim.ema_decay=0.9", f"data.path={dataset}",
        f"vae.path={ASSETS / 'vae'}", f"text.path={ASSETS / 'image_model'}", f"reward.path={ASSETS / 'reward'}",
    ]  # fmt: skip


def words(values: list[str]) -> str:
    return ",".join(f'"{value}"' for value in values)


def test_a_pipeline_survives_preemption_and_a_lost_node(slurm: LocalSlurm, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "pipeline"
    video = words([f"train.max_steps={STEPS}", "parallel.sp=2"])
    stages = [
        '{name:image,stage:image,overrides:["train.max_steps=3"]}',
        f"{{name:lowres_video,stage:lowres_video,init:image,overrides:[{video}]}}",
        '{name:highres_video,stage:highres_video,init:lowres_video,overrides:["train.max_steps=2"]}',
        '{name:rlhf,stage:rlhf,init:highres_video,overrides:["train.max_steps=2","reward.steps=2"]}',
    ]
    job = Job(
        slurm, tmp_path / "job", "pipeline", "pipeline=demo", f"out={out}", f"pipeline.init={ASSETS / 'image_model'}",
        f"pipeline.overrides=[{words(settings(dataset))}]", f"pipeline.stages=[{','.join(stages)}]",
    )  # fmt: skip
    low = out / "lowres_video"
    job.wait(lambda: len(rows(low)) >= 3, "the second stage does not begin")
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)  # what Slurm does before the time limit
    job.wait_for("PENDING")
    status = json.loads((low / "status.json").read_text())
    saved = sorted(path.name for path in (low / "checkpoints").glob("step-*"))[-1]
    assert status["exit_code"] == 75
    assert saved == f"step-{len(rows(low)):08d}"  # the step it had reached, not the last one that was due
    assert slurm.field(job.id, "Restarts") == "1"

    job.go_on()
    before = len(rows(low))
    job.wait(lambda: len(rows(low)) > before, "it does not go on")
    slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    job.go_on()  # Slurm requeues it by itself; the node answers and is taken in again
    assert job.wait_for("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", (tmp_path / "job" / "job.out").read_text()

    assert [row["step"] for row in rows(low)] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows(low, "ledger")] == list(range(1, STEPS + 1))
    assert all((out / name / "stage.json").is_file() for name in ("image", "lowres_video", "highres_video", "rlhf"))
    logs = sorted(str(path.relative_to(tmp_path / "job" / "logs")) for path in tmp_path.glob("job/logs/*/*.log"))
    assert logs == [f"attempt-{attempt}/rank-{rank}.log" for attempt in range(3) for rank in range(2)]
    assert "sp 2" in (tmp_path / "job" / "job.out").read_text()


def test_signals_to_the_step_and_cancelling(slurm: LocalSlurm, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = [
        "train", "stage=image", *settings(dataset), f"init={ASSETS / 'image_model'}", f"out={out}",
        "train.max_steps=100000", "train.checkpoint_every=0",
    ]  # fmt: skip
    job = Job(slurm, tmp_path / "signalled", *train)
    job.wait(lambda: len(rows(out)) >= 2, "it does not train")
    slurm.run("scancel", "--signal=USR1", job.id)
    job.wait_for("PENDING")
    slurm.run("scontrol", "update", f"JobId={job.id}", "Requeue=0")
    before = len(rows(out))
    job.go_on()
    job.wait(lambda: len(rows(out)) > before, "it does not go on")
    slurm.run("scancel", "--signal=USR1", job.id)
    assert job.wait_for("FAILED", "COMPLETED") == "FAILED"
    assert slurm.field(job.id, "ExitCode") == "75:0"

    again = Job(slurm, tmp_path / "cancelled", *train)
    before = len(rows(out))
    again.wait(lambda: len(rows(out)) > before, "the same command does not go on")
    slurm.run("scancel", again.id)
    assert again.wait_for("CANCELLED", "PENDING") == "CANCELLED"
    again.wait(lambda: "idle 2" in slurm.run("sinfo", "-h", "-o", "%T %D"), "the nodes are not given back")
    assert slurm.state(again.id) == "CANCELLED"
    assert (out / "checkpoints" / f"step-{len(rows(out)):08d}" / "manifest.json").is_file()
    assert [row["step"] for row in rows(out)] == list(range(1, len(rows(out)) + 1))
