"""Rows completed from their tallies, and one warning when a range of sigma is starved."""

from __future__ import annotations

import pytest

from contentv.diffusion.noise_levels import BINS, QUADRANTS, NoiseLevels
from contentv.train.metrics import Recorder
from contentv.train.noise_watch import NoiseWatch

FLAT = [1 / BINS] * BINS
LEVELS = NoiseLevels("flat", FLAT, FLAT, 0.5, 0.3)


def row(of_bin: list[float], unscored: float = 0.0, keep: tuple[float, float] = (0.0, 0.0)) -> dict:
    """Draws of one quadrant, and some without scores in the last bin."""
    counts = [[0.0] * BINS for _ in QUADRANTS]
    counts[0], counts[-1][-1] = list(of_bin), unscored
    losses = [[0.123456789 * n for n in of_quadrant] for of_quadrant in counts]
    return {"step": 1, "sigma_counts": counts, "sigma_losses": losses, "keep_sums": list(keep)}


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    found: list[list[int]] = []
    monkeypatch.setattr("contentv.train.noise_watch.warn_starved", found.append)
    return found


def test_starved_bins_are_told_once_and_only_when_enough_was_drawn(warnings) -> None:
    watch, starving = NoiseWatch(LEVELS), [15.0] * 4 + [1.0, 1.0] + [15.0] * 4
    assert watch.complete(row(starving))["starved_bins"] == 0  # 122 draws: the base would have put 12 in each bin
    assert warnings == []
    assert watch.complete(row(starving))["starved_bins"] == 2
    assert watch.complete(row(starving))["starved_bins"] == 2
    assert warnings == [[4, 5]]
    assert watch.complete(row([0.0] * 4 + [200.0, 200.0] + [0.0] * 4))["starved_bins"] == 0


def test_a_run_that_was_warned_before_its_first_step_is_not_warned_again(warnings) -> None:
    watch = NoiseWatch(NoiseLevels("u", FLAT, [0.2] * 4 + [0.01, 0.01] + [0.045] * 4, 0.5, 0.3))
    assert watch.complete(row([100.0] * 4 + [0.0, 0.0] + [100.0] * 4))["starved_bins"] == 2
    assert warnings == []


def test_keep_rate_of_dropped_clips_is_the_rate_at_which_they_were_kept() -> None:
    """Of 1000 clips each with keep probability 0.2, 0.5 and 1, those kept tell how many there were."""
    kept = {0.2: 200, 0.5: 500, 1.0: 1000}
    clips = sum(kept.values())
    sums = sum(p * n for p, n in kept.items()), sum(n / p for p, n in kept.items())
    full = row([clips / BINS] * BINS, keep=sums)
    assert NoiseWatch(LEVELS, dropout=True).complete(full)["keep_rate"] == pytest.approx(clips / 3000)
    assert NoiseWatch(LEVELS, weight=True).complete(full)["keep_rate"] == pytest.approx(sums[0] / clips)
    plain = NoiseWatch(LEVELS).complete(full)
    assert "keep_rate" not in plain
    assert "keep_sums" not in plain


def test_missing_scores_are_counted_and_tallies_written_shortly() -> None:
    done = NoiseWatch(LEVELS).complete(row([3.0] * BINS, unscored=10.0))
    assert done["unscored"] == pytest.approx(10 / 40)
    assert done["sigma_counts"][0] == [3] * BINS
    assert all(isinstance(n, int) for of_quadrant in done["sigma_counts"] for n in of_quadrant)
    assert done["sigma_losses"][0][0] == 0.37037
    assert NoiseWatch(LEVELS).complete({"step": 1, "loss": 2.0}) == {"step": 1, "loss": 2.0}


def test_the_recorder_completes_its_rows() -> None:
    class Sink:
        def __init__(self) -> None:
            self.rows: list[dict] = []

        def log(self, row) -> None:
            self.rows.append(dict(row))

        def close(self) -> None:
            pass

    sink = Sink()
    recorder = Recorder([sink], None, "image", 10, 0, NoiseWatch(LEVELS))
    recorder.row({"loss": 1.0, "grad_norm": 0.5, "step_s": 0.1, "data_wait_s": 0.0, **row([2.0] * BINS)})
    recorder.close()
    assert sink.rows[0]["unscored"] == 0.0
