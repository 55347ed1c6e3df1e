"""What is found in folders and tars, and what becomes of everything that is wrong there."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import webdataset
from broken_files import KEPT, make_broken, picture_of
from omegaconf import OmegaConf

from contentv.base.errors import UserError
from contentv.curation.captions import CaptionError, SceneCaption
from contentv.curation.config import CurateConfig
from contentv.curation.inputs import Inputs, InputSettings, open_inputs
from contentv.curation.manifests import ManifestConfig
from contentv.curation.media import Extent, MediaItem, Window
from contentv.curation.tars import list_members
from contentv.curation.video_io import (
    DecodeError,
    encode_jpg_bytes,
    encode_mp4_bytes,
    open_video,
    read_image,
    require_complete,
)


def inputs_of(path: Path, leave_out: Path | None = None, **settings: Any) -> Inputs:
    inputs = open_inputs(SimpleNamespace(input=str(path), manifest=ManifestConfig(**settings)), leave_out)
    assert isinstance(inputs, Inputs)
    assert inputs.units == sorted(set(inputs.units))
    return inputs


def every_item(inputs: Inputs) -> list[MediaItem | DecodeError]:
    return [item for unit in inputs.units for item in inputs.items(unit)]


def caption_of(item: MediaItem | DecodeError) -> str:
    assert isinstance(item, MediaItem), item
    return item.captions().of_scene(0, 1, 0.0, 1.0)


def rule_of(item: MediaItem | DecodeError) -> tuple[str, str, str]:
    """Returns a file's name, the rule of its reject, and the reason, by decoding it as far as that shows."""
    if isinstance(item, DecodeError):
        return item.file, item.rule, item.reason
    try:
        item.captions()
        with item.open() as file:
            if item.is_image:
                read_image(file, item.name)
                return item.name, KEPT, ""
            with open_video(file, item.name) as video:
                frames = sum(1 for _ in video.pictures())
                require_complete(video, frames)
        return item.name, KEPT if frames > 1 else "too_short", ""
    except CaptionError as error:
        return item.name, error.rule, str(error)
    except DecodeError as error:
        return item.name, error.rule, error.reason


def test_curate_is_told_what_inputs_need() -> None:
    assert isinstance(CurateConfig(), InputSettings)


def test_everything_that_can_be_wrong_has_its_rule(tmp_path: Path) -> None:
    expected = make_broken(tmp_path / "in")
    found = {name: (rule, reason) for name, rule, reason in map(rule_of, every_item(inputs_of(tmp_path / "in")))}
    assert {name: rule for name, (rule, _) in found.items()} == expected
    assert all(reason for rule, reason in found.values() if rule not in (KEPT, "too_short"))
    for name in expected:
        name.encode("utf-8")  # what is written to files
    reasons = {
        "narrow.mp4": "10000 x 10", "zero_bytes.mp4": "0 bytes", "audio_only.mp4": "no video stream",
        "long_caption.mp4": "1048576 bytes", "latin1_caption.mp4": "not UTF-8", "round_and_round": "link",
        "pipe.mp4": "no regular file", "dangling.mp4": "no such file",
    }  # fmt: skip
    for name, words in reasons.items():
        assert words in found[name][1], found[name]


def test_folders(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for name in ("b.mp4", "web/a.MP4", "web/deep/c.jpg", "out/x.mp4", ".hidden/y.mp4", "web/.z.mp4", "t/1.tar", "n.md"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "sub").mkdir(parents=True)
    (elsewhere / "sub" / "d.mp4").write_bytes(b"x")
    (elsewhere / "sub" / "back").symlink_to(root)
    (root / "link").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)  # the first by name is followed
    (root / "output").symlink_to(root / "out")
    inputs = inputs_of(root, leave_out=root / "out")
    media = ["again/sub/d.mp4", "b.mp4", "web/a.MP4", "web/deep/c.jpg"]
    assert inputs.units == sorted([*media, "again/sub/back", "link", "t/1.tar"])
    items = {item.name: item for item in every_item(inputs) if isinstance(item, MediaItem)}
    assert sorted(items) == media
    assert {name: item.source for name, item in items.items()} == {
        "again/sub/d.mp4": "again", "b.mp4": "default", "web/a.MP4": "web", "web/deep/c.jpg": "web",
    }  # fmt: skip
    assert [name for name, item in items.items() if item.is_image] == ["web/deep/c.jpg"]


