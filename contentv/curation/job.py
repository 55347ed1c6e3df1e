"""What the phases of a curation share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from contentv.base.types import Bucket, Peers
from contentv.curation.config import CurateConfig
from contentv.curation.inputs import Inputs
from contentv.curation.media import MediaItem
from contentv.curation.plan import ClipRules, ClipTask
from contentv.curation.progress import Reporter
from contentv.curation.records import ClipRecord, FileRecord
from contentv.curation.run_folder import Plan, RunFolder
from contentv.curation.timing import Stop, Timer
from contentv.curation.video_io import DecodeError
from contentv.curation.workers import Pool


@dataclass
class Job:
    """A run, and what it is done with, in one process."""

    config: CurateConfig
    run: RunFolder
    plan: Plan
    inputs: Inputs
    pool: Pool
    peers: Peers
    stop: Stop
    timer: Timer
    reporter: Reporter

    @property
    def output(self) -> Path:
        """The dataset's folder."""
        return Path(self.config.output)

    @property
    def chunks(self) -> range:
        """Numbers of all chunks."""
        return range(len(self.plan.chunks))

    def mine(self) -> list[int]:
        """Returns the chunks that this process has to do, done or not: every n-th of n processes."""
        return list(self.chunks[self.peers.rank :: self.peers.world])

    def open_chunks(self, phase: str) -> list[int]:
        """Returns those of them that a phase is not done with."""
        return [chunk for chunk in self.mine() if not self.run.has(phase, chunk)]

    def records(self, chunk: int) -> Iterator[FileRecord]:
        """Yields what the scan found in a chunk."""
        return map(FileRecord.from_row, self.run.read("scan", chunk))

    def rules(self) -> ClipRules:
        """Returns how clips are planned."""
        config = self.config
        return ClipRules(
            tuple(Bucket.parse(name) for name in config.buckets), config.min_clip_s, config.max_clip_s, config.fps,
            config.allow_upscale, config.max_crop, config.images_from_video, config.keep_media, config.aspect,
            config.frames, needs_caption=config.captioner.kind == "none",
        )  # fmt: skip

    def items(self, chunk: int, records: list[FileRecord]) -> list[MediaItem | None]:
        """Returns the media of records again, None where the input has something else there by now."""
        wanted: dict[int, dict[int, int]] = {}
        for place, record in enumerate(records):
            wanted.setdefault(record.unit, {})[record.item] = place
        found: list[MediaItem | None] = [None] * len(records)
        for unit, places in wanted.items():
            for number, item in enumerate(self.inputs.items(self.plan.chunks[chunk][unit])):
                if number not in places or isinstance(item, DecodeError):
                    continue
                if item.name == records[places[number]].name:
                    found[places[number]] = item
        return found


def clip_task(
    item: MediaItem, record: FileRecord, clip: ClipRecord, buckets: tuple[str, ...], rules: ClipRules
) -> ClipTask:
    """Returns a scanned clip as a task, for some of its buckets."""
    return ClipTask(
        item, clip.scene, clip.clip, clip.caption, clip.fps, record.height, record.width, clip.frames, clip.stamps,
        clip.times_s, tuple(Bucket.parse(name) for name in buckets), rules,
    )  # fmt: skip
