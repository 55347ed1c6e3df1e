"""The cache: the same bytes, within its limit, whatever happens to its files and whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from data_factory import SMALL, WIDE, build, key, keys_of, source
from http_folder import HttpFolder

from contentv.base.errors import UserError
from contentv.data.cache import ByteCache
from contentv.data.storage import StorageConfig


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.data"))


def held_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".data", ".tmp"))


def config(folder: Path, limit: int = 10_000_000) -> StorageConfig:
    return StorageConfig(cache_dir=str(folder), cache_bytes=limit, retries=1, retry_s=0.01, timeout_s=5.0)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return build(tmp_path / "d", {SMALL: 12, WIDE: 4})


def epoch(place: str | Path, storage: StorageConfig, **options: Any) -> list[list[str]]:
    return keys_of(source(place, storage=storage, **options), 4)


def test_the_second_epoch_asks_for_no_sample(dataset: Path, tmp_path: Path) -> None:
    with HttpFolder(dataset) as server:
        first = epoch(server.url, config(tmp_path / "c"))
        before = len(server.requests)
        assert epoch(server.url, config(tmp_path / "c")) == first == epoch(dataset, StorageConfig())
        asked = {path for _, path, _ in server.requests[before:]}
    assert not any("shards" in path for path in asked), asked
    assert "/dataset.json" in asked, "what has no checksum is never taken from the cache"


def damage(data: bytes, how: str) -> bytes:
    return {"flipped": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-3], "empty": b"", "longer": data + b"x"}[how]


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "longer"])
def test_damaged_entries_are_fetched_again(dataset: Path, tmp_path: Path, how: str) -> None:
    with HttpFolder(dataset) as server:
        expected = epoch(server.url, config(tmp_path / "c"))
        files = entries(tmp_path / "c")
        assert len(files) >= 16
        sound = {file: file.read_bytes() for file in files}
        for file in files:
            file.write_bytes(damage(sound[file], how))
        stream = source(server.url, storage=config(tmp_path / "c"))
        assert keys_of(stream, 4) == expected
        assert stream.quarantined == 0
    assert {file: file.read_bytes() for file in entries(tmp_path / "c")} == sound


def test_a_dataset_that_was_rewritten_is_not_mixed_with_the_old_one(dataset: Path, tmp_path: Path) -> None:
    with HttpFolder(dataset) as server:
        epoch(server.url, config(tmp_path / "c"))
        other = build(tmp_path / "e", {WIDE: 4, SMALL: 11})
        for file in [p for p in dataset.rglob("*") if p.is_file()]:
            file.unlink()
        for file in [p for p in other.rglob("*") if p.is_file()]:
            target = dataset / file.relative_to(other)
            target.write_bytes(file.read_bytes())
        found = {k for step in epoch(server.url, config(tmp_path / "c"), global_batch_size=2) for k in step}
    assert found <= {key(i) for i in range(11)} | {key(i, WIDE) for i in range(4)}


def test_the_limit_holds_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path / "c", 10_000)
    for i in range(9):
        cache.put(str(i), bytearray([i]) * 1000)
        os.utime(cache._path(str(i)), ns=(i * 10**9, i * 10**9))
    for used in ("0", "2"):
        assert cache.get(used) == bytearray([int(used)]) * 1000  # now the youngest
    for i in range(9, 12):
        cache.put(str(i), bytearray([i]) * 1000)
        assert held_bytes(tmp_path / "c") <= 10_000
    assert cache.get("0") is not None
    assert cache.get("2") is not None
    assert cache.get("1") is None
    assert cache.get("3") is None
    cache.put("large", bytearray(10_001))
    assert cache.get("large") is None
    assert cache.get("11", 999) is None, "of another size than asked for"


def test_random_use_never_passes_the_limit(tmp_path: Path) -> None:
    draw = random.Random(0)
    caches = [ByteCache(tmp_path / "c", 50_000) for _ in range(3)]  # as three processes would
    written: dict[str, bytearray] = {}
    for step in range(250):
        name, cache = str(draw.randrange(80)), draw.choice(caches)
        written.setdefault(name, bytearray(draw.randbytes(draw.randrange(1, 6000))))
        if draw.random() < 0.1:
            cache.drop(name)
        cache.put(name, written[name])
        assert held_bytes(tmp_path / "c") <= 50_000, step
        other = str(draw.randrange(80))
        assert draw.choice(caches).get(other) in (None, written.get(other))


def test_a_smaller_limit_is_kept_from_the_start(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path / "c", 10_000)
    for i in range(8):
        cache.put(str(i), bytearray(1000))
    ByteCache(tmp_path / "c", 3_000)
    assert held_bytes(tmp_path / "c") <= 3_000


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / "c/ab/thesis.txt", tmp_path / "c/notes.txt", tmp_path / "c/ab/x.data"]
    for file in others:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    cache = ByteCache(tmp_path / "c", 2_000)
    for i in range(300):
        cache.put(str(i), bytearray(500))
    assert all(file.read_text() == "mine" for file in others)


def put_without_end(folder: Path, name: str) -> None:
    cache = ByteCache(folder, 200_000)
    for i in range(10**9):
        cache.put(f"{name}-{i}", bytearray(f"{i:08d}".encode() * 500))


def test_killed_writers_leave_nothing_bad(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    for turn in range(8):
        writers = []
        for number in range(2):
            writers.append(os.fork())
            if writers[-1] == 0:
                put_without_end(folder, f"{turn}-{number}")
        while len(entries(folder)) < 5:
            time.sleep(0.005)
        time.sleep(0.01 * turn)
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
        assert held_bytes(folder) <= 200_000
        for file in entries(folder):
            data = file.read_bytes()
            assert len(data) == 4000
            assert data == data[:8] * 500
    cache = ByteCache(folder, 200_000)  # no lock is left behind
    for i in range(100):
        cache.put(f"after-{i}", bytearray(4000))
    assert held_bytes(folder) <= 200_000
    assert not list(folder.glob("*/*.tmp"))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-5", b"99999999999"])
def test_a_torn_count_is_put_right(tmp_path: Path, content: bytes) -> None:
    cache = ByteCache(tmp_path / "c", 10_000)
    for i in range(5):
        cache.put(str(i), bytearray(1000))
    (tmp_path / "c/bytes").write_bytes(content)
    for i in range(5, 30):
        cache.put(str(i), bytearray(1000))
        assert held_bytes(tmp_path / "c") <= 10_000
    assert cache.get("29") is not None


def test_a_full_disk_stops_the_cache_and_not_the_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with HttpFolder(dataset) as server:
        stream = source(server.url, storage=config(tmp_path / "c"))
        monkeypatch.setattr(Path, "write_bytes", full)
        assert keys_of(stream, 4) == epoch(dataset, StorageConfig())
    assert not entries(tmp_path / "c")


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        ByteCache(tmp_path / "file/c", 1000)
    assert "data.cache_dir" in caught.value.where
