"""The clips that a dataset stores beside its latents, found by their keys, for the pictures of its page."""

from __future__ import annotations

from contentv.data import DatasetInfo
from contentv.data.index import DamagedShardError
from contentv.data.sample import BadSampleError
from contentv.data.shards import ShardReader
from contentv.report.dataset_pictures import Media
from contentv.report.dataset_stats import Clip

MAX_SHARDS = 64  # of each bucket that are looked through


def stored_media(info: DatasetInfo) -> Media:
    """Returns a function from a clip to the suffix and bytes of its stored media, or None where there are none.

    Args:
        info: the dataset's record; of each bucket its first shards are looked through, when first asked for.
    """
    buckets: dict[str, dict[str, tuple[ShardReader, int]]] = {}

    def media(clip: Clip) -> tuple[str, bytes] | None:
        if clip.bucket not in buckets:
            buckets[clip.bucket] = _places(info, clip.bucket)
        place = buckets[clip.bucket].get(clip.key)
        try:
            return None if place is None else place[0].media(place[1])
        except BadSampleError:
            return None

    return media


def _places(info: DatasetInfo, bucket: str) -> dict[str, tuple[ShardReader, int]]:
    places = {}
    for shard in [shard for shard in info.shards if shard.bucket == bucket][:MAX_SHARDS]:
        try:
            reader = ShardReader(info, shard)
        except DamagedShardError:
            continue
        places.update({reader.key(position): (reader, position) for position in range(len(reader.entries))})
    return places
