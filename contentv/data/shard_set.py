"""Shards that several processes write into one dataset folder: each its own set, named by a prefix."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from jaxtyping import Float
from torch import Tensor

from contentv.base.errors import UserError
from contentv.base.types import Bucket
from contentv.data.dataset import SHARDS_FOLDER, ShardInfo, TextInfo, VaeInfo
from contentv.data.files import disk_errors
from contentv.data.index import IndexEntry
from contentv.data.sample import BadSampleError, SampleShapes, encode_meta, encode_tensors
from contentv.data.shards import MAX_KEY_LENGTH, ShardWriter, member_bytes

CURATION_SHARD = re.compile(r"r\d{4,}-c\d{6}-\d+\.tar", re.ASCII)  # written by a run of `contentv curate`
_KEY = re.compile(r"[A-Za-z0-9_\-]+", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9_\-]{1,64}", re.ASCII)


class ShardSetWriter:
    """Writes samples into shards `<bucket>/<prefix>-000.tar`, `-001.tar`, ... of a dataset folder.

    No dataset has them before `DatasetWriter.add_shards`. Sets of other prefixes may be written at the same time, and a
    set of the same prefix replaces what an interrupted one has left. Equal samples give equal files.

    Args:
        root: the dataset's folder; it may not exist yet.
        vae: the VAE that made the latents.
        text: the text encoders that made the captions' vectors.
        prefix: letters, digits, `_` and `-`.
        max_shard_bytes: a shard whose samples would grow past this size is finished and a new one begun.

    Raises:
        ValueError: the prefix is malformed.
    """

    def __init__(
        self, root: str | Path, vae: VaeInfo, text: TextInfo, prefix: str, max_shard_bytes: int = 1 << 30
    ) -> None:
        if not _PREFIX.fullmatch(prefix):
            raise ValueError(f"shard prefix {prefix!r} is not 1 to 64 letters, digits, _ and -")
        self._root, self._vae, self._text, self._prefix = Path(root), vae, text, prefix
        self._max_shard_bytes = max_shard_bytes
        self._open: dict[str, ShardWriter] = {}
        self._begun: dict[str, int] = {}  # bucket -> shards begun
        self._finished: list[ShardInfo] = []
        self._keys: set[str] = set()

    def add(
        self,
        key: str,
        meta: Mapping[str, Any],
        latents: Float[Tensor, "c t h w"],
        text_tokens: Float[Tensor, "l d"],
        text_pooled: Float[Tensor, " p"],
        bucket: Bucket,
        media: bytes | None = None,
        media_suffix: str = "mp4",
    ) -> None:
        """Adds one sample, as `DatasetWriter.add` does.

        Raises:
            UserError: the key is taken in this set or malformed, a field or tensor is not what the dataset allows, or
                the disk is full.
        """
        check_key(key, self._keys, self._root)
        shapes = SampleShapes.of(self._vae.latent_shape(bucket), self._text)
        entry, payloads = pack_sample(
            self._root, key, meta, latents, text_tokens, text_pooled, shapes, media, media_suffix
        )
        self._writer(bucket.name, packed_bytes(payloads)).add(entry, payloads)
        self._keys.add(key)

    def finish(self) -> list[ShardInfo]:
        """Completes the shards on disk and returns their records, in the order of their names."""
        for bucket in list(self._open):
            self._finish(bucket)
        return sorted(self._finished, key=lambda shard: shard.name)

    def abort(self) -> None:
        """Removes the shards that are not complete."""
        for writer in self._open.values():
            writer.abort()
        self._open.clear()

    def _writer(self, bucket: str, sample_bytes: int) -> ShardWriter:
        writer = self._open.get(bucket)
        if writer is not None and writer.num_bytes + sample_bytes > self._max_shard_bytes:
            self._finish(bucket)
            writer = None
        if writer is None:
            folder = self._root / SHARDS_FOLDER / bucket
            with disk_errors(self._root):
                folder.mkdir(parents=True, exist_ok=True)
            number = self._begun.get(bucket, 0)
            self._begun[bucket] = number + 1
            writer = self._open[bucket] = ShardWriter(folder / f"{self._prefix}-{number:03d}.tar")
        return writer

    def _finish(self, bucket: str) -> None:
        writer = self._open.pop(bucket)
        self._finished.append(writer.finish(f"{bucket}/{writer.path.name}"))


def pack_sample(
    root: Path,
    key: str,
    meta: Mapping[str, Any],
    latents: Float[Tensor, "c t h w"],
    text_tokens: Float[Tensor, "l d"],
    text_pooled: Float[Tensor, " p"],
    shapes: SampleShapes,
    media: bytes | None,
    media_suffix: str,
) -> tuple[IndexEntry, dict[str, bytes]]:
    """Returns a sample's index entry and its members' payloads by suffix.

    Args:
        root: the dataset's folder, for messages.
        key: the sample's.
        meta: the fields of KEY.json but `key` and `media_xxh128`; scores may be absent, None or NaN.
        latents: before mean/std normalisation; bf16, fp16 or fp32, like the text vectors.
        text_tokens: the encoded caption.
        text_pooled: its pooled vector.
        shapes: what the bucket and the text encoders allow.
        media: the encoded clip itself, or None.
        media_suffix: mp4 or jpg.

    Raises:
        UserError: a field or tensor is not what the dataset allows.
    """
    if media is not None and media_suffix not in ("mp4", "jpg"):
        raise UserError(f'media suffix "{media_suffix}" is not mp4 or jpg', where=key)
    fields = {"media_xxh128": None, **meta, "key": key}
    payloads = {} if media is None else {media_suffix: media}
    if media is not None:
        fields["media_xxh128"] = xxhash.xxh128_hexdigest(media)
    try:
        payloads["json"] = encode_meta(fields)
        payloads["safetensors"] = encode_tensors(latents, text_tokens, text_pooled, shapes)
    except (BadSampleError, ValueError) as error:
        raise UserError(f"sample {key}: {error}", where=str(root)) from error
    entry = IndexEntry(key, {}, fields["source"], _score(fields, "visual_raw"), _score(fields, "motion_raw"))
    return entry, payloads


def packed_bytes(payloads: Mapping[str, bytes]) -> int:
    """Returns what a sample's members take in a tar."""
    return sum(member_bytes(len(data)) for data in payloads.values())


def check_key(key: str, taken: set[str], root: Path) -> None:
    """Passes over a key that a new sample may have.

    Raises:
        UserError: it is taken or malformed.
    """
    if key in taken:
        raise UserError(f'key "{key}" is already in the dataset', where=str(root), remedy="give it another")
    if not _KEY.fullmatch(key) or len(key) > MAX_KEY_LENGTH:
        raise UserError(
            f'key "{key}" is not usable',
            where=str(root),
            remedy=f"use 1 to {MAX_KEY_LENGTH} letters, digits, _ and -",
        )


def _score(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name)
    return None if value is None or math.isnan(value) else float(value)
