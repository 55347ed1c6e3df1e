"""Small datasets for the tests of contentv.data, with tensors that say which sample they are of."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch

from contentv.base.types import Bucket, TextCond
from contentv.data import DatasetSource, DatasetWriter, TextInfo, VaeInfo, open_dataset

VAE = VaeInfo("vae-fingerprint", (0.5, -1.0), (2.0, 0.25), 2, 4, 8)
TEXT = TextInfo("text-fingerprint", 6, 5, 3)
SMALL = Bucket(5, 16, 16)
WIDE = Bucket(1, 16, 32)
IMAGE = Bucket(1, 16, 16)


def null_text() -> TextCond:
    return TextCond(torch.full((1, 3, 6), -1.0), torch.full((1, 5), -2.0))


def meta(i: int, source: str = "films", **changes: Any) -> dict[str, Any]:
    fields = {
        "caption": f"caption number {i} with é", "source": source, "kind": "video", "num_frames": 5, "height_px": 16,
        "width_px": 16, "fps": 8.0, "start_s": 0.0, "duration_s": 0.625, "visual_raw": float(i % 7),
        "motion_raw": math.nan if i % 5 == 4 else float(i % 11), "scores": {"blur": 0.5},
    }  # fmt: skip
    return {**fields, **changes}


def tensors(i: int, bucket: Bucket = SMALL, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    shapes = {"latents": VAE.latent_shape(bucket), "text_tokens": (3, 6), "text_pooled": (5,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def key(i: int, bucket: Bucket = SMALL) -> str:
    return f"{bucket.name}-{i:04d}"


def writer(path: Path, **options: Any) -> DatasetWriter:
    return DatasetWriter(path, VAE, TEXT, null_text(), **options)


def fill(
    target: DatasetWriter,
    count: int,
    bucket: Bucket = SMALL,
    first: int = 0,
    source: str = "films",
    media: bool = False,
) -> None:
    for i in range(first, first + count):
        target.add(
            key(i, bucket), meta(i, source), **tensors(i, bucket), bucket=bucket,
            media=random.Random(i).randbytes(700 + i) if media else None,
        )  # fmt: skip


def build(path: Path, counts: dict[Bucket, int], **options: Any) -> Path:
    with writer(path, max_shard_bytes=20_000, **options) as target:
        for bucket, count in counts.items():
            fill(target, count, bucket)
    return path


def source(path: Path, **options: Any) -> DatasetSource:
    sizes = {"global_batch_size": 4, "micro_batch_size": 2, "seed": 3, "prefetch": 0, **options}
    return open_dataset(path, **sizes)


def keys_of(stream: DatasetSource, steps: int) -> list[list[str]]:
    return [[k for batch in next(stream) for k in batch.keys] for _ in range(steps)]
