"""What a clip looks like in a few hundred bits, the same for other encodings and sizes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

HASHED_FRAMES = 8  # of a clip, evenly spaced over its time
_SIDE_PX = 32  # pictures are compared at this size
_BITS_SIDE = 8  # lowest frequencies of each axis; the mean is left out
_LEAST = 0.5  # grey levels a frequency must have: weaker ones are noise of the coder, and count as none
_CELLS = 3  # colours are compared in 3 x 3 cells

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ClipHash:
    """A clip's look.

    Attributes:
        frames: 64 bits for each of `HASHED_FRAMES` frames; one for a still.
        colours: mean Cb and Cr (0..255) of 3 x 3 cells over all of them.
        detail: share of those frames that have enough detail to be told apart, 0..1.
    """

    frames: tuple[int, ...]
    colours: tuple[int, ...]
    detail: float

    def to_row(self) -> dict[str, Any]:
        """Returns its JSON form."""
        frames = "".join(f"{bits:016x}" for bits in self.frames)
        return {"frames": frames, "colours": bytes(self.colours).hex(), "detail": self.detail}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ClipHash:
        """Returns the hash of a JSON form."""
        text = row["frames"]
        frames = tuple(int(text[i : i + 16], 16) for i in range(0, len(text), 16))
        return cls(frames, tuple(bytes.fromhex(row["colours"])), float(row["detail"]))


def hash_clip(pictures: Sequence[UInt8[np.ndarray, "H W 3"]]) -> ClipHash:
    """Returns the look of evenly spaced frames of a clip.

    Each frame is made grey, shrunk to 32 x 32 and transformed (DCT); a bit says whether one of its 64 lowest
    frequencies, the mean left out, is above the median of them. Encoding, scaling and brightness change few of these
    bits. Small things of equal shape may still have other colours, and flat pictures have no bits worth comparing: both
    are noted beside.

    Args:
        pictures: RGB, at least one.

    Source: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010 (the DCT hash; the floor
    on weak frequencies, the colours and the detail are ours).
    """
    bits, detailed, colours = [], 0, []
    for picture in pictures:
        small = cv2.resize(picture, (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_AREA)
        planes = cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb)
        frequencies = cv2.dct(planes[:, :, 0].astype(np.float32)) / _SIDE_PX
        low = frequencies[: _BITS_SIDE + 1, : _BITS_SIDE + 1].reshape(-1)[1:65]
        bits.append(_pack(low > max(float(np.median(low)), 0.0) + _LEAST))
        detailed += float(planes[:, :, 0].std()) >= 6.0
        chroma = cv2.resize(planes[:, :, 1:], (_CELLS, _CELLS), interpolation=cv2.INTER_AREA)
        colours.append(chroma.astype(np.float32).reshape(-1))
    mean = np.mean(colours, axis=0).round().astype(int)
    return ClipHash(tuple(bits), tuple(mean.tolist()), detailed / len(bits))


def _pack(bits: npt.NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
