"""What earlier runs into a dataset have seen: which files are done, and what the clips that were kept look like."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from contentv.base.errors import UserError
from contentv.base.files import disk_errors, write_atomic
from contentv.curation.near_duplicates import as_array, from_array
from contentv.curation.perceptual_hash import ClipHash
from contentv.curation.run_folder import INDEX_FILE, RunFolder

GAVE_SAMPLES, GAVE_NONE = 1, 2


@dataclass
class RunIndex:
    """The index of one run, INDEX_FILE: small, so that runs to come need not read its records.

    Attributes:
        contents: of each file that was scanned (not of copies): its content key.
        states: GAVE_SAMPLES or GAVE_NONE, for each.
        clips: hashes of the clips that were kept.
        files: names of their files.
        names: what to call them.
        embeddings: of them, if an encoder was given.
        encoder: the folder of that encoder.
        settings: fingerprint of what decided.
    """

    contents: list[str] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    clips: list[ClipHash] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    embeddings: list[npt.NDArray[np.float32]] = field(default_factory=list)
    encoder: str = ""
    settings: str = ""

    def write(self, run: RunFolder) -> None:
        """Writes it into the run's folder."""
        tensors: dict[str, npt.NDArray] = {
            "contents": _digests(self.contents), "states": np.array(self.states, np.uint8),
            "clips": as_array(self.clips), "files": _text(self.files), "names": _text(self.names),
        }  # fmt: skip
        if self.embeddings:
            tensors["embeddings"] = np.stack(self.embeddings).astype(np.float32)
        # One entry: safetensors writes several in an order that differs from one process to the next.
        facts = json.dumps({"encoder": self.encoder, "settings": self.settings})
        data = save_safetensors(tensors, {"facts": facts})
        with disk_errors(run.path, len(data)):
            write_atomic(run.path / INDEX_FILE, data)


class EarlierRuns:
    """The finished runs of a dataset.

    Args:
        runs: oldest first.
        settings: fingerprint of what decides now: a file that gave nothing is tried again under other settings.

    Raises:
        UserError: an index is missing or damaged.
    """

    def __init__(self, runs: Sequence[RunFolder], settings: str) -> None:
        self._runs = list(runs)
        known: list[npt.NDArray[np.uint64]] = []
        for run in self._runs:
            tensors, facts = _read(run, ("contents", "states"))
            counts = tensors["states"] == GAVE_SAMPLES
            if facts.get("settings") == settings:
                counts |= True
            known.append(tensors["contents"][counts])
        self._known = np.unique(np.concatenate(known)) if known else np.zeros(0, np.uint64)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._runs)

    def knows(self, content: str) -> bool:
        """Whether a file of this content key is done."""
        digest = _digests([content])[0]
        place = int(np.searchsorted(self._known, digest))
        return place < len(self._known) and bool(self._known[place] == digest)

    def kept_clips(self, encoder: str) -> Iterator[tuple[str, str, ClipHash, npt.NDArray[np.float32] | None]]:
        """Yields (file, name, hash, embedding) of the clips that were kept; embeddings of the same encoder only."""
        for run in self._runs:
            tensors, facts = _read(run, ("clips", "files", "names", "embeddings"))
            vectors = tensors.get("embeddings") if encoder and facts.get("encoder") == encoder else None
            clips = from_array(tensors["clips"])
            files, names = _lines(tensors["files"]), _lines(tensors["names"])
            for n, (file, name, clip) in enumerate(zip(files, names, clips, strict=True)):
                yield file, name, clip, None if vectors is None else vectors[n]


def _read(run: RunFolder, wanted: Sequence[str]) -> tuple[dict[str, npt.NDArray], dict[str, str]]:
    path = run.path / INDEX_FILE
    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in wanted if name in file.keys()]  # noqa: SIM118  (it is no dict)
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            return {name: file.get_tensor(name) for name in names}, facts
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the index of an earlier run is missing or damaged ({error})", where=str(path),
            remedy="restore it from a copy; without it, clips that are there would be added again",
        ) from error  # fmt: skip


def _digests(contents: Sequence[str]) -> npt.NDArray[np.uint64]:
    """64 bits each: among a million files two meet by chance once in 40 million datasets."""
    return np.array([xxhash.xxh64_intdigest(content.encode()) for content in contents], np.uint64)


def _text(lines: Sequence[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer("".join(f"{line}\0" for line in lines).encode(), np.uint8)


def _lines(data: npt.NDArray[np.uint8]) -> list[str]:
    return data.tobytes().decode().split("\0")[:-1]
