"""Phase 4, ENCODE: the clips that are kept become samples in shards of their chunk.

Batches do not cross chunks, and each chunk's captions are encoded apart: what comes out does not depend on which
process does which chunk, or on what was done before.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from contentv.base.types import Bucket
from contentv.curation.caption_phase import VANISHED, Place, read_captions
from contentv.curation.clips import CutSample, cut_clip
from contentv.curation.decide import told
from contentv.curation.decide_phase import read_decisions
from contentv.curation.encode import (
    ChunkCaptions,
    ChunkWriter,
    ClipEncoder,
    DatasetSink,
    EncodedBatch,
    ReadySample,
)
from contentv.curation.job import Job, clip_task
from contentv.curation.keys import sample_key
from contentv.curation.plan import ClipTask
from contentv.curation.records import ClipRecord, FileRecord, Reject
from contentv.curation.run_folder import ENCODE
from contentv.curation.scoring.view import ClipScores
from contentv.curation.timing import PhaseTime, chunk_tasks, map_tasks
from contentv.curation.workers import WorkerCrashError


@dataclass(frozen=True)
class EncodeTask:
    """A clip to encode, with what is known of it; `clip` None: its file is not there any more."""

    place: Place
    record: FileRecord
    entry: ClipRecord
    caption: str
    clip: ClipTask | None


@dataclass
class EncodedChunk:
    """What became of a chunk's clips.

    Attributes:
        shards: records of the files they are in.
        samples: (place of the clip, bucket, key) of each.
        rejects: what could not be encoded.
    """

    shards: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[Place, str, str]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    def to_row(self) -> dict[str, Any]:
        """Returns its JSON form."""
        rejects = [reject.to_row() for reject in self.rejects]
        return {"shards": self.shards, "samples": self.samples, "rejects": rejects}

    @classmethod
    def read(cls, job: Job, chunk: int) -> EncodedChunk:
        """Returns what became of a chunk that is done."""
        (row,) = job.run.read(ENCODE, chunk)
        samples = [((place[0], place[1]), bucket, key) for place, bucket, key in row["samples"]]
        return cls(row["shards"], samples, [Reject.from_row(reject) for reject in row["rejects"]])


@dataclass
class _Chunk:
    """A chunk under way."""

    number: int
    writer: ChunkWriter
    waiting: dict[Bucket, list[ReadySample]] = field(default_factory=dict)
    captions: ChunkCaptions = field(default_factory=ChunkCaptions)
    encoded: EncodedChunk = field(default_factory=EncodedChunk)
    rejects: list[tuple[Place, str, Reject]] = field(default_factory=list)  # with the bucket; as they come

    def finish(self) -> EncodedChunk:
        """Completes the shards and returns what became of the clips."""
        self.encoded.shards = self.writer.finish()
        self.encoded.rejects = [reject for _, _, reject in sorted(self.rejects, key=lambda entry: entry[:2])]
        return self.encoded


def encode(job: Job, encoder: ClipEncoder, sink: DatasetSink) -> None:
    """Encodes this process's chunks."""
    chunks = job.open_chunks(ENCODE)
    total = len(job.mine())
    with (
        job.timer.phase(ENCODE) as clock,
        job.reporter.phase(ENCODE, total, total - len(chunks), "samples") as advance,
    ):
        line = _Line(job, encoder, sink, clock, advance)
        tasks = chunk_tasks(((chunk, line.begin(chunk)) for chunk in chunks), job.stop)
        try:
            for outcome in map_tasks(job.pool, cut_task, tasks, clock, job.stop):
                if outcome.task is None:
                    line.end(outcome.chunk)
                else:
                    line.add(outcome.chunk, outcome.task, outcome.result)
            line.drain(0)
        except BaseException:
            line.abort()
            raise
    job.stop.check(at_once=True)


def cut_task(task: EncodeTask) -> list[CutSample] | Reject:
    """Returns a clip in the shape of its buckets, or why it cannot be."""
    if task.clip is None:
        return Reject(task.record.name, VANISHED, task.entry.scene, task.entry.clip)
    return cut_clip(task.clip)


