"""Shares of samples: how much of the training each (bucket, source) gets, so that what was asked for holds.

Asked for are sums over the table of buckets x sources: of a source (`data.source_weights`), of a bucket
(`data.bucket_weights`), of all one-frame buckets (`data.image_ratio`). The table nearest to the data themselves with
these sums comes from scaling rows and columns in turn (iterative proportional fitting; Deming and Stephan 1940). It is
then rounded to whole numbers, so that everything that follows is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from contentv.base.errors import UserError
from contentv.base.types import Bucket

WHOLE = 1 << 20  # the sum of all shares
_MAX_ROUNDS = 3000
_CLOSE = 1e-9
_LEAST = 1e-15  # of a cell with samples: it is never quite left out
_TOLERANCE = 2e-3  # shares that cannot hold at once miss by more


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Returns whole numbers that sum to `total` in proportion to the weights, at least 1 for each weight above 0.

    `total` is much larger than the number of weights. What rounding leaves goes to the largest remainders.
    """
    whole = sum(weights)
    exact = [weight / whole * total for weight in weights]
    parts = [max(int(x), int(x > 0)) for x in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: int(exact[i]) - exact[i])
    for i in by_remainder[: max(total - sum(parts), 0)]:
        parts[i] += 1
    largest = max(range(len(parts)), key=parts.__getitem__)
    parts[largest] += total - sum(parts)
    return parts


@dataclass(frozen=True)
class Targets:
    """What was asked for; empty mappings and a ratio of 0 leave it to the data.

    Args:
        source_weights: source -> share of the samples, relative.
        bucket_weights: bucket -> share of the samples, relative.
        image_ratio: share of the samples that come from one-frame buckets, 0..1.
    """

    source_weights: Mapping[str, float] = field(default_factory=dict)
    bucket_weights: Mapping[str, float] = field(default_factory=dict)
    image_ratio: float = 0.0


def is_image(bucket: str) -> bool:
    """Whether a bucket's clips have one frame."""
    return Bucket.parse(bucket).frames == 1


def fit_shares(
    cells: Sequence[tuple[str, str]], sizes: Sequence[float], targets: Targets, strict: bool = False
) -> list[int]:
    """Returns the share of each cell, whole numbers that sum to `WHOLE`; 0 for cells of size 0.

    Shares of buckets hold exactly. Shares of sources hold as far as they go together with those of the buckets. Where a
    source, bucket or kind has no samples (left), the others share what it would get.

    Args:
        cells: (bucket, source) of each.
        sizes: samples in each; the shares of cells are in proportion to them where nothing else was asked for.
        targets: what was asked for.
        strict: refuse targets that do not go together.

    Raises:
        UserError: they do not.
    """
    rows = _row_targets([bucket for bucket, _ in cells], sizes, targets)
    columns = _normalised({s: targets.source_weights.get(s, 0.0) for (_, s), n in zip(cells, sizes, strict=True) if n})
    row_of, row_share = _numbered([_row(bucket, rows) for bucket, _ in cells], rows)
    column_of, column_share = _numbered([source for _, source in cells], columns)
    x = np.asarray(sizes, dtype=np.float64) / sum(sizes)
    least = np.where(x > 0, _LEAST, 0.0)
    missed = 0.0
    for _ in range(_MAX_ROUNDS):
        if columns:
            x = np.maximum(_scaled(x, column_of, column_share), least)
        if rows:
            x = np.maximum(_scaled(x, row_of, row_share), least)
        if not (rows and columns):
            break
        found = np.bincount(column_of, weights=x, minlength=len(column_share))
        before, missed = missed, float(np.abs(found - column_share).max())
        if missed < _CLOSE or abs(before - missed) < _CLOSE * missed:  # there, or as near as it gets
            break
    if strict and missed > _TOLERANCE:
        told = ", ".join(f"{name} {found[i]:.3f}" for i, name in enumerate(columns))
        raise UserError(
            f"the shares of sources {dict(columns)} do not go together with the shares of buckets; nearest are {told}",
            where="data.source_weights",
            remedy="change them, data.image_ratio or data.bucket_weights, or leave one of them out",
        )
    return _whole(x, row_of if rows else np.zeros(len(cells), dtype=np.int64), row_share if rows else np.ones(1))


def _row_targets(buckets: Sequence[str], sizes: Sequence[float], targets: Targets) -> dict[str, float]:
    """Returns bucket -> share, or kind -> share where only the ratio of images was asked for, of those with samples."""
    there = list(dict.fromkeys(bucket for bucket, size in zip(buckets, sizes, strict=True) if size))
    kinds = {kind: [bucket for bucket in there if is_image(bucket) == (kind == "image")] for kind in ("image", "video")}
    ratio = targets.image_ratio
    by_kind = _normalised({kind: {"image": ratio, "video": 1 - ratio}[kind] for kind in kinds if kinds[kind]})
    if not targets.bucket_weights:
        return by_kind if ratio else {}
    if not ratio:
        return _normalised({bucket: targets.bucket_weights[bucket] for bucket in there})
    return {
        bucket: share * by_kind[kind]
        for kind in by_kind
        for bucket, share in _normalised({bucket: targets.bucket_weights[bucket] for bucket in kinds[kind]}).items()
    }


def _row(bucket: str, rows: Mapping[str, float]) -> str:
    return bucket if bucket in rows else ("image" if is_image(bucket) else "video")


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    whole = sum(weights.values())
    return {name: weight / whole for name, weight in weights.items()} if whole > 0 else {}


def _numbered(names: Sequence[str], shares: Mapping[str, float]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the place of each name among `shares`, cells without samples at the first, and the shares."""
    places = {name: i for i, name in enumerate(shares)}
    return np.array([places.get(name, 0) for name in names], dtype=np.int64), np.array(list(shares.values()))


def _scaled(x: NDArray[np.float64], group_of: NDArray[np.int64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    sums = np.bincount(group_of, weights=x, minlength=len(shares))
    scaled: NDArray[np.float64] = x * (shares / np.where(sums > 0, sums, 1.0))[group_of]
    return scaled


def _whole(x: NDArray[np.float64], group_of: NDArray[np.int64], shares: NDArray[np.float64]) -> list[int]:
    """Returns the table in whole numbers, each group's sum being its share."""
    parts = [0] * len(x)
    for group, total in enumerate(apportion(WHOLE, shares.tolist())):
        members = np.flatnonzero((group_of == group) & (x > 0)).tolist()
        for member, part in zip(members, apportion(total, x[members].tolist()) if members else [], strict=True):
            parts[member] = part
    return parts
