"""dataset.json: what a dataset holds and which VAE and text encoders made it. It is written last, so a folder that has
one is a finished dataset, and everything a shard contains is checked against it.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from contentv.base.errors import UserError
from contentv.base.types import Bucket, TextCond
from contentv.data.files import to_json, write_atomic
from contentv.data.storage import Storage, StorageConfig, open_storage

DATASET_VERSION = 1
DATASET_FILE = "dataset.json"
QUALITY_FILE = "quality.json"
NULL_TEXT_FILE = "null_text.safetensors"
TABLE_FILE = "samples.safetensors"
SHARDS_FOLDER = "shards"
_SHARD_NAME = re.compile(r"(f\d+_h\d+_w\d+)/[A-Za-z0-9_\-]+\.tar", re.ASCII)


@dataclass
class VaeInfo:
    """The VAE that made the latents: its fingerprint, the statistics that normalise them, and its factors."""

    fingerprint: str
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    latent_channels: int
    temporal_factor: int
    spatial_factor: int

    def __post_init__(self) -> None:
        if not len(self.latents_mean) == len(self.latents_std) == self.latent_channels:
            raise ValueError(f"latents_mean and latents_std must have latent_channels = {self.latent_channels} entries")
        if not all(math.isfinite(x) for x in self.latents_mean + self.latents_std) or min(self.latents_std) <= 0:
            raise ValueError("latents_mean must be finite and latents_std positive")
        if min(self.latent_channels, self.temporal_factor, self.spatial_factor) < 1:
            raise ValueError("latent_channels, temporal_factor and spatial_factor must be at least 1")

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """Returns (c, t, h, w) of a bucket's latents.

        Raises:
            ValueError: the bucket is not on the VAE's grid.
        """
        if (bucket.frames - 1) % self.temporal_factor or any(p % self.spatial_factor for p in bucket[1:]):
            raise ValueError(
                f"bucket {bucket.name} is not on the VAE's grid: frames must be {self.temporal_factor}k+1, "
                f"height and width multiples of {self.spatial_factor}"
            )
        frames = (bucket.frames - 1) // self.temporal_factor + 1
        return (
            self.latent_channels, frames, bucket.height // self.spatial_factor, bucket.width // self.spatial_factor,
        )  # fmt: skip


@dataclass
class TextInfo:
    """The text encoders that made the captions' vectors: fingerprint, widths, and number of tokens."""

    fingerprint: str
    token_width: int
    pooled_width: int
    num_tokens: int

    def __post_init__(self) -> None:
        if min(self.token_width, self.pooled_width, self.num_tokens) < 1:
            raise ValueError("token_width, pooled_width and num_tokens must be at least 1")


@dataclass
class ShardInfo:
    """One tar: `<bucket>/<file>.tar` below shards/, its samples, size, checksum, and its index's checksum."""

    name: str
    samples: int
    bytes: int
    xxh128: str
    index_xxh128: str | None = None

    def __post_init__(self) -> None:
        if not _SHARD_NAME.fullmatch(self.name):
            raise ValueError(f"shard name {self.name!r} is not of the form <bucket>/<file>.tar")
        if not all(isinstance(count, int) and count >= 0 for count in (self.samples, self.bytes)):
            raise ValueError(f"shard {self.name} has counts that are not numbers")

    @property
    def bucket(self) -> str:
        """The name of the shard's bucket."""
        return self.name.split("/")[0]

    @property
    def file(self) -> str:
        """The tar's name inside the dataset."""
        return f"{SHARDS_FOLDER}/{self.name}"

    @property
    def index_file(self) -> str:
        """Its index's name inside the dataset: `000000.index.json` beside `000000.tar`."""
        return f"{SHARDS_FOLDER}/{self.name.removesuffix('.tar')}.index.json"


@dataclass
class TableInfo:
    """The table of all samples (`contentv.data.table`): its file, its rows, and each column's checksum."""

    file: str
    samples: int
    xxh128: dict[str, str]

    def __post_init__(self) -> None:
        if self.file != TABLE_FILE or not isinstance(self.samples, int) or not isinstance(self.xxh128, dict):
            raise ValueError(f"the record of the table of samples is not that of {TABLE_FILE}")


