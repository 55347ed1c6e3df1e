"""Looking at a dataset without training on it: all descriptions, and a check of every byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.data.dataset import DatasetInfo, ShardInfo
from contentv.data.index import CHUNK_BYTES, DamagedShardError
from contentv.data.sample import BadSampleError
from contentv.data.shards import ShardReader


def read_metas(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yields KEY.json of every sample, plus `bucket`, in the order of dataset.json; damaged ones are logged.

    Raises:
        UserError: there is no dataset, or a shard is missing.
    """
    info = DatasetInfo.load(path)
    for shard in info.shards:
        try:
            reader = ShardReader(info, shard)
        except DamagedShardError as error:
            get_logger().warning(f"{shard.name} is left out: {error}")
            continue
        try:
            for position in range(len(reader.entries)):
                meta = _meta(reader, position)
                if meta is not None:
                    yield {**meta, "bucket": shard.bucket}
        finally:
            reader.close()


def _meta(reader: ShardReader, position: int) -> dict[str, Any] | None:
    try:
        return reader.meta(position)
    except BadSampleError as error:
        get_logger().warning(f"{reader.entries[position].key} of {reader.shard.name} is left out: {error}")
        return None


def verify_dataset(path: str | Path) -> list[str]:
    """Returns what is wrong with a dataset after reading all of it: one line a fault, empty if it is sound.

    Raises:
        UserError: there is no dataset.
    """
    info = DatasetInfo.load(path)
    return [f"{shard.name}: {fault}" for shard in info.shards for fault in _faults(info, shard)]


def _faults(info: DatasetInfo, shard: ShardInfo) -> Iterator[str]:
    try:
        if _file_hash(info.shard_path(shard)) != shard.xxh128:
            yield "the tar is not what was written (checksum)"
        reader = ShardReader(info, shard)
    except (DamagedShardError, UserError, OSError) as error:
        yield str(error)
        return
    try:
        yield from filter(None, (_fault(reader, position) for position in range(len(reader.entries))))
    finally:
        reader.close()


def _fault(reader: ShardReader, position: int) -> str | None:
    try:
        reader.read(position)
        reader.media(position)
    except BadSampleError as error:
        return f"{reader.entries[position].key}: {error}"
    return None


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh128()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())
