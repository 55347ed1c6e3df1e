"""The launch scripts: they parse, they start the right command, and a preempted Slurm job saves and is requeued."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contentv.base.network import VARIABLES

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TRAIN = ["train", "model=tiny", "out=a folder/run"]

SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_ON_NODE": "96",
    "SLURM_SUBMIT_DIR": str(ROOT),
}


@pytest.fixture
def fakes(tmp_path):
    """A folder for programs that go first on PATH; returns a function that writes one."""

    def write(name: str, body: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    return write


def start(tmp_path: Path, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    ours = ("OMP_NUM_THREADS", "PROCESSES_PER_NODE", "LOG_DIR", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("SLURM")}
    return subprocess.Popen(
        ["bash", LAUNCH / script, *arguments],
        env=environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out.splitlines(), err


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir() if path.suffix != ".yaml"))
def test_scripts_parse_and_stop_at_errors(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    text = (LAUNCH / script).read_text()
    if text.startswith("#!"):  # the others are sourced and must not change the caller's shell options
        assert "set -euo pipefail" in text
        assert os.access(LAUNCH / script, os.X_OK)


def test_local_starts_torchrun_and_shares_the_cores(tmp_path, fakes):
    fakes("torchrun", 'echo "$OMP_NUM_THREADS"; printf "%s\\n" "$@"; exit 75')
    fakes("nproc", "echo 12")
    code, out, _ = finish(start(tmp_path, "local.sh", "8", *TRAIN))
    assert code == 75
    assert out == ["1", "--standalone", "--nproc-per-node", "8", "-m", "contentv", *TRAIN]
    assert finish(start(tmp_path, "local.sh", "2", "doctor"))[1][0] == "6"
    assert finish(start(tmp_path, "local.sh", "2", "doctor", OMP_NUM_THREADS="3"))[1][0] == "3"


@pytest.mark.parametrize("arguments", [[], ["train"], ["train", "out=run"], ["0", "train"]])
def test_local_shows_how_it_is_used(tmp_path, fakes, arguments):
    fakes("torchrun", "echo started")
    code, out, err = finish(start(tmp_path, "local.sh", *arguments))
    assert (code, out) == (2, [])
    assert "launch/local.sh PROCESSES COMMAND key=value" in err


# Runs the first task of a step here; as srun does, it hands USR1 to every process of the step.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
at = sys.argv.index("bash")
print("srun", *sys.argv[1:at], flush=True)
task = dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="16")
signal.signal(signal.SIGUSR1, lambda *_: os.killpg(step.pid, signal.SIGUSR1))
step = subprocess.Popen(sys.argv[at:], env=os.environ | task, start_new_session=True)
sys.exit(step.wait())
"""


@pytest.fixture
def slurm_fakes(tmp_path, fakes):
    def write(python: str) -> dict[str, str]:
        (tmp_path / "srun").write_text(SRUN)
        (tmp_path / "srun").chmod(0o755)
        fakes("python", python)
        fakes(
            "scontrol",
            'case "$1 $2" in "show hostnames") printf "n1\\nn2\\n";; "show node") echo "  NodeAddr=10.0.0.7 X=y";;'
            ' *) echo "scontrol $*";; esac',
        )
        return SLURM | {"LOG_DIR": str(tmp_path / "logs")}

    return write


def test_slurm_places_the_ranks_and_tells_them_where_to_meet(tmp_path, slurm_fakes):
    names = "OMP_NUM_THREADS MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE"
    env = slurm_fakes(f'for name in {names}; do echo "$name=${{!name}}"; done; printf "%s\\n" "$@"')
    code, out, err = finish(start(tmp_path, "slurm.sbatch", *TRAIN, **env, SLURM_RESTART_COUNT="2"))
    assert code == 0, err
    srun = out[0].split()
    assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12", "--kill-on-bad-exit=1"} < set(srun)
    assert f"--output={tmp_path}/logs/attempt-2/rank-%t.log" in srun
    assert out[1:8] == [
        "OMP_NUM_THREADS=12", "MASTER_ADDR=10.0.0.7", f"MASTER_PORT={12000 + 567 * 20}", "RANK=0", "LOCAL_RANK=0",
        "WORLD_SIZE=16", "LOCAL_WORLD_SIZE=8",
    ]  # fmt: skip
    assert out[8:] == ["-m", "contentv", *TRAIN]


