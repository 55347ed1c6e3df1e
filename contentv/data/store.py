"""The samples of the chosen buckets by number, with damaged ones replaced."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

from contentv.base.errors import UserError
from contentv.base.types import Bucket
from contentv.data.batch_rows import BatchRows
from contentv.data.dataset import DatasetInfo, ShardInfo
from contentv.data.index import IndexEntry
from contentv.data.quarantine import Quarantine
from contentv.data.sample import BadSampleError, StoredSample
from contentv.data.shards import Fetched, ShardPool


class BucketTable:
    """The samples of one bucket, numbered through its shards in the order of dataset.json."""

    def __init__(self, info: DatasetInfo, name: str) -> None:
        self.name = name
        self.bucket = Bucket.parse(name)
        self.shards = [shard for shard in info.shards if shard.bucket == name]
        self._ends = list(itertools.accumulate(shard.samples for shard in self.shards))
        self.size = self._ends[-1]

    def locate(self, sample: int) -> tuple[ShardInfo, int]:
        """Returns the shard of a sample and its position in it."""
        place = bisect.bisect_right(self._ends, sample)
        shard = self.shards[place]
        return shard, sample - (self._ends[place] - shard.samples)


class SampleStore:
    """Reads samples by bucket and number, from any thread; what is damaged goes to the quarantine and is replaced.

    Which sample replaces which depends on the dataset alone: not on who reads, nor on what was read before.
    """

    def __init__(self, info: DatasetInfo, buckets: list[str], quarantine: Quarantine) -> None:
        self.info = info
        self.tables = {name: BucketTable(info, name) for name in buckets}
        self.pool = ShardPool(info)
        self._quarantine = quarantine
        self._bad: dict[str, set[int]] = {name: set() for name in buckets}
        self._lock = threading.Lock()

    def read(self, bucket: str, sample: int) -> StoredSample:
        """Returns a sample, or the next intact one of its bucket.

        Raises:
            UserError: too many samples are damaged, none is left, or the data's source is gone.
        """
        table, bad = self.tables[bucket], self._bad[bucket]
        for number in itertools.chain(range(sample, table.size), range(sample)):
            if number in bad:
                continue
            shard, position = table.locate(number)
            self._quarantine.count_read()
            reader = None
            try:
                reader = self.pool.reader(shard)
                return reader.read(position)
            except BadSampleError as error:
                with self._lock:  # two threads may have met it at once
                    first = number not in bad
                    bad.add(number)
                if first:  # `*` for a shard that cannot be opened at all
                    self._quarantine.add(shard.name, reader.key(position) if reader else "*", str(error))
        raise UserError(f"every sample of bucket {bucket} is damaged", where="data", remedy="restore the dataset")

    def fetch_into(self, bucket: str, sample: int, rows: BatchRows, row: int) -> Fetched | None:
        """Reads a sample into a row of `rows` for `accept` to check; None where that is not possible.

        Raises:
            UserError: the data's source is gone.
        """
        if sample in self._bad[bucket]:
            return None
        shard, position = self.tables[bucket].locate(sample)
        try:
            return self.pool.reader(shard).fetch_into(position, rows, row)
        except BadSampleError:
            return None  # `read` puts it down

    def accept(
        self, bucket: str, sample: int, rows: BatchRows, row: int, fetched: Fetched | None
    ) -> dict[str, Any] | None:
        """Returns a sample's description, its tensors in a row of `rows`; of the next intact one where it is damaged.

        Returns None where the sample does not fit into `rows`, as its dtypes are others.

        Args:
            fetched: what `fetch_into` has returned for the same sample and row.

        Raises:
            UserError: as `read`.
        """
        if fetched is not None:
            try:
                meta = fetched.reader.accept(fetched, rows, row)
            except BadSampleError:
                meta = None
            if meta is not None:
                self._quarantine.count_read()
                return meta
        found = self.read(bucket, sample)
        return found.meta if rows.put(row, found) else None

    def read_many(self, bucket: str, samples: Sequence[int], executor: Executor | None = None) -> list[StoredSample]:
        """Returns samples in the given order, as `read` does for each, read by the executor's threads at once."""
        numbers = [int(sample) for sample in samples]
        if executor is None:
            return [self.read(bucket, number) for number in numbers]
        return list(executor.map(self.read, itertools.repeat(bucket), numbers))

    def entries(self, bucket: str) -> Iterator[list[IndexEntry]]:
        """Yields the index entries of each shard; empty ones where the index cannot be read."""
        return map(self._entries, self.tables[bucket].shards)

    def _entries(self, shard: ShardInfo) -> list[IndexEntry]:
        empty = [IndexEntry(f"{shard.name}/{position}", {}) for position in range(shard.samples)]
        try:
            reader = self.pool.reader(shard)
        except BadSampleError:  # met again, counted and replaced when its samples are read
            return empty
        for position in range(shard.samples):
            with contextlib.suppress(BadSampleError):
                empty[position] = reader.entry(position)
        return empty
