"""Modulated LayerNorm: the reference against its formula, and the Triton kernel interpreted and built for Hopper."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contentv_kernels import modulated_layer_norm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run_apart(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"CONTENTV_TYPECHECK": "0", "PYTHONPATH": "kernels"} | env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_reference_is_the_formula():
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    scale, shift = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    y = modulated_layer_norm(x, scale, shift, eps=1e-2)
    for b in range(2):
        for s in range(3):
            token = x[b, s].tolist()
            mean = sum(token) / 5
            std = (sum((value - mean) ** 2 for value in token) / 5 + 1e-2) ** 0.5
            for d in range(5):
                expected = (token[d] - mean) / std * (1 + scale[b, d].item()) + shift[b, d].item()
                assert y[b, s, d].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("x", "scale", "shift"), [((2, 3, 5), (2, 4), (2, 5)), ((2, 3, 5), (2, 5), (1, 5)), ((3, 5), (3, 5), (3, 5))]
)
def test_shapes_that_do_not_belong_together_are_refused(x, scale, shift):
    with pytest.raises(ValueError, match=re.escape(str(x))):
        modulated_layer_norm(torch.zeros(x), torch.zeros(scale), torch.zeros(shift))


def test_triton_kernel_in_the_interpreter():
    result = run_apart(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py"), TRITON_INTERPRET="1"
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 18
    assert "skipped" not in result.stdout


def test_triton_kernels_build_for_hopper_without_spills(tmp_path):
    """Triton's wheel holds ptxas: the kernels compile to sm_90 machine code on a machine without a GPU."""
    result = run_apart(str(HERE / "build_kernels.py"), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr[-3000:]
    built = json.loads(result.stdout.splitlines()[-1])
    assert {kernel["name"] for kernel in built} == {"_forward_kernel", "_backward_kernel"}
    for kernel in built:
        assert kernel["spill_bytes"] == 0, kernel
        assert kernel["vector_loads"] > 0, kernel
        assert kernel["atomics"] == 0, kernel
