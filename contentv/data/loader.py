"""Opening datasets for training: resumable, the same order on every layout.

Every rank plans the same global batches and reads its contiguous slice of each. A damaged sample is replaced by the
next intact one of its bucket (in stored order), so all ranks agree on it without talking.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from contentv.base.errors import UserError, nearest
from contentv.base.types import ReaderRank
from contentv.data.census import take_census
from contentv.data.joined import JoinedDatasets, JoinedStore, Paths
from contentv.data.ordering import Choices, build_order, identity
from contentv.data.pipeline import Ahead, Collate, Mapped, Ordered, Read, ShareOf
from contentv.data.quality import Normaliser
from contentv.data.quarantine import Quarantine
from contentv.data.rows import KeepProbability
from contentv.data.shards import missing_shard
from contentv.data.source import DatasetSource
from contentv.data.storage import StorageConfig
from contentv.data.table import bucket_shards


def open_dataset(
    path: Paths,
    *,
    reader: ReaderRank | None = None,
    global_batch_size: int,
    micro_batch_size: int,
    seed: int = 0,
    buckets: list[str] | None = None,
    bucket_weights: Mapping[str, float] | None = None,
    batch_multiples: Mapping[str, int] | None = None,
    image_ratio: float = 0.0,
    source_weights: Mapping[str, float] | None = None,
    source_max_epochs: Mapping[str, int] | None = None,
    keep_probability: KeepProbability | None = None,
    quality_mode: str = "quantile",
    quality_scope: str = "source",
    prefetch: int = 2,
    workers: int = 0,
    quarantine_path: str | Path | None = None,
    max_bad_samples: int = 10,
    max_bad_fraction: float = 0.01,
    storage: StorageConfig | None = None,
) -> DatasetSource:
    """Returns a source of optimiser steps: each item is this rank's micro-batches of one global batch.

    The order depends on the seed, the datasets, the global batch size and the choices below alone; at every step all
    ranks have the same bucket. The names of the arguments that `DataConfig` has as well are explained there.

    Args:
        path: the folder with dataset.json or its URL, or several, which are then read as one dataset.
        reader: which slice of every global batch to deliver; all of it if None.
        global_batch_size: samples of an optimiser step over all ranks.
        micro_batch_size: samples of one forward pass on one rank.
        seed: key of the order.
        batch_multiples: bucket -> k: its steps take k times `global_batch_size` samples in micro-batches of k times
            `micro_batch_size`, so all buckets have the same number of micro-batches; 1 where it is not named.
        keep_probability: (motion, visual) in [0, 1] -> probability of a clip being seen in an epoch; clips without
            both scores are always kept.
        quarantine_path: a JSON-lines file of damaged samples, usually in the run's folder; None keeps none.
        storage: how the dataset's files are fetched and kept.

    Raises:
        UserError: no dataset there, a shard is missing, sizes that do not divide, unknown buckets or sources, shares
            that cannot hold, or no samples.
    """
    reader = reader or ReaderRank()
    _check_sizes(global_batch_size, micro_batch_size, reader, prefetch, workers)
    joined = JoinedDatasets.load(path, storage)
    weights = {name: float(weight) for name, weight in (bucket_weights or {}).items()}
    names = _choose_buckets(joined, buckets or [], weights)
    _check_shards(joined, names)
    normalisers = [Normaliser.load(info.storage, quality_mode, quality_scope) for info in joined.infos]
    quarantine = Quarantine(quarantine_path, max_samples=max_bad_samples, max_fraction=max_bad_fraction)
    store = JoinedStore(joined, names, quarantine, normalisers)
    multiples = _check_multiples(batch_multiples or {}, names)
    choices = Choices(
        seed, {name: multiples[name] * global_batch_size for name in names},
        {name: weights[name] for name in names} if weights else {}, image_ratio,
        {name: float(weight) for name, weight in (source_weights or {}).items()}, dict(source_max_epochs or {}),
        keep_probability,
    )  # fmt: skip
    order, kept = build_order(store, choices, normalisers)
    shares = Mapped(Ordered(order), ShareOf(reader, global_batch_size // (reader.world * micro_batch_size)))
    read = Read(store, workers)
    batches = Mapped(Mapped(shares, read, read.close), Collate(joined.vae))
    return DatasetSource(
        joined, joined.null_text(), Ahead(batches, prefetch),
        identity(choices, joined.fingerprint, global_batch_size, kept), quarantine,
        lambda: take_census({name: store.rows(name, ("source", "scores")) for name in names}, seed),
    )  # fmt: skip


def _check_sizes(
    global_batch_size: int, micro_batch_size: int, reader: ReaderRank, prefetch: int, workers: int
) -> None:
    counts_ok = min(global_batch_size, micro_batch_size) >= 1 and min(prefetch, workers) >= 0
    if not counts_ok or not 0 <= reader.rank < reader.world:
        raise UserError(
            f"global batch {global_batch_size}, micro-batch {micro_batch_size}, prefetch {prefetch}, "
            f"workers {workers}, reader {reader.rank} of {reader.world}: out of range",
            where="train.global_batch_size",
        )
    if global_batch_size % (reader.world * micro_batch_size):
        raise UserError(
            f"global batch size {global_batch_size} is not a multiple of {reader.world} data-parallel ranks x "
            f"micro-batch {micro_batch_size}",
            where="train.global_batch_size",
            remedy=f"use a multiple of {reader.world * micro_batch_size}, or another train.micro_batch_size",
        )


def _check_multiples(multiples: Mapping[str, int], names: list[str]) -> dict[str, int]:
    """Returns the multiple of each bucket that is read."""
    found = {name: int(multiples.get(name, 1)) for name in names}
    if min(found.values()) < 1:
        raise UserError(f"batch multiples {found} must be 1 or more", where="train.global_tokens")
    return found


def _choose_buckets(info: JoinedDatasets, buckets: list[str], weights: Mapping[str, float]) -> list[str]:
    """Returns the names of the buckets to read, sorted, so that the order of shards in dataset.json does not matter."""
    known = sorted(info.bucket_samples)
    for name in [*buckets, *weights]:
        if name not in known:
            raise UserError(
                f'the dataset has no samples in bucket "{name}" (it has: {", ".join(known) or "none"})',
                where="data.buckets",
                remedy=nearest(name, known),
            )
    names = sorted(set(buckets)) or known
    if not names:
        raise UserError("the dataset has no samples", where=info.url, remedy="curate some clips into it")
    if weights:
        if any(not 0 <= weight < math.inf for weight in weights.values()) or set(names) - weights.keys():
            raise UserError(
                f"bucket weights {dict(weights)} must be finite, not negative, and name each of {', '.join(names)}",
                where="data.bucket_weights",
            )
        names = [name for name in names if weights[name] > 0]
        if not names:
            raise UserError("all bucket weights are 0", where="data.bucket_weights", remedy="give one a weight")
    return names


def _check_shards(joined: JoinedDatasets, names: list[str]) -> None:
    """Finds missing shards now rather than after hours, by one listing of each bucket's folder.

    Other sizes, and what lies behind a URL, where a question costs a request, are met when shards are read.
    """
    for info in joined.infos:
        if info.storage.local is None:
            continue
        for bucket, shards in bucket_shards(info).items():
            if bucket in names:
                folder = info.shard_path(shards[0]).parent
                there = set(os.listdir(folder)) if folder.is_dir() else set()
                for shard in shards:
                    if shard.name.rpartition("/")[2] not in there:
                        raise missing_shard(info.shard_path(shard))
