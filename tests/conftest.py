"""Test-wide set-up: shapes in annotations are checked at run time, and math is single-threaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

# The jaxtyping hook breaks torch.compile(fullgraph=True), so compile tests run without it (CONTENTV_TYPECHECK=0).
if os.environ.get("CONTENTV_TYPECHECK", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook(["contentv", "contentv_kernels"], "beartype.beartype")

import torch

torch.set_num_threads(1)
Parity = Callable[[str, str, float, float], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-out",
        default="",
        help="run only the tests that compare with a published module, and append a JSON line for every comparison",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--parity-out"):
        others = [item for item in items if "parity" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    """Asserts that an error is within its bound, and records both where `--parity-out` says."""

    def check(what: str, against: str, error: float, bound: float) -> None:
        path = request.config.getoption("--parity-out")
        if path:
            row = {
                "what": what,
                "against": against,
                "error": float(error),
                "bound": float(bound),
                "test": request.node.nodeid,
            }
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        assert error <= bound, f"{what} against {against}: {error:.3g}, at most {bound:.3g}"

    return check
