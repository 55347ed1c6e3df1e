"""The samples of the chosen buckets by number, with damaged ones replaced."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from contentv.base.errors import UserError
from contentv.base.types import Bucket
from contentv.data.dataset import DatasetInfo, ShardInfo
from contentv.data.index import IndexEntry
from contentv.data.quarantine import Quarantine
from contentv.data.sample import BadSampleError, StoredSample
from contentv.data.shards import ShardPool


class BucketTable:
    """The samples of one bucket, numbered through its shards in the order of dataset.json."""

    def __init__(self, info: DatasetInfo, name: str) -> None:
        self.name = name
        self.bucket = Bucket.parse(name)
        self.shards = [shard for shard in info.shards if shard.bucket == name]
        self._ends = np.cumsum([shard.samples for shard in self.shards])
        self.size = int(self._ends[-1])

    def locate(self, sample: int) -> tuple[ShardInfo, int]:
        """Returns the shard of a sample and its position in it."""
        place = int(np.searchsorted(self._ends, sample, side="right"))
        shard = self.shards[place]
        return shard, sample - (int(self._ends[place]) - shard.samples)


class SampleStore:
    """Reads samples by bucket and number; what is damaged goes to the quarantine and is replaced."""

    def __init__(self, info: DatasetInfo, buckets: list[str], quarantine: Quarantine) -> None:
        self.info = info
        self.tables = {name: BucketTable(info, name) for name in buckets}
        self.pool = ShardPool(info)
        self._quarantine = quarantine
        self._bad: dict[str, set[int]] = {name: set() for name in buckets}

    def read(self, bucket: str, sample: int) -> StoredSample:
        """Returns a sample, or the next intact one of its bucket.

        Raises:
            UserError: too many samples are damaged, or none is left.
        """
        table, bad = self.tables[bucket], self._bad[bucket]
        for number in ((sample + i) % table.size for i in range(table.size)):
            if number in bad:
                continue
            shard, position = table.locate(number)
            self._quarantine.reads += 1
            key = "*"  # for a shard that cannot be opened at all
            try:
                reader = self.pool.reader(shard)
                key = reader.entries[position].key
                return reader.read(position)
            except BadSampleError as error:
                bad.add(number)
                self._quarantine.add(shard.name, key, str(error))
        raise UserError(f"every sample of bucket {bucket} is damaged", where="data", remedy="restore the dataset")

    def entries(self, bucket: str) -> Iterator[list[IndexEntry]]:
        """Yields the index entries of each shard; empty ones for a shard that cannot be opened."""
        return map(self._entries, self.tables[bucket].shards)

    def _entries(self, shard: ShardInfo) -> list[IndexEntry]:
        try:
            return self.pool.reader(shard).entries
        except BadSampleError:  # met again, counted and replaced when its samples are read
            return [IndexEntry(f"{shard.name}/{position}", {}) for position in range(shard.samples)]
