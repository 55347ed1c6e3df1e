"""Phase 3, CAPTION: clips that are kept and need a caption get one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from contentv.curation.captioner import Captioner, CaptionerConfig, CaptionRequest
from contentv.curation.captions import CaptionError
from contentv.curation.clip_frames import read_frames
from contentv.curation.decide_phase import read_decisions
from contentv.curation.job import Job, clip_task
from contentv.curation.plan import ClipTask
from contentv.curation.records import ClipRecord, Reject
from contentv.curation.run_folder import CAPTION
from contentv.curation.timing import Outcome, chunk_tasks, map_tasks
from contentv.curation.video_io import DecodeError
from contentv.curation.workers import WorkerCrashError

Place = tuple[int, int]  # of a file in its chunk, and of a clip among its entries
VANISHED = "the input has something else in its place by now"


@dataclass(frozen=True)
class CaptionTask:
    """A clip whose frames are wanted for its caption; without a clip, a file that is not there any more."""

    place: Place
    name: str
    scene: int
    clip: int
    task: ClipTask | None
    frames: int
    max_side_px: int


def write_captions(job: Job, captioner: Captioner | None) -> None:
    """Captions this process's chunks; does nothing without a captioner.

    Raises:
        UserError: no caption can be had at all.
    """
    if captioner is None:
        return
    chunks = job.open_chunks(CAPTION)
    total = len(job.mine())
    with (
        job.timer.phase(CAPTION) as clock,
        job.reporter.phase(CAPTION, total, total - len(chunks), "clips") as advance,
    ):
        tasks = chunk_tasks(((chunk, _tasks(job, chunk)) for chunk in chunks), job.stop)
        waiting: list[tuple[CaptionTask, CaptionRequest]] = []
        rows: list[dict[str, Any]] = []
        for outcome in map_tasks(job.pool, caption_request, tasks, clock, job.stop):
            is_end = outcome.task is None
            if not is_end:
                _take(outcome, waiting, rows)
            if waiting and (is_end or len(waiting) >= batch_size(job.config.captioner)):
                rows.extend(_ask(captioner, waiting))
                clock.items += len(waiting)
                advance(0, len(waiting))
                waiting = []
            if is_end:
                job.run.write(CAPTION, outcome.chunk, sorted(rows, key=lambda row: row["place"]))
                rows = []
                advance(1, 0)
    job.stop.check(at_once=True)


def batch_size(config: CaptionerConfig) -> int:
    """Returns how many clips are asked about together; a few for every request that is under way."""
    return config.batch_size if config.kind == "local" else 4 * config.concurrency


def read_captions(job: Job, chunk: int) -> dict[Place, str | Reject]:
    """Returns what the captioner said of a chunk's clips, or why there is nothing; empty without a captioner."""
    if not job.run.has(CAPTION, chunk):
        return {}
    found: dict[Place, str | Reject] = {}
    for row in job.run.read(CAPTION, chunk):
        place = (row["place"][0], row["place"][1])
        found[place] = Reject.from_row(row["reject"]) if row["caption"] is None else str(row["caption"])
    return found


def caption_request(task: CaptionTask) -> CaptionRequest | Reject:
    """Returns the frames of a clip that its caption is written from."""
    if task.task is None:
        return Reject(task.name, VANISHED, task.scene, task.clip)
    clip = task.task
    longest = max(bucket.frames for bucket in clip.buckets)
    count = min(task.frames, longest)
    places = ((np.arange(count) + 0.5) * longest / count).astype(int).tolist()
    if longest == 1:
        places = [len(clip.frames) // 2]
    scale = min(1.0, task.max_side_px / max(clip.height, clip.width))
    try:
        found = read_frames(clip, places, max(1, round(clip.height * scale)), max(1, round(clip.width * scale)))
    except DecodeError as error:
        return Reject(task.name, error.reason, task.scene, task.clip, rule=error.rule)
    fps = clip.fps * count / longest if longest > 1 else 0.0
    return CaptionRequest(np.stack([found[place] for place in places]), fps, clip.caption or "")


def _tasks(job: Job, chunk: int) -> Iterator[CaptionTask]:
    config, rules = job.config.captioner, job.rules()
    records = list(job.records(chunk))
    decisions = read_decisions(job, chunk)
    wanted = [
        (decision.file, entry, buckets)
        for decision in decisions
        for entry, buckets in decision.keep
        if config.when == "always" or _clip(records[decision.file].entries[entry]).caption is None
    ]
    items = job.items(chunk, records) if wanted else []
    for file, entry, buckets in wanted:
        record, item = records[file], items[file]
        clip = _clip(record.entries[entry])
        task = None if item is None else clip_task(item, record, clip, buckets, rules)
        yield CaptionTask((file, entry), record.name, clip.scene, clip.clip, task, config.frames, config.max_side_px)


def _clip(entry: ClipRecord | Reject) -> ClipRecord:
    if isinstance(entry, Reject):
        raise RuntimeError("a rejected clip was kept")
    return entry


def _take(outcome: Outcome, waiting: list[tuple[CaptionTask, CaptionRequest]], rows: list[dict[str, Any]]) -> None:
    task, result = outcome.task, outcome.result
    if isinstance(result, WorkerCrashError):
        result = Reject(task.name, str(result), task.scene, task.clip, rule="crashed")
    if isinstance(result, Reject):
        rows.append(_row(task, result))
    else:
        waiting.append((task, result))


def _ask(captioner: Captioner, waiting: list[tuple[CaptionTask, CaptionRequest]]) -> list[dict[str, Any]]:
    answers = captioner.caption([request for _, request in waiting])
    if len(answers) != len(waiting):
        raise RuntimeError(f"the captioner gave {len(answers)} answers to {len(waiting)} questions")
    rows = []
    for (task, _), answer in zip(waiting, answers, strict=True):
        if isinstance(answer, CaptionError):
            rows.append(_row(task, Reject(task.name, str(answer), task.scene, task.clip, rule=answer.rule)))
        else:
            rows.append(_row(task, answer))
    return rows


def _row(task: CaptionTask, result: str | Reject) -> dict[str, Any]:
    reject = result.to_row() if isinstance(result, Reject) else None
    return {"place": task.place, "caption": result if reject is None else None, "reject": reject}
