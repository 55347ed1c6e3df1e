"""The stage graph: stages one after another, each what a user would type, with a record of what went in and came out.

A stage is done when its run folder holds a `stage.json` made from the same configuration and the same inputs. Running
the pipeline again therefore goes on where it stopped, and a changed setting is noticed instead of silently ignored.

Started once per process by torchrun, Slurm or Kubernetes, every process runs its own part of each stage; rank 0 keeps
the record.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contentv.base.errors import EXIT_STOPPED, EXIT_USER_ERROR, StoppedBySignalError, UserError
from contentv.base.log import console, get_logger
from contentv.base.stop import StopSignal
from contentv.train.manifest import MANIFEST, StageManifest

STATUS = "status.json"


@dataclass(frozen=True)
class StageRun:
    """A stage ready to launch.

    Attributes:
        overrides: what follows `contentv train`, `out=` and `init=` included.
        config_hash: digest of the configuration without paths and logging.
    """

    name: str
    out: Path
    overrides: tuple[str, ...]
    config_hash: str


@dataclass(frozen=True)
class StageResult:
    """What became of a stage: `ran` is false when it had been done before."""

    name: str
    ran: bool
    seconds: float


def run_pipeline(
    stages: Sequence[StageRun], out: Path, launcher: Sequence[str], env: Mapping[str, str]
) -> list[StageResult]:
    """Runs the stages that are not done yet and returns what became of each; `out/pipeline.json` records it.

    Args:
        launcher: the command put before `-m contentv train ...`.
        env: added to the environment of every stage.

    Raises:
        UserError: a stage was done with another configuration, or failed because of something the user can fix.
        StoppedBySignalError: a stage was stopped by a signal after saving.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = _read_record(out / "pipeline.json")
    results = []
    with StopSignal() as stop:
        for position, stage in enumerate(stages, 1):
            if _is_done(stage):
                seconds = float(record.get(stage.name, {}).get("seconds", 0.0))
                get_logger().info("stage %d/%d %s: done before", position, len(stages), stage.name)
                results.append(StageResult(stage.name, False, seconds))
                continue
            if stop.received:
                raise StoppedBySignalError(f"stopped before stage {stage.name}; run the same command again to go on")
            console.rule(f"stage {position}/{len(stages)}: {stage.name}")
            results.append(_run_stage(stage, launcher, {**env, **_meeting_place(position)}, record, out))
    return results


def _run_stage(
    stage: StageRun, launcher: Sequence[str], env: Mapping[str, str], record: dict[str, dict[str, Any]], out: Path
) -> StageResult:
    writer = os.environ.get("RANK", "0") == "0"
    if writer:  # how an earlier attempt ended must not be taken for how this one does
        (stage.out / STATUS).unlink(missing_ok=True)
        stage.out.mkdir(parents=True, exist_ok=True)  # where even a stage that cannot begin says why
    before = float(record.get(stage.name, {}).get("seconds", 0.0))
    started = time.perf_counter()
    code = launch([*launcher, "-m", "contentv", "train", *stage.overrides], env)
    seconds = before + time.perf_counter() - started
    record[stage.name] = {"seconds": seconds, "overrides": list(stage.overrides), "exit_code": code}
    if code == 0:
        produced = StageManifest.read(stage.out)
        record[stage.name] |= {"consumed": produced.consumed, "produced": produced.weights, "steps": produced.steps}
    if writer:
        _write_record(out / "pipeline.json", record)
    if code != 0:
        raise _failure(stage, code)
    return StageResult(stage.name, True, seconds)


def _meeting_place(position: int) -> dict[str, str]:
    """Returns where the processes of a job meet for one stage: a store of its own, on a port of its own.

    The store they were started with still holds the keys of the stage before, and a slow process of that stage may
    still be leaving it.
    """
    port = os.environ.get("MASTER_PORT") if "RANK" in os.environ else None
    if port is None:
        return {}
    return {"MASTER_PORT": str(int(port) + position), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _is_done(stage: StageRun) -> bool:
    if not (stage.out / MANIFEST).is_file():
        return False
    manifest = StageManifest.read(stage.out)
    if manifest.config_hash != stage.config_hash:
        raise UserError(
            f"stage {stage.name} was done with another configuration", where=str(stage.out),
            remedy="use another out=, remove this folder to run the stage again, or undo the change",
        )  # fmt: skip
    return True


def launch(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs a command with additions to the environment, passes signals on, and returns its exit code."""
    get_logger().info("%s", " ".join(command))
    with StopSignal() as stop:
        process = subprocess.Popen(command, env={**os.environ, **env})

        def forward(number: int) -> None:
            if number != signal.SIGINT or not sys.stdin.isatty():  # a terminal has sent Ctrl-C to both already
                process.send_signal(number)

        stop.forward = forward
        if stop.received:  # while the process started
            forward(stop.received)
        return process.wait()


def _failure(stage: StageRun, code: int) -> Exception:
    # torchrun ends with its own exit code, so the run folder says how the stage itself ended.
    status = read_status(stage.out)
    ended = status.get("exit_code", code)
    if EXIT_STOPPED in (code, ended) or code in [-number for number in StopSignal.SIGNALS]:
        return StoppedBySignalError(f"stage {stage.name} was stopped; run the same command again to go on")
    if EXIT_USER_ERROR in (code, ended):
        return UserError(str(status.get("message", "its message is above")), where=f"stage {stage.name}")
    return RuntimeError(f"stage {stage.name} failed with exit code {code}; its output is above")


def read_status(run: Path) -> dict[str, Any]:
    """Returns how the run in a folder last ended ({exit_code, message}), or an empty dict."""
    path = run / STATUS
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        return {}


def write_status(run: Path, exit_code: int, message: str) -> None:
    """Records how a run ended; torchrun hides its workers' exit codes."""
    if run.is_dir():
        (run / STATUS).write_text(json.dumps({"exit_code": exit_code, "message": message}), encoding="utf-8")


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"is damaged ({error})", where=str(path), remedy="remove it; done stages stay done") from None


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    temporary.replace(path)


def local_launcher(nproc: int) -> list[str]:
    """Returns torchrun with `nproc` processes on this machine, by this interpreter."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
