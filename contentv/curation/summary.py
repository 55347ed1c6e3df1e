"""summary.json of a run: what came of it and where its time went; with it, the run is finished."""

from __future__ import annotations

import json
from typing import Any

from contentv.base.files import disk_errors, to_json, write_atomic
from contentv.curation.job import Job
from contentv.curation.merge_phase import Counts
from contentv.curation.run_folder import MERGE, SCAN, SUMMARY_FILE
from contentv.curation.scan_phase import THUMBNAILS


def save_times(job: Job, seconds: float) -> None:
    """Notes what the phases of this process took, for the summary; a process that is killed leaves none.

    Args:
        job: the run.
        seconds: of all of them on the clock.
    """
    if not job.run.path.is_dir():
        return
    phases = {name: phase.to_row() for name, phase in job.timer.phases.items()}
    if job.config.executor == "local" and job.config.workers == 1:  # this process itself was the worker
        for phase in phases.values():
            phase["worker_cpu_s"] = 0.0
    with disk_errors(job.run.path), open(_path(job, job.peers.rank), "a", encoding="utf-8") as file:
        file.write(json.dumps({"seconds": seconds, "phases": phases}) + "\n")


def finish(job: Job, counts: Counts, seconds: float) -> None:
    """Writes the summary and removes what nobody needs any more.

    Args:
        job: the run; its samples are part of the dataset.
        counts: what came of it.
        seconds: of this process on the clock, merging included.
    """
    before, phases = _read_times(job)
    phases[MERGE] = {**job.timer.phases[MERGE].to_row(), "worker_cpu_s": 0.0}
    summary = {
        "run": job.run.name, **counts.to_row(), "seconds": round(before + seconds, 3), "phases": phases,
        "workers": job.pool.workers * job.peers.world,
    }  # fmt: skip
    with disk_errors(job.run.path):
        write_atomic(job.run.path / SUMMARY_FILE, to_json(summary))
    for chunk in job.chunks:
        job.run.chunk_path(SCAN, chunk, THUMBNAILS).unlink(missing_ok=True)


def _read_times(job: Job) -> tuple[float, dict[str, dict[str, Any]]]:
    """Returns the seconds of processes before this one, and the phases' times: rank 0's clock, everyone's work."""
    seconds: list[float] = []
    phases: dict[str, dict[str, Any]] = {}
    for rank in range(job.peers.world):
        path = _path(job, rank)
        rows = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in rows:
            row = _parsed(line)
            if rank == 0:
                seconds.append(row.get("seconds", 0.0))
            for name, phase in row.get("phases", {}).items():
                total = phases.setdefault(name, dict.fromkeys(phase, 0))
                for key, value in phase.items():
                    total[key] += value if rank == 0 or key != "seconds" else 0
    return sum(seconds[:-1], 0.0), phases


def _parsed(line: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        return row
    except ValueError:  # a process was killed while it wrote the line
        return {}


def _path(job: Job, rank: int) -> Any:
    return job.run.path / f"times-{rank}.jsonl"
