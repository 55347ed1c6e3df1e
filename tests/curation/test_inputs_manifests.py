"""Manifests: every kind of table, every name of a column, and every kind of broken row."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contentv.base.errors import UserError
from contentv.curation.captions import CaptionError
from contentv.curation.inputs import Inputs, open_inputs
from contentv.curation.manifests import ManifestConfig
from contentv.curation.media import MediaItem
from contentv.curation.video_io import DecodeError

KINDS = ("csv", "tsv", "jsonl", "parquet")


def inputs_of(path: Path, **changes: Any) -> Inputs:
    inputs = open_inputs(SimpleNamespace(input=str(path), manifest=ManifestConfig(**changes)))
    assert isinstance(inputs, Inputs)
    assert inputs.units == sorted(set(inputs.units))
    return inputs


def every_item(inputs: Inputs) -> list[MediaItem | DecodeError]:
    return [item for unit in inputs.units for item in inputs.items(unit)]


def items_of(path: Path, **changes: Any) -> list[MediaItem]:
    items = every_item(inputs_of(path, **changes))
    assert all(isinstance(item, MediaItem) for item in items), items
    return items  # type: ignore[return-value]


def errors_of(path: Path, **changes: Any) -> list[tuple[str, str, str]]:
    return [(e.file, e.rule, e.reason) for e in every_item(inputs_of(path, **changes)) if isinstance(e, DecodeError)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a table in the format of its suffix, with the usual writers."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_gives_the_same_items(kind: str, tmp_path: Path) -> None:
    rows = [
        {"path": "web/a.mp4", "caption": 'with "quotes", commas\nand a new line', "source": None},
        {"path": "./b.MOV", "caption": "  über 雪 ", "source": "own"},
        {"path": "c.jpg", "caption": None, "source": None},
        {"path": str(tmp_path / "d.mp4"), "caption": "absolute", "source": ""},
        {"path": "../e.mp4", "caption": "outside", "source": None},
    ]
    items = items_of(write(tmp_path / f"m.{kind}", rows))
    outside = str(tmp_path.parent / "e.mp4")
    assert [item.name for item in items] == ["web/a.mp4", "b.MOV", "c.jpg", str(tmp_path / "d.mp4"), outside]
    paths = [tmp_path / "web/a.mp4", tmp_path / "b.MOV", tmp_path / "c.jpg", tmp_path / "d.mp4", Path(outside)]
    assert [item.path for item in items] == [str(path) for path in paths]
    assert [item.source for item in items] == ["web", "own", "default", "default", "default"]
    assert [item.caption for item in items] == [rows[0]["caption"], "über 雪", None, "absolute", "outside"]
    assert [item.is_image for item in items] == [False, False, True, False, False]


@pytest.mark.parametrize(
    "names",
    [
        ("path", "text"), ("video", "prompt"), ("video_path", "cap"), ("file", "caption"), ("file_name", "text"),
        ("Path", "Caption"),
    ],
)  # fmt: skip
def test_columns_of_other_tools_are_known(names: tuple[str, str], tmp_path: Path) -> None:
    rows = [{"id": n, names[0]: f"{n}.mp4", names[1]: f"caption {n}", "height": 720} for n in range(3)]
    for kind in KINDS:
        items = items_of(write(tmp_path / f"m.{kind}", rows))
        assert [(item.name, item.caption) for item in items] == [(f"{n}.mp4", f"caption {n}") for n in range(3)]


def test_columns_can_be_named_and_paths_start_elsewhere(tmp_path: Path) -> None:
    rows = [
        {"path": "wrong.mp4", "where": "a.mp4", "caption": "wrong", "said": "right", "set": "x", "t0": 1, "t1": 2.5}
    ]
    for kind in KINDS:
        (item,) = items_of(
            write(tmp_path / f"m.{kind}", rows), path_column="where", caption_column="said", source_column="set",
            start_column="t0", end_column="t1", root=str(tmp_path.parent),
        )  # fmt: skip
        assert (item.path, item.caption, item.source) == (str(tmp_path.parent / "a.mp4"), "right", "x")
        assert (item.name, item.span_s) == ("a.mp4#t=1,2.5", (1.0, 2.5))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_files(kind: str, tmp_path: Path) -> None:
    spans = [(None, None), ("1.5", None), (None, "0:01:02.25"), ("00:10", "61"), ("0", "1e-3")]
    rows = [{"path": "a.mp4", "start_s": start, "end_s": end} for start, end in spans] + [
        {"path": "b.png", "end_s": "3"}
    ]
    items = items_of(write(tmp_path / f"m.{kind}", rows))
    assert [item.span_s for item in items] == [None, (1.5, math.inf), (0.0, 62.25), (10.0, 61.0), (0.0, 0.001), None]
    assert [item.name for item in items] == [
        "a.mp4", "a.mp4#t=1.5,", "a.mp4#t=0,62.25", "a.mp4#t=10,61", "a.mp4#t=0,0.001", "b.png",
    ]  # fmt: skip
    assert [item.is_image for item in items] == [False] * 5 + [True]
    bad = [("2", "1"), ("-1", "3"), ("x", "3"), ("nan", "3"), ("1:2:3:4", "9"), ("5", "5")]
    rows = [{"path": "a.mp4", "start_s": start, "end_s": end} for start, end in bad]
    errors = errors_of(write(tmp_path / f"n.{kind}", rows))
    assert [(file, rule) for file, rule, _ in errors] == [("a.mp4", "bad_row")] * len(bad)
    first_line = 2 if kind in ("csv", "tsv") else 1
    assert [f"n.{kind}:{first_line + n}: " in reason for n, (_, _, reason) in enumerate(errors)] == [True] * len(bad)


def test_scores_that_came_with_the_clips(tmp_path: Path) -> None:
    rows = [
        {"path": "a.mp4", "aes": 5.25, "flow": "0.5", "more": {"ocr": 3}},
        {"path": "b.mp4", "aes": None, "flow": "", "more": None},
        {"path": "c.mp4", "aes": math.nan, "flow": "-1e-3", "more": {"ocr": None}},
        {"path": "d.mp4", "aes": 1.0, "flow": "fast", "more": None},
    ]
    expected = [{"aes": 5.25, "flow": 0.5, "more_ocr": 3.0}, {}, {"flow": -0.001}]
    for kind in ("jsonl", "parquet"):
        items = every_item(inputs_of(write(tmp_path / f"m.{kind}", rows), score_columns=["aes", "flow", "more.ocr"]))
        assert [dict(item.given_scores) for item in items[:3] if isinstance(item, MediaItem)] == expected
        assert isinstance(items[3], DecodeError)
        assert (items[3].rule, "flow is no number: 'fast'" in items[3].reason) == ("bad_row", True)
        assert all(not item.given_scores for item in items_of(tmp_path / f"m.{kind}"))  # only if asked for
    with pytest.raises(UserError, match=r'no column "ae".*\n.*did you mean "aes"'):
        inputs_of(tmp_path / "m.jsonl", score_columns=["ae"])


def test_broken_rows_are_rejected_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    lines = [
        b"path,caption",
        b"a.mp4,fine",
        b"b.mp4,one,too many",
        b"c.mp4",
        b",nothing named",
        b"",
        b"d.mp4,Stra\xdfe",
        b"e.mp4," + b"x" * 40_000,
        b"f.mp4," + b"y" * 200_000,
        b"https://host/g.mp4,far away",
        b"h.txt,no media",
        b"i\x00.mp4,zero byte",
        b'j.mp4,"two\nlines"',
        b"caf\xe9.mp4,fine too",
        b'k.mp4,"never closed',
    ]
    path.write_bytes(b"\n".join(lines))
    for rows in (1, 3, 100):
        items = every_item(inputs_of(path, rows_per_unit=rows))
        fine = [(item.name, item.caption) for item in items if isinstance(item, MediaItem)]
        assert fine == [
            ("a.mp4", "fine"), ("j.mp4", "two\nlines"), ("caf\\xe9.mp4", "fine too"), ("k.mp4", "never closed"),
        ]  # fmt: skip
        errors = [(item.file, item.rule) for item in items if isinstance(item, DecodeError)]
        assert errors == [
            ("m.csv:3", "bad_row"), ("m.csv:4", "bad_row"), ("m.csv:5", "bad_row"), ("d.mp4", "bad_caption"),
            ("e.mp4", "bad_caption"), ("m.csv:9", "bad_row"), ("m.csv:10", "bad_row"), ("m.csv:11", "bad_row"),
            ("m.csv:12", "bad_row"),
        ]  # fmt: skip
    reasons = [item.reason for item in items if isinstance(item, DecodeError)]
    for words, reason in zip(
        ("3 fields for 2", "1 fields for 2", "names no file", "m.csv:7: the caption is not UTF-8", "40000 characters",
         "field larger than", "is an address", "ends in none of", ""), reasons, strict=True,
    ):  # fmt: skip
        assert words in reason
    by_name = {item.name: item for item in items if isinstance(item, MediaItem)}
    assert by_name["caf\\xe9.mp4"].path == os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")


def test_broken_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = [
        b'{"path": "a.mp4", "text": "fine"}', b"{", b"[1, 2]", b"{}", b"   ", b'{"text": "no path"}',
        b'{"path": 7, "text": "x"}', b'{"path": "b.mp4", "text": ["x"]}', b'{"path": "c.mp4", "text": "\\ud800"}',
        b'{"path": "d\\ud800.mp4"}', b"[" * 100_000, b'{"path": "e.mp4", "text": "' + b"x" * (5 << 20) + b'"}',
        b'{"path": "f.mp4", "text": null, "source": "a\\u0000b"}', b'{"path": "g.mp4", "text": "last"}',
    ]  # fmt: skip
    path.write_bytes(b"\r\n".join(lines))
    for rows in (1, 5, 100):
        items = every_item(inputs_of(path, rows_per_unit=rows))
        assert [item.name for item in items if isinstance(item, MediaItem)] == ["a.mp4", "g.mp4"]
        assert [(item.file, item.rule) for item in items if isinstance(item, DecodeError)] == [
            ("m.jsonl:2", "bad_row"), ("m.jsonl:3", "bad_row"), ("m.jsonl:4", "bad_row"), ("m.jsonl:6", "bad_row"),
            ("m.jsonl:7", "bad_row"), ("b.mp4", "bad_caption"), ("c.mp4", "bad_caption"), ("m.jsonl:10", "bad_row"),
            ("m.jsonl:11", "bad_row"), ("m.jsonl:12", "bad_row"), ("f.mp4", "bad_row"),
        ]  # fmt: skip


def test_parquet_of_all_types(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    count = 100
    paths = [f"{n}.mp4" for n in range(count)]
    texts = pyarrow.array([b"fine" if n != 5 else b"Stra\xdfe" for n in range(count)], pyarrow.binary())
    columns = {
        "path": pyarrow.array(paths).dictionary_encode(),
        "caption": texts.view(pyarrow.string()),  # unchecked, as careless writers leave it
        "start": pyarrow.array([n if n % 2 else None for n in range(count)], pyarrow.int32()),
        "unused": pyarrow.array([{"bytes": b"\0" * 100}] * count),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "m.parquet", row_group_size=33)
    for rows in (1, 10, 1000):
        inputs = inputs_of(tmp_path / "m.parquet", rows_per_unit=rows)
        items = every_item(inputs)
        assert len(items) == count
        bad = items.pop(5)
        assert isinstance(bad, DecodeError)
        assert (bad.file, bad.rule, "m.parquet:6" in bad.reason) == ("5.mp4", "bad_caption", True)
        truth = [n for n in range(count) if n != 5]
        assert [item.caption for item in items if isinstance(item, MediaItem)] == ["fine"] * 99
        assert [item.span_s for item in items if isinstance(item, MediaItem)] == [
            (float(n), math.inf) if n % 2 else None for n in truth
        ]
    data = bytearray((tmp_path / "m.parquet").read_bytes())
    data[40:60] = bytes(20)  # in the first row group
    (tmp_path / "n.parquet").write_bytes(data)
    damaged = errors_of(tmp_path / "n.parquet", rows_per_unit=1000)
    assert [(file, rule) for file, rule, _ in damaged][:1] == [("n.parquet:1", "bad_row")]
    (tmp_path / "o.parquet").write_bytes(data[:200])
    with pytest.raises(UserError, match="not a Parquet file"):
        inputs_of(tmp_path / "o.parquet")


def test_large_row_groups_are_read_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"path": [f"{n}.mp4" for n in range(5_000)]})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet", row_group_size=4_500)
    whole = [item.name for item in items_of(tmp_path / "m.parquet", rows_per_unit=1500)]
    monkeypatch.setattr("contentv.curation.manifest_rows.MAX_GROUP_BYTES", 0)
    assert [item.name for item in items_of(tmp_path / "m.parquet", rows_per_unit=1500)] == whole
    assert whole == [f"{n}.mp4" for n in range(5_000)]


CAPTIONS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CAPTIONS, min_size=1, max_size=25), st.integers(1, 9), st.sampled_from(KINDS), st.randoms())
def test_any_text_survives_and_units_can_be_read_in_any_order(
    tmp_path: Path, captions: list[str], rows_per_unit: int, kind: str, rng: Any
) -> None:
    path = write(tmp_path / f"m.{kind}", [{"path": f"{n}.mp4", "text": text} for n, text in enumerate(captions)])
    inputs = inputs_of(path, rows_per_unit=rows_per_unit)
    assert len(inputs.units) == math.ceil(len(captions) / rows_per_unit)
    order = list(enumerate(inputs.units))
    rng.shuffle(order)
    for unit, name in order:
        part = range(unit * rows_per_unit, min(len(captions), (unit + 1) * rows_per_unit))
        items = list(inputs.items(name))
        assert [item.name for item in items if isinstance(item, MediaItem)] == [f"{n}.mp4" for n in part]
        assert [item.caption or "" for item in items if isinstance(item, MediaItem)] == [
            captions[n].strip() for n in part
        ]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_plan_outlives_rows_that_are_added(kind: str, tmp_path: Path) -> None:
    rows = [{"path": f"{n}.mp4", "text": "x"} for n in range(25)]
    path = write(tmp_path / f"m.{kind}", rows[:13])
    before = inputs_of(path, rows_per_unit=5)
    planned = {unit: list(before.items(unit)) for unit in before.units}
    write(path, rows)
    after = inputs_of(path, rows_per_unit=5)
    assert {unit: list(after.items(unit)) for unit in planned} == planned
    assert after.units[:2] == before.units[:2]
    assert before.units[2] not in after.units  # its rows have become more
    write(path, rows[:8])
    with pytest.raises(UserError, match="it has 8 rows"):
        list(inputs_of(path, rows_per_unit=5).items(before.units[2]))
    with pytest.raises(UserError, match="4 a unit"):
        list(inputs_of(path, rows_per_unit=4).items(before.units[1]))


def test_rows_are_not_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    with open(path, "w") as file:
        file.write("path,text\n")
        for n in range(2_000):
            file.write(f"{n}.mp4,{'x' * 3000}\n")
    assert path.stat().st_size > 6e6
    tracemalloc.start()
    inputs = inputs_of(path)
    assert sum(1 for unit in inputs.units[::20] for _ in inputs.items(unit)) == 4 * 32
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"", "no rows|none of its columns"),
        ("m.csv", b"name,caption\na.mp4,x\n", r"\(name, caption\) is known to hold paths"),
        ("m.csv", "path,caption\n".encode("utf-16"), "UTF-16"),
        ("m.csv", b"p" * (5 << 20), "more than 4194304"),
        ("m.jsonl", b"\n\n", "no rows"),
        ("m.jsonl", b"not json\n", "no rows"),
        ("m.parquet", b"PAR1", "not a Parquet file"),
        ("m.xlsx", b"x", "neither a folder nor a manifest"),
    ],
)
def test_manifests_that_are_none(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        inputs_of(tmp_path / name)


def test_a_wrong_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", [{"path": "a.mp4", "caption_en": "x"}])
    with pytest.raises(UserError, match=r"manifest\.caption_column.*no column \"caption\".*\n.*\"caption_en\""):
        inputs_of(path, caption_column="caption")


def test_a_root_that_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", [{"path": "a.mp4"}])
    with pytest.raises(UserError, match=r"manifest\.root"):
        inputs_of(path, root=str(tmp_path / "nowhere"))


def test_byte_order_marks_and_semicolons(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes("path;text\na.mp4;Grüße, alle\n".encode("utf-8-sig"))
    (item,) = items_of(tmp_path / "m.csv")
    assert (item.name, item.caption) == ("a.mp4", "Grüße, alle")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'contentv\[curation\]'"):
        inputs_of(tmp_path / "m.parquet")


def test_folders_of_hugging_face_are_read_by_their_metadata(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / "videos" / name).write_bytes(b"x")
    rows = [{"file_name": "videos/a.mp4", "text": "one"}, {"file_name": "videos/b.mp4", "text": None}]
    write(tmp_path / "metadata.jsonl", rows)
    (tmp_path / "videos" / "b.txt").write_text("from its sidecar")
    one, two = items_of(tmp_path)
    assert (one.name, one.source) == ("videos/a.mp4", "videos")
    assert [item.captions().of_scene(0, 1, 0.0, 1.0) for item in (one, two)] == ["one", "from its sidecar"]
    assert inputs_of(tmp_path, layout="files").units == ["videos/a.mp4", "videos/b.mp4", "videos/c.mp4"]


def test_a_part_takes_the_captions_with_times_of_its_sidecar(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", [{"path": "a.mp4", "start": "3", "end": "6"}])
    scenes = [{"caption": "first", "start_s": 0, "end_s": 3}, {"caption": "second", "start_s": 3, "end_s": 6}]
    (tmp_path / "a.json").write_text(json.dumps({"scenes": scenes}))
    (item,) = items_of(path)
    assert item.captions().of_scene(0, 1, 3.0, 6.0) == "second"
    (tmp_path / "a.txt").write_text("one\ntwo")
    with pytest.raises(CaptionError, match="a part of the file"):
        item.captions()


def test_a_file_that_is_not_there_is_found_out_when_it_is_opened(tmp_path: Path) -> None:
    (item,) = items_of(write(tmp_path / "m.csv", [{"path": "a.mp4", "caption": "x"}]))
    with pytest.raises(DecodeError) as caught:
        item.open()
    assert (caught.value.rule, caught.value.file) == ("no_file", "a.mp4")
    (tmp_path / "a.mp4").write_bytes(b"content")
    with item.open() as file:
        assert isinstance(file, io.BufferedReader)
        assert file.read() == b"content"
