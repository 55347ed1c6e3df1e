"""The page about a dataset against counts by hand: buckets, noise levels, rejects, pictures, runs, captions."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import random
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_report_pages import NASTY, Page, write_clip

from contentv.base.errors import UserError
from contentv.base.types import Bucket, TextCond
from contentv.cli.main import main
from contentv.data import DatasetInfo, DatasetWriter, TextInfo, VaeInfo
from contentv.diffusion.samplers import LogitNormal
from contentv.diffusion.tqd import TQD
from contentv.report import dataset_stats, write_dataset_report
from contentv.report.dataset_pictures import Pictures, read_picture
from contentv.report.dataset_runs import ratio_name
from contentv.report.dataset_sigma import mean_density, route
from contentv.report.dataset_stats import MOTION_RICH, Clip, gather

CORNERS = {"mr": (0.9, 0.1), "cl": (0.1, 0.9), "bo": (0.8, 0.9), "ne": (0.2, 0.1)}
INFO = {
    "text": {"num_tokens": 7},
    "buckets": {
        "f17_h64_w112": {"samples": 30, "latent_shape": [16, 5, 8, 14]},
        "f1_h64_w64": {"samples": 10, "latent_shape": [16, 1, 8, 8]},
        "odd name": {"samples": 0},
    },
    "shards": [],
}


def jpg(shade: int, side: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def metas(count: int = 40) -> list[dict[str, Any]]:
    names = list(CORNERS)
    return [
        {
            "key": f"{names[i % 4]}{i:03d}", "caption": f"clip {i} of {NASTY}", "source": f"s{i % 3}", "kind": "video",
            "bucket": "f17_h64_w112", "duration_s": 2.0, "motion_raw": float(i), "visual_raw": 0.5,
            "scores": {"blur": i / 10, "never": None},
        }
        for i in range(count)
    ]  # fmt: skip


def corner(meta: dict[str, Any]) -> tuple[float, float]:
    return CORNERS[meta["key"][:2]]


def lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def page_of(folder: Path, **options: Any) -> Page:
    page = Page(write_dataset_report(folder, metas(), INFO, corner, folder / "report.html", **options))
    page.check_self_contained()
    return page


def table(page: Page, first: str, other: str = "") -> list[list[str]]:
    """Returns the rows of the table whose head begins with a word, and has another one, head first."""
    for found in re.findall(r"<table>(.*?)</table>", page.source, re.DOTALL):
        rows = [re.findall(r"<t[hd][ >](.*?)</t[hd]>", row, re.DOTALL) for row in found.split("</tr>")]
        rows = [[_text(cell.removeprefix('class="n">')) for cell in row] for row in rows]
        if rows[0][0] == first and other in ("", *rows[0]):
            return [row for row in rows if row]
    raise AssertionError(f"no table of {first}")


def _text(cell: str) -> str:
    return html.unescape(re.sub(r'^<span class="rule">(.*)</span>$', r"\1", cell))


def images(page: Page) -> list[bytes]:
    return [base64.b64decode((a["src"] or "").split(",", 1)[1]) for t, a in page.tags if t == "img"]


def test_sources_and_buckets_are_counted(tmp_path: Path) -> None:
    page = page_of(tmp_path, global_batch_size=8)
    sources = {row[0]: row[1:] for row in table(page, "source")[1:]}
    assert [row[0] for row in sources.values()] == ["14", "13", "13"]
    assert sources["s0"][2:5] == [f"{14 * 2 / 3600:.4g}", "19.5", "0.5"]  # 0, 3, ... 39
    motion = np.mean([corner(m)[0] for m in metas() if m["source"] == "s1"])
    assert float(sources["s1"][5]) == pytest.approx(motion, rel=1e-3)
    buckets = {row[0]: row[1:] for row in table(page, "bucket")[1:]}
    # 5 x 4 x 7 + 7 tokens and 1 x 4 x 4 + 7
    wide = ["16:9", "30", "75.0%", "16 x 5 x 8 x 14", "147", f"{4410 / 4640:.1%}", "3.8"]
    assert buckets["f17_h64_w112"] == wide
    assert buckets["f1_h64_w64"][:5] == ["1:1", "10", "25.0%", "16 x 1 x 8 x 8", "23"]
    assert buckets["odd name"] == ["n/a", "0", "0.0%", "n/a", "n/a", "n/a", "0"]
    assert "An epoch is 5.0 steps of 8 clips" in page.text


def test_an_older_dataset_says_what_is_not_recorded(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    for text in (
        "not recorded: there is no curation/run-*", "Aspect ratios of the files that went in: not recorded",
        "nothing is known of rejected clips", "no sample has a thumbnail or a stored clip",
    ):  # fmt: skip
        assert text in page.text, text
    assert images(page) == []


@pytest.mark.parametrize(
    "tqd", [TQD(LogitNormal(shift=3.0)), TQD(LogitNormal(), kappa_base=4.0, mode="direct", floor=0.2)]
)
def test_noise_levels_are_those_that_are_drawn(tqd: TQD) -> None:
    draw = random.Random(3)
    clips = [Clip(str(i), "", "", "", draw.random(), draw.random(), {}) for i in range(40)]
    clips.append(Clip("none", "", "", "", math.nan, 0.5, {}))
    routing = route(clips, tqd)
    assert [clip.key for clip in routing.clips] == [str(i) for i in range(40)]
    generator, draws = torch.Generator().manual_seed(0), 4000
    kept: list[torch.Tensor] = []
    for clip, keep, high, low in zip(routing.clips, routing.keep, routing.high, routing.low, strict=True):
        scores = torch.full((draws,), clip.motion), torch.full((draws,), clip.visual)
        sigma = tqd.sample(*scores, generator)
        assert abs(float((sigma > 0.8).double().mean()) - float(high)) < 0.04
        assert abs(float((sigma < 0.2).double().mean()) - float(low)) < 0.04
        assert float(keep) == pytest.approx(max(clip.motion, clip.visual), abs=1e-6)
        kept.append(sigma[torch.rand(draws, generator=generator) < keep])
    sigma = torch.linspace(0, 1, 4001, dtype=torch.float64)[1:-1]
    density = mean_density(routing.clips, tqd, sigma)
    assert float(density.sum() / 4000) == pytest.approx(1.0, abs=0.02)
    everything = torch.cat(kept)
    for end in (0.2, 0.5, 0.8):
        below = float(density[sigma < end].sum() / 4000)
        assert float((everything < end).double().mean()) == pytest.approx(below, abs=0.02)


def test_the_routing_table_and_strips_put_motion_at_high_noise(tmp_path: Path) -> None:
    keys = [f"{name}{i:03d}" for i, name in enumerate(list(CORNERS) * 2)]
    for i, key in enumerate(keys):
        (tmp_path / "thumbnails").mkdir(exist_ok=True)
        (tmp_path / "thumbnails" / f"{key}.jpg").write_bytes(jpg(10 + i))
    rows = [
        {"path": f"thumbnails/{key}.jpg", "key": key, "file": "a", "scene": 0, "clip": 0, "rule": None} for key in keys
    ]
    lines(tmp_path / "thumbnails.jsonl", rows)
    page = page_of(tmp_path)
    routed = {row[0]: row[1:] for row in table(page, "quadrant", "kept")[1:]}
    share = {name: [float(cell.rstrip("%")) / 100 for cell in cells[1:]] for name, cells in routed.items()}
    assert set(share) == {"motion-rich", "clean-looking", "both", "neither", "all samples", "without TQD"}
    assert share["motion-rich"][2] > share["without TQD"][2] > share["clean-looking"][2]  # sigma > 0.8
    assert share["clean-looking"][3] > share["without TQD"][3] > share["motion-rich"][3]  # sigma < 0.2
    assert share["motion-rich"][1] == pytest.approx(0.9)
    assert share["all samples"][1] == pytest.approx((0.9 + 0.9 + 0.9 + 0.2) / 4, abs=1e-3)
    corners = ("motion-rich", "clean-looking", "both", "neither")
    assert sum(share[name][4] for name in corners) == pytest.approx(1.0, abs=3e-3)
    base = LogitNormal().log_tails(torch.tensor([0.8]))[1].exp()
    assert share["without TQD"][2] == pytest.approx(float(base), abs=1e-3)
    after = page.source.split("Trained most often at sigma ")[1:]
    assert [re.findall(r"clip (\d+) of", part)[0] for part in after] == ["0", "1"]  # mr000 and cl001
    assert all(len(re.findall("<img", part.split("<h")[0])) <= 8 for part in after)


def test_pictures_stay_inside_the_folder_and_are_pictures(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "thumbnails").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(jpg(1))
    (data / "thumbnails" / "good.jpg").write_bytes(jpg(2))
    (data / "thumbnails" / "no.jpg").write_bytes(b"<script>alert(1)</script>")
    (data / "thumbnails" / "huge.jpg").write_bytes(jpg(3) + bytes(300_000))
    (data / "thumbnails" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    with tarfile.open(data / "thumbnails" / "c.tar", "w") as tar:
        for name, content in (("a.jpg", jpg(4)), ("../b.jpg", jpg(5))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (data / "thumbnails" / "torn.tar").write_bytes((data / "thumbnails" / "c.tar").read_bytes()[:700])
    assert read_picture(data, "thumbnails/good.jpg") == jpg(2)
    assert read_picture(data, "thumbnails/c.tar/a.jpg") == jpg(4)
    for path in (
        "../secret.jpg", str(tmp_path / "secret.jpg"), "thumbnails/link.jpg", "thumbnails/huge.jpg", "", "a\0b", ".",
        "thumbnails/c.tar/../b.jpg", "thumbnails/c.tar/link.jpg", "thumbnails/c.tar/none.jpg",
        "thumbnails/torn.tar/a.jpg", "thumbnails/c.tar", "nowhere.tar/a.jpg",
    ):  # fmt: skip
        assert read_picture(data, path) is None, path
    paths = ["thumbnails/no.jpg", "thumbnails/good.jpg", "../secret.jpg", "thumbnails/c.tar/a.jpg"]
    rows = [{"path": path, "key": None, "file": NASTY, "rule": "too_short"} for path in paths]
    lines(data / "thumbnails.jsonl", [*rows, "{torn", {"path": 3}, []])
    lines(data / "rejects.jsonl", [{"file": NASTY, "reason": NASTY, "rule": "too_short", "scores": {NASTY: 1.5}}])
    page = page_of(data)
    assert images(page) == [jpg(2), jpg(4)]
    assert Pictures(data).damaged == 3


def test_pictures_are_bounded_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpg(9, side=64))
    size = (tmp_path / "a.jpg").stat().st_size
    lines(
        tmp_path / "thumbnails.jsonl", [{"path": "a.jpg", "key": f"k{i}", "file": "f", "rule": None} for i in range(9)]
    )
    pictures = Pictures(tmp_path, max_bytes=3 * size)
    clips = [Clip(f"k{i}", "c", "", "", 0.5, 0.5, {}) for i in range(9)]
    strip = pictures.strip(clips, [""] * 9, 9)
    assert strip is not None
    assert strip.count("<img") == 3
    assert pictures.strip(clips, [""] * 9, 9) is None


def test_a_thumbnail_is_for_all_samples_of_its_clip(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpg(7))
    still = "clip-00013-000-00-f1_h48_w48-5284cd93cb258269"
    lines(tmp_path / "thumbnails.jsonl", [{"path": "a.jpg", "key": still, "file": "f", "rule": None}])
    pictures = Pictures(tmp_path)
    keys = [still, still.replace("f1_h48_w48", "f17_h48_w64"), still.replace("000-00", "000-01"), "-f1_h1_w1-"]
    stats = gather(({"key": key} for key in keys), lambda meta: (0.5, 0.5), pictures.keys)
    assert [clip.key for clip in stats.wanted] == keys[:2]
    assert [pictures.of_clip(clip) is not None for clip in stats.kept] == [True, True, False, False]


def test_rejects_are_counted_by_rule_with_examples(tmp_path: Path) -> None:
    blurred = [
        {"file": f"v{i}.mp4", "scene": 0, "clip": i, "reason": f"sharpness 0.{i} is below 0.5",
         "rule": "filter:sharpness", "scores": {"noise": 3.0, "sharpness": i / 10, "bad": None}}
        for i in range(5)
    ]  # fmt: skip
    near = {"file": "copy.mp4", "scene": 0, "clip": 0, "rule": "duplicate:near", "scores": {},
            "reason": "looks like first (1).mp4 (scene 2, clip 1) (1.5 of 64 bits differ)"}  # fmt: skip
    lines(tmp_path / "rejects.jsonl", [*blurred, near, {"file": "x", "reason": "it was 3 px", "scores": "?"}])
    for name, shade in (("kept.jpg", 50), ("copy.jpg", 90), ("blur.jpg", 120)):
        (tmp_path / name).write_bytes(jpg(shade))
    lines(
        tmp_path / "thumbnails.jsonl",
        [
            {"path": "kept.jpg", "key": "k", "file": "first (1).mp4", "scene": 2, "clip": 1, "rule": None},
            {"path": "copy.jpg", "key": None, "file": "copy.mp4", "scene": 0, "clip": 0, "rule": "duplicate:near"},
            {"path": "blur.jpg", "key": None, "file": "v1.mp4", "scene": 0, "clip": 1, "rule": "filter:sharpness"},
        ],
    )
    page = page_of(tmp_path)
    rows = {row[0]: row[1:] for row in table(page, "rule")[1:]}
    assert rows["filter:sharpness"][:3] == ["5", "71.4%", "sharpness 0 to 0.4"]
    assert "v0.mp4 (scene 0, clip 0): sharpness 0.0 is below 0.5" in rows["filter:sharpness"][3]
    assert "sharpness 0.1, noise 3" in rows["filter:sharpness"][3]
    assert "v3.mp4" not in page.source
    assert rows["not recorded"][:2] == ["1", "14.3%"]
    assert "7 rejected, by rule" in page.text
    assert images(page) == [jpg(50), jpg(90), jpg(120)]  # the pair side by side, then those of the rule
    assert "looks like first (1).mp4" in page.text


def test_many_reasons_do_not_make_many_rows(tmp_path: Path) -> None:
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwxyz"]
    lines(tmp_path / "rejects.jsonl", [{"file": "f", "reason": f"because of {word}"} for word in words])
    page = page_of(tmp_path)
    assert f"{len(words)} rejected, by reason" in page.text
    rows = table(page, "rule")[1:]
    assert len(rows) == 60
    assert rows[0][:2] == ["others", str(len(words) - 500)]


def test_runs_and_shapes(tmp_path: Path) -> None:
    summary = {
        "run": 1, "seconds": 20.0, "files": 9, "clips": 40, "kept": 30, "rejected": 10, "skipped": 2, "workers": 2,
        "phases": {
            "scan": {"seconds": 10.0, "items": 9, "cpu_s": 1.0, "worker_cpu_s": 17.0},
            "<b>encode": {"seconds": 8.0, "items": 30, "cpu_s": 4.0}, "torn": "x", "none": {"seconds": None},
        },
    }  # fmt: skip
    lines(tmp_path / "curation" / "run-0001" / "summary.json", [summary])
    lines(tmp_path / "curation" / "run-0002" / "summary.json", ["{torn"])
    lines(tmp_path / "curation" / "run-0003" / "plan.json", ["{}"])
    sizes = [(1920, 1080)] * 3 + [(1080, 1920), (640, 480), (5000, 100), (0, 7)]
    rows = [{"width": w, "height": h} for w, h in sizes]
    lines(tmp_path / "curation" / "run-0001" / "scan" / "000000.jsonl", [*rows, "{torn", "[]", {"width": "a"}])
    page = page_of(tmp_path)
    runs = {row[0]: row[1:] for row in table(page, "run")[1:]}
    assert runs["run-0001"] == ["9", "40", "30", "10", "2", "20 s", "2", "2"]
    assert runs["run-0002"][5] == "its summary cannot be read"
    assert runs["run-0003"][5] == "not finished"
    assert "90%" in page.text  # (1 + 17) / (10 x 2)
    assert "25%" in page.text
    assert "<b>encode" in page.text
    assert "Aspect ratios of the files that went in: 9:16 1, 4:3 1, 16:9 3, other 1" in page.source


@pytest.mark.parametrize(
    ("width", "height", "name"), [(1920, 1080, "16:9"), (854, 480, "16:9"), (500, 500, "1:1"), (9, 100, "other")]
)
def test_shapes_have_common_names(width: int, height: int, name: str) -> None:
    assert ratio_name(width, height) == name


def test_captions_are_counted_within_buckets(tmp_path: Path) -> None:
    draw = random.Random(1)
    texts = ["", "  ", "a red ball", "a blue square moves", NASTY]
    found = [{"key": str(i), "caption": draw.choice(texts), "bucket": draw.choice(["a", "b"])} for i in range(200)]
    stats = gather(iter(found), lambda meta: (0.5, 0.5)).captions
    real = [(m["bucket"], m["caption"]) for m in found if m["caption"].strip()]
    assert stats.empty == 200 - len(real)
    assert stats.repeated == len(real) - len(set(real))
    assert Counter(stats.words) == Counter(len(m["caption"].split()) for m in found)
    assert [count for *_, count in stats.most_common(10)] == [count for _, count in Counter(real).most_common()]
    (text, bucket, _), *_ = stats.most_common(1)
    assert Counter(real).most_common(1)[0][1] == real.count((bucket, text))


def test_large_datasets_are_counted_whole_and_drawn_from_an_even_pick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_stats, "MAX_KEPT", 64)

    def stream() -> Iterator[dict[str, Any]]:
        for i in range(5000):
            yield {"key": str(i), "source": "s", "bucket": "b", "scores": {"x": float(i)}, "duration_s": 1.0}

    def quality(meta: dict[str, Any]) -> tuple[float, float]:
        return (int(meta["key"]) % 10) / 10, 0.9

    stats = gather(stream(), quality, wanted=["17", "4999"])
    assert stats.clips == 5000
    assert stats.seconds == 5000.0
    assert stats.quadrants == {"both": 2500, "clean-looking": 2500}
    assert [clip.key for clip in stats.wanted] == ["17", "4999"]
    assert 32 <= len(stats.kept) <= 64
    kept = [int(clip.key) for clip in stats.kept]
    assert kept == list(range(0, 5000, stats.stride))


def test_a_source_without_statistics_does_not_end_the_report(tmp_path: Path) -> None:
    def quality(meta: dict[str, Any]) -> tuple[float, float]:
        if meta["source"] == "s1":
            raise UserError('no statistics of motion_raw in source "s1"')
        return corner(meta)

    page = Page(write_dataset_report(tmp_path, metas(), INFO, quality, tmp_path / "r.html"))
    assert "Clips without both scores are left out: 13." in page.text
    assert '13 samples: no statistics of motion_raw in source "s1".' in page.text


def make_dataset(folder: Path, media: bytes) -> Path:
    vae, text = VaeInfo("v", (0.0,), (1.0,), 1, 4, 8), TextInfo("t", 2, 2, 1)
    empty = TextCond(torch.zeros(1, 1, 2), torch.zeros(1, 2))
    with DatasetWriter(folder, vae, text, empty) as writer:
        for i in range(8):
            meta = {
                "caption": NASTY, "source": "films", "kind": "video", "num_frames": 5, "height_px": 16, "width_px": 16,
                "fps": 8.0, "start_s": 0.0, "duration_s": 0.6, "visual_raw": float(i), "motion_raw": float(-i),
            }  # fmt: skip
            writer.add(
                f"k{i}", meta, torch.zeros(1, 2, 2, 2), torch.zeros(1, 2), torch.zeros(2), bucket=Bucket(5, 16, 16),
                media=media if i != 3 else b"no video at all",
            )  # fmt: skip
    return folder


def test_the_command_on_a_dataset_with_stored_clips(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "set", write_clip(tmp_path / "clip.mp4"))
    assert main(["report", f"path={folder}", "global_batch_size=4", "timestep.shift=3"]) == 0
    page = Page(folder / "report.html")
    page.check_self_contained()
    assert "An epoch is 2.0 steps of 4 clips" in page.text
    assert "shift=3" in page.text
    found = images(page)
    assert len(found) == 7 * 3  # in its quadrant and in both strips; all but the one that is no video
    with Image.open(io.BytesIO(found[0])) as image:
        assert image.size == (32, 32)
    assert MOTION_RICH in page.text
    (folder / "quality.json").unlink()
    assert main(["report", f"path={folder}"]) == 0
    assert "ranks within this dataset" in Page(folder / "report.html").text
    assert DatasetInfo.load(folder).samples == 8


def test_the_command_refuses_another_sampler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"path={tmp_path}", "timestep.kind=uniform"]) == 2
    assert "timestep.kind" in capsys.readouterr().err
