"""Looking at a dataset without training on it: all descriptions, and a check of every byte."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import xxhash

from contentv.base.log import get_logger
from contentv.data.dataset import DatasetInfo, ShardInfo
from contentv.data.index import CHUNK_BYTES, DamagedShardError
from contentv.data.sample import BadSampleError
from contentv.data.shards import ShardReader
from contentv.data.table import table_faults


def read_metas(dataset: str | Path | DatasetInfo, buckets: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields KEY.json of every sample, plus `bucket`, in the order of dataset.json; damaged ones are logged.

    Args:
        dataset: its folder, its URL, or its record.
        buckets: names of those to look at; None looks at all.

    Raises:
        UserError: there is no dataset, or a shard is missing.
    """
    info = dataset if isinstance(dataset, DatasetInfo) else DatasetInfo.load(dataset)
    for shard in info.shards:
        if buckets is not None and shard.bucket not in buckets:
            continue
        try:
            reader = ShardReader(info, shard)
        except DamagedShardError as error:
            get_logger().warning(f"{shard.name} is left out: {error}")
            continue
        for position in range(len(reader.entries)):
            meta = _meta(reader, position)
            if meta is not None:
                yield {**meta, "bucket": shard.bucket}


def _meta(reader: ShardReader, position: int) -> dict[str, Any] | None:
    try:
        return reader.meta(position)
    except BadSampleError as error:
        get_logger().warning(f"{reader.key(position)} of {reader.shard.name} is left out: {error}")
        return None


def verify_dataset(dataset: str | Path | DatasetInfo) -> list[str]:
    """Returns what is wrong with a dataset after reading all of it: one line a fault, empty if it is sound.

    Args:
        dataset: its folder, its URL, or its record.

    Raises:
        UserError: there is no dataset, or its source is gone.
    """
    info = dataset if isinstance(dataset, DatasetInfo) else DatasetInfo.load(dataset)
    faults = [f"{shard.name}: {fault}" for shard in info.shards for fault in shard_faults(info, shard)]
    return faults + table_faults(info)


def shard_faults(info: DatasetInfo, shard: ShardInfo) -> Iterator[str]:
    """Yields what is wrong with a shard after reading all of it."""
    size = info.storage.size(shard.file)
    if size is None:
        yield "the tar is missing"
        return
    try:
        if size != shard.bytes:
            yield f"the tar has {size} bytes, dataset.json says {shard.bytes}"
        elif _file_hash(info, shard) != shard.xxh128:
            yield "the tar is not what was written (checksum)"
        reader = ShardReader(info, shard)
    except (DamagedShardError, OSError) as error:
        yield str(error)
        return
    yield from filter(None, (_fault(reader, position) for position in range(len(reader.entries))))


def _fault(reader: ShardReader, position: int) -> str | None:
    try:
        reader.read(position)
        reader.media(position)
    except BadSampleError as error:
        return f"{reader.key(position)}: {error}"
    return None


def _file_hash(info: DatasetInfo, shard: ShardInfo) -> str:
    digest, place = xxhash.xxh128(), 0
    while chunk := info.storage.read(shard.file, place, CHUNK_BYTES):
        digest.update(chunk)
        place += len(chunk)
    return str(digest.hexdigest())
