"""The section about noise levels: what it counts, what it says, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from contentv.base.errors import UserError
from contentv.diffusion.noise_levels import BINS, QUADRANTS
from contentv.report import write_run_report
from contentv.report.run_noise import noise_section, tallies

FLAT = [1 / BINS] * BINS


def cells(value: float, rows: int = 5) -> list[list[float]]:
    return [[value] * BINS if i < rows else [0.0] * BINS for i in range(len(QUADRANTS))]


def write(folder: Path, rows: list[dict]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"stage": "image", **row}) + "\n" for row in rows))
    return folder


def test_tallies_of_both_halves_and_the_last_word_of_a_step(tmp_path: Path) -> None:
    rows = [{"step": i, "sigma_counts": cells(i), "sigma_losses": cells(10 * i)} for i in (1, 2, 3)]
    path = write(tmp_path, [*rows, {"step": 3, "sigma_counts": cells(7), "sigma_losses": cells(8)}, {"step": 4}])
    (first, losses), (second, later) = tallies(path / "metrics.jsonl")
    assert (first, losses) == (cells(1), cells(10))
    assert (second, later) == (cells(9), cells(28))


def test_the_page_tells_shares_starvation_and_the_expectation(tmp_path: Path) -> None:
    counts = cells(0.0)
    counts[0], counts[1], counts[4] = [30] * 4 + [1, 1] + [30] * 4, [20] * 4 + [0, 0] + [20] * 4, [10] * BINS
    row = {"step": 5, "loss": 1.0, "sigma_counts": counts, "sigma_losses": cells(40.0)}
    (write(tmp_path, [row]) / "noise_levels.json").write_text(
        json.dumps({"sampler": "TQD(<flat>)", "base": FLAT, "trained": FLAT})
    )
    page = write_run_report(tmp_path).read_text()
    section = page[page.index("Noise levels") :]
    assert "502 draws, 80.1% of them for clips with both scores" in section
    assert "TQD(&lt;flat&gt;)" in section
    assert "Starved, less than a quarter of what the base sampler gives: sigma 0.4-0.6." in section  # 11 of 50 expected
    assert re.search("motion-rich.*242.*48.2%", section, re.DOTALL)


def test_a_starved_range_is_named(tmp_path: Path) -> None:
    counts = cells(0.0)
    counts[-1] = [50] * 4 + [2, 3] + [50] * 4
    folder = write(tmp_path, [{"step": 5, "sigma_counts": counts, "sigma_losses": cells(1.0)}])
    assert "Starved" not in (noise_section(folder) or "")  # nothing to compare with
    (folder / "noise_levels.json").write_text(json.dumps({"sampler": "s", "base": FLAT, "trained": FLAT}))
    section = noise_section(folder)
    assert section is not None
    assert "less than a quarter of what the base sampler gives: sigma 0.4-0.6." in section
    assert "Whose clips" not in section  # no clip has scores


def test_runs_without_tallies_have_no_section_and_bad_ones_are_named(tmp_path: Path) -> None:
    assert noise_section(write(tmp_path, [{"step": 1, "loss": 2.0}])) is None
    write(tmp_path, [{"step": 1, "sigma_counts": [[1.0]], "sigma_losses": [[1.0]]}])
    with pytest.raises(UserError, match=r"5 x 10 numbers"):
        noise_section(tmp_path)
    write(tmp_path, [{"step": 1, "sigma_counts": cells(1.0), "sigma_losses": cells(1.0)}])
    (tmp_path / "noise_levels.json").write_text('{"base": [1]}')
    with pytest.raises(UserError, match="not a record of noise levels"):
        noise_section(tmp_path)
