"""The index of a tar: what the scan accepts, and that damage is always reported and never followed."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import xxhash
from data_factory import SMALL, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contentv.data.index import DamagedShardError, Member, ShardIndex, scan_tar, split_member

META = b'{"source": "films", "visual_raw": 1, "motion_raw": null}'


def make_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5  # a fraction makes pax write an extension header for each member
            tar.addfile(info, io.BytesIO(data))
    return path


def pair(name: str) -> list[tuple[str, bytes]]:
    return [(f"{name}.json", META), (f"{name}.safetensors", b"tensor bytes of " + name.encode())]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.json", ("a", "json")),
        ("x/y/a.json", ("x/y/a", "json")),
        ("./a.json", ("a", "json")),
        ("a.b.json", ("a", "b.json")),
        ("a", ("a", "")),
    ],
)
def test_split_member_cuts_at_the_first_dot(name: str, expected: tuple[str, str]) -> None:
    assert split_member(name) == expected


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd.json", "../a.json", "a/../../b.json", "a/./b.json", "a\\b.json", "a\0b.json", "a\nb.json",
     "a//b.json", ".json", "", "é.json", "x" * 300 + ".json", "\x1b[2J.json"],
)  # fmt: skip
def test_split_member_refuses_names_that_are_not_plain(name: str) -> None:
    with pytest.raises(ValueError):
        split_member(name)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_agrees_with_tarfile_on_every_format(tmp_path: Path, tar_format: int) -> None:
    long = "folder_" * 9 + "/" + "k" * 60 if tar_format != tarfile.USTAR_FORMAT else "folder/k"
    path = make_tar(tmp_path / "a.tar", pair("one") + pair(long), format=tar_format)
    scan = scan_tar(path)
    assert scan.damage is None
    assert scan.refused == []
    with tarfile.open(path) as tar:
        expected = {
            info.name: Member(info.offset_data, info.size, xxhash.xxh128_hexdigest(tar.extractfile(info).read()))
            for info in tar
        }
    assert {f"{e.key}.{s}": m for e in scan.index.entries for s, m in e.members.items()} == expected
    assert scan.xxh128 == xxhash.xxh128_hexdigest(path.read_bytes())
    assert [(e.source, e.visual_raw, e.motion_raw) for e in scan.index.entries] == [("films", 1.0, None)] * 2


def test_scan_refuses_links_devices_other_kinds_and_escapes(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [*pair("good"), *pair("../evil"), ("good.pkl", b"cos\nsystem"), ("good.json", b"again")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in [("l.json", tarfile.SYMTYPE), ("h.json", tarfile.LNKTYPE), ("d.json", tarfile.CHRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    scan = scan_tar(path)
    assert scan.damage is None
    assert [entry.key for entry in scan.index.entries] == ["good"]
    assert set(scan.index.entries[0].members) == {"json", "safetensors"}
    assert len(scan.refused) == 7


def damaged(data: bytes, case: str) -> bytes:
    second = data.index(b"two.json")  # the header of the third member
    return {
        "cut at a member's end": data[:second],
        "cut in a header": data[: second + 100],
        "cut in a payload": data[: second + 600],
        "cut in the end mark": data[: len(data.rstrip(b"\0")) // 512 * 512 + 1024],
        "random header": data[:second] + bytes(range(256)) * 2 + data[second + 512 :],
        "wiped header": data[:second] + bytes(1024) + data[second + 1024 :],
        "html page": b"<html>403 Forbidden</html>" * 100,
        "empty": b"",
    }[case]


@pytest.mark.parametrize(
    "case",
    ["cut at a member's end", "cut in a header", "cut in a payload", "cut in the end mark", "random header",
     "wiped header", "html page", "empty"],
)  # fmt: skip
def test_scan_reports_an_archive_that_is_not_whole(tmp_path: Path, case: str) -> None:
    path = make_tar(tmp_path / "a.tar", pair("one") + pair("two"), format=tarfile.USTAR_FORMAT)
    path.write_bytes(damaged(path.read_bytes(), case))
    scan = scan_tar(path)
    assert scan.damage is not None
    kept = [] if case in ("html page", "empty") else ["one", "two"] if case == "cut in the end mark" else ["one"]
    assert [entry.key for entry in scan.index.entries] == kept


@pytest.mark.parametrize("size_field", [b"77777777777\0", b"\x80" + bytes(6) + b"\x02\x54\x0b\xe4\0", b"\xff" * 12])
def test_scan_believes_no_claimed_size(tmp_path: Path, size_field: bytes) -> None:
    path = make_tar(tmp_path / "a.tar", pair("one") + pair("two"), format=tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    start = data.index(b"two.json")
    data[start + 124 : start + 136] = size_field
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    scan = scan_tar(path)
    assert scan.damage is not None
    assert "claims" in scan.damage
    assert [entry.key for entry in scan.index.entries] == ["one"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=40))
def test_scan_of_scribbled_tars_ends_and_stays_inside_the_file(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    path = make_tar(tmp_path / "a.tar", pair("one") + pair("two"), format=tarfile.PAX_FORMAT)
    data = bytearray(path.read_bytes())
    for place, value in edits:
        data[place] = value
    path.write_bytes(data)
    scan = scan_tar(path)
    for entry in scan.index.entries:
        for suffix, member in entry.members.items():
            assert split_member(f"{entry.key}.{suffix}") == (entry.key, suffix)
            found = data[member.offset : member.offset + member.size]
            assert len(found) == member.size
            assert xxhash.xxh128_hexdigest(bytes(found)) == member.xxh128


def test_a_scan_gives_the_bytes_of_the_writers_index(tmp_path: Path) -> None:
    build(tmp_path / "d", {SMALL: 6})
    tars = sorted((tmp_path / "d/shards" / SMALL.name).glob("*.tar"))
    assert tars
    for tar in tars:
        written = tar.with_name(f"{tar.stem}.index.json").read_bytes()
        assert scan_tar(tar).index.to_bytes() == written
        assert ShardIndex.from_bytes(written).to_bytes() == written


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"version": 1', b'"version": 2'),
        (b'"key": "one"', b'"key": "../one"'),
        (b'"json": {"offset": 512', b'"pkl": {"offset": 512'),
        (b'"offset": 512', b'"offset": -1'),
        (b'"offset": 512', b'"offset": 99999999999'),
        (b'"offset": 512', b'"offset": true'),
        (b'"samples": [', b'"samples": [{},'),
        (b'"motion_raw": null', b'"motion_raw": Infinity'),
        (b"{", b""),
    ],
)
def test_an_index_that_cannot_be_right_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = make_tar(tmp_path / "a.tar", pair("one"), format=tarfile.USTAR_FORMAT)
    good = scan_tar(path).index.to_bytes()
    assert old in good
    with pytest.raises(DamagedShardError):
        ShardIndex.from_bytes(good.replace(old, new, 1))
