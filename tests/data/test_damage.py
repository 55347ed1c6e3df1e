"""Damaged and hostile shards: every fault is found, named, counted and survived, and nothing in them runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from data_factory import SMALL, WIDE, build, key, keys_of, meta, source, tensors, writer
from safetensors.torch import save

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.base.types import ReaderRank
from contentv.data import DatasetSource, read_metas, verify_dataset
from contentv.data.index import scan_tar

SHARD = f"shards/{SMALL.name}/000000.tar"


def place(path: Path, name: str) -> tuple[int, int]:
    """Returns offset and size of a member's payload, as tarfile sees them."""
    with tarfile.open(path / SHARD) as tar:
        info = tar.getmember(name)
        return info.offset_data, info.size


def flip(path: Path, name: str, byte: int = 40) -> None:
    offset, _ = place(path, name)
    data = bytearray((path / SHARD).read_bytes())
    data[offset + byte] ^= 0x10
    (path / SHARD).write_bytes(data)


def cut(path: Path, name: str, into: int) -> None:
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(data[: place(path, name)[0] + into])


def one_shard(path: Path, count: int = 12) -> Path:
    with writer(path) as target:
        for i in range(count):
            target.add(key(i), meta(i), **tensors(i), bucket=SMALL)
    return path


def quarantined(path: Path) -> list[tuple[str, str, str]]:
    return [tuple(json.loads(line)[n] for n in ("shard", "key", "reason")) for line in path.read_text().splitlines()]


def one_epoch(path: Path, tmp_path: Path, **options: Any) -> tuple[list[str], DatasetSource]:
    stream = source(path, quarantine_path=tmp_path / "run/quarantine.jsonl", **options)
    return [k for step in keys_of(stream, 3) for k in step], stream


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_flipped_bit_costs_exactly_that_sample(tmp_path: Path, suffix: str) -> None:
    path = one_shard(tmp_path / "d")
    intact, _ = one_epoch(path, tmp_path)
    flip(path, f"{key(4)}.{suffix}")
    found, stream = one_epoch(path, tmp_path)
    assert found == [key(5) if k == key(4) else k for k in intact], "replaced by the next one of the bucket"
    assert stream.quarantined == 1
    assert quarantined(tmp_path / "run/quarantine.jsonl") == [
        (f"{SMALL.name}/000000.tar", key(4), f"the member at byte {place(path, f'{key(4)}.{suffix}')[0]} "
         "is not what was written (checksum)"),
    ]  # fmt: skip
    keys_of(stream, 6)
    assert stream.quarantined == 1, "a sample known to be damaged is not read again"
    one_epoch(path, tmp_path)
    assert len(quarantined(tmp_path / "run/quarantine.jsonl")) == 1, "nor written down again by the next run"


def test_all_ranks_and_restarts_replace_alike(tmp_path: Path) -> None:
    path = one_shard(tmp_path / "d")
    for i in (0, 4, 5, 11):
        flip(path, f"{key(i)}.safetensors")
    whole, _ = one_epoch(path, tmp_path)
    assert len(whole) == 12
    assert not {key(i) for i in (0, 4, 5, 11)} & set(whole)
    ranks = [source(path, reader=ReaderRank(rank, 2)) for rank in range(2)]
    halves = [keys_of(rank, 3) for rank in ranks]
    assert [k for a, b in zip(*halves, strict=True) for k in a + b] == whole
    stopped, resumed = source(path, reader=ReaderRank(1, 2)), source(path, workers=2)
    keys_of(stopped, 2)
    resumed.load_state_dict(stopped.state_dict())
    assert keys_of(resumed, 1)[0] == whole[8:]


@pytest.mark.parametrize("into", [0, 100])
def test_a_shard_cut_short_delivers_all_that_is_left(tmp_path: Path, into: int) -> None:
    path = one_shard(tmp_path / "d")
    cut(path, f"{key(8)}.safetensors", into)
    found, stream = one_epoch(path, tmp_path)
    assert set(found) == {key(i) for i in range(8)}
    assert stream.quarantined == 4
    assert all("cut short" in reason for _, _, reason in quarantined(tmp_path / "run/quarantine.jsonl"))


