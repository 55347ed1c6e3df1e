"""The study of timestep-aware quality decoupling on moving sprites: README.md says what, why and how.

python benchmarks/tqd_study --jobs 2       # make the runs that are missing, then write tables and figures
python benchmarks/tqd_study --list         # which runs are missing
python benchmarks/tqd_study --page-only    # tables and figures of the rows there are

Every finished run is a row in benchmarks/results/: stop it at any time, and start it again.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder, whose names are no modules

from tqd_study import report  # noqa: E402
from tqd_study.driver import main  # noqa: E402

if __name__ == "__main__" and main():
    report.write()
