"""docs/parallelism.md is what its generator makes of the formulas and of the newest rows."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import parallel_table as generator  # noqa: E402

from contentv.config.figures import filled  # noqa: E402


def test_the_pages_tables_are_those_of_the_formulas_and_rows() -> None:
    text = generator.PAGE.read_text(encoding="utf-8")
    assert filled(text, generator.TABLES) == text, "run `make docs`"


def test_heads_and_bytes_known_by_hand() -> None:
    heads, traffic = generator.heads_table(), generator.traffic_table()
    assert "| 1 (1 x 38) | 38, +0% | 19, +0% | 10, +5% | 5, +5% | 3, +26% |" in heads
    assert "| 4 (2 x 10 + 2 x 9) | 10, +5% |" in heads
    # 38 layers x 8 x (10,368 + 84) tokens x 40 heads x 64 x 2 bytes
    assert f"| 4 | 1 x 4 | 1 | {38 * 8 * 10_452 * 2560 * 2 / 2**30:.3g} GiB | - | - |" in traffic


def test_rows_are_within_their_bounds() -> None:
    for row in generator.newest_rows():
        assert row["error"] <= row["bound"], row
