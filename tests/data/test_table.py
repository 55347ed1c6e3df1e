"""The table of samples: the same order with it and without it, checked, and bounded in what it reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from data_factory import IMAGE, SMALL, WIDE, build, fill, key, keys_of, source
from data_factory import writer as open_writer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from contentv.base.errors import UserError
from contentv.data import DatasetInfo, Normaliser, verify_dataset
from contentv.data.indexing import index_dataset
from contentv.data.quality import SCORE_NAMES, ScoreStatistics
from contentv.data.rows import BucketRows, Keeper, SourceRows
from contentv.data.table import Columns, SampleTable

TABLE = "samples.safetensors"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = build(tmp_path_factory.mktemp("table") / "d", {WIDE: 7, SMALL: 20})
    with open_writer(path, max_shard_bytes=20_000) as target:
        fill(target, 9, SMALL, 300, "stock")
        fill(target, 3, IMAGE, 400, "stock")
    return path


def without_table(path: Path, copy: Path) -> Path:
    """The dataset as an earlier version wrote it."""
    copy.mkdir()
    for item in path.iterdir():
        if item.name not in (TABLE, "dataset.json"):
            (copy / item.name).symlink_to(item)
    record = json.loads((path / "dataset.json").read_text())
    del record["table"]
    (copy / "dataset.json").write_text(json.dumps(record))
    return copy


def expected_columns(path: Path) -> dict[str, list[Any]]:
    """The same by reading every index as JSON, bucket by bucket."""
    info = DatasetInfo.load(path)
    sources = sorted(info.sources)
    rows: dict[str, list[Any]] = {"key_hash": [], "source": [], "scores": []}
    for bucket in sorted(info.bucket_samples):
        for shard in info.shards:
            if shard.bucket == bucket:
                index = json.loads((path / "shards" / shard.name.replace(".tar", ".index.json")).read_text())
                for sample in index["samples"]:
                    rows["key_hash"].append(xxhash.xxh64_intdigest(sample["key"].encode()))
                    rows["source"].append(sources.index(sample["source"]))
                    raw = [sample["visual_raw"], sample["motion_raw"]]
                    rows["scores"].append([math.nan if value is None else value for value in raw])
    return rows


def test_the_file_is_a_safetensors_file_of_what_the_indexes_say(dataset: Path) -> None:
    tensors, expected = load_file(dataset / TABLE), expected_columns(dataset)
    assert tensors.keys() == expected.keys()
    for name, rows in expected.items():
        assert np.array_equal(tensors[name], np.array(rows, dtype=tensors[name].dtype), equal_nan=name == "scores")
    record = json.loads((dataset / "dataset.json").read_text())["table"]
    assert record["samples"] == 39
    assert record["xxh128"]["source"] == xxhash.xxh128_hexdigest(tensors["source"].tobytes())


def test_without_the_file_the_rows_come_from_the_indexes(dataset: Path, tmp_path: Path) -> None:
    older = without_table(dataset, tmp_path / "older")
    info, other = DatasetInfo.load(dataset), DatasetInfo.load(older)
    assert other.table is None
    assert info.fingerprint == other.fingerprint
    options: dict[str, Any] = {
        "source_weights": {"films": 1.0, "stock": 2.0},
        "keep_probability": lambda motion, visual: visual,
    }
    assert keys_of(source(older, **options), 20) == keys_of(source(dataset, **options), 20)
    source(older, **options).load_state_dict(source(dataset, **options).state_dict())


@pytest.mark.parametrize("column", ["key_hash", "source", "scores"])
def test_a_flipped_bit_is_found_before_the_column_is_used(dataset: Path, tmp_path: Path, column: str) -> None:
    path = build(tmp_path / "d", {SMALL: 20})
    data = bytearray((path / TABLE).read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    data[8 + int.from_bytes(data[:8], "little") + header[column]["data_offsets"][0] + 5] ^= 4
    (path / TABLE).write_bytes(data)
    assert verify_dataset(path) == [
        f"{TABLE}: column {column} of the table of samples is not what was written (checksum)"
    ]
    keys_of(source(path), 3)  # the plain order asks for no column
    options: dict[str, Any] = {"source_max_epochs": {"films": 3}}
    if column == "source":
        with pytest.raises(UserError, match=f"column {column}"):
            source(path, **options)
    else:
        keys_of(source(path, **options), 3)
    with pytest.raises(UserError, match=f"column {column}"):
        source(path, keep_probability=lambda motion, visual: visual)


@pytest.mark.parametrize("damage", ["missing", "cut", "header", "another dataset's"])
def test_a_table_that_is_not_the_datasets_is_refused(dataset: Path, tmp_path: Path, damage: str) -> None:
    path = build(tmp_path / "d", {SMALL: 20})
    data = (path / TABLE).read_bytes()
    changed = {
        "missing": None, "cut": data[:-40], "header": b"\xff" * 8 + data[8:],
        "another dataset's": (dataset / TABLE).read_bytes(),
    }[damage]  # fmt: skip
    (path / TABLE).unlink()
    if changed is not None:
        (path / TABLE).write_bytes(changed)
    with pytest.raises(UserError, match=r"table of samples|missing") as caught:
        source(path, keep_probability=lambda motion, visual: visual)
    assert caught.value.remedy
    keys_of(source(path), 3)


@pytest.mark.parametrize("damage", ["an older dataset", "missing", "flipped"])
def test_contentv_index_writes_the_table_again(tmp_path: Path, damage: str) -> None:
    path = build(tmp_path / "d", {SMALL: 20})
    written, record = (path / TABLE).read_bytes(), json.loads((path / "dataset.json").read_text())
    assert index_dataset(path).made == [], "nothing is done to what is sound"
    if damage == "flipped":
        (path / TABLE).write_bytes(written[:-3] + b"???")
    else:
        (path / TABLE).unlink()
    if damage == "an older dataset":
        (path / "dataset.json").write_text(json.dumps({k: v for k, v in record.items() if k != "table"}))
    assert index_dataset(path).made == [TABLE]
    assert (path / TABLE).read_bytes() == written
    assert json.loads((path / "dataset.json").read_text()) == record


def test_only_the_rows_of_the_samples_drawn_are_looked_at(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, ...]] = []
    columns = SampleTable.columns
    monkeypatch.setattr(
        SampleTable, "columns", lambda self, bucket, needed: opened.append(needed) or columns(self, bucket, needed)
    )
    keys_of(source(dataset), 3)
    assert opened == [], "the plain order needs no table"
    keys_of(source(dataset, source_max_epochs={"films": 9}), 3)
    assert set(opened) == {("source",)}


@settings(max_examples=80, deadline=None)
@given(
    column=st.lists(st.integers(0, 4), min_size=1, max_size=300), cut=st.integers(0, 300), data=st.data(),
    block=st.sampled_from([1, 7, 64]),
)  # fmt: skip
def test_the_ith_sample_of_a_source_is_found(column: list[int], cut: int, data: st.DataObject, block: int) -> None:
    """Against a plain search; source 4 is none of them. The rows lie in two datasets that number sources otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("contentv.data.rows._LEAST_BLOCK", block)
        names = ("a", "b", "c", "d")
        first, second = np.array(column[:cut], np.uint16), np.array(column[cut:], np.uint16)
        turned = np.where(second < 4, 3 - second, second).astype(np.uint16)

        def part(places: np.ndarray, sources: tuple[str, ...]) -> Columns:
            count = len(places)
            return Columns(np.zeros(count, np.uint64), places, np.zeros((count, 2), np.float32), sources)

        rows = BucketRows([part(first, names), part(turned, names[::-1])], [])
        for place, name in enumerate(names):
            expected = [i for i, value in enumerate(column) if value == place]
            assert rows.sources().get(name, 0) == len(expected)
            if expected:
                wanted = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=20))
                found = rows.select(name)(np.array(wanted, dtype=np.int64))
                assert found.tolist() == [expected[i] for i in wanted]