@dataclass
class DatasetInfo:
    """The content of dataset.json; `root` is the dataset's folder, or the storage that reads it."""

    root: Path | Storage
    vae: VaeInfo
    text: TextInfo
    sources: dict[str, int] = field(default_factory=dict)  # name -> samples
    shards: list[ShardInfo] = field(default_factory=list)
    table: TableInfo | None = None  # of datasets made by an earlier version there is none

    @functools.cached_property
    def storage(self) -> Storage:
        """What the dataset's files are read with."""
        return open_storage(self.root) if isinstance(self.root, Path) else self.root

    @property
    def path(self) -> Path:
        """The dataset's folder.

        Raises:
            UserError: it is not on this machine, so it can be read and not be changed.
        """
        local = self.storage.local
        if local is None:
            raise UserError(
                "this needs the dataset in a folder of this machine", where=self.storage.url,
                remedy="copy it here, or run the command where it lies",
            )  # fmt: skip
        return local

    @property
    def bucket_samples(self) -> dict[str, int]:
        """Samples of each bucket that has any, in the order of its first shard."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            if shard.samples:
                counts[shard.bucket] = counts.get(shard.bucket, 0) + shard.samples
        return counts

    @property
    def samples(self) -> int:
        """Samples of the whole dataset."""
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """An xxh128 that changes whenever a shard is added, removed, reordered or rewritten."""
        lines = "\n".join(f"{s.name} {s.samples} {s.xxh128}" for s in self.shards)
        return str(xxhash.xxh128_hexdigest(lines.encode()))

    def shard_path(self, shard: ShardInfo) -> Path:
        """Returns where a shard's tar lies on this machine."""
        return self.path / shard.file

    def latent_shape(self, bucket: str) -> tuple[int, int, int, int]:
        """Returns (c, t, h, w) of a bucket's latents."""
        return self.vae.latent_shape(Bucket.parse(bucket))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of this record."""
        counts = self.bucket_samples
        return {
            "version": DATASET_VERSION,
            "vae": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.vae).items()},
            "text": asdict(self.text),
            "sources": {name: {"samples": self.sources[name]} for name in sorted(self.sources)},
            "buckets": {
                name: {"samples": counts[name], "latent_shape": list(self.latent_shape(name))}
                for name in sorted(counts)
            },
            "shards": [vars(shard) for shard in self.shards],
            **({} if self.table is None else {"table": asdict(self.table)}),
            "totals": {
                "samples": self.samples,
                "shards": len(self.shards),
                "bytes": sum(shard.bytes for shard in self.shards),
            },
        }

    def write(self) -> None:
        """Writes dataset.json in one step: readers see the old dataset or the new one."""
        write_atomic(self.path / DATASET_FILE, to_json(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path, config: StorageConfig | None = None) -> DatasetInfo:
        """Returns the record of the dataset in a folder or at a URL.

        Args:
            config: how its files are fetched and kept.

        Raises:
            UserError: there is no dataset.json, its version is another, its numbers contradict each other, or its
                source does not answer.
        """
        storage = open_storage(path, config)
        where = f"{storage.url}/{DATASET_FILE}"
        record = read_record(storage, DATASET_FILE, "a dataset", "check data.path, or let `contentv curate` finish")
        if record.get("version") != DATASET_VERSION:
            raise UserError(
                f"dataset version {record.get('version')!r} is not the supported {DATASET_VERSION}",
                where=where,
                remedy="install a contentv that reads this version, or curate the dataset again",
            )
        try:
            return cls._from_record(storage, record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"dataset.json is not valid ({type(error).__name__}: {error})",
                where=where,
                remedy="restore it from a copy, or curate the dataset again",
            ) from error

    @classmethod
    def _from_record(cls, storage: Storage, record: Mapping[str, Any]) -> DatasetInfo:
        vae: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record["vae"].items()}
        info = cls(
            storage,
            VaeInfo(**vae),
            TextInfo(**record["text"]),
            {name: int(source["samples"]) for name, source in record["sources"].items()},
            [ShardInfo(**shard) for shard in record["shards"]],
            TableInfo(**record["table"]) if "table" in record else None,
        )
        counts = info.bucket_samples
        listed = {name: bucket for name, bucket in record["buckets"].items() if bucket["samples"]}
        if {name: bucket["samples"] for name, bucket in listed.items()} != counts:
            raise ValueError("the buckets' samples are not the sums of their shards' samples")
        for name, bucket in listed.items():
            if tuple(bucket["latent_shape"]) != info.latent_shape(name):
                raise ValueError(f"the latent shape of {name} does not follow from the VAE's factors")
        if len({shard.name for shard in info.shards}) != len(info.shards):
            raise ValueError("a shard is listed twice")
        if info.table is not None and info.table.samples != info.samples:
            raise ValueError("the table of samples has another number of rows than the shards have samples")
        return info


def read_record(storage: Storage, name: str, what: str, remedy: str) -> dict[str, Any]:
    """Returns a JSON object from a file of a dataset.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    where = f"{storage.url}/{name}"
    data = storage.read_all(name)
    if data is None:
        raise UserError(f"{storage.url} is not {what}: it has no {name}", where=where, remedy=remedy)
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON ({error})", where=where, remedy=remedy) from error
    if not isinstance(record, dict):
        raise UserError(f"{name} is not a JSON object", where=where, remedy=remedy)
    return record


def null_text_bytes(null_text: TextCond, text: TextInfo) -> bytes:
    """Returns null_text.safetensors for the encoded empty caption (one row).

    Raises:
        UserError: its shape does not fit the text encoders' record.
    """
    shapes = (tuple(null_text.tokens.shape), tuple(null_text.pooled.shape))
    expected = ((1, text.num_tokens, text.token_width), (1, text.pooled_width))
    if shapes != expected:
        raise UserError(
            f"null_text has shapes {shapes}, the text encoders' record says {expected}",
            where=NULL_TEXT_FILE,
            remedy='pass the encoding of "" made by the same text encoders',
        )
    return bytes(
        save_safetensors(
            {
                "text_tokens": null_text.tokens[0].detach().cpu().contiguous(),
                "text_pooled": null_text.pooled[0].detach().cpu().contiguous(),
            }
        )
    )


def read_null_text(info: DatasetInfo, stored: bool = False) -> TextCond:
    """Returns the encoded empty caption, one row, in fp32 or as it is stored.

    Raises:
        UserError: the file is missing, damaged or of another shape.
    """
    where = f"{info.storage.url}/{NULL_TEXT_FILE}"
    text = info.text
    shapes: dict[str, Sequence[int]] = {
        "text_tokens": [text.num_tokens, text.token_width],
        "text_pooled": [text.pooled_width],
    }
    try:
        tensors = load_safetensors(bytes(info.storage.read_all(NULL_TEXT_FILE) or b""))
        if {name: list(tensor.shape) for name, tensor in tensors.items()} != shapes:
            raise UserError("its shapes are not those of dataset.json", where=where, remedy="curate again")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the encoded empty caption cannot be read ({error})",
            where=where,
            remedy="restore the file from a copy, or curate the dataset again",
        ) from error
    rows = TextCond(tensors["text_tokens"][None], tensors["text_pooled"][None])
    return rows if stored else rows.to(torch.device("cpu"), torch.float32)
