"""docs/parity.md is what the generator makes of the newest rows, and the generator says what rows say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import parity as generator  # noqa: E402

ORIGIN = {
    "device": "a machine", "versions": {"torch": "2.13.0", "cuda": None}, "commit": "abc", "command": "make parity",
}  # fmt: skip


def write(path: Path, rows: list[tuple]) -> Path:
    names = ("date", "what", "against", "error", "bound", "test")
    path.write_text("".join(json.dumps(ORIGIN | dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_the_committed_page_is_that_of_the_newest_rows() -> None:
    source = generator.newest(generator.RESULTS)
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(source), "run `make parity`"


def test_committed_rows_are_within_their_bounds_and_of_tests_that_exist() -> None:
    rows = generator.read(generator.newest(generator.RESULTS))
    for row in rows:
        assert row["error"] <= row["bound"], row
    for row in rows:
        if row["date"] == rows[-1]["date"]:
            assert f"def {generator.test_name(row)}(" in (ROOT / row["test"].split("::")[0]).read_text(), row["test"]


def test_a_page_shows_the_last_run_and_the_worst_case(tmp_path: Path) -> None:
    path = write(
        tmp_path / "2026-01-01_x_parity.jsonl",
        [
            ("2026-01-01T00:00:00", "old", "b", 0.5, 1.0, "tests/t.py::test_old"),
            ("2026-01-01T01:00:00", "a", "b", 1e-7, 1e-5, "tests/t.py::test_a[one]"),
            ("2026-01-01T01:00:00", "a", "b", 2e-7, 1e-5, "tests/t.py::test_a[two]"),
            ("2026-01-01T01:00:00", "c|d", "e", 0.0, 0.0, "tests/u.py::test_c"),
        ],
    )
    text = generator.page(path)
    assert "| a | b | 2 | 2e-07 | 1e-05 | test_a |" in text
    assert "| c\\|d | e | 1 | 0 | 0 | test_c |" in text
    assert "old" not in text.split("## ", 1)[1]
    assert "[2026-01-01_x_parity.jsonl](../benchmarks/results/2026-01-01_x_parity.jsonl)" in text
    assert "torch 2.13.0; command" in text
    later = write(tmp_path / "2025-01-01_y_parity.jsonl", [("2026-01-02T00:00:00", "a", "b", 0.0, 0.0, "t.py::a")])
    assert generator.newest(tmp_path) == later


def test_the_fixture_fails_past_the_bound_and_writes_what_it_saw(tmp_path: Path, pytester_run) -> None:
    out = tmp_path / "rows.jsonl"
    code = pytester_run(
        "def test_within(parity): parity('a', 'b', 1.0, 1.0)\n"
        "def test_past(parity): parity('a', 'b', 1.01, 1.0)\n"
        "def test_not_a_number(parity): parity('a', 'b', float('nan'), 1.0)\n"
        "def test_other(): raise RuntimeError('not asked for')\n",
        out,
    )
    assert code.endswith("2 failed, 1 passed, 1 deselected")
    assert [row["test"].split("::")[1] for row in generator.read(out)] == [
        "test_within", "test_past", "test_not_a_number",
    ]  # fmt: skip


@pytest.fixture
def pytester_run(tmp_path: Path):
    """Runs a test file under the project's conftest.py and returns pytest's last line without the time."""
    import subprocess

    def run(text: str, out: Path) -> str:
        (tmp_path / "test_some.py").write_text(text)
        (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
        command += ["--parity-out", str(out), str(tmp_path / "test_some.py")]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
        return printed.strip().splitlines()[-1].split(" in ")[0]

    return run
