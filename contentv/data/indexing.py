"""Putting a dataset's indexes in order: missing ones made, others' shards taken in, every byte checked on request."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from contentv.base.lock import lock_folder
from contentv.data.dataset import SHARDS_FOLDER, TABLE_FILE, DatasetInfo, ShardInfo, read_null_text
from contentv.data.entries import made_index, stored_entries
from contentv.data.files import disk_errors, write_atomic
from contentv.data.index import DamagedShardError
from contentv.data.inspection import verify_dataset
from contentv.data.table import table_faults, write_table
from contentv.data.writer import DatasetWriter, refit_quality


@dataclass
class IndexReport:
    """What `index_dataset` found and did; shards by name, samples and faults with the reason."""

    shards: int = 0
    samples: int = 0
    made: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)  # tars that dataset.json does not know
    adopted: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # samples and members of adopted tars that are not used
    drift: list[str] = field(default_factory=list)  # scores unlike those that quality.json had been fitted to
    faults: list[str] = field(default_factory=list)


def index_dataset(path: str | Path, *, adopt: bool = False, refit: bool = False, verify: bool = False) -> IndexReport:
    """Returns what was done to a dataset's indexes; those that are missing or unsound are made again.

    Args:
        path: the dataset's folder; a URL can be verified, and nothing else.
        adopt: take tars below shards/<bucket>/ that dataset.json does not list, after checking all of their samples.
        refit: fit quality.json again.
        verify: read everything and list what is wrong.

    Raises:
        UserError: there is no dataset, it cannot be written, another process writes it, or a tar to be adopted is
            damaged, in a folder that is no bucket, or holds a key that the dataset has.
    """
    info = DatasetInfo.load(path)
    report = IndexReport()
    if info.storage.local is not None or not verify:
        _make_indexes(info, report)
        if adopt:
            _adopt(info, report)
            info = DatasetInfo.load(path)
        report.unlisted = _unlisted(info)
        if refit:
            report.drift = refit_quality(info.path)
    if verify:
        report.faults += [fault for fault in verify_dataset(info) if fault not in report.faults]
    report.shards, report.samples = len(info.shards), info.samples
    return report


def _make_indexes(info: DatasetInfo, report: IndexReport) -> None:
    lock = lock_folder(info.path, "writing this dataset")
    try:
        for shard in info.shards:
            if _has_index(info, shard):
                continue
            try:
                index = made_index(info, shard).to_bytes()
            except DamagedShardError as error:
                report.faults.append(f"{shard.name}: {error}")
                continue
            report.made.append(shard.name)
            with disk_errors(info.path):
                write_atomic(info.path / shard.index_file, index)
                checksum = str(xxhash.xxh128_hexdigest(index))
                if shard.index_xxh128 != checksum:
                    shard.index_xxh128 = checksum
                    info.write()
        if not report.faults and (info.table is None or table_faults(info)):
            with disk_errors(info.path):
                info.table = write_table(info, lambda shard: stored_entries(info.storage, shard))
                info.write()
            report.made.append(TABLE_FILE)
    finally:
        os.close(lock)


def _has_index(info: DatasetInfo, shard: ShardInfo) -> bool:
    """Whether a sound index lies beside a shard, and dataset.json has its checksum."""
    try:
        stored_entries(info.storage, shard)
    except DamagedShardError:
        return False
    return shard.index_xxh128 is not None


def _adopt(info: DatasetInfo, report: IndexReport) -> None:
    null_text = read_null_text(info, stored=True)
    with DatasetWriter(info.path, info.vae, info.text, null_text) as writer:
        report.adopted = writer.adopt_shards()
        report.left_out = writer.left_out


def _unlisted(info: DatasetInfo) -> list[str]:
    listed = {shard.name for shard in info.shards}
    found = sorted((info.path / SHARDS_FOLDER).glob("*/*.tar"))
    return [name for name in (f"{path.parent.name}/{path.name}" for path in found) if name not in listed]
