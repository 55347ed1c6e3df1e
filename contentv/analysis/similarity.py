"""Cosines between gradients, what limits them, and how sure they are: all from inner products.

With the gradients of G groups of clips for each twin (rows of a matrix of inner products),

    cosine     of the means over all groups: how alike one optimiser step on these clips and one on their twins are
    ceiling    of the golden clips' two halves, mean over all ways to halve them: how alike two steps on other golden
               clips are. A twin above it changes the step less than drawing other clips would.
    corrected  <g, d> / sqrt(<g, g> <d, d>), each inner product over pairs of *different* groups, which share neither
               clips nor noise: what remains is the cosine of the expected gradients, as if of endlessly many clips. It
               does not exist where the golden or the twin's gradient cannot be told from zero.
    distance   |d - g| / |g| of the means

Intervals are 95 %, by the jackknife over groups (each left out once, Student's t with G - 1 degrees of freedom).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Returns its JSON form, null for NaN."""
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}


class Grams:
    """Inner products between the gradients of `twins` kinds of clips in `groups` groups.

    Args:
        gram: (twins x groups, twins x groups), rows twin after twin, the golden one first.
        groups: groups of clips, 4 or more.
    """

    def __init__(self, gram: Matrix, groups: int) -> None:
        self.twins, self.groups = len(gram) // groups, groups
        self._cells = np.asarray(gram, np.float64).reshape(self.twins, groups, self.twins, groups)

    def without(self, group: int) -> Grams:
        """Returns the same of all groups but one."""
        kept = [i for i in range(self.groups) if i != group]
        cells = self._cells[:, kept][:, :, :, kept]
        return Grams(cells.reshape(self.twins * len(kept), -1), len(kept))

    def of_means(self) -> Matrix:
        """Returns the inner products (twins, twins) of the means over all groups."""
        return np.asarray(self._cells.mean(axis=(1, 3)))

    def across_groups(self) -> Matrix:
        """Returns the mean inner products (twins, twins) over pairs of different groups."""
        same = np.einsum("kili->kl", self._cells)
        everything = self._cells.sum(axis=(1, 3))
        return np.asarray((everything - same) / (self.groups * (self.groups - 1)))

    def cosine(self, twin: int) -> float:
        """Returns the cosine of the golden mean and a twin's."""
        return _cosine(self.of_means(), twin)

    def corrected(self, twin: int) -> float:
        """Returns the cosine of the expected gradients, NaN where one cannot be told from zero."""
        return _cosine(self.across_groups(), twin)

    def distance(self, twin: int) -> float:
        """Returns |twin's mean - golden mean| / |golden mean|."""
        m = self.of_means()
        return math.sqrt(max(0.0, m[twin, twin] - 2 * m[0, twin] + m[0, 0]) / m[0, 0]) if m[0, 0] > 0 else math.nan

    def ceiling(self) -> float:
        """Returns the cosine of two disjoint halves of the golden clips, mean over all halves."""
        golden = self._cells[0, :, 0, :]
        first = _halves(self.groups)
        second = 1 - first
        first, second = (half / half.sum(axis=1, keepdims=True) for half in (first, second))
        inner = [np.einsum("si,ij,sj->s", a, golden, b) for a, b in ((first, second), (first, first), (second, second))]
        found = inner[0] / np.sqrt(np.maximum(inner[1] * inner[2], 1e-300))
        return float(found.mean()) if float(golden.trace()) > 0 else math.nan

    def jackknife(self, statistic: Callable[[Grams], float]) -> Estimate:
        """Returns a statistic of these inner products with its interval."""
        return jackknife(statistic(self), [statistic(self.without(i)) for i in range(self.groups)])


def jackknife(value: float, left_out: Sequence[float]) -> Estimate:
    """Returns a value with its 95 % interval.

    Args:
        value: of all groups.
        left_out: of all groups but one, for each.
    """
    found = np.asarray(left_out, np.float64)
    n = len(found)
    error = math.sqrt((n - 1) / n * float(((found - found.mean()) ** 2).sum()))
    reach = float(special.stdtrit(n - 1, 0.975)) * error
    return Estimate(value, value - reach, value + reach)


def trend(
    bins: Sequence[Grams], statistic: Callable[[Grams], float], below: Sequence[float], above: Sequence[float]
) -> Estimate:
    """Returns the mean of a statistic over the upper bins less that over the lower ones.

    Args:
        bins: one an interval of sigma, all of the same groups.
        statistic: such as a cosine.
        below: weight of each bin in the mean over the lower ones; together above 0.
        above: likewise in that over the upper ones.
    """

    def rise(grams: Sequence[Grams]) -> float:
        values = [statistic(gram) for gram in grams]
        return float(np.average(values, weights=above) - np.average(values, weights=below))

    return jackknife(rise(bins), [rise([gram.without(i) for gram in bins]) for i in range(bins[0].groups)])


def direction(rise: Estimate) -> str:
    """Returns rises, falls or flat (also where there is no telling)."""
    return "rises" if rise.low > 0 else "falls" if rise.high < 0 else "flat"


def crossing(sigma: Sequence[float], rising: Sequence[float], falling: Sequence[float]) -> float:
    """Returns the lowest sigma at which `rising` comes from below `falling` to above it, by straight lines; or NaN."""
    gap = [a - b for a, b in zip(rising, falling, strict=True)]
    for i, (before, after) in enumerate(itertools.pairwise(gap)):
        if before < 0 <= after:
            return sigma[i] + (sigma[i + 1] - sigma[i]) * before / (before - after)
    return math.nan


def _cosine(inner: Matrix, twin: int) -> float:
    lengths = inner[0, 0], inner[twin, twin]
    return float(inner[0, twin] / math.sqrt(lengths[0] * lengths[1])) if min(lengths) > 0 else math.nan


def _halves(groups: int) -> NDArray[Any]:
    """Returns all ways to choose half of the groups, rounded down, one a row of zeros and ones."""
    chosen = list(itertools.combinations(range(groups), groups // 2))
    rows = np.zeros((len(chosen), groups))
    for row, places in zip(rows, chosen, strict=True):
        row[list(places)] = 1.0
    return rows
