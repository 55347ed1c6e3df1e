"""Clips that show the same: found by perceptual hashes, and by embeddings where there are some.

Clips are asked for one after another, and only those that no earlier clip is a copy of are added: the first wins.
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, UInt8, UInt64

from contentv.base.errors import UserError
from contentv.curation.perceptual_hash import HASHED_FRAMES, ClipHash

BAND_BITS = 16
MAX_COLOUR_STEPS = 16  # of 255, by which cells of copies differ at most
MIN_DETAIL = 0.5  # share of frames with detail below which a clip is like any other flat one, and compared with none
BLOCK_CLIPS = 1024
_BIT_COUNT = np.array([bin(n).count("1") for n in range(1 << 16)], np.uint8)


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DedupConfig:
    """Which clips count as copies of an earlier one, of this run or of runs before."""

    exact: bool = _doc(True, "leave out files with the same bytes as an earlier one")
    near: bool = _doc(True, "leave out clips that look like a clip of an earlier file, in whatever encoding and size")
    max_distance: float = _doc(6.0, "most bits of 64 by which the hashes of two clips' frames differ on average, if "
                                    "they are copies; 0..16; more finds more, also what is none")  # fmt: skip
    encoder: str = _doc("", "folder of a CLIP-class image encoder: clips are copies also by their embeddings")
    min_similarity: float = _doc(0.96, "least cosine of the embeddings of two clips, if they are copies; 0..1")

    def __post_init__(self) -> None:
        for key, low, high in (("max_distance", 0, 16), ("min_similarity", 0, 1)):
            if not low <= getattr(self, key) <= high:
                raise UserError(
                    f"{key}={getattr(self, key)} is not possible", where=f"dedup.{key}", remedy=f"use {low}..{high}"
                )


class HashIndex:
    """Hashes of clips with equally many frames, searched exactly and without looking at all of them.

    The bits of a clip are cut into bands of 16. Two clips that differ in D bits altogether differ in at most D / bands
    (rounded down) bits of some band (pigeonhole), so looking up every value of every band within that radius finds all
    of them: one value a band below 4 bits a frame on average, 17 below 8, 137 below 12.

    Args:
        frames: hashes of each clip.
        max_distance: most bits a frame, on average over the frames.
    """

    def __init__(self, frames: int, max_distance: float) -> None:
        self._most = int(max_distance * frames + 1e-9)
        self._bands = frames * 64 // BAND_BITS
        self._table: dict[int, array[int]] = {}  # band and its value -> clips
        self._hashes = np.zeros((1024, frames), np.uint64)
        self._colours = np.zeros((1024, 0), np.int16)
        self._labels: list[tuple[int, int]] = []
        radius = self._most // self._bands
        self._masks = [
            sum(1 << bit for bit in bits)
            for size in range(radius + 1)
            for bits in itertools.combinations(range(BAND_BITS), size)
        ]

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, clip: ClipHash, file: int, label: int) -> None:
        """Adds a clip of a file; both are numbers of the caller's."""
        place = len(self._labels)
        if place == 0:
            self._colours = np.zeros((len(self._hashes), len(clip.colours)), np.int16)
        if place == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
            self._colours = np.concatenate([self._colours, np.zeros_like(self._colours)])
        self._hashes[place] = clip.frames
        self._colours[place] = clip.colours
        self._labels.append((file, label))
        for key in self._keys(clip, (0,)):
            self._table.setdefault(key, array("L")).append(place)

    def find(self, clip: ClipHash, file: int) -> tuple[int, float] | None:
        """Returns the label of the first clip of another file that a clip is a copy of, and their distance, or None."""
        if not self._labels:
            return None
        found = [self._table[key] for key in self._keys(clip, self._masks) if key in self._table]
        if not found:
            return None
        places = np.unique(np.concatenate([np.frombuffer(part, np.dtype(f"u{part.itemsize}")) for part in found]))
        distances = hamming(self._hashes[places], np.array(clip.frames, np.uint64))
        steps = np.abs(self._colours[places] - np.array(clip.colours, np.int16)).max(axis=1)
        for hit in np.flatnonzero((distances <= self._most) & (steps <= MAX_COLOUR_STEPS)).tolist():
            other, label = self._labels[int(places[hit])]
            if other != file:
                return label, float(distances[hit]) / len(clip.frames)
        return None

    def _keys(self, clip: ClipHash, masks: Any) -> list[int]:
        keys: list[int] = []
        for frame, bits in enumerate(clip.frames):
            for part in range(64 // BAND_BITS):
                band = (frame * 64 // BAND_BITS + part) << BAND_BITS
                value = bits >> (part * BAND_BITS) & 0xFFFF
                keys.extend(band | (value ^ mask) for mask in masks)
        return keys


def hamming(hashes: UInt64[np.ndarray, "n frames"], clip: UInt64[np.ndarray, "frames"]) -> npt.NDArray[np.int64]:
    """Returns the number of different bits of each row and one clip."""
    words = (hashes ^ clip).reshape(-1).view(np.uint16)
    counts: npt.NDArray[np.int64] = _BIT_COUNT[words].reshape(len(hashes), -1).sum(axis=1, dtype=np.int64)
    return counts


class EmbeddingIndex:
    """Embeddings of clips, compared with every one there is, in double precision.

    Args:
        min_similarity: least cosine of copies.
    """

    def __init__(self, min_similarity: float) -> None:
        self._least = min_similarity
        self._blocks: list[npt.NDArray[np.float64]] = []
        self._rows: list[npt.NDArray[np.float64]] = []  # of the block that is being filled
        self._labels: list[tuple[int, int]] = []

    def add(self, embedding: Float[np.ndarray, "d"], file: int, label: int) -> None:
        """Adds a clip of a file; both are numbers of the caller's."""
        self._rows.append(embedding.astype(np.float64))
        self._labels.append((file, label))
        if len(self._rows) == BLOCK_CLIPS:
            self._blocks.append(np.stack(self._rows))
            self._rows = []

    def find(self, embedding: Float[np.ndarray, "d"], file: int) -> tuple[int, float] | None:
        """Returns the label of the first clip of another file that a clip is a copy of, and their cosine, or None."""
        wanted = embedding.astype(np.float64)
        tail = [np.stack(self._rows)] if self._rows else []
        for number, block in enumerate([*self._blocks, *tail]):
            cosines = block @ wanted
            for hit in np.flatnonzero(cosines >= self._least).tolist():
                other, label = self._labels[number * BLOCK_CLIPS + hit]
                if other != file:
                    return label, float(cosines[hit])
        return None


class NearDuplicates:
    """The clips that are kept, asked about the next one.

    Args:
        config: what a copy is.
    """

    def __init__(self, config: DedupConfig) -> None:
        self._config = config
        self._videos = HashIndex(HASHED_FRAMES, config.max_distance)
        self._stills = HashIndex(1, config.max_distance)
        self._embeddings = EmbeddingIndex(config.min_similarity)
        self._names: list[str] = []

    def find(self, clip: ClipHash, embedding: npt.NDArray[np.float32] | None, file: int) -> str | None:
        """Returns a sentence about the clip of another file that this is a copy of, or None.

        Args:
            clip: its hash.
            embedding: of unit length, if there is one.
            file: number of its file: clips of one file are not compared with each other.
        """
        if not self._config.near:
            return None
        if clip.detail >= MIN_DETAIL:
            found = self._index(clip).find(clip, file)
            if found is not None:
                return f"looks like {self._names[found[0]]} ({found[1]:.1f} of 64 bits differ)"
        if embedding is not None and self._config.encoder:
            near = self._embeddings.find(embedding, file)
            if near is not None:
                return f"looks like {self._names[near[0]]} (similarity {near[1]:.3f})"
        return None

    def add(self, clip: ClipHash, embedding: npt.NDArray[np.float32] | None, file: int, name: str) -> None:
        """Adds a clip that is kept; `name` says which, for people."""
        label = len(self._names)
        self._names.append(name)
        if clip.detail >= MIN_DETAIL:
            self._index(clip).add(clip, file, label)
        if embedding is not None and self._config.encoder:
            self._embeddings.add(embedding, file, label)

    def _index(self, clip: ClipHash) -> HashIndex:
        return self._stills if len(clip.frames) == 1 else self._videos


def as_array(clips: list[ClipHash]) -> UInt8[np.ndarray, "n bytes"]:
    """Returns hashes as rows of bytes: number of frames, detail (0..255), colours, and 64 bits for each frame."""
    width = 2 + 18 + 8 * HASHED_FRAMES
    rows = np.zeros((len(clips), width), np.uint8)
    for row, clip in zip(rows, clips, strict=True):
        bits = b"".join(frame.to_bytes(8, "big") for frame in clip.frames)
        row[:2] = len(clip.frames), round(clip.detail * 255)
        row[2:20] = clip.colours
        row[20 : 20 + len(bits)] = np.frombuffer(bits, np.uint8)
    return rows


def from_array(rows: UInt8[np.ndarray, "n bytes"]) -> list[ClipHash]:
    """Returns the hashes of `as_array`'s rows."""
    clips = []
    for row in rows:
        data = row.tobytes()
        frames = tuple(int.from_bytes(data[20 + 8 * i : 28 + 8 * i], "big") for i in range(data[0]))
        clips.append(ClipHash(frames, tuple(data[2:20]), data[1] / 255))
    return clips