@pytest.mark.parametrize("case", ["missing", "empty", "no manifest", "wrong layout"])
def test_inputs_that_are_none(case: str, tmp_path: Path) -> None:
    path = tmp_path / {"no manifest": "x.csv", "missing": "nowhere"}.get(case, "in")
    if case in ("empty", "wrong layout"):
        path.mkdir()
    if case == "wrong layout":
        (path / "a.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match="input"):
        inputs_of(path, **({"layout": "webdataset"} if case == "wrong layout" else {}))
    with pytest.raises(UserError, match="did you mean"):
        ManifestConfig(layout="webdatset")


def test_layouts_choose_what_is_taken(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.tar", "clips/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert inputs_of(tmp_path).units == ["a.mp4", "b.tar", "clips/c.mp4"]
    assert inputs_of(tmp_path, layout="webdataset").units == ["b.tar"]
    assert inputs_of(tmp_path, layout="cosmos").units == ["clips/c.mp4"]


def test_items_travel_to_workers(tmp_path: Path) -> None:
    item = MediaItem("a.mp4", "/x/a.mp4", "web", Extent(1, 2), span_s=(1.0, float("inf")), given_scores={"x": 1.0},
                     scenes=(SceneCaption("a", 0.0, 1.0),))  # fmt: skip
    assert pickle.loads(pickle.dumps(item)) == item
    assert len(pickle.dumps(item)) < 1000
    hash(item)
    for error in (DecodeError("a", "why", "no_file"), CaptionError("why", "bad_caption")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.rule) == (type(error), str(error), error.rule)


def test_a_part_of_a_file_reads_like_a_file(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(5000)
    (tmp_path / "x").write_bytes(data)
    truth, rng = io.BytesIO(data[700:4100]), random.Random(1)
    with io.BufferedReader(Window(open(tmp_path / "x", "rb"), Extent(700, 3400)), 64) as part:
        for _ in range(500):
            if rng.random() < 0.5:
                move = (rng.randrange(-100, 100), 1) if rng.random() < 0.3 else (rng.randrange(3600), 0)
                if move[1] == 0 or truth.tell() + move[0] >= 0:
                    assert part.seek(*move) == truth.seek(*move)
            size = rng.choice([0, 1, 63, 64, 65, 500, -1])
            assert part.read(size) == truth.read(size)
            assert part.tell() == truth.tell()
        assert part.seek(0, 2) == 3400
    with pytest.raises(ValueError, match="closed"):
        part.read(1)


def test_captions_in_sidecars_and_records(tmp_path: Path) -> None:
    def caption(**files: Any) -> str:
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "a.mp4").write_bytes(b"x")
        for kind, content in files.items():
            (tmp_path / f"a.{kind}").write_bytes(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )
        return caption_of(MediaItem("a.mp4", str(tmp_path / "a.mp4"), "s"))

    for name in ("caption", "cap", "text", "prompt"):
        assert caption(json={name: " a dog "}) == "a dog"
    assert caption(json={"caption": "", "cap": None, "text": "a dog", "prompt": "no"}) == "a dog"
    assert caption(txt=b"\n\n", json={"text": "a dog"}) == "a dog"
    cases: list[tuple[Any, str]] = [
        ({"caption": 7}, "bad_caption"), ({"caption": "x" * 40_000}, "bad_caption"), ([1], "bad_caption"),
        ({"caption": "\ud800"}, "bad_caption"), ({"caption": " "}, "no_caption"), ({}, "no_caption"),
        (b"[" * 100_000, "bad_caption"), (b"\xff", "bad_caption"), (b"", "bad_caption"),
    ]  # fmt: skip
    for content, rule in cases:
        with pytest.raises(CaptionError) as caught:
            caption(json=content)
        assert caught.value.rule == rule, content


# ---- tars


def pack(path: Path, members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_are_read_as_the_standard_library_reads_them(form: int, tmp_path: Path) -> None:
    rng = random.Random(form)
    members = {
        f"d{n}/{rng.randrange(10**9)}.bin": rng.randbytes(rng.choice([0, 1, 511, 512, 513, 3000])) for n in range(20)
    }
    if form != tarfile.USTAR_FORMAT:
        members |= {"l" * 300 + "/ü雪.mp4": b"long", "x/" + "m" * 99: b"medium"}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        folder, link = tarfile.TarInfo("folder"), tarfile.TarInfo("link.mp4")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(folder)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # a time that PAX needs a record for
            tar.addfile(info, io.BytesIO(content))
        tar.addfile(link)
    found, damage = list_members("a.tar", str(path))
    assert damage is None
    with tarfile.open(path) as tar:
        truth = {member.name: (member.offset_data, member.size) for member in tar if member.isreg()}
    assert {name: (member.extent.offset, member.extent.size) for name, member in found.items()} == truth
    assert list(truth) == list(members)


def test_a_damaged_tar_gives_what_came_before_and_never_more(tmp_path: Path) -> None:
    members = {f"{n}.bin": bytes([n]) * 700 for n in range(6)}
    whole = pack(tmp_path / "whole.tar", members, tarfile.PAX_FORMAT)
    truth, _ = list_members("whole", str(tmp_path / "whole.tar"))
    rng = random.Random(0)
    path = tmp_path / "x.tar"
    for n in range(400):
        data = bytearray(whole)
        if n % 2:
            data = data[: rng.randrange(len(data))]
        else:
            at = rng.randrange(0, len(members) * 1536, 512) if n % 4 else 512 * rng.randrange(18)
            data[at + 124 : at + 136] = rng.randbytes(12) if n % 8 else b"\xff" * 12  # a size, negative if binary
            data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 148]) + 256 + sum(data[at + 156 : at + 512]))
        path.write_bytes(data)
        found, damage = list_members("x.tar", str(path))
        assert damage is not None or n % 2 == 0 or len(data) >= 6 * 1536 + 512
        assert all(m.extent.offset + m.extent.size <= len(data) for m in found.values())
        if n % 2:
            assert list(found.items()) == list(truth.items())[: len(found)]


