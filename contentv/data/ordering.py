"""From what was asked for to an order: streams of buckets and sources, and which of the orders schedules them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from contentv.base.errors import UserError, nearest
from contentv.data.joined import JoinedStore
from contentv.data.mixture import Cell, MixtureOrder
from contentv.data.permutation import Ids
from contentv.data.plan import EpochOrder, Order, WeightedOrder
from contentv.data.quality import Normaliser
from contentv.data.rows import BucketRows, Keeper, KeepProbability
from contentv.data.shares import Targets, is_image
from contentv.data.streams import SampleStream

_MAX_TOLD = 400  # characters of a value in the identity; longer ones are told by their checksum


@dataclass(frozen=True)
class Choices:
    """All that an order depends on besides the dataset.

    Args:
        seed: key of the order.
        batch_sizes: samples of a global batch of each bucket that is read.
        bucket_weights: relative probability of each bucket; empty: in proportion to the data.
        image_ratio: share of samples from one-frame buckets, 0..1; 0: in proportion to the data.
        source_weights: relative share of samples of each source; empty: in proportion to the data.
        source_max_epochs: how often a source may be seen in full.
        keep_probability: of a sample being seen in an epoch, from its scores; None keeps all.
    """

    seed: int
    batch_sizes: Mapping[str, int]
    bucket_weights: Mapping[str, float] = field(default_factory=dict)
    image_ratio: float = 0.0
    source_weights: Mapping[str, float] = field(default_factory=dict)
    source_max_epochs: Mapping[str, int] = field(default_factory=dict)
    keep_probability: KeepProbability | None = None


def build_order(store: JoinedStore, choices: Choices, normalisers: Sequence[Normaliser]) -> tuple[Order, str | None]:
    """Returns the order of global batches, and a checksum of what decides which samples are kept (None: all are).

    Raises:
        UserError: a choice cannot hold, or no samples are left.
    """
    by_source = bool(choices.source_weights or choices.source_max_epochs)
    keep = choices.keep_probability
    needed = ("key_hash", "source", "scores") if keep is not None else ("source",)
    rows = {bucket: store.rows(bucket, needed) for bucket in choices.batch_sizes if by_source or keep is not None}
    keepers = {bucket: Keeper(rows[bucket], keep, choices.seed) for bucket in rows if keep is not None}
    if by_source:
        cells = _source_cells(rows, choices, keepers)
    else:
        cells = [
            Cell(bucket, "", _stream(bucket, store.size(bucket), choices.seed, keepers.get(bucket)))
            for bucket in choices.batch_sizes
        ]
    digest = _digest(keepers.values(), normalisers) if keepers else None
    sizes, weights = choices.batch_sizes, choices.bucket_weights
    if by_source or choices.image_ratio:
        _check_ratio(choices)
        of_samples = {bucket: weights[bucket] * sizes[bucket] for bucket in sizes} if weights else {}
        targets = Targets(choices.source_weights, of_samples, choices.image_ratio)
        return MixtureOrder(cells, sizes, targets, choices.seed), digest
    streams = [cell.stream for cell in cells]
    if weights:
        return WeightedOrder(streams, sizes, weights, choices.seed), digest
    return EpochOrder(streams, sizes, choices.seed), digest


def identity(choices: Choices, dataset: str, global_batch_size: int, kept: str | None) -> dict[str, Any]:
    """Returns all that an order depends on, for a saved state to be compared with."""
    sizes = choices.batch_sizes
    multiples = {name: size // global_batch_size for name, size in sizes.items() if size != global_batch_size}
    return {
        "seed": choices.seed,
        "global_batch_size": global_batch_size,
        "dataset": dataset,
        "buckets": _told(list(sizes)),
        "batch_multiples": _told(multiples),
        "bucket_weights": _told(_floats(choices.bucket_weights)) or None,
        "image_ratio": float(choices.image_ratio),
        "source_weights": _told(_floats(choices.source_weights)),
        "source_max_epochs": _told(dict(choices.source_max_epochs)),
        "keep": kept,
    }


def _floats(weights: Mapping[str, float]) -> dict[str, float]:
    return {name: float(weights[name]) for name in sorted(weights)}


def _told(value: Any) -> Any:
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= _MAX_TOLD else f"{len(value)} entries, xxh128 {xxhash.xxh128_hexdigest(text.encode())}"


def _digest(keepers: Iterable[Keeper], normalisers: Sequence[Normaliser]) -> str:
    digest = xxhash.xxh128()
    for keeper in keepers:
        digest.update(keeper.digest.digest())
    for normaliser in normalisers:
        digest.update(f"{normaliser.mode} {sorted(normaliser.sources.items())}".encode())
    return str(digest.hexdigest())


def _stream(
    name: str,
    size: int,
    seed: int,
    keeper: Keeper | None,
    select: Callable[[Ids], Ids] | None = None,
    max_epochs: int | None = None,
) -> SampleStream:
    keep = None if keeper is None or not size else keeper.keep(name, size, select)
    return SampleStream(name, size, seed, select=select, keep=keep, max_epochs=max_epochs)


def _source_cells(rows: Mapping[str, BucketRows], choices: Choices, keepers: Mapping[str, Keeper]) -> list[Cell]:
    """Returns the streams of each bucket's sources, sources of weight 0 left out."""
    counts = {bucket: rows[bucket].sources() for bucket in rows}
    known = sorted({source for sources in counts.values() for source in sources})
    weights, caps = choices.source_weights, choices.source_max_epochs
    _check_sources(weights, caps, known)
    cells = [
        Cell(bucket, source, _stream(f"{bucket}/{source}", count, choices.seed, keepers.get(bucket),
                                     rows[bucket].select(source), caps.get(source)))
        for bucket, sources in counts.items()
        for source, count in sorted(sources.items())
        if not weights or weights[source] > 0
    ]  # fmt: skip
    if not cells:
        raise UserError("no samples are left to train on", where="data.source_weights", remedy="give a source a weight")
    return cells


def _check_sources(weights: Mapping[str, float], caps: Mapping[str, int], known: Sequence[str]) -> None:
    for key, names in (("data.source_weights", weights), ("data.source_max_epochs", caps)):
        for name in names:
            if name not in known:
                raise UserError(
                    f'the buckets that are read have no source "{name}" (they have: {", ".join(known) or "none"})',
                    where=key,
                    remedy=nearest(name, known),
                )
    missing = [name for name in known if name not in weights]
    if weights and (missing or any(not 0 <= weight < math.inf for weight in weights.values())):
        raise UserError(
            f"weights of sources {dict(weights)} must be finite, not negative, and name each of {', '.join(known)}",
            where="data.source_weights",
            remedy="give every source a weight; 0 leaves it out",
        )
    if any(cap < 1 for cap in caps.values()):
        raise UserError(f"{dict(caps)} has a budget below 1", where="data.source_max_epochs", remedy="use 1 or more")


def _check_ratio(choices: Choices) -> None:
    kinds = {is_image(bucket) for bucket in choices.batch_sizes}
    if choices.image_ratio and kinds != {True, False}:
        raise UserError(
            f"{choices.image_ratio} of the samples are to be images, and the buckets that are read hold "
            f"{'images' if True in kinds else 'videos'} alone: {', '.join(choices.batch_sizes)}",
            where="data.image_ratio",
            remedy="read buckets of both kinds (stage.buckets=all, or data.buckets=[...]), or use 0",
        )
