"""A LoRA trained on two processes under ZeRO-3: killed and resumed, read by diffusers, merged by the next stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from contentv.engine.checkpoint_files import read_manifest
from contentv.models.io import open_transformer
from contentv.models.lora import merged, read_lora
from contentv.models.stored import whole

ASSETS = Path(__file__).resolve().parents[2] / "contentv" / "demo" / "assets"
BASE = ASSETS / "image_model" / "transformer"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CONTENTV_TYPECHECK": "0"}
FILE = "pytorch_lora_weights.safetensors"
RANK, ALPHA, LAYERS_ADAPTED = 4, 8.0, 4
COMMON = [
    "model=tiny", "train.precision=fp32", "train.global_batch_size=4", "train.log_every=1", "optim.warmup_steps=2",
    "optim.ema_decay=0.9",
]  # fmt: skip
LORA = [f"lora.rank={RANK}", f"lora.alpha={ALPHA}"]

pytestmark = pytest.mark.dist


def command(*arguments: str, nproc: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)] if nproc > 1 else []
    return [sys.executable, *torchrun, "-m", "contentv", *arguments]


def contentv(*arguments: str, nproc: int = 1) -> None:
    done = subprocess.run(
        command(*arguments, nproc=nproc), env=ENV, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    contentv("synth", f"out={root / 'videos'}", "clips=8", "seed=4")
    contentv(
        "curate", f"input={root / 'videos'}", f"output={root / 'dataset'}", "buckets=[f1_h32_w32,f9_h32_w32]",
        f"vae.path={ASSETS / 'vae'}", f"text.path={ASSETS / 'image_model'}", "min_clip_s=1.0", "max_clip_s=6",
    )  # fmt: skip
    return root / "dataset"


def training(dataset: Path, name: str) -> list[str]:
    return ["train", "stage=image", f"data.path={dataset}", f"init={ASSETS / 'image_model'}",
            f"out={dataset.parent / name}", "train.max_steps=6", "train.checkpoint_every=2", "parallel.zero_stage=3",
            "optim.lr=0.003", *LORA, *COMMON]  # fmt: skip


@pytest.fixture(scope="module")
def run(dataset: Path) -> Path:
    contentv(*training(dataset, "lora"), nproc=2)
    return dataset.parent / "lora"


def test_only_the_lora_is_trained_and_kept(run: Path) -> None:
    stage = json.loads((run / "stage.json").read_text())
    assert stage["lora"] == {"base": str(BASE), "rank": RANK, "alpha": ALPHA}
    manifest = read_manifest(run / "checkpoints" / "step-00000006")
    assert all(".lora_" in name for name in manifest["tensors"])
    assert manifest["weights"]["trained"] < 0.1 * manifest["weights"]["frozen"]
    for which in ("ema", "raw"):
        assert [p.name for p in (run / "export" / which).iterdir()] == [FILE]
    ema, raw = (read_lora(run / "export" / which) for which in ("ema", "raw"))
    blocks = stage["geometry"]["num_layers"]
    assert len(raw.ranks) == LAYERS_ADAPTED * blocks
    assert set(raw.ranks.values()) == {RANK}
    assert set(raw.scales.values()) == {ALPHA / RANK}
    for module in raw.ranks:  # B starts at zero
        assert whole(raw.tensors[f"{module}.lora_B.weight"]).abs().max() > 1e-4
    assert any(not torch.equal(whole(ema.tensors[n]), whole(raw.tensors[n])) for n in raw.tensors)
    assert all(row["grad_norm"] > 0 for row in rows(run))


def test_one_process_trains_the_same(dataset: Path, run: Path) -> None:
    arguments = [a for a in training(dataset, "lora_one") if not a.startswith("parallel.zero_stage")]
    contentv(*arguments, "parallel.zero_stage=1")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in rows(dataset.parent / "lora_one")] == pytest.approx(
            [r[key] for r in rows(run)], rel=1e-5
        )


@pytest.mark.slow  # test_end_to_end kills a run without a LoRA, which differs in what a checkpoint holds alone
def test_a_killed_run_goes_on_as_if_nothing_had_happened(dataset: Path, run: Path) -> None:
    out = dataset.parent / "lora_killed"
    process = subprocess.Popen(command(*training(dataset, "lora_killed"), nproc=2), env=ENV, start_new_session=True)
    deadline = time.time() + 200
    while not (out / "checkpoints" / "step-00000004").is_dir():
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    contentv(*training(dataset, "lora_killed"), nproc=2)
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(run)]
    for which in ("ema", "raw"):
        again, straight = (read_lora(folder / "export" / which) for folder in (out, run))
        assert again.scales == straight.scales
        assert all(torch.equal(whole(again.tensors[n]), whole(t)) for n, t in straight.tensors.items())


def test_diffusers_reads_it(run: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    state, metadata = StableDiffusion3Pipeline.lora_state_dict(run / "export" / "ema", return_lora_metadata=True)
    ours = read_lora(run / "export" / "ema")
    assert {name.removeprefix("transformer.") for name in state} == set(ours.tensors)
    assert all(torch.equal(state[f"transformer.{name}"], whole(tensor)) for name, tensor in ours.tensors.items())
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (RANK, ALPHA)


def test_the_next_stage_starts_from_both_and_rlhf_adds_its_own(dataset: Path, run: Path) -> None:
    out = dataset.parent / "low"
    contentv(
        "train", "stage=lowres_video", f"data.path={dataset}", f"init={run}", f"out={out}", "train.max_steps=1",
        *COMMON, "optim.lr=1e-12",
    )  # fmt: skip
    lora = read_lora(run / "export" / "ema")
    want, base = merged(open_transformer(BASE), lora).tensors, open_transformer(BASE).tensors
    changed = 0
    for name, got in open_transformer(out / "export" / "raw").tensors.items():
        torch.testing.assert_close(whole(got), whole(want[name]), rtol=0, atol=1e-9)
        changed += not torch.equal(whole(got), whole(base[name]))
    assert changed >= len(lora.ranks)
    rlhf = dataset.parent / "rlhf"
    contentv(
        "train", "stage=rlhf", "stage.accepts=[lowres_video]", f"data.path={dataset}", f"init={out}", f"out={rlhf}",
        f"vae.path={ASSETS / 'vae'}", f"text.path={ASSETS / 'image_model'}", f"reward.path={ASSETS / 'reward'}",
        "reward.steps=3", "reward.grad_steps=2", "train.max_steps=3", "parallel.sp=2", *LORA, *COMMON, "optim.lr=0.003",
        nproc=2,
    )  # fmt: skip
    kl = [row["kl"] for row in rows(rlhf)]
    assert abs(kl[0]) < 1e-10  # at first the policy is the reference, which is the base
    assert kl[2] > 1e-8
