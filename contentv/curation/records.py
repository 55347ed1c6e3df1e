"""What the phases leave for each other: files, clips and rejections as lines of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contentv.base.files import disk_errors, write_atomic
from contentv.curation.perceptual_hash import ClipHash
from contentv.curation.scoring.view import ClipScores

SCANNED, KNOWN, REJECTED = "scanned", "known", "rejected"  # what became of a file


@dataclass(frozen=True)
class Reject:
    """A file, or a clip of it, that was left out; a line of rejects.jsonl. `rule` is the reason for programs."""

    file: str
    reason: str
    scene: int | None = None
    clip: int | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    rule: str = "unreadable"

    def to_row(self) -> dict[str, Any]:
        """Returns its line of rejects.jsonl."""
        scores = {name: _finite(value) for name, value in self.scores.items()}
        return {
            "file": self.file, "scene": self.scene, "clip": self.clip, "reason": self.reason, "rule": self.rule,
            "scores": scores,
        }  # fmt: skip

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Reject:
        """Returns the rejection of a line."""
        return cls(row["file"], row["reason"], row["scene"], row["clip"], row["scores"], row["rule"])


@dataclass(frozen=True)
class ClipRecord:
    """A clip as the scan found it: everything that later phases need to know without its pixels.

    Attributes:
        scene, clip: its numbers, from 0.
        caption: None = to be written by a captioner.
        fps: its frames per second; 0 for stills.
        frames: numbers in the file, one per sampled frame; a frame may repeat.
        stamps: their times in the container's units; None = frames are found by counting.
        times_s: their times in seconds.
        buckets: names of those it fills.
        video: its scores as a video; None if it fills no bucket of several frames.
        still: the scores of its middle frame; None if it fills no bucket of one frame.
        hash: of what it looks like.
    """

    scene: int
    clip: int
    caption: str | None
    fps: float
    frames: tuple[int, ...]
    stamps: tuple[int, ...] | None
    times_s: tuple[float, ...]
    buckets: tuple[str, ...]
    video: ClipScores | None
    still: ClipScores | None
    hash: ClipHash

    def to_row(self) -> dict[str, Any]:
        """Returns its JSON form."""
        return {
            "scene": self.scene, "clip": self.clip, "caption": self.caption, "fps": self.fps, "frames": self.frames,
            "stamps": self.stamps, "times_s": self.times_s, "buckets": self.buckets, "video": _scores_row(self.video),
            "still": _scores_row(self.still), "hash": self.hash.to_row(),
        }  # fmt: skip

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ClipRecord:
        """Returns the clip of a JSON form."""
        stamps = row["stamps"]
        return cls(
            row["scene"], row["clip"], row["caption"], float(row["fps"]), tuple(row["frames"]),
            None if stamps is None else tuple(stamps), tuple(map(float, row["times_s"])), tuple(row["buckets"]),
            _scores(row["video"]), _scores(row["still"]), ClipHash.from_row(row["hash"]),
        )  # fmt: skip


@dataclass(frozen=True)
class FileRecord:
    """A file as the scan found it.

    Attributes:
        unit: place of its unit in the chunk.
        item: its place among the items of the unit.
        name, source: see `MediaItem`.
        state: scanned | known (an earlier run has it) | rejected (as a whole).
        content: checksum of its bytes and of the part of it that counts; "" if it could not be read.
        xxh128: checksum of its bytes.
        height, width: in pixels, upright, square ones.
        entries: its clips, and what of it gives none, in order.
    """

    unit: int
    item: int
    name: str
    source: str
    state: str
    content: str = ""
    xxh128: str = ""
    height: int = 0
    width: int = 0
    entries: tuple[ClipRecord | Reject, ...] = ()

    @property
    def clips(self) -> list[ClipRecord]:
        """Its clips, in order."""
        return [entry for entry in self.entries if isinstance(entry, ClipRecord)]

    def to_row(self) -> dict[str, Any]:
        """Returns its JSON form."""
        entries = [
            {"reject": e.to_row()} if isinstance(e, Reject) else {"clip": e.to_row()} for e in self.entries
        ]  # fmt: skip
        return {
            "unit": self.unit, "item": self.item, "name": self.name, "source": self.source, "state": self.state,
            "content": self.content, "xxh128": self.xxh128, "height": self.height, "width": self.width,
            "entries": entries,
        }  # fmt: skip

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> FileRecord:
        """Returns the file of a JSON form."""
        entries = tuple(
            Reject.from_row(e["reject"]) if "reject" in e else ClipRecord.from_row(e["clip"]) for e in row["entries"]
        )
        return cls(
            row["unit"], row["item"], row["name"], row["source"], row["state"], row["content"], row["xxh128"],
            row["height"], row["width"], entries,
        )  # fmt: skip


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes lines of JSON, all or none.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    data = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    with disk_errors(path.parent, len(data)):
        write_atomic(path, data)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file that `write_rows` wrote."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _scores_row(scores: ClipScores | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    return {
        "visual_raw": _number(scores.visual_raw), "motion_raw": _number(scores.motion_raw),
        "scores": {name: _number(value) for name, value in scores.scores.items()},
    }  # fmt: skip


def _scores(row: Mapping[str, Any] | None) -> ClipScores | None:
    if row is None:
        return None
    motion = None if row["motion_raw"] is None else float(row["motion_raw"])
    scores = {name: float(value) for name, value in row["scores"].items()}
    return ClipScores(float(row["visual_raw"]), motion, scores)


def _number(value: float | None) -> float | str | None:
    """JSON has no word for NaN and infinity; Python's `float` reads these."""
    return value if value is None or math.isfinite(value) else str(float(value))


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
