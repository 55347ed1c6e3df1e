"""Which implementation runs: precedence, refusals, and what is reported."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from contentv_kernels import attention, available, dispatch, force, modulated_layer_norm, report

ROOT = Path(__file__).parents[2]


class Elsewhere(torch.Tensor):
    """A tensor that says it lives on another kind of device."""

    @property
    def device(self):
        return SimpleNamespace(type=self.kind)


def tensor_on(kind: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    tensor = torch.zeros(1, 2, 1, 8, dtype=dtype).as_subclass(Elsewhere)
    tensor.kind = kind
    return tensor


@pytest.fixture
def heads():
    return torch.randn(3, 1, 4, 2, 8).unbind()


def test_argument_goes_before_force_and_force_before_the_table(heads):
    attention(*heads)
    assert report()["attention"][0::3] == ("sdpa", "automatic")
    with force("attention", "math"):
        attention(*heads)
        assert report()["attention"][0::3] == ("math", "force()")
        attention(*heads, impl="sdpa")
        assert report()["attention"][0::3] == ("sdpa", "impl=")
    attention(*heads)
    assert report()["attention"][0::3] == ("sdpa", "automatic")


def test_force_nests_and_ends_with_an_error(heads):
    with force("attention", "math"):
        with pytest.raises(ValueError, match="heads"), force("attention", "sdpa"):
            raise ValueError("heads")
        attention(*heads)
        assert report()["attention"].impl == "math"
    attention(*heads)
    assert report()["attention"].impl == "sdpa"


def test_force_holds_in_the_threads_of_autograd_too(heads):
    seen = []

    def work():
        attention(*heads)
        seen.append(report()["attention"].impl)

    with force("attention", "math"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == ["math"]


def test_the_tensor_decides_and_not_the_machine(monkeypatch):
    for kind, modules, expected in (
        ("cuda", (), "sdpa"),
        ("cpu", (), "sdpa"),
        ("npu", ("torch_npu",), "npu_fusion_attention"),
    ):
        with monkeypatch.context() as patch:
            for module in modules:
                patch.setitem(sys.modules, module, SimpleNamespace())
            dispatch.select("attention", None, tensor_on(kind))
        assert report()["attention"][:3] == (expected, kind, "bfloat16")


def test_layer_norm_on_cuda_takes_triton_and_says_why_not():
    dispatch.select("modulated_layer_norm", None, tensor_on("cuda", torch.float64))
    assert report()["modulated_layer_norm"].impl == "reference"
    assert (
        report()["modulated_layer_norm"].by == "automatic; not triton (the kernel takes float16, bfloat16 or float32)"
    )
    assert available("modulated_layer_norm", "cuda", torch.bfloat16) == {"triton": None, "reference": None}


@pytest.mark.parametrize(
    ("op", "impl", "message"),
    [
        (
            "attention",
            "flash_attn",
            '"flash_attn" cannot run on cpu with torch.float32: flash-attn needs a CUDA device',
        ),
        ("attention", "npu_fusion_attention", "npu_fusion_attention needs an Ascend NPU"),
        ("modulated_layer_norm", "triton", "set TRITON_INTERPRET=1"),
    ],
)
def test_what_is_asked_for_and_cannot_run_is_refused_with_the_reason(heads, monkeypatch, op, impl, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = {
        "attention": lambda **kwargs: attention(*heads, **kwargs),
        "modulated_layer_norm": lambda **kwargs: modulated_layer_norm(
            torch.zeros(1, 2, 8), torch.zeros(1, 8), torch.zeros(1, 8), **kwargs
        ),
    }[op]
    with pytest.raises(RuntimeError, match=message):
        call(impl=impl)
    with force(op, impl), pytest.raises(RuntimeError, match=message):
        call()
    call()


def test_flash_attn_that_is_not_installed_or_has_the_wrong_dtype_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "_on_path", lambda module: False)
    with pytest.raises(RuntimeError, match="flash_attn is not installed"):
        dispatch.select("attention", "flash_attn", tensor_on("cuda"))
    with pytest.raises(RuntimeError, match="takes float16 or bfloat16"):
        dispatch.select("attention", "flash_attn", tensor_on("cuda", torch.float32))
    with pytest.raises(RuntimeError, match=r"no implementation runs on npu .*\(torch_npu is not installed\)"):
        dispatch.select("attention", None, tensor_on("npu"))


def test_unknown_names_are_refused_with_the_known_ones(heads):
    with pytest.raises(ValueError, match='"flash" is unknown; there are: sdpa, flash_attn, npu_fusion_attention, math'):
        attention(*heads, impl="flash")
    with pytest.raises(ValueError, match="there are: sdpa"), force("attention", "flash"):
        pass
    with (
        pytest.raises(ValueError, match=r'"attend" is unknown; there are: attention, .*, modulated_layer_norm'),
        force("attend", "math"),
    ):
        pass


def test_a_choice_is_logged_once(heads, monkeypatch):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("contentv")
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    for _ in range(3):
        attention(*heads)
        attention(*heads, impl="math")
    logger.manager._clear_cache()
    assert messages == ["attention: sdpa on cpu float32 (automatic)", "attention: math on cpu float32 (impl=)"]


def test_import_and_cpu_use_need_torch_alone():
    program = """
import importlib.abc, sys
class OnlyTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "flash_attn", "torch_npu", "jaxtyping", "einops", "contentv"):
            raise ImportError(name)
import torch
sys.meta_path.insert(0, OnlyTorch())
import contentv_kernels as kernels
x = torch.randn(1, 3, 8)
kernels.modulated_layer_norm(x, x[:, 0], x[:, 0])
kernels.attention(x[:, :, None], x[:, :, None], x[:, :, None])
print(sorted(name for name, choice in kernels.report().items()))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "kernels", capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "['attention', 'modulated_layer_norm']", result.stderr
