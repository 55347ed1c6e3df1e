"""What a scorer is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from contentv.curation.scoring.view import ClipView

KINDS = ("visual", "motion", "text", "plug-in")


@runtime_checkable
class Scorer(Protocol):
    """A measurement of a clip.

    `name` is the score's, `meaning` one sentence, `range` the values it takes, `unit` theirs ("" = a ratio), `kind` one
    of visual, motion, text and plug-in. Scorers that `needs_time` are for clips of two frames or more.
    """

    name: str
    meaning: str
    range: str
    unit: str
    kind: str
    needs_time: bool

    def score(self, clip: ClipView) -> float | Mapping[str, float]:
        """Returns the measurement, or several by name; the scorer's own `name` is then not one of the scores."""
        ...


@dataclass(frozen=True)
class ScorerInfo:
    """A line of `contentv curate --scorers`; `needs` says what must be given, `available` whether it works here."""

    name: str
    meaning: str
    range: str
    unit: str
    kind: str
    needs: str
    available: bool
