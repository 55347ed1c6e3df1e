"""The stage graph: runs in order, goes on where it stopped, notices changed settings, and says how a stage ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from contentv.base.errors import StoppedBySignalError, UserError
from contentv.base.stop import StopSignal
from contentv.train.manifest import StageManifest
from contentv.train.pipeline import StageRun, launch, read_status, run_pipeline, write_status

# Stands in for `torchrun ... -m contentv train`: logs the call, then does what `behaviour` says.
LAUNCHER = """
import json, pathlib, sys
values = dict(a.split("=", 1) for a in sys.argv[4:])
out = pathlib.Path(values["out"])
out.mkdir(parents=True, exist_ok=True)
with open(out.parent / "calls.txt", "a") as log:
    log.write(out.name + "\\n")
status = json.loads(values.get("status", "null"))
if status is not None:
    (out / "status.json").write_text(json.dumps(status))
    sys.exit(1)
(out / "stage.json").write_text(values["manifest"])
"""


@pytest.fixture
def launcher(tmp_path: Path) -> list[str]:
    script = tmp_path / "launcher.py"
    script.write_text(LAUNCHER)
    return [sys.executable, str(script)]


def stage(out: Path, name: str, digest: str = "h", **values: str) -> StageRun:
    manifest = json.dumps(asdict(StageManifest(name, {}, steps=3, config_hash=digest, weights={"ema": "export/ema"})))
    overrides = [f"out={out / name}", f"manifest={manifest}", *(f"{k}={v}" for k, v in values.items())]
    return StageRun(name, out / name, tuple(overrides), digest)


def calls(out: Path) -> list[str]:
    path = out / "calls.txt"
    return path.read_text().split() if path.exists() else []


def test_stages_run_in_order_once_and_are_recorded(tmp_path, launcher) -> None:
    out = tmp_path / "p"
    stages = [stage(out, "image"), stage(out, "lowres_video")]
    assert [r.ran for r in run_pipeline(stages, out, launcher, {})] == [True, True]
    assert [r.ran for r in run_pipeline(stages, out, launcher, {})] == [False, False]
    assert calls(out) == ["image", "lowres_video"]
    record = json.loads((out / "pipeline.json").read_text())
    assert record["image"]["produced"] == {"ema": "export/ema"}
    assert record["image"]["seconds"] > 0


def test_a_stopped_stage_is_run_again(tmp_path, launcher) -> None:
    out = tmp_path / "p"
    first, second = stage(out, "image"), stage(out, "rlhf", status='{"exit_code": 75, "message": "stopped"}')
    with pytest.raises(StoppedBySignalError, match="rlhf"):
        run_pipeline([first, second], out, launcher, {})
    run_pipeline([first, stage(out, "rlhf")], out, launcher, {})
    assert calls(out) == ["image", "rlhf", "rlhf"]


def test_the_message_of_a_stage_that_the_user_can_fix_comes_through(tmp_path, launcher) -> None:
    out = tmp_path / "p"
    with pytest.raises(UserError, match="no such bucket"):
        run_pipeline([stage(out, "image", status='{"exit_code": 2, "message": "no such bucket"}')], out, launcher, {})


def test_a_stage_that_cannot_even_begin_has_a_place_to_say_why(tmp_path) -> None:
    out = tmp_path / "p"
    says = """[ -d "$0" ] && printf '{"exit_code": 2, "message": "no such key"}' > "$0/status.json"; exit 1"""
    with pytest.raises(UserError, match="no such key"):
        run_pipeline([stage(out, "image")], out, ["sh", "-c", says, str(out / "image")], {})


def test_any_other_end_is_a_failure(tmp_path, launcher) -> None:
    out = tmp_path / "p"
    with pytest.raises(RuntimeError, match="image failed with exit code 1"):
        run_pipeline([stage(out, "image", status='{"exit_code": 1, "message": ""}')], out, launcher, {})


def test_changed_settings_are_noticed(tmp_path, launcher) -> None:
    out = tmp_path / "p"
    run_pipeline([stage(out, "image")], out, launcher, {})
    with pytest.raises(UserError, match="another configuration"):
        run_pipeline([stage(out, "image", digest="other")], out, launcher, {})


def test_a_damaged_record_is_named(tmp_path, launcher) -> None:
    out = tmp_path / "p"
    run_pipeline([stage(out, "image")], out, launcher, {})
    (out / "pipeline.json").write_text("{")
    with pytest.raises(UserError, match=r"pipeline\.json"):
        run_pipeline([stage(out, "image")], out, launcher, {})


def test_how_an_earlier_attempt_ended_is_not_taken_for_how_this_one_does(tmp_path) -> None:
    out = tmp_path / "p"
    (out / "image").mkdir(parents=True)
    write_status(out / "image", 75, "stopped")
    with pytest.raises(RuntimeError, match="failed with exit code -9"):  # killed before it could say anything
        run_pipeline([stage(out, "image")], out, ["sh", "-c", "kill -9 $$"], {})


# Every rank's part of a stage: says how it was told to meet the others, and ends as asked.
RANK = """
import json, os, pathlib, sys
values = dict(a.split("=", 1) for a in sys.argv[4:])
out = pathlib.Path(values["out"])
out.mkdir(parents=True, exist_ok=True)
names = ("RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
(out / f"env-{os.environ['RANK']}.json").write_text(json.dumps([os.environ[name] for name in names]))
(out / "stage.json").write_text(values["manifest"])
sys.exit(int(values.get("code", 0)))
"""


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, value in (("RANK", "1"), ("MASTER_PORT", "12340"), ("TORCHELASTIC_USE_AGENT_STORE", "True")):
        monkeypatch.setenv(name, value)
    (tmp_path / "rank.py").write_text(RANK)
    return [sys.executable, str(tmp_path / "rank.py")]


def test_started_once_per_process_each_runs_its_part_and_every_stage_has_its_own_place_to_meet(tmp_path, rank) -> None:
    out = tmp_path / "p"
    run_pipeline([stage(out, "image"), stage(out, "rlhf")], out, rank, {})
    assert json.loads((out / "image" / "env-1.json").read_text()) == ["1", "12341", "False"]
    assert json.loads((out / "rlhf" / "env-1.json").read_text()) == ["1", "12342", "False"]
    assert not (out / "pipeline.json").exists()  # rank 0's


@pytest.mark.parametrize(("code", "error"), [("75", StoppedBySignalError), ("2", UserError), ("1", RuntimeError)])
def test_the_exit_code_of_a_ranks_part_is_the_pipelines(tmp_path, rank, code, error) -> None:
    out = tmp_path / "p"
    with pytest.raises(error):
        run_pipeline([stage(out, "image", code=code)], out, rank, {})


def test_a_signal_between_stages_stops_before_the_next(tmp_path, launcher) -> None:
    out = tmp_path / "p"
    with StopSignal():
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(StoppedBySignalError, match="before stage image"):
            run_pipeline([stage(out, "image")], out, launcher, {})
    assert calls(out) == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_stage(tmp_path, number) -> None:
    program = (
        "import signal, sys, time, pathlib\n"
        "signal.signal(int(sys.argv[1]), lambda n, _: sys.exit(75))\n"
        "pathlib.Path(sys.argv[2]).touch(); time.sleep(60)\n"
    )
    ready = tmp_path / "ready"

    def tell() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell)
    thread.start()
    assert launch([sys.executable, "-c", program, str(int(number)), str(ready)], {}) == 75
    thread.join()


def test_status_round_trip(tmp_path) -> None:
    assert read_status(tmp_path) == {}
    write_status(tmp_path, 75, "stopped")
    assert read_status(tmp_path) == {"exit_code": 75, "message": "stopped"}
    (tmp_path / "status.json").write_text("{")
    assert read_status(tmp_path) == {}
