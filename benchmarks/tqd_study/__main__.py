"""python benchmarks/tqd_study --jobs 2: makes the runs that are missing. Stop it at any time and start it again."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from tqd_study.driver import main  # noqa: E402

if __name__ == "__main__":
    main()
