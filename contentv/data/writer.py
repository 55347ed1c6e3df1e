"""Writing a dataset: samples into the shards of their buckets, then quality.json, and dataset.json last."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash
from jaxtyping import Float
from torch import Tensor

from contentv.base.errors import UserError
from contentv.base.lock import lock_folder
from contentv.base.log import get_logger
from contentv.base.types import Bucket, TextCond
from contentv.data.dataset import (
    DATASET_FILE,
    NULL_TEXT_FILE,
    SHARDS_FOLDER,
    DatasetInfo,
    ShardInfo,
    TextInfo,
    VaeInfo,
    null_text_bytes,
)
from contentv.data.entries import leave_out_faulty, load_entries
from contentv.data.files import disk_errors, write_atomic
from contentv.data.index import DamagedShardError, IndexEntry, scan_tar
from contentv.data.quality import drifted, write_quality
from contentv.data.sample import SampleShapes
from contentv.data.shard_set import CURATION_SHARD, ShardSetWriter, check_key, pack_sample, packed_bytes
from contentv.data.shards import ShardWriter, index_path
from contentv.data.table import write_table

__all__ = ["DatasetWriter", "ShardSetWriter", "refit_quality"]

_NUMBERED = re.compile(r"(\d+)\.tar(\.tmp)?")


class DatasetWriter:
    """Writes a dataset, or appends to one; readers see the result of `close` (or `flush`) and nothing before it.

    Use it as a context manager: leaving the block closes the dataset, leaving it by an exception abandons what was
    added since the last `flush`.

    Args:
        path: the dataset's folder.
        vae: the VAE that made the latents; must be the existing dataset's when appending.
        text: the text encoders that made the captions' vectors; likewise.
        null_text: the encoding of "", one row.
        max_shard_bytes: a shard whose samples would grow past this size is finished and a new one begun.

    Raises:
        UserError: another writer is at work here, the folder cannot be written, or the dataset was made with other
            encoders.
    """

    def __init__(
        self, path: str | Path, vae: VaeInfo, text: TextInfo, null_text: TextCond, max_shard_bytes: int = 1 << 30
    ) -> None:
        self._root = Path(path)
        self._max_shard_bytes = max_shard_bytes
        self._null_text = null_text_bytes(null_text, text)
        self._writers: dict[str, ShardWriter] = {}
        self._scores: list[tuple[str, float | None, float | None]] = []
        self._fitted = 0  # how many of the scores quality.json was fitted to
        self._keys: set[str] = set()
        self._unsaved = False
        self.left_out: list[str] = []  # what adopt_shards did not take: shard, key and why
        with disk_errors(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self._root, "writing this dataset")
        try:
            self._info = self._open(vae, text)
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self, vae: VaeInfo, text: TextInfo) -> DatasetInfo:
        for leftover in sorted(self._root.glob(f"{SHARDS_FOLDER}/*/*.tmp")):
            leftover.unlink()  # of a writer that was killed: the lock says none is alive
        if not (self._root / DATASET_FILE).exists():
            return DatasetInfo(self._root, vae, text)
        info = DatasetInfo.load(self._root)
        for name, old, new in (("VAE", info.vae, vae), ("text encoders", info.text, text)):
            if old != new:
                raise UserError(
                    f"the dataset was made with other {name}: {old}, not {new}",
                    where=str(self._root / DATASET_FILE),
                    remedy="write to another folder, or use the same encoders",
                )
        for shard in info.shards:
            self._admit(_index(info, shard), shard.name)
        self._fitted = len(self._scores)
        listed = {info.shard_path(shard) for shard in info.shards}
        found = self._root.glob(f"{SHARDS_FOLDER}/*/*.tar")
        unlisted = [path for path in found if path not in listed and not CURATION_SHARD.fullmatch(path.name)]
        if unlisted:
            remedy = "`contentv index path=... adopt=true` takes them in"
            get_logger().warning(f"{self._root}: {len(unlisted)} tars are not in dataset.json; {remedy}")
        return info

    @property
    def info(self) -> DatasetInfo:
        """The record of the dataset, as of the shards finished so far."""
        return self._info

    def __contains__(self, key: object) -> bool:
        """Whether the dataset, or what was added to it here, has a sample of this key."""
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

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
        """Adds one sample.

        Args:
            key: unique in the dataset; letters, digits, `_` and `-`.
            meta: the fields of KEY.json but `key` and `media_xxh128`; scores may be absent, None or NaN.
            latents: before mean/std normalisation; bf16, fp16 or fp32, like the text vectors.
            text_tokens: the encoded caption.
            text_pooled: its pooled vector.
            bucket: the clip's shape in pixels.
            media: the encoded clip itself, kept for people to look at.
            media_suffix: mp4 or jpg.

        Raises:
            UserError: the key is taken or malformed, a field or tensor is not what the dataset allows, or the disk is
                full.
        """
        check_key(key, self._keys, self._root)
        try:
            shapes = SampleShapes.of(self._info.vae.latent_shape(bucket), self._info.text)
        except ValueError as error:
            raise UserError(f"sample {key}: {error}", where=str(self._root)) from error
        entry, payloads = pack_sample(
            self._root, key, meta, latents, text_tokens, text_pooled, shapes, media, media_suffix
        )
        self._writer(bucket.name, packed_bytes(payloads)).add(entry, payloads)
        self._admit([entry], bucket.name)
        self._unsaved = True

    def _admit(self, entries: list[IndexEntry], where: str) -> None:
        for entry in entries:
            if entry.key in self._keys:
                raise UserError(f'key "{entry.key}" is there twice', where=where, remedy="remove one of the shards")
            self._keys.add(entry.key)
            if entry.source is not None:
                self._scores.append((entry.source, entry.visual_raw, entry.motion_raw))

    def _writer(self, bucket: str, sample_bytes: int) -> ShardWriter:
        """Returns the bucket's open shard, a new one where the sample would overfill it."""
        writer = self._writers.get(bucket)
        if writer is not None and writer.num_bytes + sample_bytes > self._max_shard_bytes:
            self._finish(bucket)
            writer = None
        if writer is None:
            folder = self._root / SHARDS_FOLDER / bucket
            with disk_errors(self._root):
                folder.mkdir(parents=True, exist_ok=True)
            numbers = [int(m[1]) for m in (_NUMBERED.fullmatch(entry) for entry in os.listdir(folder)) if m]
            writer = self._writers[bucket] = ShardWriter(folder / f"{max(numbers, default=-1) + 1:06d}.tar")
        return writer

    def _finish(self, bucket: str) -> None:
        writer = self._writers.pop(bucket)
        self._info.shards.append(writer.finish(f"{bucket}/{writer.path.name}"))

    def keys_of(self, wanted: Callable[[ShardInfo], bool]) -> set[str]:
        """Returns the keys of the samples in those shards of the dataset that are wanted."""
        return {entry.key for shard in self._info.shards if wanted(shard) for entry in _index(self._info, shard)}

    def add_shards(self, shards: Iterable[ShardInfo]) -> int:
        """Takes over finished shards (see `ShardSetWriter`), index beside, and returns how many were new.

        A shard that the dataset already lists, with the same content, changes nothing.

        Raises:
            UserError: a shard is missing, is not what its record says, or has a key that the dataset has.
        """
        listed = {shard.name: shard for shard in self._info.shards}
        added = 0
        for shard in shards:
            if shard.name in listed:
                if listed[shard.name] != shard:
                    raise UserError(
                        f"shard {shard.name} is in the dataset with another content", where=str(self._root),
                        remedy="name the new shard otherwise",
                    )  # fmt: skip
                continue
            path = self._info.shard_path(shard)
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise UserError(
                    f"the shard is missing or does not have its {shard.bytes} bytes", where=str(path),
                    remedy="remove it and write it again",
                )  # fmt: skip
            self._info.latent_shape(shard.bucket)
            self._admit(_index(self._info, shard), shard.name)
            self._info.shards.append(shard)
            listed[shard.name] = shard
            self._unsaved = True
            added += 1
        return added

    def adopt_shards(self) -> list[str]:
        """Takes over the tars below shards/<bucket>/ that dataset.json does not list, and returns their names.

        They may be others' WebDataset tars with KEY.json and KEY.safetensors, or finished shards of a writer that was
        killed. All of their samples are checked; those the dataset may not use are left out of the index that is made,
        and named in `left_out`.

        Raises:
            UserError: a tar is damaged, its folder is not a bucket of the VAE, or a key is there twice.
        """
        listed = {shard.name for shard in self._info.shards}
        open_paths = {writer.path for writer in self._writers.values()}
        adopted = []
        for path in sorted((self._root / SHARDS_FOLDER).glob("*/*.tar")):
            name = f"{path.parent.name}/{path.name}"
            if name not in listed and path not in open_paths and self._adopt(path, name):
                adopted.append(name)
        return adopted

    def _adopt(self, path: Path, name: str) -> bool:
        try:
            self._info.latent_shape(path.parent.name)
            scan = scan_tar(path)
            shard = ShardInfo(name, len(scan.index.entries), scan.index.num_bytes, scan.xxh128)
        except ValueError as error:
            raise UserError(str(error), where=str(path), remedy="move the tar to its bucket's folder") from error
        if scan.damage is not None:
            raise UserError(scan.damage, where=str(path), remedy="restore the tar from a copy, or remove it")
        faults = scan.refused + leave_out_faulty(self._info, name, scan)
        self.left_out += [f"{name}: {fault}" for fault in faults]
        for fault in faults:
            get_logger().warning(f"{name}: left out {fault}")
        shard.samples = len(scan.index.entries)
        if not shard.samples:
            return False
        self._admit(scan.index.entries, name)
        index = scan.index.to_bytes()
        shard.index_xxh128 = xxhash.xxh128_hexdigest(index)
        with disk_errors(path.parent):
            write_atomic(index_path(path), index)
        self._info.shards.append(shard)
        self._unsaved = True
        return True

    def flush(self) -> None:
        """Finishes the open shards and makes everything added so far part of the dataset."""
        for bucket in list(self._writers):
            self._finish(bucket)
        if not self._info.samples:
            raise UserError(
                "no sample was written, so there is no dataset",
                where=str(self._root),
                remedy="check that the input has clips and that the filters leave some",
            )
        if not self._unsaved:
            return
        self._info.sources = {}
        for source, _, _ in self._scores:
            self._info.sources[source] = self._info.sources.get(source, 0) + 1
        for sentence in drifted(self._root, self._scores, self._fitted):
            get_logger().warning(f"{sentence}; quality.json is fitted again, so the scores of earlier clips move")
        with disk_errors(self._root):
            write_atomic(self._root / NULL_TEXT_FILE, self._null_text)
            write_quality(self._root, self._scores)
            self._fitted = len(self._scores)
            self._info.table = write_table(self._info, lambda shard: _index(self._info, shard))
            self._info.write()
        self._unsaved = False

    def close(self) -> None:
        """Completes the dataset and lets other writers at it; does nothing the second time."""
        if self._lock >= 0:
            try:
                self.flush()
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Removes unfinished shards and leaves the dataset as of the last `flush`."""
        for writer in self._writers.values():
            writer.abort()
        self._writers.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def refit_quality(path: str | Path) -> list[str]:
    """Fits quality.json again to the raw scores in a dataset's shards, which stay as they are.

    Returns sentences about scores that were unlike those it was fitted to before.

    Raises:
        UserError: there is no dataset, or a writer is at work on it.
    """
    info = DatasetInfo.load(path)
    lock = lock_folder(info.path, "writing this dataset")
    try:
        entries = [entry for shard in info.shards for entry in _index(info, shard)]
        scores = [(e.source, e.visual_raw, e.motion_raw) for e in entries if e.source is not None]
        found = drifted(info.path, scores)
        with disk_errors(info.path):
            write_quality(info.path, scores)
        return found
    finally:
        os.close(lock)


def _index(info: DatasetInfo, shard: ShardInfo) -> list[IndexEntry]:
    """Returns what a listed shard holds; a damaged one is an error here, as a dataset is not extended around damage."""
    try:
        return list(load_entries(info, shard))
    except DamagedShardError as error:
        raise UserError(str(error), where=str(info.shard_path(shard)), remedy="restore it from a copy") from error
