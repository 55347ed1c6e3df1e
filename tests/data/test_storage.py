"""Datasets on this machine, behind HTTP with its faults, and in object storage: the same samples, or a clear end."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import xxhash
from data_factory import SMALL, WIDE, build, key, keys_of, meta, source, tensors, writer
from http_folder import HttpFolder

from contentv.base.errors import UserError
from contentv.base.types import ReaderRank, StoredBatch
from contentv.data import DatasetInfo, Normaliser, read_metas, verify_dataset
from contentv.data.quarantine import Quarantine
from contentv.data.storage import (
    BufferPool,
    LocalStorage,
    Storage,
    StorageConfig,
    is_url,
    local_path,
    open_storage,
)
from contentv.data.store import SampleStore

QUICK = StorageConfig(retries=3, retry_s=0.01, timeout_s=5.0)
SHARD = f"shards/{SMALL.name}/000000.tar"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return build(tmp_path / "d", {SMALL: 12, WIDE: 4})


def epoch(place: str | Path, **options: Any) -> list[list[str]]:
    stream = source(place, storage=QUICK, **options)
    try:
        return keys_of(stream, 4)
    finally:
        stream.close()


def test_http_gives_the_same_samples_in_the_same_order(dataset: Path) -> None:
    with HttpFolder(dataset) as server:
        assert epoch(server.url) == epoch(dataset)
        assert [m["key"] for m in read_metas(server.url)] == [m["key"] for m in read_metas(dataset)]
        assert verify_dataset(server.url) == []
        assert Normaliser.load(DatasetInfo.load(server.url).storage) == Normaliser.load(dataset)
    whole = {path for method, path, span in server.requests if span is None and method == "GET"}
    assert "/dataset.json" in whole
    assert not any(path.endswith(".tar") for path in whole), "shards are never fetched whole"


def test_a_sample_costs_one_ranged_request(dataset: Path) -> None:
    with HttpFolder(dataset) as server:
        info = DatasetInfo.load(server.url, QUICK)
        store = SampleStore(info, [SMALL.name], Quarantine())
        store.read(SMALL.name, 0)
        before = len(server.requests)
        sample = store.read(SMALL.name, 3)
    assert sample.meta["key"] == key(3)
    ((method, path, span),) = server.requests[before:]
    assert (method, path) == ("GET", f"/{SHARD}")
    assert span is not None


@pytest.mark.parametrize("fault", ["503", "429", "drop", "short"])
def test_two_of_three_requests_failing_changes_nothing(dataset: Path, fault: str) -> None:
    expected = epoch(dataset)
    with HttpFolder(dataset, lambda number, path, span: fault if number % 3 else "") as server:
        assert epoch(server.url) == expected
        assert len(server.requests) > 30


def test_a_server_that_stalls_is_asked_again(dataset: Path) -> None:
    config = StorageConfig(retries=3, retry_s=0.01, timeout_s=0.3)
    with HttpFolder(dataset, lambda number, path, span: "stall" if number in (1, 4) else "") as server:
        stream = source(server.url, storage=config)
        assert keys_of(stream, 4) == epoch(dataset)


@pytest.mark.parametrize("fault", ["503", "drop"])
def test_a_source_that_is_gone_stops_the_run_and_going_on_repeats_nothing(dataset: Path, fault: str) -> None:
    expected = epoch(dataset)
    down = threading.Event()
    with HttpFolder(dataset, lambda number, path, span: fault if down.is_set() else "") as server:
        stream = source(server.url, storage=QUICK)
        first = keys_of(stream, 2)
        state = stream.state_dict()
        down.set()
        with pytest.raises(UserError, match="the source of the data is gone") as caught:
            keys_of(stream, 2)
        assert "4 times" in caught.value.what
        assert server.url in caught.value.where
        assert stream.quarantined == 0, "what cannot be reached is not damaged"
        down.clear()
        resumed = source(server.url, storage=QUICK)
        resumed.load_state_dict(state)
        assert first + keys_of(resumed, 2) == expected


def test_a_shard_that_vanishes_in_mid_epoch_is_named(dataset: Path) -> None:
    with HttpFolder(dataset) as server:
        stream = source(server.url, storage=QUICK, buckets=[SMALL.name])
        keys_of(stream, 1)
        for tar in dataset.glob("shards/*/*.tar"):
            tar.unlink()
        count = len(server.requests)
        with pytest.raises(UserError, match="missing") as caught:
            keys_of(stream, 3)
        assert ".tar" in caught.value.where
        assert len(server.requests) - count < 12, "a file that is not there is not asked for again and again"
        assert stream.quarantined == 0


def test_a_shard_cut_short_on_the_server_is_damage_and_not_a_failure(dataset: Path) -> None:
    tar = dataset / SHARD
    tar.write_bytes(tar.read_bytes()[:5000])
    with HttpFolder(dataset) as server:
        remote = source(server.url, storage=QUICK)
        assert keys_of(remote, 4) == epoch(dataset)
        local = source(dataset)
        keys_of(local, 4)
        assert remote.quarantined == local.quarantined > 0


def test_a_faulty_transfer_is_fetched_again_and_lasting_damage_is_quarantined(dataset: Path) -> None:
    expected = epoch(dataset)
    broken = {"once": 1}

    def flip(path: str, part: bytes) -> bytes:
        if path.endswith(".tar") and broken["once"] > 0:
            broken["once"] -= 1
            return part[:-1] + bytes([part[-1] ^ 1])
        return part

    with HttpFolder(dataset) as server:
        server.altered = flip
        stream = source(server.url, storage=QUICK)
        assert keys_of(stream, 4) == expected
        assert (stream.quarantined, broken["once"]) == (0, 0)
        broken["once"] = 1 << 30
        with pytest.raises(UserError, match="damaged"):
            keys_of(source(server.url, storage=QUICK, max_bad_samples=2), 4)


def test_a_server_without_ranges_is_refused(dataset: Path) -> None:
    with HttpFolder(dataset, ranges=False) as server, pytest.raises(UserError, match="knows no ranges"):
        epoch(server.url)


@pytest.mark.parametrize("status", ["401", "403"])
def test_denied_access_is_told_at_once(dataset: Path, status: str) -> None:
    with HttpFolder(dataset, lambda number, path, span: status) as server:
        with pytest.raises(UserError, match="access is denied"):
            DatasetInfo.load(server.url, QUICK)
        assert len(server.requests) == 1


def test_redirects_do_not_leave_http(dataset: Path) -> None:
    with HttpFolder(dataset, lambda number, path, span: "redirect") as server:
        server.redirect_to = f"file://{dataset}/dataset.json"
        with pytest.raises(UserError):
            DatasetInfo.load(server.url, StorageConfig(retries=0, retry_s=0.01, timeout_s=2.0))


def test_nothing_listens_and_no_dataset_are_told_apart(tmp_path: Path) -> None:
    with HttpFolder(tmp_path) as server, pytest.raises(UserError, match=r"not a dataset: it has no dataset\.json"):
        DatasetInfo.load(server.url, QUICK)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(UserError, match="the source of the data is gone"):
        DatasetInfo.load(f"http://127.0.0.1:{port}/d", QUICK)


def test_object_storage_by_fsspec(dataset: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/bucket/d", recursive=True)
    try:
        url = "memory://bucket/d"
        assert epoch(url) == epoch(dataset)
        assert verify_dataset(url) == []
        with pytest.raises(UserError, match="folder of this machine"):
            _ = DatasetInfo.load(url).path
        memory.rm("/bucket/d/shards", recursive=True)
        with pytest.raises(UserError, match="missing"):
            epoch(url)
    finally:
        memory.rm("/bucket", recursive=True)


def test_missing_indexes_are_made_from_afar_and_kept_nowhere(dataset: Path) -> None:
    expected = epoch(dataset)
    indexes = sorted(dataset.glob("shards/*/*.index.json"))
    for index in indexes:
        index.unlink()
    with HttpFolder(dataset) as server:
        assert epoch(server.url) == expected
    assert not any(index.exists() for index in indexes)


@pytest.mark.parametrize(
    "place",
    ["pipe:cat /etc/passwd", "pipe://cat", "filecache://x", "simplecache::http://x/y", "zip://a::file://b.zip",
     "reference://x", "github://a:b@c/d", "nonsense://x/y", "dir::memory://x", "local://x"],
)  # fmt: skip
def test_only_plain_stores_are_spoken_to(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        DatasetInfo.load(place)
    assert caught.value.where == "data.path"
    assert "s3" in caught.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["https://me:secret@host/d", "https://host/d?token=secret", "s3://key:secret@b/d"])
def test_secrets_do_not_belong_into_a_url_and_are_not_repeated(url: str) -> None:
    with pytest.raises(UserError) as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)
    assert "netrc" in caught.value.remedy


def test_a_backend_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="s3fs") as caught:
        open_storage("s3://bucket/d")
    assert "contentv[storage]" in caught.value.remedy


def test_what_is_a_url_and_what_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:name").mkdir()
    assert all(is_url(place) for place in ("https://a/b", "s3://a", "pipe:x"))
    assert not any(is_url(place) for place in ("a/b", "/a", "file:///a", "odd:name", Path("s3://a")))
    assert local_path("file:///a/b") == Path("/a/b")
    assert open_storage(tmp_path).local == tmp_path


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "a\\b", "a\0b", ""])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    memory = open_storage("memory://inside")
    for storage in (LocalStorage(tmp_path), memory):
        for call in (lambda s: s.read(name, 0, 1), lambda s: s.read_all(name), lambda s: s.size(name)):
            with pytest.raises(ValueError):
                call(storage)


def test_local_reads_of_any_place(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "a").write_bytes(content)
    storage = LocalStorage(tmp_path)
    assert isinstance(storage, Storage)
    for offset, size in (
        (0, 10),
        (7, 200_000),
        (100_000, 200_000),
        (299_999, 5),
        (300_000, 1),
        (1 << 40, 1 << 40),
        (5, 0),
    ):
        assert bytes(storage.read("a", offset, size)) == content[offset : offset + size]
    assert storage.read_all("a") == content
    assert storage.size("a") == len(content)
    assert storage.size("b") is storage.read_all("b") is None
    with pytest.raises(UserError, match="missing"):
        storage.read("b", 0, 1)


def test_no_more_than_a_few_files_stay_open(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / str(i)).write_bytes(bytes([i % 251]))
    storage = LocalStorage(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert [storage.read(str(i), 0, 1)[0] for i in range(300)] == [i % 251 for i in range(300)]
    assert len(os.listdir("/proc/self/fd")) - before <= 128
    storage.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_network_disk_that_comes_back_costs_nothing_and_one_that_does_not_stops(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = epoch(dataset)
    real, fails = os.preadv, {"left": 2, "errno": errno.ESTALE}

    def flaky(*arguments: Any) -> int:
        if fails["left"] > 0:
            fails["left"] -= 1
            raise OSError(fails["errno"], "from the test")
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", flaky)
    assert epoch(dataset) == expected
    assert fails["left"] == 0
    fails["left"] = 1 << 30
    with pytest.raises(UserError, match="the source of the data is gone"):
        epoch(dataset)
    fails.update(left=1, errno=errno.EIO)
    stream = source(dataset)
    keys_of(stream, 4)
    assert stream.quarantined == 1, "a bad sector is damage"


def test_memory_is_handed_out_again_only_when_nobody_holds_it() -> None:
    pool = BufferPool(max_bytes=1 << 20)
    first = pool.take(100_000)
    first[:5] = b"first"
    slice_of_it = memoryview(first)[:5]
    second = pool.take(100_000)
    second[:6] = b"second"
    del first
    assert pool.take(100_000)[:5] != b"first" or bytes(slice_of_it) == b"first"
    third = pool.take(100_000)
    third[:5] = b"third"
    assert bytes(slice_of_it) == b"first", "a slice still holds it"
    held = [pool.take(100_000) for _ in range(40)]
    for i, buffer in enumerate(held):
        buffer[:1] = bytes([i])
    assert [buffer[0] for buffer in held] == list(range(40))
    assert len({id(memoryview(buffer).obj) for buffer in held}) == 40


def test_tensors_keep_the_bytes_they_were_read_with(dataset: Path) -> None:
    store = SampleStore(DatasetInfo.load(dataset), [SMALL.name], Quarantine())
    kept = [store.read(SMALL.name, i) for i in range(12)]
    sums = [
        xxhash.xxh64_hexdigest(s.latents.view(-1).view(dtype=s.latents.dtype).float().numpy().tobytes()) for s in kept
    ]
    for _ in range(3):
        for i in range(12):
            store.read(SMALL.name, i)
    again = [xxhash.xxh64_hexdigest(s.latents.float().contiguous().numpy().tobytes()) for s in kept]
    assert again == sums
    assert len(set(sums)) == 12


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_read_and_replace_as_one_does(tmp_path: Path, threads: int) -> None:
    path = build(tmp_path / "d", {SMALL: 60})
    bad = {3, 4, 17, 30, 31, 32, 59}
    for i in bad:
        tar = next(t for t in path.glob("shards/*/*.tar") if f"{key(i)}.json".encode() in t.read_bytes())
        data = bytearray(tar.read_bytes())
        data[data.index(f"{key(i)}.json".encode()) + 512 + 5] ^= 1
        tar.write_bytes(data)
    info = DatasetInfo.load(path)

    def read(order: list[int], executor: ThreadPoolExecutor | None) -> tuple[dict[int, str], int]:
        quarantine = Quarantine(tmp_path / f"q{threads}.jsonl", max_samples=100)
        store = SampleStore(info, [SMALL.name], quarantine)
        samples = store.read_many(SMALL.name, order, executor)
        return {n: s.meta["key"] for n, s in zip(order, samples, strict=True)}, quarantine.count

    forward = list(range(60))
    expected = {n: key(next(m % 60 for m in range(n, n + 60) if m % 60 not in bad)) for n in forward}
    assert read(forward, None) == (expected, len(bad))
    with ThreadPoolExecutor(threads) as executor:
        for order in (forward, forward[::-1], forward[30:] + forward[:30]):
            assert read(order, executor) == (expected, len(bad)), "each fault is counted once"
    lines = (tmp_path / f"q{threads}.jsonl").read_text().splitlines()
    assert len(lines) == len(bad)


def rows_of(batches: list[StoredBatch]) -> dict[str, tuple[bytes, ...]]:
    found = {}
    for batch in batches:
        for i, name in enumerate(batch.keys):
            values = (batch.latents[i], batch.text.tokens[i], batch.text.pooled[i])
            found[name] = tuple(value.float().numpy().tobytes() for value in values)
    return found


@pytest.mark.parametrize("workers", [0, 3])
def test_what_is_read_into_batches_is_what_was_written(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "d"
    with writer(path, max_shard_bytes=9_000) as target:
        for i in range(40):  # dtypes that change within and between batches, and media between the members
            dtype = (torch.bfloat16, torch.float16, torch.float32)[i // 7 % 3]
            media = bytes(i * 900) if i % 4 == 3 else None
            target.add(key(i), meta(i), **tensors(i, dtype=dtype), bucket=SMALL, media=media)
    expected = {
        key(i): tuple(
            value.float().numpy().tobytes()
            for value in tensors(i, dtype=(torch.bfloat16, torch.float16, torch.float32)[i // 7 % 3]).values()
        )
        for i in range(40)
    }
    stream = source(path, global_batch_size=8, micro_batch_size=4, workers=workers)
    batches = [batch for _ in range(15) for batch in next(stream)]
    assert rows_of(batches[:10]) == rows_of(batches) == expected
    assert {batch.latents.dtype for batch in batches} >= {torch.float32}
    stream.close()
    with HttpFolder(path) as server:
        remote = source(server.url, global_batch_size=8, micro_batch_size=4, workers=workers, storage=QUICK)
        assert rows_of([batch for _ in range(5) for batch in next(remote)]) == expected
        remote.close()


def test_batches_keep_the_stored_dtype_and_their_own_memory(dataset: Path) -> None:
    stream = source(dataset, buckets=[SMALL.name], global_batch_size=4, micro_batch_size=4)
    kept = [next(stream)[0] for _ in range(9)]
    assert all(batch.latents.dtype == torch.bfloat16 for batch in kept)
    assert all(batch.latents.is_contiguous() for batch in kept)
    expected = {key(i): tensors(i)["latents"] for i in range(12)}
    for batch in kept:
        for i, name in enumerate(batch.keys):
            assert torch.equal(batch.latents[i], expected[name])


def test_ranks_that_read_from_different_places_replace_alike(dataset: Path) -> None:
    data = bytearray((dataset / SHARD).read_bytes())
    data[700] ^= 1
    (dataset / SHARD).write_bytes(data)
    whole = epoch(dataset)
    with HttpFolder(dataset) as server:
        halves = [epoch(place, reader=ReaderRank(rank, 2)) for rank, place in enumerate((dataset, server.url))]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_config_values_are_checked() -> None:
    for name, value in (("cache_bytes", 0), ("retries", -1), ("retry_s", 0.0), ("timeout_s", float("inf"))):
        with pytest.raises(UserError) as caught:
            StorageConfig(**{name: value})
        assert caught.value.where == f"data.{name}"


def test_a_fork_after_reading_reads_on(dataset: Path) -> None:
    code = f"""
import os
from contentv.data import DatasetInfo
with_url = DatasetInfo.load({{url!r}})
pid = os.fork()
if pid == 0:
    os._exit(0 if with_url.storage.size({SHARD!r}) > 0 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    with HttpFolder(dataset) as server:
        done = subprocess.run(
            [sys.executable, "-c", code.replace("{url!r}", repr(server.url))], timeout=60, check=False
        )
    assert done.returncode == 0