class _Line:
    """Batches under way from the workers to the writer, in order; several chunks may be in it."""

    def __init__(self, job: Job, encoder: ClipEncoder, sink: DatasetSink, clock: PhaseTime, advance: Any) -> None:
        self._job, self._encoder, self._sink, self._clock, self._advance = job, encoder, sink, clock, advance
        self._rules = job.rules()
        self._chunks: dict[int, _Chunk] = {}
        self._queue: deque[tuple[_Chunk, EncodedBatch | None]] = deque()  # None: the chunk's end

    def begin(self, chunk: int) -> Iterator[EncodeTask]:
        """Yields the tasks of a chunk."""
        job = self._job
        self._chunks[chunk] = _Chunk(chunk, self._sink.chunk(job.run.chunk_prefix(chunk)))
        records = list(job.records(chunk))
        decisions = read_decisions(job, chunk)
        captions = read_captions(job, chunk)
        items = job.items(chunk, records) if any(decision.keep for decision in decisions) else []
        for decision in decisions:
            for n, buckets in decision.keep:
                record, entry = records[decision.file], records[decision.file].entries[n]
                if isinstance(entry, Reject):
                    raise RuntimeError(f"{record.name}: a rejected clip was kept")
                caption = captions.get((decision.file, n), entry.caption)
                if isinstance(caption, Reject) or caption is None:
                    lost = caption or Reject(record.name, "no caption", entry.scene, entry.clip, rule="no_caption")
                    self._chunks[chunk].rejects.append(((decision.file, n), "", lost))
                    continue
                item = items[decision.file]
                task = None if item is None else clip_task(item, record, entry, buckets, self._rules)
                # Without the other clips: a film has thousands, and each of them would carry all.
                alone = dataclasses.replace(record, entries=())
                yield EncodeTask((decision.file, n), alone, entry, caption, task)

    def add(self, number: int, task: EncodeTask, result: list[CutSample] | Reject | WorkerCrashError) -> None:
        """Takes a clip from the workers."""
        chunk = self._chunks[number]
        if isinstance(result, WorkerCrashError):
            entry = task.entry
            result = Reject(task.record.name, str(result), entry.scene, entry.clip, rule="crashed")
        if isinstance(result, Reject):
            chunk.rejects.append((task.place, "", result))
            return
        for cut in result:
            key = sample_key(task.record, task.entry, cut.bucket.name)
            waiting = chunk.waiting.setdefault(cut.bucket, [])
            waiting.append(ReadySample(task.place, key, task.caption, _meta(task, cut, key), cut, _reject(task, cut)))
            if len(waiting) >= self._encoder.clips_per_call(cut.bucket):
                self._start(chunk, chunk.waiting.pop(cut.bucket))

    def end(self, number: int) -> None:
        """Takes the end of a chunk: what waits is encoded, and then its file is written."""
        chunk = self._chunks[number]
        for bucket in self._rules.buckets:
            if bucket in chunk.waiting:
                self._start(chunk, chunk.waiting.pop(bucket))
        self._queue.append((chunk, None))
        self.drain(self._encoder.lanes)

    def drain(self, most: int) -> None:
        """Writes what comes out, until at most so many batches are under way."""
        while sum(batch is not None for _, batch in self._queue) > most or (self._queue and self._queue[0][1] is None):
            chunk, batch = self._queue.popleft()
            if batch is None:
                self._job.run.write(ENCODE, chunk.number, [chunk.finish().to_row()])
                del self._chunks[chunk.number]
                self._advance(1, 0)
            else:
                self._write(chunk, batch)

    def abort(self) -> None:
        """Removes what chunks under way have written."""
        for chunk in self._chunks.values():
            chunk.writer.abort()

    def _start(self, chunk: _Chunk, samples: list[ReadySample]) -> None:
        self._queue.append((chunk, self._encoder.encode(samples, chunk.captions)))
        self.drain(self._encoder.lanes)

    def _write(self, chunk: _Chunk, batch: EncodedBatch) -> None:
        for sample, latents, text in batch.rows():
            if not bool(torch.isfinite(latents).all()):
                chunk.rejects.append((sample.clip, sample.cut.bucket.name, sample.reject))
                continue
            cut = sample.cut
            chunk.writer.add(
                sample.key, sample.meta, latents.contiguous(), text.tokens[0], text.pooled[0], cut.bucket,
                media=cut.media, media_suffix=cut.media_suffix,
            )  # fmt: skip
            chunk.encoded.samples.append((sample.clip, cut.bucket.name, sample.key))
            self._clock.items += 1
            self._advance(0, 1)


def _scores(task: EncodeTask, cut: CutSample) -> ClipScores:
    scores = task.entry.still if cut.bucket.frames == 1 else task.entry.video
    if scores is None:
        raise RuntimeError(f"{task.record.name}: no scores for {cut.bucket.name}")
    return scores


def _reject(task: EncodeTask, cut: CutSample) -> Reject:
    reason, scores = f"its latents are not finite ({cut.bucket.name})", told(_scores(task, cut))
    return Reject(task.record.name, reason, task.entry.scene, task.entry.clip, scores, "not_finite")


def _meta(task: EncodeTask, cut: CutSample, key: str) -> dict[str, Any]:
    """Returns the fields of KEY.json."""
    scores = _scores(task, cut)
    return {
        "key": key,
        "caption": task.caption,
        "source": task.record.source,
        "kind": "image" if cut.bucket.frames == 1 else "video",
        "num_frames": cut.bucket.frames,
        "height_px": cut.bucket.height,
        "width_px": cut.bucket.width,
        "fps": cut.fps,
        "start_s": cut.start_s,
        "duration_s": cut.bucket.frames / cut.fps if cut.fps > 0 else 0.0,
        "visual_raw": scores.visual_raw,
        "motion_raw": scores.motion_raw,
        "scores": dict(scores.scores),
        "media_xxh128": task.record.xxh128 if cut.media is None else xxhash.xxh128_hexdigest(cut.media),
    }
