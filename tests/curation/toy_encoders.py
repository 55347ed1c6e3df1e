"""Toy encoders and datasets in memory for tests of curation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from contentv.base.types import Bucket, TextCond


class ToyVAE:
    """Averages over blocks of 8 x 8 pixels and takes every fourth frame."""

    fingerprint = "toy"
    latents_mean = (0.0, 0.0, 0.0)
    latents_std = (1.0, 1.0, 1.0)
    latent_channels = 3
    temporal_factor = 4
    spatial_factor = 8

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        self.batches.append(tuple(video.shape))
        assert video.dtype == torch.float32
        assert -1 <= float(video.min()) <= float(video.max()) <= 1
        return torch.nn.functional.avg_pool3d(video[:, :, ::4], (1, 8, 8))


class ToyText:
    """A caption's length and first letter."""

    fingerprint = "toy"

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, captions: list[str]) -> TextCond:
        self.encoded.extend(captions)
        pooled = torch.tensor([[float(len(c)), float(ord(c[0]))] for c in captions])
        return TextCond(pooled[:, None].expand(-1, 4, -1).clone(), pooled)


class ListChunk:
    """The samples of one chunk."""

    def __init__(self, sink: ListSink, prefix: str) -> None:
        self._sink, self._prefix = sink, prefix
        self._samples: list[dict[str, Any]] = []

    def add(
        self, key: str, meta: dict[str, Any], latents: torch.Tensor, text_tokens: torch.Tensor,
        text_pooled: torch.Tensor, bucket: Bucket, media: bytes | None = None, media_suffix: str = "mp4",
    ) -> None:  # fmt: skip
        self._sink.added += 1
        self._samples.append(
            {"key": key, "meta": meta, "latents": latents, "tokens": text_tokens, "pooled": text_pooled,
             "bucket": bucket, "media": media, "suffix": media_suffix}
        )  # fmt: skip

    def finish(self) -> list[dict[str, Any]]:
        self._sink.finished[self._prefix] = self._samples
        return [{"prefix": self._prefix}] if self._samples else []

    def abort(self) -> None:
        self._samples = []


class ListSink:
    """Keeps what it is given; `samples` are those of the dataset."""

    def __init__(self) -> None:
        self.finished: dict[str, list[dict[str, Any]]] = {}
        self.published: list[str] = []
        self.added = 0

    @property
    def samples_there(self) -> list[dict[str, Any]]:
        return [sample for prefix in self.published for sample in self.finished[prefix]]

    @property
    def closed(self) -> bool:
        return bool(self.published)

    def chunk(self, prefix: str) -> ListChunk:
        return ListChunk(self, prefix)

    def taken(self, key: str) -> bool:
        return False

    def samples(self) -> int:
        return len(self.samples_there)

    def publish(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            if record["prefix"] not in self.published:
                self.published.append(record["prefix"])

    def discard(self, prefix: str) -> None:
        for name in [name for name in self.finished if name.startswith(prefix)]:
            del self.finished[name]

    def of(self, bucket: str) -> list[dict[str, Any]]:
        return [sample for sample in self.samples_there if sample["bucket"].name == bucket]
