"""Which clips are kept: told by the scan's records alone, in the run's order, the same whenever it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from contentv.base.types import Bucket
from contentv.curation.earlier_runs import EarlierRuns
from contentv.curation.filters import FilterConfig, broken_bounds
from contentv.curation.keys import sample_key
from contentv.curation.near_duplicates import DedupConfig, NearDuplicates
from contentv.curation.records import KNOWN, SCANNED, ClipRecord, FileRecord, Reject
from contentv.curation.scoring.view import ClipScores


@dataclass(frozen=True)
class FileDecision:
    """What becomes of a file.

    Attributes:
        file: place of its record in the chunk.
        keep: (place among its entries, names of the buckets it goes to) of each clip that is kept.
        rejects: what is left out, in order.
        clips: how many clips were decided about; none of a file that is left out as a whole.
    """

    file: int
    keep: tuple[tuple[int, tuple[str, ...]], ...] = ()
    rejects: tuple[Reject, ...] = ()
    clips: int = 0

    def to_row(self) -> dict[str, Any]:
        """Returns its JSON form."""
        rejects = [reject.to_row() for reject in self.rejects]
        return {"file": self.file, "keep": self.keep, "rejects": rejects, "clips": self.clips}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> FileDecision:
        """Returns the decision of a JSON form."""
        keep = tuple((entry, tuple(buckets)) for entry, buckets in row["keep"])
        return cls(row["file"], keep, tuple(map(Reject.from_row, row["rejects"])), row["clips"])


class Decider:
    """Decides about files, one after another.

    Args:
        filters: bounds on scores.
        dedup: what a copy is.
        earlier: the files and clips of earlier runs.
        taken: keys of samples that the dataset has from elsewhere.
    """

    def __init__(
        self, filters: FilterConfig, dedup: DedupConfig, earlier: EarlierRuns, taken: Callable[[str], bool]
    ) -> None:
        self._filters, self._dedup, self._taken = filters, dedup, taken
        self._contents: dict[str, str] = {}  # of a file -> its name
        self._near = NearDuplicates(dedup)
        self._names: dict[str, int] = {}  # of files -> number
        for file, name, clip, embedding in earlier.kept_clips(dedup.encoder):
            self._near.add(clip, embedding, self._number(file), name)

    def decide(
        self, records: Iterable[FileRecord], embeddings: npt.NDArray[np.float32] | None = None
    ) -> list[FileDecision]:
        """Returns what becomes of the files of the next chunk.

        Args:
            records: the chunk's, in order.
            embeddings: of its clips, one row each, in order.
        """
        rows = iter(range(0 if embeddings is None else len(embeddings)))
        decisions = []
        for place, record in enumerate(records):
            vectors = [None if embeddings is None else embeddings[next(rows)] for _ in record.clips]
            decisions.append(self._file(place, record, vectors))
        return decisions

    def _file(self, place: int, record: FileRecord, vectors: Sequence[npt.NDArray[np.float32] | None]) -> FileDecision:
        if record.state == KNOWN:
            return FileDecision(place)
        if record.state == SCANNED and self._dedup.exact:
            first = self._contents.setdefault(record.content, record.name)
            if first != record.name:
                copy = Reject(record.name, f"the same bytes as {first}", rule="duplicate:bytes")
                return FileDecision(place, rejects=(copy,))
        keep: list[tuple[int, tuple[str, ...]]] = []
        rejects: list[Reject] = []
        remaining = iter(vectors)
        for n, entry in enumerate(record.entries):
            if isinstance(entry, Reject):
                rejects.append(entry)
                continue
            buckets = self._clip(record, entry, next(remaining), rejects)
            if buckets:
                keep.append((n, buckets))
        return FileDecision(place, tuple(keep), tuple(rejects), len(record.clips))

    def _clip(
        self, record: FileRecord, clip: ClipRecord, vector: npt.NDArray[np.float32] | None, rejects: list[Reject]
    ) -> tuple[str, ...]:
        buckets = self._filtered(record, clip, rejects)
        fresh = tuple(name for name in buckets if not self._taken(sample_key(record, clip, name)))
        if buckets and not fresh:
            reason = "the dataset has it already, from elsewhere"
            rejects.append(Reject(record.name, reason, clip.scene, clip.clip, rule="duplicate:bytes"))
        if not fresh:
            return ()
        file = self._number(record.name)
        copy = self._near.find(clip.hash, vector, file)
        if copy is not None:
            scores = told(clip.video or clip.still)
            rejects.append(Reject(record.name, copy, clip.scene, clip.clip, scores, rule="duplicate:near"))
            return ()
        self._near.add(clip.hash, vector, file, f"{record.name} (scene {clip.scene}, clip {clip.clip})")
        return fresh

    def _filtered(self, record: FileRecord, clip: ClipRecord, rejects: list[Reject]) -> tuple[str, ...]:
        kept: list[str] = []
        for is_still, scores in ((True, clip.still), (False, clip.video)):
            buckets = [name for name in clip.buckets if (Bucket.parse(name).frames == 1) == is_still]
            if scores is None or not buckets:
                continue
            broken = broken_bounds(self._filters, scores)
            if broken:
                reason = f"{'; '.join(bound.reason for bound in broken)} ({', '.join(buckets)})"
                rejects.append(
                    Reject(record.name, reason, clip.scene, clip.clip, told(scores), rule=broken[0].rule)
                )  # fmt: skip
            else:
                kept.extend(buckets)
        return tuple(name for name in clip.buckets if name in kept)

    def _number(self, file: str) -> int:
        return self._names.setdefault(file, len(self._names))


def told(scores: ClipScores | None) -> dict[str, float | None]:
    """Returns all scores of a clip by name, the two sums first."""
    if scores is None:
        return {}
    return {"visual_raw": scores.visual_raw, "motion_raw": scores.motion_raw, **scores.scores}
