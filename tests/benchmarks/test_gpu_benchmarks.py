"""The GPU benchmarks as programs, on toy shapes on the CPU: they run, and their rows say all that a row must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORIGIN = {"date", "device", "versions", "commit", "command"}
SPREAD = {"median_ms", "p10_ms", "p90_ms", "repeats"}


def rows_of(program: str, out: Path) -> list[dict]:
    result = subprocess.run(
        [sys.executable, f"benchmarks/{program}", "--device", "cpu", "--tiny", "--no-compile", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = out.iterdir()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_step_rows(tmp_path):
    rows = rows_of("gpu_step.py", tmp_path)
    impls = ["contentv_eager", "diffusers_eager", "diffusers_eager_cudnn"]
    assert [(row["tokens"], row["impl"]) for row in rows] == [(n, impl) for n in (21, 29) for impl in impls]
    for row in rows:
        assert set(row) >= ORIGIN | SPREAD | {"clip", "batch", "layers", "width", "recompute", "gemm_tflops"}
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["share_of_ceiling"] > 0
        assert "mfu" not in row  # no data-sheet rate is known for this device
        # The same weights, text and image through both models: what differs is rounding.
        assert row["difference"] < 0.02


def test_kernel_rows(tmp_path):
    rows = rows_of("gpu_kernels.py", tmp_path)
    assert {(row["op"], row["direction"], row["impl"]) for row in rows} == {
        ("modulated_layer_norm", "forward", "eager"),
        ("modulated_layer_norm", "backward", "eager"),
        ("attention", "forward", "contentv"),
        ("attention", "backward", "contentv"),
        ("attention", "forward", "torch_default"),
        ("attention", "backward", "torch_default"),
    }
    for row in rows:
        assert set(row) >= ORIGIN | SPREAD | {"shape", "copy_gb_per_s"}
        if row["op"] == "modulated_layer_norm":
            # read x, write y: 2 tensors of bf16; the backward also reads dy
            assert row["bytes"] == 2 * 9 * 48 * 2 * {"forward": 2, "backward": 3}[row["direction"]]
            assert row["error"] < 0.01
            assert row["share_of_copy"] == pytest.approx(
                row["bytes"] / (row["median_ms"] / 1e3) / (row["copy_gb_per_s"] * 1e9), rel=0.1, abs=1e-3
            )
        else:
            assert row["flops"] == 2 * 9 * 9 * 3 * 16 * {"forward": 4, "backward": 8}[row["direction"]]


def test_model_step_rows(tmp_path):
    command = [sys.executable, "benchmarks/model_step.py", "--model", "tiny", "--patches", "4", "--repeats", "2"]
    result = subprocess.run(
        [*command, "--threads", "1", "--out", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["impl"] for row in rows] == ["contentv", "diffusers"]
    for row in rows:
        assert set(row) >= ORIGIN | SPREAD | {"parameters", "video_tokens", "threads", "gflops"}
        assert row["output_error"] <= 1e-5
        assert row["gradient_error"] <= 1e-4
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["cpu_ratio_min"] <= row["cpu_ratio"] <= row["cpu_ratio_max"]
