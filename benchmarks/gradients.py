"""Gradients of the demo's golden clips against their degraded twins: a row of benchmarks/results/ for each stage.

python benchmarks/gradients.py --demo demo-out             # after `make demo`; about two minutes a stage on one core
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measure import append_rows, provenance

from contentv.config.analyzing import analyze_gradients
from contentv.config.compose import load_config

STAGES = ("lowres_video", "highres_video")


def measured(folder: Path, stage: str, more: list[str]) -> dict[str, Any]:
    """Returns a stage's row: its curves, their directions and the recommendation."""
    keys = [f"checkpoint={folder / 'run' / stage}", f"data.path={folder / 'dataset'}", "device=cpu", *more]
    result = analyze_gradients(load_config("analyze", keys))
    bins = [
        {
            **b,
            **{
                kind: {name: e for name, e in b[kind].items() if name != "cosine_by_part"}
                for kind in ("visual", "motion")
            },
        }
        for b in result["bins"]
    ]
    return {"benchmark": "gradients", "stage": stage, **result, "bins": bins}


def main() -> None:
    """Measures, appends the rows and prints the file's path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"), help="folder of a finished demo")
    parser.add_argument("keys", nargs="*", help="further keys of `contentv analyze gradients`, such as clips=32")
    arguments = parser.parse_args()
    if not (arguments.demo / "summary.json").is_file():
        raise SystemExit(f"{arguments.demo} holds no finished demo: run `make demo` first, or name one with --demo")
    device = torch.device("cpu")
    rows = [{**measured(arguments.demo, stage, arguments.keys), **provenance(device)} for stage in STAGES]
    print(append_rows(rows, "gradients", device))


if __name__ == "__main__":
    main()