def test_sizes_in_pax_records_are_trusted_with_nothing(tmp_path: Path) -> None:
    for value in ("99999999999999999999", "-1024", "x", "1e3", "700"):
        info, head = tarfile.TarInfo("a.bin"), tarfile.TarInfo("h")
        info.size = 700 if value != "700" else 0
        record = f" size={value}\n"
        body = f"{len(record) + 2}{record}".encode()
        assert len(body) < 100
        head.type, head.size = tarfile.XHDTYPE, len(body)
        form = tarfile.USTAR_FORMAT
        data = head.tobuf(form) + body.ljust(512, b"\0") + info.tobuf(form) + bytes(1024) + bytes(1024)
        (tmp_path / "a.tar").write_bytes(data)
        found, damage = list_members("a.tar", str(tmp_path / "a.tar"))
        assert (damage is None) == (value == "700")
        assert [member.extent.size for member in found.values()] == [700] * (value == "700")


def test_tars_of_webdataset_and_their_sidecars(tmp_path: Path) -> None:
    jpg = encode_jpg_bytes(picture_of("x", 1, 16, 16)[0])
    (tmp_path / "web").mkdir()
    with webdataset.TarWriter(str(tmp_path / "web" / "0.tar")) as writer:
        writer.write({"__key__": "a/1", "jpg": jpg, "txt": "from text", "json": {"caption": "no", "aesthetic": 5.5}})
        writer.write({"__key__": "a/2", "left.jpg": jpg, "json": {"prompt": "from a prompt", "q": {"x": "3"}}})
        writer.write({"__key__": "a/3.5", "jpg": jpg})
        writer.write({"__key__": "a/4", "jpg": jpg, "json": {"text": "x", "q": {"x": "good"}}})
    inputs = inputs_of(tmp_path)
    assert inputs.units == ["web/0.tar"]
    one, two, three, four = every_item(inputs)
    assert [caption_of(item) for item in (one, two, four)] == ["from text", "from a prompt", "x"]
    assert isinstance(three, MediaItem)
    assert (three.name, three.source, three.given_scores) == ("web/0.tar/a/3.5.jpg", "web", {})
    with pytest.raises(CaptionError, match="no caption"):
        three.captions()
    with three.open() as file:
        assert file.read() == jpg
    one, two, three, four = every_item(inputs_of(tmp_path, score_columns=["aesthetic", "q.x"]))
    assert [item.given_scores for item in (one, two, three)] == [{"aesthetic": 5.5}, {"q_x": 3.0}, {}]
    assert isinstance(four, DecodeError)
    assert four.rule == "bad_row"


