"""Compiled blocks, alone and recomputed, give the gradients of eager ones."""

from __future__ import annotations

import functools

import pytest
import torch
import toy

from contentv.engine import parallelize as module
from contentv.parallel.mesh import single_process_mesh

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_blocks(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain, compiled = toy.make_model(), toy.make_model()
    module.parallelize(compiled, single_process_mesh(), recompute=recompute, compile=True)
    for model in (plain, compiled):
        toy.loss_sum(model, toy.make_batch(0)).backward()
    for name, parameter in plain.named_parameters():
        got, want = compiled.get_parameter(name).grad, parameter.grad
        assert got is not None
        assert want is not None
        assert (got - want).norm() <= 1e-5 * want.norm(), name
