"""Video files -> shards -> image stage -> low-res stage on two processes, killed and resumed -> RLHF -> MP4."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contentv.base.lock import lock_folder
from contentv.curation.video_io import read_video

ASSETS = Path(__file__).resolve().parents[2] / "contentv" / "demo" / "assets"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CONTENTV_TYPECHECK": "0"}
COMMON = [
    "model=tiny", "timestep=tqd", "train.precision=fp32", "train.global_batch_size=4", "train.log_every=1",
    "optim.warmup_steps=2", "optim.ema_decay=0.9",
]  # fmt: skip

pytestmark = pytest.mark.dist


def command(*arguments: str, nproc: int = 1) -> list[str]:
    if nproc == 1:
        return [sys.executable, "-m", "contentv", *arguments]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    return [sys.executable, *torchrun, "-m", "contentv", *arguments]


def contentv(*arguments: str, nproc: int = 1, expect: int = 0) -> str:
    done = subprocess.run(
        command(*arguments, nproc=nproc), env=ENV, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("e2e")
    contentv("synth", f"out={root / 'videos'}", "clips=10", "seed=3")
    (root / "videos" / "broken.mp4").write_bytes(b"not a video")
    output = contentv(
        "curate", f"input={root / 'videos'}", f"output={root / 'dataset'}", "buckets=[f1_h32_w32,f9_h32_w32]",
        f"vae.path={ASSETS / 'vae'}", f"text.path={ASSETS / 'image_model'}", "min_clip_s=1.0", "max_clip_s=6",
    )  # fmt: skip
    assert "rejected" in output
    rejects = [json.loads(line) for line in (root / "dataset" / "rejects.jsonl").read_text().splitlines()]
    assert any("broken.mp4" in reject["file"] for reject in rejects)
    return root / "dataset"


@pytest.fixture(scope="module")
def image_run(dataset: Path) -> Path:
    out = dataset.parent / "image"
    contentv(
        "train", "stage=image", f"data.path={dataset}", f"init={ASSETS / 'image_model'}", f"out={out}",
        "train.max_steps=3", *COMMON,
    )  # fmt: skip
    return out


def low(dataset: Path, image_run: Path, name: str, *more: str) -> list[str]:
    return ["train", "stage=lowres_video", f"data.path={dataset}", f"init={image_run}", f"out={dataset.parent / name}",
            "train.max_steps=6", "train.checkpoint_every=2", *COMMON, *more]  # fmt: skip


@pytest.fixture(scope="module")
def low_run(dataset: Path, image_run: Path) -> Path:
    contentv(*low(dataset, image_run, "low", "parallel.sp=2"), nproc=2)
    return dataset.parent / "low"


def test_without_a_moving_average_the_raw_weights_are_exported(dataset: Path) -> None:
    out = dataset.parent / "no_ema"
    contentv(
        "train", "stage=image", f"data.path={dataset}", f"init={ASSETS / 'image_model'}", f"out={out}",
        "train.max_steps=1", *COMMON, "optim.ema_decay=0",
    )  # fmt: skip
    assert [p.name for p in (out / "export").iterdir()] == ["raw"]
    text = contentv(
        "train", "stage=lowres_video", f"data.path={dataset}", f"init={out}", f"out={out}_next", *COMMON, expect=2
    )
    assert "no ema weights" in text


def test_the_image_stage_starts_from_the_image_model(image_run: Path) -> None:
    manifest = json.loads((image_run / "stage.json").read_text())
    assert manifest["consumed"]["init_stage"] == "sd3"
    assert len(losses(image_run)) == 3


def test_two_processes_with_sequence_parallel_follow_one_process(dataset: Path, image_run: Path, low_run: Path) -> None:
    contentv(*low(dataset, image_run, "low_one"))
    assert losses(low_run) == pytest.approx(losses(dataset.parent / "low_one"), rel=1e-5)
    ledgers = [(dataset.parent / name / "ledger.jsonl").read_text() for name in ("low", "low_one")]
    assert ledgers[0] == ledgers[1]


def test_the_same_command_twice_gives_the_same_losses_to_the_bit(dataset: Path, image_run: Path, low_run: Path) -> None:
    contentv(*low(dataset, image_run, "low_again", "parallel.sp=2"), nproc=2)
    assert losses(dataset.parent / "low_again") == losses(low_run)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(dataset: Path, image_run: Path, low_run: Path) -> None:
    out = dataset.parent / "low_killed"
    arguments = low(dataset, image_run, "low_killed", "parallel.sp=2")
    process = subprocess.Popen(command(*arguments, nproc=2), env=ENV, start_new_session=True)
    deadline = time.time() + 200
    while not (out / "checkpoints" / "step-00000004").is_dir():
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    contentv(*arguments, nproc=2)
    assert losses(out) == losses(low_run)
    assert (out / "ledger.jsonl").read_text() == (low_run / "ledger.jsonl").read_text()
    assert "nothing to do" in contentv(*arguments, nproc=2)
    assert json.loads((out / "status.json").read_text()) == {"exit_code": 0, "message": "done"}


def test_two_runs_in_one_folder_are_refused(dataset: Path, image_run: Path) -> None:
    out = dataset.parent / "image"
    lock = lock_folder(out, "training in this folder")
    try:
        text = contentv(
            "train", "stage=image", f"data.path={dataset}", f"init={ASSETS / 'image_model'}", f"out={out}",
            "train.max_steps=4", "train.resume=none", *COMMON, expect=2,
        )  # fmt: skip
    finally:
        os.close(lock)
    assert "another process is training in this folder" in text
    assert len(losses(image_run)) == 3


def test_a_wrong_predecessor_is_refused(dataset: Path, image_run: Path) -> None:
    text = contentv(
        "train", "stage=rlhf", f"data.path={dataset}", f"init={image_run}", f"out={dataset.parent / 'wrong'}", *COMMON,
        f"reward.path={ASSETS / 'reward'}", expect=2,
    )  # fmt: skip
    assert "image" in text
    assert "highres_video" in text
    assert "Traceback" not in text


def test_rlhf_runs_and_its_weights_sample_a_video(dataset: Path, low_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "rlhf"
    contentv(
        "train", "stage=rlhf", "stage.accepts=[lowres_video]", f"data.path={dataset}", f"init={low_run}", f"out={out}",
        f"vae.path={ASSETS / 'vae'}", f"text.path={ASSETS / 'image_model'}", f"reward.path={ASSETS / 'reward'}",
        "reward.steps=3", "reward.grad_steps=2", "train.max_steps=2", *COMMON, nproc=2,
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row["reward"] is not None and row["grad_norm"] > 0 for row in rows)
    video = tmp_path / "red.mp4"
    contentv("sample", f"checkpoint={out}", "prompt=a red circle moving left", f"out={video}", "steps=2")
    assert read_video(video).frames.shape == (9, 32, 32, 3)