def test_tars_without_media_and_compressed_ones_are_named(tmp_path: Path) -> None:
    pack(tmp_path / "texts.tar", {"a.txt": b"x", "x/._a.mp4": b"what a file manager leaves"})
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"))
    os.rename(tmp_path / "packed.tar.gz", tmp_path / "packed.tar")
    (tmp_path / "b.tgz").write_bytes((tmp_path / "packed.tar").read_bytes())
    errors = {item.file: item.reason for item in every_item(inputs_of(tmp_path)) if isinstance(item, DecodeError)}
    assert errors.keys() == {"texts.tar", "packed.tar", "b.tgz"}
    assert "no video or image" in errors["texts.tar"]
    assert "compressed" in errors["packed.tar"]
    assert "compressed" in errors["b.tgz"]


def test_a_member_beyond_the_end_is_an_error_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(100))
    for extent in (Extent(50, 51), Extent(0, 1 << 62), Extent(200, 1)):
        with pytest.raises(DecodeError, match="ends within"):
            MediaItem("a.tar/x.mp4", str(tmp_path / "a.tar"), "s", extent).open()


# ---- cosmos-curate


def windows(*captions: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"start_frame": 24 * n, "end_frame": 24 * (n + 1), **fields} for n, fields in enumerate(captions)]


RECORD = {
    "framerate_source": 8.0, "motion_score": {"global_mean": 0.25, "per_patch_min_256": 0.001}, "aesthetic_score": 4.5,
    "source_video": "/raw/x.mp4", "duration_span": [3.0, 9.0],
    "windows": windows({"qwen_caption": "plain", "qwen_enhanced_caption": "rich"}, {"qwen_caption": "second"}),
}  # fmt: skip
SCORES = {"motion_score_global_mean": 0.25, "motion_score_per_patch_min_256": 0.001, "aesthetic_score": 4.5}


def test_the_split_stage_of_cosmos_curate(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "metas" / "v0").mkdir(parents=True)
    (tmp_path / "previews").mkdir()
    (tmp_path / "previews" / "u1.webp").write_bytes(b"no clip")
    for name, record in {"u1": RECORD, "u2": {"windows": []}, "u3": None, "u4": "{torn", "u5": {"windows": 7}}.items():
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(b"x")
        if record is not None:
            text = record if isinstance(record, str) else json.dumps(record)
            (tmp_path / "metas" / "v0" / f"{name}.json").write_text(text)
    inputs = inputs_of(tmp_path)
    assert inputs.units == [f"clips/u{n}.mp4" for n in range(1, 6)]
    one, two, three, four, five = every_item(inputs)
    assert isinstance(one, MediaItem)
    assert (one.source, dict(one.given_scores)) == ("default", SCORES)
    captions = one.captions()
    assert [captions.of_scene(0, 1, *span) for span in ((0.0, 2.9), (3.1, 6.0))] == ["rich", "second"]
    (tmp_path / "metas" / "v1").mkdir()  # captions that were written later
    (tmp_path / "metas" / "v1" / "u1.json").write_text(json.dumps({**RECORD, "framerate": 24.0}))
    (item,) = inputs.items("clips/u1.mp4")
    assert isinstance(item, MediaItem)
    assert [(scene.start_s, scene.end_s) for scene in item.scenes] == [(0.0, 1.0), (1.0, 2.0)]  # the clip's own rate
    (tmp_path / "metas" / "v1" / "u1.json").unlink()
    (tmp_path / "metas" / "v1").rmdir()
    for item in (two, three, five):
        assert isinstance(item, MediaItem)
        with pytest.raises(CaptionError) as caught:
            item.captions()
        assert caught.value.rule == "no_caption"
    assert isinstance(four, DecodeError)
    assert four.rule == "bad_caption"
    assert "clips/u1.mp4" in inputs_of(tmp_path, layout="files").units