@pytest.mark.parametrize("damage", [bytes(512), os.urandom(512)], ids=["wiped", "random"])
def test_damaged_headers_cost_nothing(tmp_path: Path, damage: bytes) -> None:
    path = one_shard(tmp_path / "d")
    intact, _ = one_epoch(path, tmp_path)
    start = place(path, f"{key(3)}.json")[0] - 512
    data = bytearray((path / SHARD).read_bytes())
    data[start : start + 512] = damage
    (path / SHARD).write_bytes(data)
    found, stream = one_epoch(path, tmp_path)
    assert found == intact
    assert stream.quarantined == 0
    assert verify_dataset(path) == [f"{SMALL.name}/000000.tar: the tar is not what was written (checksum)"]


@pytest.mark.parametrize("content", [b"", b"<html>403 Forbidden</html>" * 99])
@pytest.mark.parametrize("with_index", [True, False])
def test_a_file_that_is_no_tar_is_survived_within_the_budget(tmp_path: Path, content: bytes, with_index: bool) -> None:
    path = build(tmp_path / "d", {SMALL: 12})
    shards = [s for s in json.loads((path / "dataset.json").read_text())["shards"]]
    assert len(shards) == 2
    (path / SHARD).write_bytes(content)
    if not with_index:
        (path / SHARD.replace(".tar", ".index.json")).unlink()
    found, stream = one_epoch(path, tmp_path)
    assert set(found) == {key(i) for i in range(shards[0]["samples"], 12)}
    assert stream.quarantined == shards[0]["samples"]
    lines = quarantined(tmp_path / "run/quarantine.jsonl")
    assert len(lines) == (shards[0]["samples"] if with_index else 1)
    with pytest.raises(UserError, match="damaged"):
        keys_of(source(path, max_bad_samples=2), 4)


def test_too_much_damage_stops_with_the_count(tmp_path: Path) -> None:
    path = one_shard(tmp_path / "d")
    for i in range(4):
        flip(path, f"{key(i)}.safetensors")
    with pytest.raises(UserError, match=r"3 of .* samples read are damaged") as caught:
        one_epoch(path, tmp_path, max_bad_samples=2, max_bad_fraction=0.0)
    assert "quarantine.jsonl" in caught.value.remedy
    assert source(path, max_bad_samples=2, max_bad_fraction=0.9).quarantined == 0
    stream = source(path, max_bad_samples=0, max_bad_fraction=1.0)
    keys_of(stream, 6)
    assert stream.quarantined == 4
    for i in range(4, 12):
        flip(path, f"{key(i)}.safetensors")
    with pytest.raises(UserError, match="every sample"):
        keys_of(source(path, max_bad_samples=100), 1)


def test_damage_met_while_reading_ahead_is_told_to_the_consumer(tmp_path: Path) -> None:
    path = one_shard(tmp_path / "d")
    for i in range(12):
        flip(path, f"{key(i)}.json")
    stream = source(path, prefetch=2, max_bad_samples=3)
    with pytest.raises(UserError, match="damaged"):
        next(stream)
    stream.close()


@pytest.mark.parametrize("content", [None, b"{}", b"\xff\xfe", b'{"version": 1, "bytes": 9, "samples": []}', "stale"])
def test_a_missing_or_wrong_index_is_made_again(tmp_path: Path, content: bytes | str | None) -> None:
    path = one_shard(tmp_path / "d")
    index = path / SHARD.replace(".tar", ".index.json")
    written = index.read_bytes()
    intact, _ = one_epoch(path, tmp_path)
    if content is None:
        index.unlink()
    else:
        index.write_bytes(written.replace(b'"offset": 1', b'"offset": 2') if isinstance(content, str) else content)
    found, stream = one_epoch(path, tmp_path)
    assert found == intact
    assert stream.quarantined == 0
    assert index.read_bytes() == written


