"""metrics.jsonl: one row a step, none twice after a resume, no NaN that JSON cannot hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contentv.train.metrics import JsonlSink, Recorder, TensorBoardSink, WandbSink

ROW = {"loss": 1.0, "grad_norm": 0.5, "step_s": 0.1, "data_wait_s": 0.0}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_past_the_resumed_step_and_a_torn_line_are_cut(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"step": 4')
    sink = JsonlSink(path, resume_step=20)
    sink.log({"step": 30, "loss": float("nan")})
    sink.close()
    assert [r["step"] for r in rows(path)] == [10, 20, 30]
    assert rows(path)[-1]["loss"] is None


def test_the_recorder_writes_rows_and_the_ledger(tmp_path) -> None:
    recorder = Recorder([JsonlSink(tmp_path / "m.jsonl")], JsonlSink(tmp_path / "l.jsonl"), "image", 10, 0)
    recorder.ids(1, ["a", "b"])
    recorder.row({"step": 1, **ROW})
    recorder.close()
    assert rows(tmp_path / "l.jsonl") == [{"step": 1, "ids": ["a", "b"]}]
    assert rows(tmp_path / "m.jsonl")[0]["loss"] == 1.0


def test_only_rank_0_writes(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    recorder = Recorder([JsonlSink(tmp_path / "m.jsonl")], None, "image", 10, 0)
    recorder.row({"step": 1, **ROW})
    recorder.close()
    assert rows(tmp_path / "m.jsonl") == []


def test_tensorboard_events_hold_the_loss(tmp_path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoardSink(tmp_path)
    sink.log({"step": 3, **ROW})
    sink.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 1.0)]


@pytest.mark.slow
def test_wandb_writes_offline_and_keeps_the_key_out_of_files(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    sink = WandbSink(tmp_path, "contentv", "offline", {"seed": 0})
    sink.log({"step": 1, **ROW})
    sink.close()
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files
    assert not any(key.encode() in p.read_bytes() for p in files)
