"""What a run's rows say about the noise levels it trains: the histogram so far, and a warning when some are starved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contentv.base.log import get_logger
from contentv.diffusion.noise_levels import BINS, NoiseLevels, bins_text, starved

LEAST_EXPECTED = 20  # draws that the base sampler would have given a bin, before it may be called starved


class NoiseWatch:
    """Completes rows from their tallies (see `quality_tallies`) and warns once if a range of sigma is starved.

    Args:
        levels: what the run was expected to train.
        dropout: clips are dropped by their keep probability, so the trained ones are a biased choice.
        weight: clips are weighed by it.
    """

    def __init__(self, levels: NoiseLevels, *, dropout: bool = False, weight: bool = False) -> None:
        self._levels = levels
        self._dropout = dropout
        self._weight = weight
        self._drawn = [0.0] * BINS
        self._warned = bool(starved(levels.base, levels.trained))  # said before the first step

    def complete(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a row with `unscored` (share of clips without scores), `starved_bins` and, if clips are kept or
        weighed by their scores, `keep_rate`; without the sums they come from. Rows without tallies stay as they are."""
        result = dict(row)
        counts, losses = result.get("sigma_counts"), result.get("sigma_losses")
        keep, inverse = result.pop("keep_sums", (0.0, 0.0))
        clips = sum(map(sum, counts)) if counts else 0.0
        if not counts or clips <= 0:
            return result
        result["sigma_counts"] = [[int(n) for n in of_quadrant] for of_quadrant in counts]
        result["sigma_losses"] = [[round(loss, 5) for loss in of_quadrant] for of_quadrant in losses or []]
        self._drawn = [drawn + sum(bin_) for drawn, bin_ in zip(self._drawn, zip(*counts, strict=True), strict=True)]
        result["unscored"] = sum(counts[-1]) / clips
        result["starved_bins"] = len(self._starved())
        if self._dropout:  # a clip that came is one of 1 / probability: their mean number tells how many did not come
            result["keep_rate"] = clips / inverse
        elif self._weight:
            result["keep_rate"] = keep / clips
        return result

    def _starved(self) -> list[int]:
        total = sum(self._drawn)
        bins = starved(self._levels.base, [drawn / total for drawn in self._drawn])
        found = [i for i in bins if self._levels.base[i] * total >= LEAST_EXPECTED]
        if found and not self._warned:
            self._warned = True
            warn_starved(found)
        return found


def warn_starved(bins: list[int]) -> None:
    """Logs which noise levels the scores leave almost untrained, and the remedy."""
    get_logger().warning(
        "sigma %s gets less than a quarter of the draws that the base sampler gives it: timestep.floor=0.1..0.2 mixes "
        "the base in, a lower timestep.kappa_max routes less", bins_text(bins),
    )  # fmt: skip