@pytest.mark.parametrize(("ended", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_slurm_requeues_what_stopped_after_saving_and_not_what_failed(tmp_path, slurm_fakes, ended, requeued):
    code, out, _ = finish(start(tmp_path, "slurm.sbatch", "train", **slurm_fakes(f"exit {ended}")))
    assert code == ended
    assert ("scontrol requeue 1234567" in out) is requeued


@pytest.mark.parametrize(("ended", "requeued"), [(75, True), (1, True), (0, False)])
def test_slurm_hands_preemption_to_the_step_and_waits_until_it_has_saved(tmp_path, slurm_fakes, ended, requeued):
    """The fake python stands for a trainer: it takes one second to save after the signal."""
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    env = slurm_fakes(f"exec {sys.executable} {tmp_path}/step.py")
    (tmp_path / "step.py").write_text(
        "import pathlib, signal, sys, time\n"
        "assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN  # one that came earlier would have killed it\n"
        "stop = []\n"
        "signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "while not stop: time.sleep(0.01)\n"
        f"time.sleep(1); pathlib.Path({str(saved)!r}).touch(); sys.exit({ended})\n"
    )
    process = start(tmp_path, "slurm.sbatch", "train", **env)
    deadline = time.monotonic() + 20
    while not ready.exists():
        assert time.monotonic() < deadline, finish(process)
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    code, out, _ = finish(process)
    assert saved.exists()
    assert code == ended
    assert ("scontrol requeue 1234567" in out) is requeued


def test_slurm_asks_for_the_signal_and_for_requeueing():
    options = [line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@120", "#SBATCH --ntasks-per-node=1"} <= set(options)


def test_slurm_without_gpus_or_command_says_what_is_missing(tmp_path, slurm_fakes):
    without = {k: v for k, v in slurm_fakes("echo started").items() if k != "SLURM_GPUS_ON_NODE"}
    code, out, err = finish(start(tmp_path, "slurm.sbatch", "train", **without))
    assert code != 0
    assert out == []
    assert "set PROCESSES_PER_NODE" in err
    assert finish(start(tmp_path, "slurm.sbatch", **SLURM))[0] == 2


def test_every_variable_that_is_set_is_explained():
    page = (ROOT / "docs" / "clusters.md").read_text()
    for script in ("environment.sh", "ascend.env.sh"):
        for name in re.findall(r"^export (\w+)=", (LAUNCH / script).read_text(), re.MULTILINE):
            assert f"| `{name}` |" in page, name
    for variable in VARIABLES.values():
        assert f"`{variable.partition('=')[0]}`" in page


@pytest.mark.parametrize(("processes", "cores", "threads"), [("8", "96", "12"), ("8", "4", "1"), ("2", "3", "1")])
def test_the_environment_shares_the_cores_and_keeps_what_is_set(processes, cores, threads):
    command = f". {LAUNCH}/environment.sh {processes} {cores}; echo $OMP_NUM_THREADS $PYTORCH_ALLOC_CONF"
    env = {"PATH": os.environ["PATH"], "PYTORCH_ALLOC_CONF": "mine"}
    result = subprocess.run(["bash", "-c", f"set -eu; {command}"], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [threads, "mine"]


def test_ascend_environment_keeps_what_is_set_and_finds_cann(tmp_path):
    toolkit = tmp_path / "ascend-toolkit" / "latest"
    toolkit.mkdir(parents=True)
    (toolkit.parent / "set_env.sh").write_text("export FOUND_CANN=$UNSET_VARIABLE.yes\n")
    command = f'. {LAUNCH}/ascend.env.sh; echo "$FOUND_CANN $HCCL_CONNECT_TIMEOUT $HCCL_EXEC_TIMEOUT"'
    result = subprocess.run(
        ["bash", "-c", command],
        env={"PATH": os.environ["PATH"], "ASCEND_TOOLKIT_HOME": str(toolkit), "HCCL_EXEC_TIMEOUT": "60"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [".yes", "1800", "60"]
    assert "no CANN" in result.stderr  # the double brings no compiler


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["build", "cuda", "--build-arg", "MAX_JOBS=8"],
            "build --target cuda --tag contentv:cuda --build-arg MAX_JOBS=8",
        ),
        (["run", "cpu", "contentv", "doctor"], "run --rm --init --network host --user"),
        (["run", "cuda", "launch/local.sh", "8", "train"], "--gpus all --ipc host"),
        (["run", "npu", "contentv", "doctor"], "--device /dev/davinci_manager"),
    ],
)
def test_docker_command(tmp_path, fakes, arguments, expected):
    fakes("docker", 'echo "$@"')
    code, out, err = finish(start(tmp_path, "docker.sh", *arguments))
    assert code == 0, err
    assert expected in out[0]
    if arguments[0] == "run":
        assert out[0].endswith(" ".join([f"contentv:{arguments[1]}", *arguments[2:]]))


@pytest.mark.parametrize("arguments", [[], ["build"], ["build", "tpu"], ["push", "cpu"], ["run", "cpu"]])
def test_docker_shows_how_it_is_used(tmp_path, fakes, arguments):
    fakes("docker", "echo started")
    code, out, err = finish(start(tmp_path, "docker.sh", *arguments))
    assert (code, out) == (2, [])
    assert "launch/docker.sh build cpu|cuda|npu" in err
