"""One or more dataset folders as one dataset: same encoders, numbers that run on, sources of equal names joined."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash

from contentv.base.errors import UserError
from contentv.base.types import TextCond
from contentv.data.batch_rows import BatchRead, BatchRows, Described, stacked
from contentv.data.dataset import DatasetInfo, TextInfo, VaeInfo, read_null_text
from contentv.data.quality import Normaliser
from contentv.data.quarantine import Quarantine
from contentv.data.readahead import Threads
from contentv.data.rows import BucketRows
from contentv.data.sample import StoredSample
from contentv.data.shards import Fetched
from contentv.data.storage import StorageConfig
from contentv.data.store import SampleStore
from contentv.data.table import SampleTable

Paths = str | Path | Sequence[str | Path]


def as_list(paths: Paths) -> list[str | Path]:
    """Returns one path, or several, as a list."""
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


class JoinedDatasets:
    """What some datasets hold together; of one dataset, the same as its own record.

    Raises:
        UserError: there is none, one is listed twice, or they were made with other encoders.
    """

    def __init__(self, infos: Sequence[DatasetInfo]) -> None:
        if not infos:
            raise UserError("no dataset is named", where="data.path", remedy="name a folder with dataset.json")
        self.infos = list(infos)
        first = infos[0]
        for i, info in enumerate(infos):
            if info.storage.url in [other.storage.url for other in infos[:i]]:
                raise UserError(f"{info.storage.url} is listed twice", where="data.path", remedy="name it once")
            for what, ours, theirs in (("VAE", first.vae, info.vae), ("text encoders", first.text, info.text)):
                if ours != theirs:
                    raise UserError(
                        f"{first.storage.url} and {info.storage.url} were made with other {what}: {ours} and {theirs}",
                        where="data.path",
                        remedy="curate one of them again with the encoders of the other",
                    )

    @classmethod
    def load(cls, paths: Paths, config: StorageConfig | None = None) -> JoinedDatasets:
        """Returns the datasets at some paths or URLs.

        Raises:
            UserError: one cannot be read, or they do not fit together.
        """
        return cls([DatasetInfo.load(path, config) for path in as_list(paths)])

    @property
    def vae(self) -> VaeInfo:
        """The VAE that made all latents."""
        return self.infos[0].vae

    @property
    def text(self) -> TextInfo:
        """The text encoders that made all captions' vectors."""
        return self.infos[0].text

    @property
    def url(self) -> str:
        """Where they are, for messages."""
        return ", ".join(info.storage.url for info in self.infos)

    @property
    def bucket_samples(self) -> dict[str, int]:
        """Samples of each bucket that has any."""
        counts: dict[str, int] = {}
        for info in self.infos:
            for name, samples in info.bucket_samples.items():
                counts[name] = counts.get(name, 0) + samples
        return counts

    @property
    def fingerprint(self) -> str:
        """An xxh128 that changes whenever a shard is added, removed, reordered or rewritten, or a dataset is."""
        prints = [info.fingerprint for info in self.infos]
        return prints[0] if len(prints) == 1 else str(xxhash.xxh128_hexdigest("\n".join(prints).encode()))

    def latent_shape(self, bucket: str) -> tuple[int, int, int, int]:
        """Returns (c, t, h, w) of a bucket's latents."""
        return self.infos[0].latent_shape(bucket)

    def null_text(self) -> TextCond:
        """Returns the encoded empty caption, one fp32 row.

        Raises:
            UserError: a dataset's cannot be read, or two differ.
        """
        texts = [read_null_text(info) for info in self.infos]
        for text, info in zip(texts, self.infos, strict=True):
            if not (torch.equal(text.tokens, texts[0].tokens) and torch.equal(text.pooled, texts[0].pooled)):
                raise UserError(
                    f"{self.infos[0].storage.url} and {info.storage.url} have different encodings of the empty caption",
                    where="data.path",
                    remedy="curate one of them again with the encoders of the other",
                )
        return texts[0]