def test_a_new_index_never_blesses_an_altered_shard(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 12})
    first = json.loads((path / "dataset.json").read_text())["shards"][0]["samples"]
    index = path / SHARD.replace(".tar", ".index.json")
    index.unlink()
    flip(path, f"{key(1)}.safetensors", byte=-600)  # in the padding or payload before it: no header is touched
    found, stream = one_epoch(path, tmp_path)
    assert set(found) == {key(i) for i in range(first, 12)}
    assert stream.quarantined == first
    ((_, bad_key, reason),) = quarantined(tmp_path / "run/quarantine.jsonl")
    assert (bad_key, "whole shard" in reason) == ("*", True)
    assert not index.exists()


def test_a_dataset_without_indexes_on_a_read_only_disk_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = one_shard(tmp_path / "d")
    intact, _ = one_epoch(path, tmp_path)
    index = path / SHARD.replace(".tar", ".index.json")
    index.unlink()

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("contentv.data.entries.write_atomic", read_only)
    assert one_epoch(path, tmp_path)[0] == intact
    assert not index.exists()


# --- members that a hostile or careless writer could produce: checksums and index are right, contents are not ---

Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], dict[str, bytes]]


def stored(record: dict[str, Any], values: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {"json": json.dumps(record).encode(), "safetensors": save(values)}


def header_claiming(size: int) -> bytes:
    return size.to_bytes(8, "little") + b"{}" + bytes(200)


def raw_header(header: dict[str, Any], payload: int = 300) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(payload)


HOSTILE: dict[str, Edit] = {
    "KEY.json is of another sample": lambda m, t: stored({**m, "key": key(0)}, t),
    "KEY.json: Object missing required field `caption`": lambda m, t: stored(
        {k: v for k, v in m.items() if k != "caption"}, t
    ),
    "fps is": lambda m, t: stored({**m, "fps": "fast"}, t),
    "num_frames is": lambda m, t: stored({**m, "num_frames": 10**400}, t),
    "source 'elsewhere' is not in dataset.json": lambda m, t: stored({**m, "source": "elsewhere"}, t),
    "KEY.json is not JSON": lambda m, t: {**stored(m, t), "json": b"\x80\x04pickle"},
    "KEY.json: Expected `object`, got `array`": lambda m, t: {**stored(m, t), "json": b"[" * 200_000},
    "KEY.json is not JSON (maximum": lambda m, t: {**stored(m, t), "json": b'{"scores": {"a":' + b"[" * 200_000},
    "at most 1048576 are possible": lambda m, t: {**stored(m, t), "json": b" " * (1 << 21)},
    "latents is F64": lambda m, t: stored(m, {**t, "latents": t["latents"].double()}),
    "latents is I64": lambda m, t: stored(m, {**t, "latents": t["latents"].long()}),
    "latents is F32 (2, 2, 2, 3)": lambda m, t: stored(m, {**t, "latents": torch.zeros(2, 2, 2, 3)}),
    "text_tokens is F32 (1, 6)": lambda m, t: stored(m, {**t, "text_tokens": torch.zeros(1, 6)}),
    "KEY.safetensors holds ['latents', 'text_pooled']": lambda m, t: stored(
        m, {k: v for k, v in t.items() if k != "text_tokens"}
    ),
    "KEY.safetensors holds ['extra'": lambda m, t: stored(m, {**t, "extra": torch.zeros(1)}),
    "latents has values that are not finite": lambda m, t: stored(m, {**t, "latents": t["latents"] / 0.0}),
    "claims a header of 1099511627776 bytes": lambda m, t: {**stored(m, t), "safetensors": header_claiming(1 << 40)},
    "claims a header of 60000 bytes": lambda m, t: {**stored(m, t), "safetensors": header_claiming(60_000)},
    "cannot be read": lambda m, t: {**stored(m, t), "safetensors": raw_header({"latents": 3})},
    "is not valid": lambda m, t: {
        **stored(m, t),
        "safetensors": raw_header(
            {n: {"dtype": "F32", "shape": list(v.shape), "data_offsets": [0, 1 << 50]} for n, v in t.items()}
        ),
    },
    "bytes where at most": lambda m, t: {**stored(m, t), "safetensors": bytes(200_000)},
    "claims a header of": lambda m, t: {**stored(m, t), "safetensors": pickle.dumps(print)},
    "KEY.safetensors claims a header of 0": lambda m, t: {**stored(m, t), "safetensors": b""},
}


def list_unchecked(path: Path, name: str) -> None:
    """Makes a tar part of a dataset with checksums that are right, as a hostile writer would."""
    tar = path / "shards" / name
    index = scan_tar(tar).index
    tar.with_name(f"{tar.stem}.index.json").write_bytes(index.to_bytes())
    record = json.loads((path / "dataset.json").read_text())
    samples = len(index.entries)
    record["buckets"][name.split("/")[0]]["samples"] += samples
    record.pop("table", None)  # whose rows are fewer now
    record["shards"].append(
        {"name": name, "samples": samples, "bytes": index.num_bytes,
         "xxh128": xxhash.xxh128_hexdigest(tar.read_bytes()),
         "index_xxh128": xxhash.xxh128_hexdigest(index.to_bytes())}
    )  # fmt: skip
    (path / "dataset.json").write_text(json.dumps(record))


@pytest.mark.parametrize("reason", HOSTILE, ids=list(HOSTILE))
def test_contents_are_never_trusted(tmp_path: Path, reason: str) -> None:
    path = one_shard(tmp_path / "d", 4)
    with tarfile.open(path / "shards" / SMALL.name / "others.tar", "w") as tar:
        record = {**meta(9), "key": "odd", "motion_raw": 1.0}
        for suffix, data in HOSTILE[reason](record, tensors(9)).items():
            info = tarfile.TarInfo(f"odd.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    list_unchecked(path, f"{SMALL.name}/others.tar")
    stream = source(path, quarantine_path=tmp_path / "q.jsonl")
    seen = {k for step in keys_of(stream, 4) for k in step}
    assert seen == {key(i) for i in range(4)}
    ((shard, bad_key, told),) = quarantined(tmp_path / "q.jsonl")
    assert (shard, bad_key) == (f"{SMALL.name}/others.tar", "odd")
    assert reason in told
    assert len(verify_dataset(path)) == 1
    assert {m["key"] for m in read_metas(path)} >= seen


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 30_000, "cannot be read"),
        (b'{"version": 1, "bytes": ' + b"9" * 5000 + b', "samples": []}', "cannot be read"),
        (b" " * (1 << 20), "an index of"),
    ],
    ids=["depth", "digits", "size"],
)
def test_an_index_that_is_a_bomb_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, told: str
) -> None:
    path = one_shard(tmp_path / "d", 4)
    record = json.loads((path / "dataset.json").read_text())
    record["shards"][0]["index_xxh128"] = None if told != "an index of" else xxhash.xxh128_hexdigest(content)
    (path / "dataset.json").write_text(json.dumps(record))
    (path / SHARD.replace(".tar", ".index.json")).write_bytes(content)
    get_logger().propagate = True
    try:
        assert {k for step in keys_of(source(path), 2) for k in step} == {key(i) for i in range(4)}
    finally:
        get_logger().propagate = False
    assert told in caplog.text


