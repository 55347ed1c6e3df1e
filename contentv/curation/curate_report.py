"""What a curation did, for its caller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class CurateReport:
    """What a curation did; see `Counts`. `phases` are the rows of `PhaseTime`, `rules` the rejects by rule."""

    files: int = 0
    clips: int = 0
    kept: int = 0
    rejected: int = 0  # lines of the run's rejects.jsonl
    skipped: int = 0  # files that an earlier run had done
    seconds: float = 0.0
    buckets: dict[str, int] = field(default_factory=dict)  # samples kept
    rules: dict[str, int] = field(default_factory=dict)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    workers: int = 1
    run: str = ""
