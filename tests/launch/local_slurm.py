"""A real Slurm on this machine for the launch tests: one slurmctld and two slurmd, away from any installed one.

Everything it writes (configuration, keys, spool, logs) lies in one temporary folder, and all ports are free ones. It
needs root and Debian's packages `slurmctld slurmd slurm-client munge`; on other systems the programs of the same names.

    python tests/launch/local_slurm.py      # starts one, prints its SLURM_CONF, and stops it at the end of input
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
START_S = 60.0
PATIENCE_S = 900.0  # for each thing that is waited for; seconds on a quiet machine
ROOT = Path(__file__).parents[2]


def why_not() -> str:
    """Returns what keeps a Slurm from starting here, or nothing."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for taken in sockets:
        taken.bind(("127.0.0.1", 0))
    ports = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


class LocalSlurm:
    """Two nodes, n1 and n2, of `cpus` CPUs each, while it is entered."""

    def __init__(self, cpus: int = 2) -> None:
        self.cpus = cpus
        self.folder = Path(tempfile.mkdtemp(prefix="slurm."))  # short: the names of Unix sockets end at 108 bytes
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> LocalSlurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.SubprocessError, OSError):
            self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, check: bool = True) -> str:
        """Returns what a Slurm command prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}{self.logs()}")
        return done.stdout

    def state(self, job: str) -> str:
        """Returns a job's state, such as PENDING, RUNNING or COMPLETED."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """Returns one field of `scontrol show job`."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)[name]

    def logs(self) -> str:
        """Returns the last lines of the daemons' logs."""
        tails = [(path.name, path.read_text(errors="replace")[-1500:]) for path in sorted(self.folder.glob("*.log"))]
        return "".join(f"\n--- {name}\n{text}" for name, text in tails)

    def _start(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        (folder / "munge").mkdir(mode=0o711)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (folder / "slurm.conf").write_text(self._configuration())
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self._spawn(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge/socket",
            f"--pid-file={folder}/munge/pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge/seed",
        )  # fmt: skip
        self._wait(lambda: (folder / "munge" / "socket").exists(), "munged has no socket")
        self._spawn("slurmctld", "slurmctld", "-D", "-i")
        for name in ("n1", "n2"):
            self._spawn(name, "slurmd", "-D", "-N", name)
        self._wait(
            lambda: self.run("sinfo", "-h", "-o", "%T %D", check=False).split() == ["idle", "2"], "no idle nodes"
        )

    def _configuration(self) -> str:
        controller, first, second = free_ports(3)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 3 // 2**20
        node = f"NodeHostname=localhost NodeAddr=127.0.0.1 CPUs={self.cpus} RealMemory={memory} State=UNKNOWN"
        return "\n".join([
            "ClusterName=local", "SlurmctldHost=localhost(127.0.0.1)", f"SlurmctldPort={controller}", "SlurmUser=root",
            "AuthType=auth/munge", f"AuthInfo=socket={self.folder}/munge/socket", "CredType=cred/munge",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none",
            "MpiDefault=none", "ReturnToService=2", "KillWait=30", "SchedulerParameters=sched_interval=2",
            f"StateSaveLocation={self.folder}/state", f"SlurmdSpoolDir={self.folder}/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid", f"SlurmdPidFile={self.folder}/%n.pid",
            f"SlurmctldLogFile={self.folder}/slurmctld.log", f"SlurmdLogFile={self.folder}/slurmd.%n.log",
            "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core",
            f"NodeName=n1 Port={first} {node}", f"NodeName=n2 Port={second} {node}",
            "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP", "",
        ])  # fmt: skip

    def _spawn(self, name: str, *command: str) -> None:
        self._processes[name] = subprocess.Popen(
            command, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START_S
        while not ready():
            if time.monotonic() > end:
                raise RuntimeError(f"the local Slurm does not start: {what}{self.logs()}")
            time.sleep(0.2)


class Job:
    """A job of launch/slurm.sbatch with one process on each of the two nodes; its output is in `folder`."""

    def __init__(self, slurm: LocalSlurm, folder: Path, *arguments: str) -> None:
        self.slurm, self.folder = slurm, folder
        folder.mkdir()
        env = slurm.env | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PROCESSES_PER_NODE": "1",
            "LOG_DIR": str(folder / "logs"), "OMP_NUM_THREADS": "1", "CONTENTV_TYPECHECK": "0",
        }  # fmt: skip
        command = ["sbatch", "--parsable", "--gpus-per-node=0", f"--output={folder}/job.out", "launch/slurm.sbatch"]
        done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        self.id = done.stdout.strip()

    def wait(self, ready: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        """Waits until `ready` says so; `what` is the message if it never does."""
        end = time.monotonic() + patience_s
        while not ready():
            output = (self.folder / "job.out").read_text() if (self.folder / "job.out").exists() else ""
            assert time.monotonic() < end, f"{what}: {self.slurm.run('squeue')}{output[-3000:]}{self.slurm.logs()}"
            time.sleep(0.5)

    def wait_for(self, *states: str, patience_s: float = PATIENCE_S) -> str:
        """Waits for one of the states and returns it."""
        self.wait(lambda: self.slurm.state(self.id) in states, f"not {states}", patience_s)
        return self.slurm.state(self.id)

    def go_on(self) -> None:
        """Slurm lets a requeued job wait for two minutes; this one starts now."""
        self.wait_for("PENDING")
        self.slurm.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")
        self.wait_for("RUNNING")


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"local_slurm: {reason}")
    with LocalSlurm() as slurm:
        print(f"export SLURM_CONF={slurm.env['SLURM_CONF']}", flush=True)
        sys.stdin.read()