@pytest.mark.parametrize("length", ["frames_0_255", "duration_5_10"])
def test_the_shards_of_cosmos_curate(length: str, tmp_path: Path) -> None:
    place = tmp_path / "v0" / "resolution_720" / "aspect_ratio_16_9" / length
    mp4 = encode_mp4_bytes(picture_of("x", 8, 16, 16), 8)
    for kind in ("video", "metas", "t5_xxl"):
        (place / kind / "part_000000").mkdir(parents=True)
    tar = "part_000000/000000.tar"
    pack(place / "video" / tar, {"u1.mp4": mp4, "u2.mp4": mp4, "u3.mp4": mp4})
    pack(place / "metas" / tar, {"u2.json": b'{"caption": "plain"}', "u1.json": json.dumps(RECORD).encode()})
    (place / "t5_xxl" / tar).write_bytes(b"never looked at")
    pack(place / "video" / "part_000000/000001.tar", {"u4.mp4": mp4})  # its metas are missing
    inputs = inputs_of(tmp_path)
    assert [Path(unit).name for unit in inputs.units] == ["000000.tar", "000001.tar"]
    assert all("/video/" in unit for unit in inputs.units)
    one, two, three, four, lacking = every_item(inputs)
    assert isinstance(one, MediaItem)
    assert dict(one.given_scores) == SCORES
    assert one.captions().of_scene(0, 1, 0.0, 1.0) == "rich"
    assert caption_of(two) == "plain"
    for item in (three, four):
        assert isinstance(item, MediaItem)
        with item.open() as file:
            assert file.read() == mp4
        with pytest.raises(CaptionError):
            item.captions()
    assert isinstance(lacking, DecodeError)
    assert (lacking.rule, lacking.file.endswith("metas/part_000000/000001.tar")) == ("no_file", True)


def test_settings_are_a_hydra_schema() -> None:
    merged = OmegaConf.merge(
        OmegaConf.structured(ManifestConfig), OmegaConf.from_dotlist(["score_columns=[a,b.c]", "layout=cosmos"])
    )
    assert OmegaConf.to_object(merged) == ManifestConfig(layout="cosmos", score_columns=["a", "b.c"])
    with pytest.raises(UserError, match="rows_per_unit"):
        ManifestConfig(rows_per_unit=0)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of Pillow, on the damaged parts
def test_noise_never_breaks_the_reader_of_pictures_and_videos() -> None:
    """Any damage is a DecodeError or a picture: no other exception, whatever the bytes say."""
    from PIL import Image

    frames = picture_of("noise", 8, 32, 32)
    exif = Image.Exif()
    exif[0x0112], exif[0x8769] = 6, {0x9000: b"0230"}
    files: dict[str, bytes] = {"a.mp4": encode_mp4_bytes(frames, 8)}
    for kind in ("png", "jpg", "webp"):
        data = io.BytesIO()
        Image.fromarray(frames[0]).save(data, {"jpg": "jpeg"}.get(kind, kind), exif=exif)
        files[f"a.{kind}"] = data.getvalue()
    rng = np.random.default_rng(0)
    outcomes = {"fine": 0, "refused": 0}
    for name, whole in files.items():
        for _ in range(120):
            data = np.frombuffer(whole, np.uint8).copy()
            places = rng.integers(0, min(len(data), int(rng.choice([64, 400, len(data)]))), int(rng.integers(1, 6)))
            data[places] = rng.integers(0, 256, len(places))
            try:
                if name == "a.mp4":
                    with open_video(io.BytesIO(data.tobytes()), name) as video:
                        for picture in video.pictures():
                            picture.to_rgb(16)
                else:
                    read_image(io.BytesIO(data.tobytes()), name)
                outcomes["fine"] += 1
            except DecodeError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 20
