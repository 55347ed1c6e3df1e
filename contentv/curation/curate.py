"""The curation pipeline: files -> scenes -> clips -> scores and filters -> latents and caption vectors -> a writer.

Decoding and scoring may run in several processes; what is written, and in which order, does not depend on how many.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
import xxhash
from torch import nn

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.base.types import Bucket
from contentv.curation.clips import CutClip, CutSample, cut_clip
from contentv.curation.config import CurateConfig
from contentv.curation.encode import (
    CaptionEncoder,
    ClipWriter,
    LatentEncoder,
    ReadySample,
    SampleEncoder,
    check_buckets,
)
from contentv.curation.inputs import list_files, list_items
from contentv.curation.plan import ClipRules, ClipTask, plan_clips
from contentv.curation.scan import FileScan, Reject, ScanTask, scan_file
from contentv.curation.video_io import DecodeError
from contentv.curation.workers import WorkerCrashError, WorkerPool

__all__ = ["CaptionEncoder", "ClipWriter", "CurateConfig", "CurateReport", "LatentEncoder", "curate"]

REJECTS_FILE = "rejects.jsonl"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Progress = Callable[[int, int], None]


@dataclass
class CurateReport:
    """What a curation did: files looked at, clips found, samples kept (a clip may fill several buckets), rejections."""

    files: int = 0
    clips: int = 0
    kept: int = 0
    rejected: int = 0  # lines of rejects.jsonl
    seconds: float = 0.0
    buckets: dict[str, int] = field(default_factory=dict)  # samples kept


def curate(
    config: CurateConfig,
    vae: LatentEncoder,
    text: CaptionEncoder,
    writer: ClipWriter,
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> CurateReport:
    """Makes a dataset of a folder of video and image files and returns what was kept and rejected.

    The writer is closed at the end of a complete run only: after an error or an interruption there is no dataset.

    Args:
        config: what to read and what to keep.
        vae: encodes clips.
        text: encodes captions.
        writer: takes the samples.
        progress: called with (files done, files in all) as files are read; a tar counts as one.
        device: of the VAE; None = that of its parameters.

    Raises:
        UserError: the input folder is missing or has no media files, no file has a caption, a bucket does not fit the
            VAE, or nothing was kept.
    """
    started = time.perf_counter()
    buckets = [Bucket.parse(name) for name in config.buckets]
    check_buckets(buckets, vae)
    if not config.output:
        raise UserError("output is not set", where="output", remedy="name a folder for the dataset, output=DIR")
    names = ordered(list_files(config.input, leave_out=config.output), config)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    encoder = SampleEncoder(
        vae, text, writer, dtype=DTYPES[config.precision], device=device or _device_of(vae),
        batch_size=config.batch_size, max_batch_pixels=config.max_batch_pixels,
    )  # fmt: skip
    with (
        open(Path(config.output) / REJECTS_FILE, "w", encoding="utf-8") as rejects,
        WorkerPool(config.workers) as pool,
    ):
        run = _Run(config, buckets, encoder, rejects, progress or (lambda done, total: None))
        run.execute(pool, names)
    run.require_something()
    writer.close()
    run.report.seconds = time.perf_counter() - started
    return run.report


def ordered(names: list[str], config: CurateConfig) -> list[str]:
    """Returns the files in the order they are taken: as they are, or drawn from the seed by their names."""
    if not config.shuffle:
        return names
    return sorted(names, key=lambda name: hashlib.blake2b(f"{config.seed}/{name}".encode()).digest())


def sample_key(task: ClipTask, bucket: Bucket) -> str:
    """Returns a name for a sample, of letters, digits, _ and -, that no other sample has.

    It is the same whenever the same file is curated: stem, scene, clip, bucket, and a checksum of the file's name and
    bytes that tells equal stems apart.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePosixPath(task.item.name).name.partition(".")[0]).strip("-")[:24]
    unique = xxhash.xxh64_hexdigest(f"{task.item.name}\0{task.xxh128}".encode())
    return f"{stem or 'clip'}-{task.scene:03d}-{task.clip:02d}-{bucket.name}-{unique}"


