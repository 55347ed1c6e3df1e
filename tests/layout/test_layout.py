"""The shape of the code: file budgets, banned names, and what must not stand in the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "contentv").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
BANNED_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 75  # docstring included
LOOP = ROOT / "contentv" / "train" / "loop.py"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_stay_small_and_are_named_for_what_they_hold(path: Path) -> None:
    assert path.name not in BANNED_NAMES
    assert len(path.read_text().splitlines()) <= MAX_MODULE_LINES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_stay_small(path: Path) -> None:
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
        and path != LOOP  # the loop itself is one readable function, see its own test
    ]
    assert not long


def test_the_loop_stays_under_150_lines() -> None:
    run = next(n for n in ast.parse(LOOP.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "run")
    assert run.end_lineno - run.lineno + 1 <= 150


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_pickle_no_bare_except_no_device_by_name(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"^\s*(import|from) pickle", text, re.M)
    assert not re.search(r"except\s*:", text)
    assert not re.search(r"except Exception:\s*(\n\s*)?pass", text)
    assert "weights_only=False" not in text
    assert ".cuda(" not in text
    assert not re.search(r"device(\.type)?\s*==\s*[\"']cuda:", text)


def test_kernels_is_a_source_root_and_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_only_one_module_imports_deepspeed() -> None:
    users = [name_of(p) for p in SOURCES if re.search(r"^\s*(import|from) deepspeed", p.read_text(), re.M)]
    assert users == ["contentv/engine/partitioner.py"]


def test_item_is_called_where_metrics_are_made_only() -> None:
    hot = [
        p
        for part in ("models", "diffusion", "objectives", "parallel")
        for p in (ROOT / "contentv" / part).rglob("*.py")
    ]
    assert not [name_of(p) for p in hot if ".item()" in p.read_text()]


def test_models_know_nothing_of_other_processes() -> None:
    users = [name_of(p) for p in (ROOT / "contentv" / "models").rglob("*.py") if "torch.distributed" in p.read_text()]
    assert not users
