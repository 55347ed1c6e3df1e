"""Means over seeds with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the ends of its 95 % interval (Student's t); NaN ends for a single seed."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Returns the mean of one value a seed, at least one."""
        n = len(values)
        mean = sum(values) / n
        if n < 2:
            return cls(mean, math.nan, math.nan)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
        reach = float(special.stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
        return cls(mean, mean - reach, mean + reach)

    @classmethod
    def of_ratio(cls, above: Sequence[float], below: Sequence[float]) -> Interval:
        """Returns the geometric mean of above / below, seed by seed, all of them positive."""
        logs = cls.of([math.log(a / b) for a, b in zip(above, below, strict=True)])
        return cls(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))

    @classmethod
    def of_difference(cls, first: Sequence[float], second: Sequence[float]) -> Interval:
        """Returns the mean of first - second, seed by seed."""
        return cls.of([a - b for a, b in zip(first, second, strict=True)])

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ({self.low:.3f} .. {self.high:.3f})"