def test_a_member_never_takes_more_memory_than_its_tar_has_bytes(tmp_path: Path) -> None:
    path = one_shard(tmp_path / "d", 4)
    index = path / SHARD.replace(".tar", ".index.json")
    record = json.loads(index.read_text())
    dataset = json.loads((path / "dataset.json").read_text())
    huge = 1 << 44
    record["bytes"] = dataset["shards"][0]["bytes"] = dataset["totals"]["bytes"] = 4 * huge
    dataset["vae"].update(temporal_factor=1, spatial_factor=1)
    dataset["buckets"] = {"f99999_h99999_w99999": {"samples": 4, "latent_shape": [2, 99999, 99999, 99999]}}
    dataset["shards"][0]["name"] = "f99999_h99999_w99999/000000.tar"
    for sample in record["samples"]:
        sample["members"]["safetensors"]["size"] = huge - 1000
    text = ",\n".join(json.dumps(sample) for sample in record["samples"])
    index.write_text(f'{{"version": 1, "bytes": {4 * huge}, "samples": [\n{text}\n]}}\n')
    dataset["shards"][0]["index_xxh128"] = xxhash.xxh128_hexdigest(index.read_bytes())
    (path / "dataset.json").write_text(json.dumps(dataset))
    (path / "shards" / SMALL.name).rename(path / "shards/f99999_h99999_w99999")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="every sample"):
            keys_of(source(path), 1)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['CANARY']}",)