class JoinedStore:
    """The samples of the datasets by bucket and number, from any thread; numbers run through the datasets in order.

    A damaged sample is replaced by the next intact one of its bucket in its own dataset.
    """

    def __init__(
        self,
        joined: JoinedDatasets,
        buckets: Sequence[str],
        quarantine: Quarantine,
        normalisers: Sequence[Normaliser],
    ) -> None:
        self._stores = [
            SampleStore(info, [bucket for bucket in buckets if bucket in info.bucket_samples], quarantine)
            for info in joined.infos
        ]
        self._tables = [SampleTable(store.info, store.entries) for store in self._stores]
        self._normalisers = list(normalisers)
        self._held = {
            bucket: [i for i, store in enumerate(self._stores) if bucket in store.tables] for bucket in buckets
        }
        self._ends = {
            bucket: list(itertools.accumulate(self._stores[i].tables[bucket].size for i in held))
            for bucket, held in self._held.items()
        }

    def size(self, bucket: str) -> int:
        """Returns the number of a bucket's samples."""
        return self._ends[bucket][-1]

    def rows(self, bucket: str, needed: Sequence[str]) -> BucketRows:
        """Returns what is known of a bucket's samples without reading them.

        Args:
            needed: the columns that will be looked at, of key_hash, source and scores.
        """
        held = self._held[bucket]
        return BucketRows([self._tables[i].columns(bucket, needed) for i in held], [self._normalisers[i] for i in held])

    def read(self, bucket: str, number: int) -> tuple[StoredSample, float, float]:
        """Returns a sample, or the one that replaces it, and its motion and visual scores in [0, 1], NaN for none.

        Raises:
            UserError: too many samples are damaged, none is left, or the data's source is gone.
        """
        store, normaliser, number = self._place(bucket, number)
        sample = store.read(bucket, number)
        return sample, *normaliser.scores(sample.meta)

    def media(self, bucket: str, number: int) -> tuple[str, bytes] | None:
        """Returns (suffix, encoded clip) of a sample, None if none was stored.

        Raises:
            BadSampleError: it is damaged.
            UserError: the data's source is gone.
        """
        store, _, number = self._place(bucket, number)
        shard, position = store.tables[bucket].locate(number)
        return store.pool.reader(shard).media(position)

    def read_batch(self, bucket: str, numbers: Sequence[int], threads: Threads | None = None) -> BatchRead:
        """Returns samples as one micro-batch, in the given order; damaged ones are replaced as by `read`.

        Args:
            bucket: all of them are in it.
            numbers: of the samples in it.
            threads: that read at once; None reads in the calling thread.
        """
        pool = self._stores[self._held[bucket][0]].pool
        rows = pool.rows(bucket, len(numbers))
        if rows is not None:  # read to where they are wanted, with nothing left to copy
            described = self._read_rows(bucket, numbers, rows, threads)
            if described is not None:
                tensors = rows.tensors()
                pool.give_back(rows)
                return BatchRead(described, tensors)
        if threads is None:
            read = [self.read(bucket, number) for number in numbers]
        else:
            found = dict(threads.each(lambda i: self.read(bucket, numbers[i]), len(numbers)))
            read = [found[i] for i in range(len(numbers))]
        samples = [sample for sample, _, _ in read]
        return BatchRead([(sample.meta, motion, visual) for sample, motion, visual in read], stacked(samples))

    def _read_rows(
        self, bucket: str, numbers: Sequence[int], rows: BatchRows, threads: Threads | None
    ) -> list[Described] | None:
        """Returns the descriptions of samples that were read into `rows`; None if they do not all fit.

        The threads fetch while the calling one checks: so they need Python's lock in turns and not all at once.
        """
        placed = [self._place(bucket, number) for number in numbers]

        def fetch(row: int) -> tuple[Fetched | None, Described | None]:
            store, _, number = placed[row]
            fetched = store.fetch_into(bucket, number, rows, row)
            if fetched is None and threads is not None:  # from afar, or damaged: the thread has to wait, not the caller
                return None, accept(row, None)
            return fetched, None

        def accept(row: int, fetched: Fetched | None) -> Described | None:
            store, normaliser, number = placed[row]
            meta = store.accept(bucket, number, rows, row, fetched)
            return None if meta is None else (meta, *normaliser.scores(meta))

        places = range(len(numbers))
        fetches = threads.each(fetch, len(numbers)) if threads else ((row, fetch(row)) for row in places)
        found: dict[int, Described | None] = {}
        unchecked: dict[int, Fetched] = {}
        for row, (fetched, described) in fetches:
            found[row] = result = described if threads is not None and fetched is None else accept(row, fetched)
            if fetched is not None and result is not None and fetched.is_new(result[0]["key"]):
                unchecked[row] = fetched
        not_finite = rows.not_finite(list(unchecked))
        for row, fetched in unchecked.items():
            if row in not_finite:
                found[row] = accept(row, None)  # reads it again, puts it down and replaces it
            else:
                fetched.found_finite()
        ordered = [found[row] for row in places]
        kept = [described for described in ordered if described is not None]
        return kept if len(kept) == len(ordered) else None

    def _place(self, bucket: str, number: int) -> tuple[SampleStore, Normaliser, int]:
        """Returns the dataset's store and normaliser, and the sample's number in it."""
        ends, held = self._ends[bucket], self._held[bucket]
        place = bisect.bisect_right(ends, number)
        return self._stores[held[place]], self._normalisers[held[place]], number - (ends[place - 1] if place else 0)

    def close(self) -> None:
        """Lets go of open files; the next read opens them again."""
        for store in self._stores:
            store.pool.close()
