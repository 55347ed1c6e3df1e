"""Opening a dataset for training: endless, resumable, the same order on every layout.

Every rank plans the same global batches and reads its contiguous slice of each. A damaged sample is replaced by the
next intact one of its bucket (in stored order), so all ranks agree on it without talking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from contentv.base.errors import UserError, nearest
from contentv.base.log import get_logger
from contentv.base.types import ReaderRank
from contentv.data.dataset import DatasetInfo, read_null_text
from contentv.data.plan import BucketStream, EpochOrder, Order, WeightedOrder
from contentv.data.quality import Normaliser
from contentv.data.quarantine import Quarantine
from contentv.data.shards import missing_shard
from contentv.data.source import DatasetSource, StepReader
from contentv.data.store import SampleStore

KeepProbability = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (motion, visual) -> probability, all (n,) fp32


def open_dataset(
    path: str | Path,
    *,
    reader: ReaderRank | None = None,
    global_batch_size: int,
    micro_batch_size: int,
    seed: int = 0,
    buckets: list[str] | None = None,
    bucket_weights: Mapping[str, float] | None = None,
    keep_probability: KeepProbability | None = None,
    quality_mode: str = "quantile",
    prefetch: int = 2,
    quarantine_path: str | Path | None = None,
    max_bad_samples: int = 10,
    max_bad_fraction: float = 0.01,
) -> DatasetSource:
    """Returns an endless source of optimiser steps: each item is this rank's micro-batches of one global batch.

    The order depends on the seed, the dataset, the global batch size and the choices below alone; at every step all
    ranks have the same bucket. The names of the arguments that `DataConfig` has as well are explained there.

    Args:
        path: the folder with dataset.json.
        reader: which slice of every global batch to deliver; all of it if None.
        global_batch_size: samples of an optimiser step over all ranks.
        micro_batch_size: samples of one forward pass on one rank.
        seed: key of the order.
        keep_probability: (motion, visual) in [0, 1] -> probability of a clip being seen in an epoch; clips without
            both scores are always kept.
        quarantine_path: a JSON-lines file of damaged samples, usually in the run's folder; None keeps none.

    Raises:
        UserError: no dataset there, a shard is missing, sizes that do not divide, unknown buckets, or no samples.
    """
    reader = reader or ReaderRank()
    _check_sizes(global_batch_size, micro_batch_size, reader, prefetch)
    info = DatasetInfo.load(path)
    weights = dict(bucket_weights or {})
    names = _choose_buckets(info, buckets or [], weights)
    _check_shards(info, names)
    normaliser = Normaliser.load(info.path, quality_mode)
    quarantine = Quarantine(quarantine_path, max_samples=max_bad_samples, max_fraction=max_bad_fraction)
    store = SampleStore(info, names, quarantine)
    order, identity = _plan(store, weights, keep_probability, normaliser, global_batch_size, seed)
    steps = StepReader(info, store, order, normaliser, reader, global_batch_size, micro_batch_size)
    return DatasetSource(info, read_null_text(info), steps, identity, quarantine, prefetch)


def _plan(
    store: SampleStore,
    weights: Mapping[str, float],
    keep_probability: KeepProbability | None,
    normaliser: Normaliser,
    global_batch_size: int,
    seed: int,
) -> tuple[Order, dict[str, Any]]:
    """Returns the order of global batches, and all that it depends on, for a saved state to be compared with."""
    names = list(store.tables)
    keep = {name: _keep(store, name, keep_probability, normaliser) for name in names} if keep_probability else {}
    streams = [BucketStream(name, store.tables[name].size, seed, keep.get(name)) for name in names]
    order: Order = (
        WeightedOrder(streams, weights, global_batch_size, seed)
        if weights
        else EpochOrder(streams, global_batch_size, seed)
    )
    return order, {
        "seed": seed,
        "global_batch_size": global_batch_size,
        "dataset": store.info.fingerprint,
        "buckets": names,
        "bucket_weights": {name: float(weights[name]) for name in names} if weights else None,
        "keep": xxhash.xxh128_hexdigest(b"".join(p.tobytes() for _, p in keep.values())) if keep else None,
    }


def _check_sizes(global_batch_size: int, micro_batch_size: int, reader: ReaderRank, prefetch: int) -> None:
    if min(global_batch_size, micro_batch_size) < 1 or prefetch < 0 or not 0 <= reader.rank < reader.world:
        raise UserError(
            f"global batch {global_batch_size}, micro-batch {micro_batch_size}, prefetch {prefetch}, reader "
            f"{reader.rank} of {reader.world}: out of range",
            where="train.global_batch_size",
        )
    if global_batch_size % (reader.world * micro_batch_size):
        raise UserError(
            f"global batch size {global_batch_size} is not a multiple of {reader.world} data-parallel ranks x "
            f"micro-batch {micro_batch_size}",
            where="train.global_batch_size",
            remedy=f"use a multiple of {reader.world * micro_batch_size}, or another train.micro_batch_size",
        )


def _choose_buckets(info: DatasetInfo, buckets: list[str], weights: Mapping[str, float]) -> list[str]:
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
        raise UserError("the dataset has no samples", where=str(info.path), remedy="curate some clips into it")
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


def _check_shards(info: DatasetInfo, names: list[str]) -> None:
    """Finds missing shards now rather than after hours; warns of other sizes, whose damage is met sample by sample."""
    for shard in info.shards:
        if shard.bucket in names:
            path = info.shard_path(shard)
            try:
                size = path.stat().st_size
            except FileNotFoundError as error:
                raise missing_shard(path) from error
            if size != shard.bytes:
                get_logger().warning(f"{path} has {size} bytes, dataset.json says {shard.bytes}: cut short or replaced")


def _keep(
    store: SampleStore, bucket: str, keep_probability: KeepProbability, normaliser: Normaliser
) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for each sample of a bucket, a hash of its KEY and the probability of being seen in an epoch."""
    entries = [entry for shard_entries in store.entries(bucket) for entry in shard_entries]
    words = np.fromiter((xxhash.xxh64_intdigest(entry.key.encode()) for entry in entries), np.uint64, len(entries))
    sources = np.array([entry.source or "" for entry in entries])
    motion, visual = (
        _normalised(normaliser, sources, name, [getattr(entry, name) for entry in entries])
        for name in ("motion_raw", "visual_raw")
    )
    scored = ~(motion.isnan() | visual.isnan())
    probability = torch.ones(len(entries), dtype=torch.float64)
    if bool(scored.any()):
        probability[scored] = keep_probability(motion[scored], visual[scored]).to(torch.float64)
    if not bool(((probability >= 0) & (probability <= 1)).all()):
        raise UserError("keep_probability gave a value outside [0, 1]", where="data", remedy="check the sampler")
    return words, probability.numpy()


def _normalised(normaliser: Normaliser, sources: np.ndarray, name: str, raw: list[float | None]) -> torch.Tensor:
    values = np.array([math.nan if value is None else value for value in raw], dtype=np.float64)
    scores = np.full(len(values), math.nan)
    for source in np.unique(sources):
        rows = sources == source
        scores[rows] = normaliser.apply_many(str(source), name, values[rows])
    return torch.from_numpy(scores).to(torch.float32)
