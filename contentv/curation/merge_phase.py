"""Phase 5, MERGE: one process makes a dataset of the chunks, and says what came of all clips."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import xxhash

from contentv.base.files import disk_errors, replacing, write_atomic
from contentv.curation.caption_phase import Place, read_captions
from contentv.curation.decide_phase import read_decisions
from contentv.curation.earlier_runs import GAVE_NONE, GAVE_SAMPLES, RunIndex
from contentv.curation.encode import DatasetSink
from contentv.curation.encode_phase import EncodedChunk
from contentv.curation.job import Job
from contentv.curation.records import KNOWN, SCANNED, FileRecord, Reject, read_rows
from contentv.curation.run_folder import (
    DECIDE,
    MERGE,
    REJECTS_FILE,
    SCAN,
    THUMBNAILS_FILE,
    THUMBNAILS_FOLDER,
    Settings,
    list_runs,
)
from contentv.curation.scan_phase import read_embeddings, read_thumbnails, thumbnail_name

KEPT_SHOWN, RULE_SHOWN = 4, 2  # thumbnails of a chunk: of clips that were kept, and of each rule that left some out
TRIED_AGAIN = ("no_caption", "bad_caption", "captioner")  # may be mended without the file changing


@dataclass
class Counts:
    """What came of a run."""

    files: int = 0
    clips: int = 0
    kept: int = 0
    rejected: int = 0  # lines of its rejects
    skipped: int = 0  # files that an earlier run had done
    buckets: Counter[str] = field(default_factory=Counter)  # samples kept
    rules: Counter[str] = field(default_factory=Counter)  # rejects
    reasons: dict[str, str] = field(default_factory=dict)  # rule -> an example

    def reject(self, reject: Reject) -> None:
        """Counts a rejection."""
        self.rejected += 1
        self.rules[reject.rule] += 1
        self.reasons.setdefault(reject.rule, reject.reason)

    def to_row(self) -> dict[str, Any]:
        """Returns its JSON form."""
        return {
            "files": self.files, "clips": self.clips, "kept": self.kept, "rejected": self.rejected,
            "skipped": self.skipped, "buckets": dict(self.buckets), "rules": dict(sorted(self.rules.items())),
        }  # fmt: skip


def count_decided(job: Job) -> Counts:
    """Returns what came of a run as far as it is decided, before anything is encoded."""
    counts = Counts()
    for chunk in job.chunks:
        for record, decision in zip(job.records(chunk), read_decisions(job, chunk), strict=True):
            counts.files += 1
            counts.skipped += record.state == KNOWN
            counts.clips += decision.clips
            for reject in decision.rejects:
                counts.reject(reject)
    return counts


def write_rejects(job: Job) -> None:
    """Writes the run's rejects, as far as they are known, and those of the dataset: its runs', one after another.

    What an earlier run rejected of a file that this one has done again is left out.
    """
    with replacing(job.run.path / REJECTS_FILE) as file:
        for chunk in job.chunks:
            for reject in _rejects(job, chunk):
                file.write(json.dumps(reject.to_row(), ensure_ascii=False) + "\n")
    _join(job, REJECTS_FILE)


def merge(job: Job, sink: DatasetSink) -> Counts:
    """Makes the run's samples part of the dataset and returns what came of the run.

    Everything that it writes is the same when it is done again after a kill.

    Args:
        job: the run; every chunk has been encoded.
        sink: makes the dataset.
    """
    with job.timer.phase(MERGE) as clock, job.reporter.phase(MERGE, len(job.chunks), 0, "samples") as advance:
        counts = Counts(buckets=Counter({name: 0 for name in job.config.buckets}))
        index = RunIndex(encoder=job.config.dedup.encoder, settings=decision_fingerprint(job.plan.settings))
        with replacing(job.run.path / THUMBNAILS_FILE) as thumbnails:
            for chunk in job.chunks:
                encoded = EncodedChunk.read(job, chunk)
                records = list(job.records(chunk))
                _count(job, chunk, records, encoded, counts)
                _index(job, chunk, records, encoded, index)
                for row in _thumbnails(job, chunk, records, encoded):
                    thumbnails.write(json.dumps(row, ensure_ascii=False) + "\n")
                clock.items += len(encoded.samples)
                advance(1, len(encoded.samples))
        write_rejects(job)
        _join(job, THUMBNAILS_FILE)
        index.write(job.run)
        sink.publish(record for chunk in job.chunks for record in EncodedChunk.read(job, chunk).shards)
    return counts


def decision_fingerprint(settings: Settings) -> str:
    """Returns a checksum of all that decides whether a clip is kept."""
    relevant = {phase: settings.get(phase) for phase in (SCAN, DECIDE)}
    return str(xxhash.xxh64_hexdigest(json.dumps(relevant, sort_keys=True).encode()))


def _rejects(job: Job, chunk: int) -> Iterator[Reject]:
    for decision in read_decisions(job, chunk):
        yield from decision.rejects
    if job.run.has("encode", chunk):
        yield from EncodedChunk.read(job, chunk).rejects


def _count(job: Job, chunk: int, records: list[FileRecord], encoded: EncodedChunk, counts: Counts) -> None:
    counts.files += len(records)
    counts.skipped += sum(record.state == KNOWN for record in records)
    counts.clips += sum(decision.clips for decision in read_decisions(job, chunk))
    counts.kept += len(encoded.samples)
    counts.buckets.update(bucket for _, bucket, _ in encoded.samples)
    for reject in _rejects(job, chunk):
        counts.reject(reject)


def _index(job: Job, chunk: int, records: list[FileRecord], encoded: EncodedChunk, index: RunIndex) -> None:
    kept = {place for place, _, _ in encoded.samples}
    gave = {file for file, _ in kept}
    mended = {file for (file, _), text in read_captions(job, chunk).items() if isinstance(text, Reject)}
    embeddings = read_embeddings(job, chunk)
    row = 0
    for decision, record in zip(read_decisions(job, chunk), records, strict=True):
        file = decision.file
        again = file in mended or any(reject.rule in TRIED_AGAIN for reject in decision.rejects)
        if record.state == SCANNED and (file in gave or not again):
            index.contents.append(record.content)
            index.states.append(GAVE_SAMPLES if file in gave else GAVE_NONE)
        for n, entry in enumerate(record.entries):
            if isinstance(entry, Reject):
                continue
            if (file, n) in kept:
                index.clips.append(entry.hash)
                index.files.append(record.name)
                index.names.append(f"{record.name} (scene {entry.scene}, clip {entry.clip})")
                if embeddings is not None:
                    index.embeddings.append(embeddings[row])
            row += 1


def _thumbnails(job: Job, chunk: int, records: list[FileRecord], encoded: EncodedChunk) -> Iterator[dict[str, Any]]:
    """Writes the first pictures of each kind and yields their lines."""
    pictures = read_thumbnails(job, chunk)
    keys: dict[Place, str] = {}
    for place, _, key in encoded.samples:
        keys.setdefault(place, key)
    rules: dict[tuple[str, int | None, int | None], str] = {}
    for reject in _rejects(job, chunk):
        rules.setdefault((reject.file, reject.scene, reject.clip), reject.rule)
    shown: Counter[str | None] = Counter()
    folder = job.output / THUMBNAILS_FOLDER
    with disk_errors(job.output):
        folder.mkdir(exist_ok=True)
    for file, record in enumerate(records):
        clips = [(n, entry) for n, entry in enumerate(record.entries) if not isinstance(entry, Reject)]
        for number, (n, entry) in enumerate(clips):
            data = pictures.get(thumbnail_name(file, number))
            rule = None if (file, n) in keys else rules.get((record.name, entry.scene, entry.clip))
            if data is None or ((file, n) not in keys and rule is None):
                continue
            shown[rule] += 1
            if shown[rule] > (KEPT_SHOWN if rule is None else RULE_SHOWN):
                continue
            name = f"{job.run.chunk_prefix(chunk)}-{file:04d}-{number:03d}.jpg"
            with disk_errors(job.output, len(data)):
                write_atomic(folder / name, data)
            yield {
                "path": f"{THUMBNAILS_FOLDER}/{name}", "key": keys.get((file, n)), "file": record.name,
                "scene": entry.scene, "clip": entry.clip, "rule": rule,
            }  # fmt: skip


def _join(job: Job, name: str) -> None:
    """Writes a file of the dataset: those of the runs one after another, without what is out of date."""
    done_again: set[int] = set()
    if any(run.number < job.run.number for run in list_runs(job.output)):
        records = (record for chunk in job.chunks for record in job.records(chunk))
        done_again = {_short(record.name) for record in records if record.state != KNOWN}
    with replacing(job.output / name) as file:
        for run in list_runs(job.output):
            path = run.path / name
            if run.number > job.run.number or not path.is_file():
                continue
            for row in read_rows(path):
                is_old = run.number < job.run.number and row["rule"] is not None
                if not is_old or _short(row["file"]) not in done_again:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _short(name: str) -> int:
    return int(xxhash.xxh64_intdigest(name.encode()))