def test_nothing_in_a_shard_is_executed_or_written_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(canary))
    path = one_shard(tmp_path / "d", 4)
    poison = pickle.dumps(Canary())
    names = [f"bad.{suffix}" for suffix in ("pkl", "pickle", "pth", "pt", "pyd", "npy", "json", "safetensors")]
    escapes = ["../../escaped.json", "../../escaped.safetensors", f"{tmp_path}/absolute.json", "a/../../b.json"]
    with tarfile.open(path / "shards" / SMALL.name / "others.tar", "w") as tar:
        for name in names + escapes:
            info = tarfile.TarInfo(name)
            info.size = len(poison)
            tar.addfile(info, io.BytesIO(poison))
        link = tarfile.TarInfo("link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    with writer(path) as target:
        assert target.adopt_shards() == []
    assert len(target.left_out) == 12, "`bad` has a json and a safetensors member by name, and neither is one"
    list_unchecked(path, f"{SMALL.name}/others.tar")
    stream = source(path)
    assert {k for step in keys_of(stream, 5) for k in step} == {key(i) for i in range(4)}
    assert stream.quarantined == 1
    assert len(list(read_metas(path))) == 4
    assert len(verify_dataset(path)) == 1
    assert not canary.exists()
    assert {p.name for p in set(tmp_path.rglob("*")) - set(before)} == {"others.index.json"}


def test_an_index_that_points_elsewhere_is_caught_even_with_matching_checksums(tmp_path: Path) -> None:
    path = one_shard(tmp_path / "d", 4)
    index = path / SHARD.replace(".tar", ".index.json")
    record = json.loads(index.read_text())
    swapped = record["samples"]
    swapped[0]["members"], swapped[1]["members"] = swapped[1]["members"], swapped[0]["members"]
    swapped[2]["visual_raw"] = 99.0
    index.write_text(json.dumps(record))
    dataset = json.loads((path / "dataset.json").read_text())
    dataset["shards"][0]["index_xxh128"] = xxhash.xxh128_hexdigest(index.read_bytes())
    (path / "dataset.json").write_text(json.dumps(dataset))
    found, _ = one_epoch(path, tmp_path)
    assert set(found) == {key(3)}
    reasons = {reason for _, _, reason in quarantined(tmp_path / "run/quarantine.jsonl")}
    assert any("another sample" in reason for reason in reasons)
    assert any("disagree" in reason for reason in reasons)


def test_shards_in_use_may_be_replaced_without_wrong_data(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 8, WIDE: 4})
    stream = source(path, buckets=[SMALL.name])
    next(stream)
    other = build(tmp_path / "e", {SMALL: 9})
    os.replace(other / SHARD, path / SHARD)
    stream.close()  # reopens the shards
    for step in keys_of(stream, 4):
        assert set(step) <= {key(i) for i in range(9)}
    (path / SHARD).unlink()
    stream.close()
    with pytest.raises(UserError, match="missing"):
        keys_of(stream, 4)
