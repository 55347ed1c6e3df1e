"""Phase 1, SCAN: every file of this process's chunks is looked at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from contentv.curation.earlier_runs import EarlierRuns
from contentv.curation.job import Job
from contentv.curation.look import Looking
from contentv.curation.records import KNOWN, REJECTED, FileRecord, Reject
from contentv.curation.run_folder import SCAN
from contentv.curation.scan import ScanResult, ScanTask, content_key, scan_file, take_checksum
from contentv.curation.timing import ChunkTask, PhaseTime, chunk_tasks, map_tasks
from contentv.curation.video_io import DecodeError
from contentv.curation.workers import WorkerCrashError

THUMBNAILS, EMBEDDINGS = "thumbnails.safetensors", "embeddings.safetensors"
AHEAD = 8  # files differ in length, and what comes back is small


@dataclass
class _Chunk:
    """What has been found of a chunk so far."""

    records: list[FileRecord] = field(default_factory=list)
    thumbnails: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)
    embeddings: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def add(self, result: ScanResult) -> None:
        for n, data in enumerate(result.thumbnails):
            self.thumbnails[thumbnail_name(len(self.records), n)] = np.frombuffer(data, np.uint8)
        self.records.append(result.record)
        self.embeddings.extend(result.embeddings)


def scan(job: Job, earlier: EarlierRuns) -> None:
    """Scans the chunks that have not been.

    Args:
        job: the run.
        earlier: files that these know are not scanned again.
    """
    chunks = job.open_chunks(SCAN)
    total = len(job.mine())
    with (
        job.timer.phase(SCAN) as clock,
        job.reporter.phase(SCAN, total, total - len(chunks), "files") as advance,
    ):
        tasks: Iterator[ChunkTask] = chunk_tasks(((chunk, _tasks(job, chunk)) for chunk in chunks), job.stop)
        if earlier:
            tasks = _unknown(job, tasks, earlier, clock)
        found = _Chunk()
        for outcome in map_tasks(job.pool, scan_file, tasks, clock, job.stop, AHEAD):
            if outcome.task is None:
                _write(job, outcome.chunk, found)
                found = _Chunk()
                advance(1, 0)
                continue
            result = outcome.result
            if isinstance(result, WorkerCrashError):
                result = ScanResult(_crashed(outcome.task, str(result)))
            found.add(result)
            clock.items += 1
            advance(0, 1)
    job.stop.check(at_once=True)


def _tasks(job: Job, chunk: int) -> Iterator[ScanTask | FileRecord]:
    config, rules = job.config, job.rules()
    looking = Looking(config.scoring, config.dedup.encoder)
    always = config.captioner.kind != "none" and config.captioner.when == "always"
    for unit, name in enumerate(job.plan.chunks[chunk]):
        for number, item in enumerate(job.inputs.items(name)):
            if isinstance(item, DecodeError):
                reject = Reject(item.file, item.reason, rule=item.rule)
                yield FileRecord(unit, number, item.file, "", REJECTED, entries=(reject,))
            else:
                yield ScanTask(
                    unit, number, item, rules, looking, config.scene_detector, config.scene_threshold, always
                )  # fmt: skip


def _unknown(job: Job, tasks: Iterator[ChunkTask], earlier: EarlierRuns, clock: PhaseTime) -> Iterator[ChunkTask]:
    """Yields the tasks again, those of known files as records."""
    for outcome in map_tasks(job.pool, take_checksum, tasks, clock, job.stop, AHEAD):
        task: Any = outcome.task
        if isinstance(task, ScanTask):
            found = outcome.result
            if isinstance(found, WorkerCrashError):
                task = _crashed(task, str(found))
            elif isinstance(found, FileRecord):
                task = found
            else:
                task = _if_unknown(task, found, earlier)
        yield ChunkTask(outcome.chunk, task)


def _if_unknown(task: ScanTask, digest: str, earlier: EarlierRuns) -> ScanTask | FileRecord:
    item, content = task.item, content_key(digest, task.item)
    if earlier.knows(content):
        return FileRecord(task.unit, task.item_number, item.name, item.source, KNOWN, content, digest)
    return ScanTask(
        task.unit, task.item_number, item, task.rules, task.looking, task.detector, task.threshold,
        task.always_caption, digest,
    )  # fmt: skip


def _crashed(task: ScanTask | FileRecord, reason: str) -> FileRecord:
    if isinstance(task, FileRecord):
        return task
    reject = Reject(task.item.name, reason, rule="crashed")
    return FileRecord(task.unit, task.item_number, task.item.name, task.item.source, REJECTED, entries=(reject,))


def _write(job: Job, chunk: int, found: _Chunk) -> None:
    if found.thumbnails:
        job.run.write_bytes(SCAN, chunk, THUMBNAILS, save_safetensors(found.thumbnails))
    if found.embeddings:
        job.run.write_bytes(SCAN, chunk, EMBEDDINGS, save_safetensors({"embeddings": np.stack(found.embeddings)}))
    job.run.write(SCAN, chunk, (record.to_row() for record in found.records))


def thumbnail_name(file: int, clip: int) -> str:
    """Returns what the thumbnail of a clip is called among those of its chunk."""
    return f"{file}/{clip}"


def read_thumbnails(job: Job, chunk: int) -> dict[str, bytes]:
    """Returns the thumbnails of a chunk's clips by `thumbnail_name`."""
    path = job.run.chunk_path(SCAN, chunk, THUMBNAILS)
    if not path.is_file():
        return {}
    return {name: array.tobytes() for name, array in load_safetensors(path.read_bytes()).items()}


def read_embeddings(job: Job, chunk: int) -> npt.NDArray[np.float32] | None:
    """Returns the embeddings of a chunk's clips, in order, if there are any."""
    path = job.run.chunk_path(SCAN, chunk, EMBEDDINGS)
    return load_safetensors(path.read_bytes())["embeddings"] if path.is_file() else None
