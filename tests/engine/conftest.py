"""Makes the small model of tests/dist importable here: one process is a layout like any other."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
