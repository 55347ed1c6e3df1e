"""Clips to latents and captions to vectors, in batches, and on to whoever writes the dataset.

The VAE, the text encoders and the writer are handed in: this module knows them by what they do.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from contentv.base.errors import UserError
from contentv.base.types import Bucket, TextCond
from contentv.curation.clips import CutSample
from contentv.curation.records import Reject

CAPTIONS_KEPT = 512  # encoded captions of a chunk that are kept for clips to come


@runtime_checkable
class LatentEncoder(Protocol):
    """A video VAE; on the CPU it is called from several threads at a time."""

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
    """The text encoders; called from one thread at a time."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, captions: list[str]) -> TextCond:
        """Returns one row per caption."""
        ...


@runtime_checkable
class ChunkWriter(Protocol):
    """What takes the samples of one chunk."""

    def add(
        self,
        key: str,
        meta: dict[str, Any],
        latents: Float[Tensor, "c t h w"],
        text_tokens: Float[Tensor, "l d"],
        text_pooled: Float[Tensor, " p"],
        bucket: Bucket,
        media: bytes | None = None,
        media_suffix: str = "mp4",
    ) -> None: ...

    def finish(self) -> list[dict[str, Any]]:
        """Returns JSON-compatible records of what is complete on disk now; no dataset has it yet."""
        ...

    def abort(self) -> None:
        """Removes what is not complete."""
        ...


@runtime_checkable
class DatasetSink(Protocol):
    """Where chunks are written to, and what makes a dataset of them."""

    def chunk(self, prefix: str) -> ChunkWriter:
        """Returns a writer of files whose names begin with `prefix`; it replaces what an earlier attempt left."""
        ...

    def taken(self, key: str) -> bool:
        """Whether the dataset has a sample of this key that no curation of this folder wrote."""
        ...

    def samples(self) -> int:
        """Returns how many samples the dataset has."""
        ...

    def publish(self, records: Iterable[dict[str, Any]]) -> None:
        """Makes finished chunks' records part of the dataset; those that are already change nothing."""
        ...

    def discard(self, prefix: str) -> None:
        """Removes the files that begin with `prefix` and belong to no dataset.

        Raises:
            UserError: they belong to one.
        """
        ...


@dataclass(frozen=True)
class ReadySample:
    """A sample that waits for its latents.

    `clip` is the place of its file in the chunk and of its clip in the file, `reject` what it becomes if they are not
    finite.
    """

    clip: tuple[int, int]
    key: str
    caption: str
    meta: dict[str, Any]
    cut: CutSample
    reject: Reject


@dataclass
class EncodedBatch:
    """Samples with their latents and the vectors of their captions, to come."""

    samples: list[ReadySample]
    latents: Future[Tensor]
    captions: list[tuple[Future[TextCond], int]]

    def rows(self) -> Iterable[tuple[ReadySample, Tensor, TextCond]]:
        """Yields each sample with its latents and its caption's vectors, when they are there."""
        latents = self.latents.result()
        for sample, row, (text, n) in zip(self.samples, latents, self.captions, strict=True):
            yield sample, row, text.result()[slice(n, n + 1)]


@dataclass
class ChunkCaptions:
    """The encoded captions of a chunk, by caption; the least recently asked for are dropped.

    Chunks do not share them, since the other captions of a batch may change a row's last bits.
    """

    rows: OrderedDict[str, tuple[Future[TextCond], int]] = field(default_factory=OrderedDict)


class ClipEncoder:
    """Encodes batches of clips; on the CPU in several lanes, each computing with one thread.

    With one thread the result does not depend on how many lanes, or cores, there are.

    Args:
        vae: makes latents; called with (b 3 T H W) in [-1, 1].
        text: makes caption vectors.
        dtype: of what is stored.
        device: of the VAE.
        batch_size: most clips in one call of the VAE.
        max_batch_pixels: most pixels in one call of more than one clip.
        lanes: batches that are computed at a time on the CPU; elsewhere it is one.
    """

    def __init__(
        self, vae: LatentEncoder, text: CaptionEncoder, *, dtype: torch.dtype, device: torch.device, batch_size: int,
        max_batch_pixels: int, lanes: int = 1,
    ) -> None:  # fmt: skip
        self._vae, self._text = vae, text
        self._dtype, self._device = dtype, device
        self._batch_size, self._max_batch_pixels = batch_size, max_batch_pixels
        self.lanes = lanes if device.type == "cpu" else 1
        self._threads = ThreadPoolExecutor(self.lanes, thread_name_prefix="encode")
        self._text_lock = threading.Lock()  # tokenizers refuse two callers at a time

    def __enter__(self) -> ClipEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def clips_per_call(self, bucket: Bucket) -> int:
        """Returns how many clips of a bucket go into one call of the VAE."""
        pixels = bucket.frames * bucket.height * bucket.width
        return max(1, min(self._batch_size, self._max_batch_pixels // pixels))

    def encode(self, samples: list[ReadySample], captions: ChunkCaptions) -> EncodedBatch:
        """Returns a batch under way.

        Args:
            samples: of one bucket.
            captions: of their chunk; captions that are not among them are encoded, once each.
        """
        wanted = list(dict.fromkeys(sample.caption for sample in samples))
        new = [caption for caption in wanted if caption not in captions.rows]
        if new:
            job = self._threads.submit(self._encode_captions, new)
            captions.rows.update((caption, (job, row)) for row, caption in enumerate(new))
        for caption in wanted:
            captions.rows.move_to_end(caption)
        rows = [captions.rows[sample.caption] for sample in samples]
        while len(captions.rows) > CAPTIONS_KEPT:
            captions.rows.popitem(last=False)
        latents = self._threads.submit(self._encode_clips, [sample.cut.frames for sample in samples])
        return EncodedBatch(samples, latents, rows)

    def _encode_clips(self, clips: Sequence[UInt8[np.ndarray, "T H W 3"]]) -> Float[Tensor, "b c t h w"]:
        self._limit_threads()
        pixels = torch.from_numpy(np.stack(clips)).to(self._device)
        video = pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        try:
            with torch.no_grad():
                latents = self._vae.encode(video)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"not enough memory on {self._device} to encode {len(clips)} clips of {tuple(clips[0].shape[:3])}",
                where="batch_size",
                remedy="set a smaller batch_size or max_batch_pixels, or smaller buckets",
            ) from error
        if len(latents) != len(clips):
            raise RuntimeError(f"the VAE returned {len(latents)} latents for {len(clips)} clips")
        return latents.to("cpu", self._dtype)

    def _encode_captions(self, captions: list[str]) -> TextCond:
        self._limit_threads()
        with self._text_lock, torch.no_grad():
            return self._text.encode(captions).to(torch.device("cpu"), self._dtype)

    def _limit_threads(self) -> None:
        if self._device.type == "cpu":
            torch.set_num_threads(1)  # of this lane's thread alone


def check_buckets(buckets: Sequence[Bucket], vae: LatentEncoder) -> None:
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