class _Run:
    """One curation under way."""

    def __init__(
        self, config: CurateConfig, buckets: list[Bucket], encoder: SampleEncoder, rejects: IO[str], progress: Progress
    ) -> None:
        self.report = CurateReport(buckets={bucket.name: 0 for bucket in buckets})
        self._config = config
        self._rules = ClipRules(
            tuple(buckets), config.min_clip_s, config.max_clip_s, config.fps, config.filters, config.allow_upscale,
            config.max_crop, config.images_from_video, config.keep_media,
        )  # fmt: skip
        self._encoder = encoder
        self._rejects = rejects
        self._progress = progress
        self._seen: dict[str, str] = {}  # checksum of a file -> its name
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}  # a reason without its numbers -> the first of its kind
        self._without_caption = 0

    def execute(self, pool: WorkerPool, names: list[str]) -> None:
        """Takes every file through to the writer."""
        for task, result in pool.map(cut_clip, self._clips(pool, names)):
            if isinstance(result, WorkerCrashError):
                item = task.file if isinstance(task, Reject) else task.item.name
                result = CutClip((), (Reject(item, str(result), task.scene, task.clip),))
            for reject in result.rejects:
                self._reject(reject)
            if isinstance(task, ClipTask):
                self.report.clips += 1
                for cut in result.samples:
                    ready = ReadySample(task, sample_key(task, cut.bucket), _meta(task, cut), cut)
                    self._count(cut.bucket, *self._encoder.add(ready))
        for bucket in self._rules.buckets:
            self._count(bucket, *self._encoder.finish(bucket))
        self._progress(len(names), len(names))

    def require_something(self) -> None:
        """Raises a UserError that says why, if no sample was kept."""
        if self.report.kept:
            return
        where = f"input={self._config.input}"
        if self._without_caption == self.report.rejected:
            raise UserError(
                "no file has a caption that fits it", where=where,
                remedy=f"write captions to NAME.txt beside NAME.mp4 ({self._most_common()})",
            )  # fmt: skip
        raise UserError(
            "nothing was kept", where=where,
            remedy=f"see {Path(self._config.output) / REJECTS_FILE}; most often: {self._most_common()}",
        )  # fmt: skip

    def _clips(self, pool: WorkerPool, names: list[str]) -> Iterator[ClipTask | Reject]:
        """Yields the clips of all files in order. What is rejected takes its place among them, so that the order of
        rejects.jsonl does not depend on how far ahead files are read."""
        for task, scan in pool.map(_scan, self._items(names)):
            if isinstance(scan, WorkerCrashError):
                name = task.file if isinstance(task, Reject) else task.item.name
                yield Reject(name, str(scan))
            elif isinstance(scan, Reject):
                yield scan
            elif self._config.dedup and scan.xxh128 in self._seen:
                yield Reject(scan.item.name, f"the same bytes as {self._seen[scan.xxh128]}")
            else:
                if self._config.dedup:
                    self._seen[scan.xxh128] = scan.item.name
                yield from plan_clips(scan, self._rules)

    def _items(self, names: list[str]) -> Iterator[ScanTask | Reject]:
        for done, name in enumerate(names):
            self._progress(done, len(names))
            for item in list_items(self._config.input, [name]):
                self.report.files += 1
                if isinstance(item, DecodeError):
                    yield Reject(item.file, item.reason)
                else:
                    yield ScanTask(item, self._config.scene_detector, self._config.scene_threshold)

    def _count(self, bucket: Bucket, written: int, bad: Iterable[ReadySample]) -> None:
        self.report.kept += written
        self.report.buckets[bucket.name] += written
        for sample in bad:
            task = sample.task
            reason = f"its latents are not finite ({bucket.name})"
            self._reject(Reject(task.item.name, reason, task.scene, task.clip, sample.meta["scores"]))

    def _reject(self, reject: Reject) -> None:
        self.report.rejected += 1
        self._without_caption += reject.lacks_caption
        kind = re.sub(r"[0-9.]+", "", reject.reason)
        self._reasons[self._examples.setdefault(kind, reject.reason)] += 1
        row = {"file": reject.file, "scene": reject.scene, "clip": reject.clip, "reason": reject.reason}
        self._rejects.write(json.dumps({**row, "scores": reject.scores}, ensure_ascii=False) + "\n")
        get_logger().debug("%s: %s", reject.file, reject.reason)

    def _most_common(self) -> str:
        return "; ".join(f"{count} x {reason}" for reason, count in self._reasons.most_common(3))


def _scan(task: ScanTask | Reject) -> FileScan | Reject:
    return task if isinstance(task, Reject) else scan_file(task)


def _meta(task: ClipTask, cut: CutSample) -> dict[str, Any]:
    """Returns the fields of KEY.json but the checksum of the media."""
    return {
        "key": sample_key(task, cut.bucket),
        "caption": task.caption,
        "source": task.item.source,
        "kind": "image" if cut.bucket.frames == 1 else "video",
        "num_frames": cut.bucket.frames,
        "height_px": cut.bucket.height,
        "width_px": cut.bucket.width,
        "fps": cut.fps,
        "start_s": cut.start_s,
        "duration_s": cut.bucket.frames / cut.fps if cut.fps > 0 else 0.0,
        "visual_raw": cut.scores.visual_raw,
        "motion_raw": cut.scores.motion_raw,
        "scores": dict(cut.scores.scores),
    }


def _device_of(vae: object) -> torch.device:
    if isinstance(vae, nn.Module):
        for parameter in vae.parameters():
            return parameter.device
    return torch.device("cpu")
