"""Keeps what a finished demo measured: one row of benchmarks/results/, from the demo's summary.json.

python benchmarks/demo.py --demo demo-out             # after `make demo`
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from measure import append_rows, provenance


def main() -> None:
    """Appends the row and prints the file's path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"), help="folder of a finished demo")
    folder = parser.parse_args().demo
    if not (folder / "summary.json").is_file():
        raise SystemExit(f"{folder} holds no finished demo: run `make demo` first, or name one with --demo")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "demo.json").read_text(encoding="utf-8"))["settings"]
    device = torch.device("cpu")
    row = {
        "benchmark": "demo", **summary, "settings": settings, "cores": len(os.sched_getaffinity(0)),
        **provenance(device), "command": "make demo",
    }  # fmt: skip
    print(append_rows([row], "demo", device))


if __name__ == "__main__":
    main()
