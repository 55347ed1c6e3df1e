"""Clips to latents and captions to vectors, in batches, and on to whoever writes the dataset.

The VAE, the text encoders and the writer are handed in: this module knows them by what they do.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import xxhash
from jaxtyping import Float, UInt8
from torch import Tensor

from contentv.base.errors import UserError
from contentv.base.types import Bucket, TextCond
from contentv.curation.clips import CutSample
from contentv.curation.plan import ClipTask

TEXT_CACHE_BYTES = 2 << 30  # of encoded captions that are kept for clips to come


@runtime_checkable
class LatentEncoder(Protocol):
    """A video VAE."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def latents_mean(self) -> tuple[float, ...]: ...

    @property
    def latents_std(self) -> tuple[float, ...]: ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def temporal_factor(self) -> int: ...

    @property
    def spatial_factor(self) -> int: ...

    def encode(self, video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b c t h w"]:
        """Returns raw latents of pixels in [-1, 1]."""
        ...


@runtime_checkable
class CaptionEncoder(Protocol):
    """The text encoders."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, captions: list[str]) -> TextCond:
        """Returns one row per caption."""
        ...


@runtime_checkable
class ClipWriter(Protocol):
    """What takes the samples; nothing of them counts as a dataset before `close`."""

    def add(
        self,
        key: str,
        meta: dict[str, Any],
        latents: Float[Tensor, "c t h w"],
        text_tokens: Float[Tensor, "l d"],
        text_pooled: Float[Tensor, "p"],
        bucket: Bucket,
        media: bytes | None = None,
        media_suffix: str = "mp4",
    ) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ReadySample:
    """A sample that waits for its latents."""

    task: ClipTask
    key: str
    meta: dict[str, Any]
    cut: CutSample


def check_buckets(buckets: list[Bucket], vae: LatentEncoder) -> None:
    """Passes over buckets that the VAE can encode.

    Raises:
        UserError: a bucket is not one frame plus whole temporal steps, or its sides are not multiples of the factor.
    """
    for bucket in buckets:
        t, s = vae.temporal_factor, vae.spatial_factor
        if (bucket.frames - 1) % t or bucket.height % s or bucket.width % s:
            frames = 1 + round((bucket.frames - 1) / t) * t
            height, width = (max(1, round(side / s)) * s for side in (bucket.height, bucket.width))
            raise UserError(
                f"the VAE cannot encode bucket {bucket.name}",
                where="buckets",
                remedy=f"frames must be {t}k + 1, height and width multiples of {s}: "
                f"the nearest is {Bucket(frames, height, width).name}",
            )


class SampleEncoder:
    """Collects samples by bucket, encodes them in batches and hands them to the writer.

    Args:
        vae: makes latents; called with (b 3 T H W) in [-1, 1].
        text: makes caption vectors, once for each distinct caption as long as they are kept.
        writer: takes the samples; `add` here does not close it.
        dtype: of what is stored.
        device: of the VAE.
        batch_size: most clips in one call of the VAE.
        max_batch_pixels: most pixels in one call of more than one clip.
    """

    def __init__(
        self, vae: LatentEncoder, text: CaptionEncoder, writer: ClipWriter, *, dtype: torch.dtype,
        device: torch.device, batch_size: int, max_batch_pixels: int,
    ) -> None:  # fmt: skip
        self._vae, self._text, self._writer = vae, text, writer
        self._dtype, self._device = dtype, device
        self._batch_size, self._max_batch_pixels = batch_size, max_batch_pixels
        self._waiting: dict[Bucket, list[ReadySample]] = {}
        self._captions: OrderedDict[str, TextCond] = OrderedDict()
        self._caption_bytes = 0

    def add(self, sample: ReadySample) -> tuple[int, list[ReadySample]]:
        """Takes a sample; returns how many were written by that, and those whose latents were not finite."""
        bucket = sample.cut.bucket
        waiting = self._waiting.setdefault(bucket, [])
        waiting.append(sample)
        if len(waiting) >= self.clips_per_call(bucket):
            return self._write(self._waiting.pop(bucket))
        return 0, []

    def finish(self, bucket: Bucket) -> tuple[int, list[ReadySample]]:
        """Writes what waits of a bucket; returns as `add` does."""
        return self._write(self._waiting.pop(bucket)) if bucket in self._waiting else (0, [])

    def clips_per_call(self, bucket: Bucket) -> int:
        """Returns how many clips of a bucket go into one call of the VAE."""
        pixels = bucket.frames * bucket.height * bucket.width
        return max(1, min(self._batch_size, self._max_batch_pixels // pixels))

    def _write(self, samples: list[ReadySample]) -> tuple[int, list[ReadySample]]:
        latents = self._encode(np.stack([sample.cut.frames for sample in samples]))
        vectors = self._encode_captions([sample.task.caption for sample in samples])
        bad = []
        for sample, row, text in zip(samples, latents, vectors, strict=True):
            if not bool(torch.isfinite(row).all()):
                bad.append(sample)
                continue
            cut = sample.cut
            digest = sample.task.xxh128 if cut.media is None else xxhash.xxh128_hexdigest(cut.media)
            meta = {**sample.meta, "media_xxh128": digest}
            self._writer.add(
                sample.key, meta, row.contiguous(), text.tokens[0], text.pooled[0], cut.bucket,
                media=cut.media, media_suffix=cut.media_suffix,
            )  # fmt: skip
        return len(samples) - len(bad), bad

    def _encode(self, clips: UInt8[np.ndarray, "b T H W 3"]) -> Float[Tensor, "b c t h w"]:
        video = torch.from_numpy(clips).to(self._device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        try:
            with torch.no_grad():
                latents = self._vae.encode(video)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"not enough memory on {self._device} to encode {len(clips)} clips of {tuple(clips.shape[1:4])}",
                where="batch_size",
                remedy="set a smaller batch_size or max_batch_pixels, or smaller buckets",
            ) from error
        if len(latents) != len(clips):
            raise RuntimeError(f"the VAE returned {len(latents)} latents for {len(clips)} clips")
        return latents.to("cpu", self._dtype)

    def _encode_captions(self, captions: list[str]) -> list[TextCond]:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._captions]
        if new:
            with torch.no_grad():
                encoded = self._text.encode(new).to(torch.device("cpu"), self._dtype)
            for row, caption in enumerate(new):
                kept = TextCond(encoded.tokens[row : row + 1].clone(), encoded.pooled[row : row + 1].clone())
                self._captions[caption] = kept
                self._caption_bytes += _bytes(kept)
        for caption in captions:
            self._captions.move_to_end(caption)
        rows = [self._captions[caption] for caption in captions]
        while self._caption_bytes > TEXT_CACHE_BYTES and len(self._captions) > 1:
            self._caption_bytes -= _bytes(self._captions.popitem(last=False)[1])
        return rows


def _bytes(text: TextCond) -> int:
    return text.tokens.nbytes + text.pooled.nbytes
