"""Shards written by several processes, and how a dataset takes them in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_factory import IMAGE, SMALL, TEXT, VAE, build, fill, key, meta, tensors, writer

from contentv.base.errors import UserError
from contentv.data import DatasetInfo, ShardInfo, ShardSetWriter, read_metas, verify_dataset


def shard_set(path: Path, prefix: str, numbers: range, max_shard_bytes: int = 1 << 30) -> list[ShardInfo]:
    target = ShardSetWriter(path, VAE, TEXT, prefix, max_shard_bytes)
    for n in numbers:
        target.add(key(n), meta(n), **tensors(n, SMALL), bucket=SMALL)
    return target.finish()


def test_sets_of_shards_become_a_dataset(tmp_path: Path) -> None:
    path = tmp_path / "d"
    one, two = shard_set(path, "r0001-c000000", range(5), 9_000), shard_set(path, "r0001-c000001", range(5, 8))
    assert [shard.name for shard in one] == [f"f5_h16_w16/r0001-c000000-{n:03d}.tar" for n in range(len(one))]
    assert len(one) > 1
    with pytest.raises(UserError, match=r"dataset\.json"):
        DatasetInfo.load(path)
    with writer(path) as target:
        assert target.add_shards([*one, *two]) == len(one) + 1
        assert target.add_shards(one) == 0, "a second time changes nothing"
    assert DatasetInfo.load(path).samples == 8
    assert verify_dataset(path) == []
    assert {m["key"] for m in read_metas(path)} == {key(n) for n in range(8)}


def test_the_result_is_that_of_one_writer(tmp_path: Path) -> None:
    """Samples, sources and quality are the same; only the shards have other names."""
    with writer(tmp_path / "sets") as target:
        target.add_shards(shard_set(tmp_path / "sets", "a", range(4)))
    with writer(tmp_path / "one") as target:
        fill(target, 4)
    for name in ("quality.json", "null_text.safetensors"):
        assert (tmp_path / "sets" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    records = [json.loads((tmp_path / d / "dataset.json").read_text()) for d in ("sets", "one")]
    assert records[0]["sources"] == records[1]["sources"]
    tars = [tmp_path / d / "shards" / DatasetInfo.load(tmp_path / d).shards[0].name for d in ("sets", "one")]
    assert tars[0].read_bytes() == tars[1].read_bytes()


def test_sets_are_added_to_a_dataset_whose_shards_stay(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 3})
    old = {p.name: p.read_bytes() for p in path.glob("shards/*/*.tar")}
    with writer(path) as target:
        target.add_shards(shard_set(path, "r0001-c000000", range(3, 6)))
    assert {p.name: p.read_bytes() for p in path.glob("shards/*/*.tar") if p.name in old} == old
    assert DatasetInfo.load(path).samples == 6


def test_what_is_not_as_recorded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d"
    (shard,) = shard_set(path, "a", range(3))
    (same_keys,) = shard_set(path, "b", range(2, 4))
    with writer(path) as target:
        target.add_shards([shard])
        with pytest.raises(UserError, match="is there twice"):
            target.add_shards([same_keys])
        with pytest.raises(UserError, match="with another content"):
            target.add_shards([ShardInfo(shard.name, 3, shard.bytes, "0" * 32)])
        with pytest.raises(UserError, match="missing"):
            target.add_shards([ShardInfo("f5_h16_w16/c.tar", 3, shard.bytes, shard.xxh128)])
    with pytest.raises(UserError, match="already in the dataset"):
        shard_set(path, "c", range(0)) or _twice(path)
    with pytest.raises(ValueError, match="prefix"):
        ShardSetWriter(path, VAE, TEXT, "../a")


def _twice(path: Path) -> None:
    target = ShardSetWriter(path, VAE, TEXT, "c")
    try:
        for _ in range(2):
            target.add(key(9), meta(9), **tensors(9, SMALL), bucket=SMALL)
    finally:
        target.abort()


def test_an_interrupted_set_is_replaced_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "d"
    stopped = ShardSetWriter(path, VAE, TEXT, "a")
    stopped.add(key(0), meta(0), **tensors(0, SMALL), bucket=SMALL)
    assert list(path.rglob("*.tmp"))
    whole = shard_set(path, "a", range(2))
    stopped.abort()
    assert not list(path.rglob("*.tmp"))
    again = shard_set(path, "a", range(2))
    assert whole == again


def test_keys_of_some_shards(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 2, IMAGE: 1})
    with writer(path) as target:
        target.add_shards(shard_set(path, "r0001-c000000", range(10, 12)))
        found = target.keys_of(lambda shard: "r0001" in shard.name)
        assert found == {key(10), key(11)}
