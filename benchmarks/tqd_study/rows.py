"""The rows of results that there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows_of_kind(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the rows of a kind, of all days and machines."""
    found = []
    for path in sorted(folder.glob(f"*_{kind}.jsonl")):
        found += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return found
