"""The comparison of two runs of a stage finds what differs between them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from slurm_demo import compare, rows_of


def make_run(folder: Path, losses: list[float], clips: list[str], weight: float) -> Path:
    for name in ("raw", "ema"):
        (folder / "export" / name).mkdir(parents=True)
        save_file(
            {"a": torch.ones(1), "w": torch.tensor([1.0, weight])}, folder / "export" / name / "model.safetensors"
        )
    metrics = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    ledger = [json.dumps({"step": step, "ids": [clip]}) for step, clip in enumerate(clips, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    (folder / "ledger.jsonl").write_text("\n".join(ledger) + "\n")
    return folder


def test_what_differs_is_found(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", [3.0, 2.0], ["x", "y"], 2.0)
    same = compare(first, first)
    assert (same["max_loss_difference"], same["max_weight_difference"]) == (0, {"raw": 0, "ema": 0})
    assert (same["steps"], same["steps_of_the_same_clips"], same["each_step_once"]) == (2, 2, True)
    found = compare(first, make_run(tmp_path / "b", [3.0, 2.5], ["x", "z"], 2.25))
    assert (found["max_loss_difference"], found["max_weight_difference"]) == (0.5, {"raw": 0.25, "ema": 0.25})
    assert found["steps_of_the_same_clips"] == 1


def test_weights_that_are_no_numbers_are_not_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [3.0], ["x"], float("nan"))
    assert math.isnan(compare(run, run)["max_weight_difference"]["raw"])


def test_a_step_done_twice_is_seen_and_a_line_not_yet_whole_is_not(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [3.0], ["x"], 2.0)
    with (run / "ledger.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "ids": ["x"]}) + '\n{"step": 2, "id')
    assert len(rows_of(run, "ledger")) == 2
    assert not compare(run, run)["each_step_once"]


def test_another_number_of_steps_is_no_comparison(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "a", [3.0], ["x"], 2.0), make_run(tmp_path / "b", [3.0], ["x", "y"], 2.0)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        compare(*runs)