def test_counts_are_kept_per_block_however_many_sources_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contentv.data.rows._MOST_COUNTS", 1000)
    monkeypatch.setattr("contentv.data.rows._LEAST_BLOCK", 2)
    monkeypatch.setattr("contentv.data.rows._CHUNK", 333)
    column = np.random.default_rng(0).integers(0, 50, 5_000).astype(np.uint16)
    rows = SourceRows(column, 50)
    assert rows._before.size <= 2 * 1000
    for place in (0, 17, 49):
        expected = np.flatnonzero(column == place)
        assert rows.count(place) == len(expected)
        assert np.array_equal(rows.select(place, np.arange(len(expected))), expected)


def test_scores_of_rows_are_those_of_the_samples_own_dataset() -> None:
    """Two datasets rank the same source by their own quality.json."""
    raw = np.array([[1.0, 2.0], [3.0, math.nan]], dtype=np.float32)
    parts = [Columns(np.arange(2, dtype=np.uint64) + 10 * i, np.zeros(2, np.uint16), raw, ("s",)) for i in range(2)]
    normalisers = [
        Normaliser({"s": {name: ScoreStatistics.fit(np.linspace(0, top, 101)) for name in SCORE_NAMES}})
        for top in (4.0, 8.0)
    ]
    rows = BucketRows(parts, normalisers)
    motion, visual = rows.scores(np.array([3, 0, 2, 1]))
    assert visual.tolist() == pytest.approx([3 / 8, 1 / 4, 1 / 8, 3 / 4])
    assert motion[1:3].tolist() == pytest.approx([2 / 4, 2 / 8])
    assert motion[[0, 3]].isnan().all()
    assert rows.words(np.array([3, 0])).tolist() == [11, 0]
    keeper = Keeper(rows, lambda motion, visual: torch.zeros_like(motion), 0)
    assert keeper.probabilities(np.arange(4)).tolist() == [0.0, 1.0, 0.0, 1.0], "a clip without both is always kept"


def test_a_stream_whose_rare_samples_are_missed_by_the_estimate_is_not_called_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("contentv.data.rows._RATE_SAMPLES", 4)
    scores = np.zeros((500, 2), np.float32)
    scores[123] = 1.0
    rows = BucketRows(
        [Columns(np.arange(500, dtype=np.uint64), np.zeros(500, np.uint16), scores, ("s",))],
        [Normaliser({"s": {n: ScoreStatistics.fit([0.0, 1.0]) for n in ("visual_raw", "motion_raw")}}, "minmax")],
    )
    assert Keeper(rows, lambda motion, visual: visual, 0).keep("b", 500, None).rate == 1
    assert Keeper(rows, lambda motion, visual: visual * 0, 0).keep("b", 500, None).rate == 0


def test_a_dataset_json_whose_table_has_other_rows_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 4})
    record = json.loads((path / "dataset.json").read_text())
    for change, message in (({"samples": 5}, "number of rows"), ({"file": "../x"}, "record of the table")):
        (path / "dataset.json").write_text(json.dumps({**record, "table": {**record["table"], **change}}))
        with pytest.raises(UserError, match=message):
            source(path)
    assert key(0) in {k for step in keys_of(source(build(tmp_path / "e", {SMALL: 4})), 1) for k in step}
