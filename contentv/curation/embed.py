"""Embeddings of clips by an image encoder, for finding near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, UInt8

MAX_FRAMES = 4  # of a clip that are embedded, evenly spaced, the middles of as many equal parts


@runtime_checkable
class FeatureTower(Protocol):
    """Anything that turns pictures into L2-normalised vectors."""

    def features(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> Float[np.ndarray, "n d"]:
        """Returns one vector per picture."""
        ...


class ImageEmbedder:
    """One vector for a clip: the mean of a few frames' image features."""

    def __init__(self, tower: FeatureTower) -> None:
        self._tower = tower

    @classmethod
    def from_folder(cls, path: str | Path, device: str = "cpu", key: str = "dedup.encoder") -> ImageEmbedder:
        """Returns the encoder stored in a transformers folder.

        Args:
            path: config.json, preprocessor_config.json and safetensors weights of a CLIP or SigLIP model.
            device: where it runs.
            key: that named the folder, for messages.

        Raises:
            UserError: the folder is no such model, or incomplete.
        """
        from contentv.curation.scoring.clip_tower import ClipTower  # torch is for those who asked for it

        return cls(ClipTower.from_folder(path, device, key))

    def embed(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "d"]:
        """Returns the clip's embedding: the mean of L2-normalised features, L2-normalised again.

        Args:
            frames: RGB, at least one.
        """
        count = min(MAX_FRAMES, len(frames))
        places = ((np.arange(count) + 0.5) * len(frames) / count).astype(int)
        mean = self._tower.features([frames[place] for place in places]).mean(axis=0)
        vector: Float[np.ndarray, "d"] = (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
        return vector
