"""The whole curation with a toy VAE and toy text encoder: what is kept, what is rejected, and in which shape."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
import xxhash
from crashing import square_unless_three
from omegaconf import OmegaConf
from toy_encoders import ListSink, ToyText, ToyVAE
from toy_media import FPS, make_scene, put

from contentv.base.errors import UserError
from contentv.base.types import Bucket
from contentv.curation.captions import CaptionError, parse_captions
from contentv.curation.clips import fit_to_bucket
from contentv.curation.curate import CurateConfig, CurateReport, curate, ordered
from contentv.curation.filters import FilterConfig
from contentv.curation.near_duplicates import DedupConfig
from contentv.curation.plan import sample_frames
from contentv.curation.video_io import encode_jpg_bytes, encode_mp4_bytes
from contentv.curation.workers import WorkerCrashError, WorkerPool

BUCKETS = ["f1_h32_w32", "f9_h32_w32", "f17_h32_w48"]
META_FIELDS = {
    "key", "caption", "source", "kind", "num_frames", "height_px", "width_px", "fps", "start_s", "duration_s",
    "visual_raw", "motion_raw", "scores", "media_xxh128",
}  # fmt: skip


def run(folder: Path, **changes: Any) -> tuple[ListSink, list[dict[str, Any]], CurateReport, ToyVAE, ToyText]:
    """Curates folder/in anew; returns the dataset, the rejects, the report and the encoders.

    Most clips here are the same disk over another ground, which near-duplicate removal is right to take for copies.
    """
    shutil.rmtree(folder / "out", ignore_errors=True)
    settings: dict[str, Any] = {
        "buckets": BUCKETS, "min_clip_s": 1.0, "max_clip_s": 3.0, "dedup": DedupConfig(near=False), **changes,
    }  # fmt: skip
    config = CurateConfig(input=str(folder / "in"), output=str(folder / "out"), **settings)
    writer, vae, text = ListSink(), ToyVAE(), ToyText()
    report = curate(config, vae, text, writer)
    rejects = [json.loads(line) for line in (folder / "out" / "rejects.jsonl").read_text("utf-8").splitlines()]
    return writer, rejects, report, vae, text


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with most of what can be there."""
    folder = tmp_path_factory.mktemp("mixed")
    source = folder / "in"
    put(source / "one.mp4", make_scene("red"), "a disk over red")
    cuts = np.concatenate([make_scene("red"), make_scene("green", 18), make_scene("blue", 4)])
    put(source / "web" / "cuts.mp4", cuts, "red\ngreen\nblue\n")
    put(
        source / "web" / "long.mp4",
        np.concatenate([make_scene("grey", 24)] * 2 + [make_scene("grey", 3)]),
        "a long one",
    )
    put(source / "web" / "still.jpg", encode_jpg_bytes(make_scene("blue", 1)[0]), "a still")
    put(source / "web" / "same bytes.mp4", (source / "one.mp4").read_bytes(), "a copy")
    put(source / "bad" / "mute.mp4", make_scene("blue"))
    put(source / "bad" / "text.mp4", b"hello" * 100, "no video")
    put(source / "bad" / "cut-off.mp4", encode_mp4_bytes(make_scene("blue"), FPS)[:-200], "cut off")
    put(source / "bad" / "miscounted.mp4", make_scene("green"), "one\ntwo")
    put(source / "bad" / "tiny.mp4", make_scene("green", height=16, width=16), "too small")
    put(source / "notes.md", b"not media")
    put(source / ".hidden" / "x.mp4", b"not looked at")
    return folder


def test_what_is_kept_and_what_is_not(mixed: Path) -> None:
    writer, rejects, report, _, _ = run(mixed)
    assert writer.closed
    kept = {(s["meta"]["source"], s["meta"]["caption"], s["bucket"].name) for s in writer.samples_there}
    clips = [("default", "a disk over red"), ("web", "red"), ("web", "green"), ("web", "a long one")]
    # Either of the equal files may come first; the other is left out.
    if ("web", "a copy", BUCKETS[0]) in kept:
        clips[0] = ("web", "a copy")
    assert kept == {(*clip, bucket) for clip in clips for bucket in BUCKETS} | {("web", "a still", BUCKETS[0])}
    assert len(writer.of(BUCKETS[1])) == 5  # the long one gives two clips
    reasons = {row["file"]: row["reason"] for row in rejects}
    assert reasons.pop("one.mp4", "") + reasons.pop("web/same bytes.mp4", "") in (
        "the same bytes as one.mp4",
        "the same bytes as web/same bytes.mp4",
    )
    patterns = {
        "bad/mute.mp4": "no caption",
        "bad/text.mp4": "not a video",
        "bad/cut-off.mp4": "not a video|cut short|damaged",
        "bad/miscounted.mp4": "2 captions for 1 scenes",
        "bad/tiny.mp4": "fills no bucket.*16 x 16 pixels are too few",
        "web/cuts.mp4": r"lasts 0.50 s, less than min_clip_s=1",
    }
    assert reasons.keys() == patterns.keys()
    for file, pattern in patterns.items():
        assert re.search(pattern, reasons[file]), (file, reasons[file])
    assert [row["scene"] for row in rejects if row["file"] == "web/cuts.mp4"] == [2]
    assert all(row.keys() == {"file", "scene", "clip", "reason", "rule", "scores"} for row in rejects)
    assert (report.files, report.kept, report.rejected) == (10, len(writer.samples_there), len(rejects))
    assert sum(report.buckets.values()) == report.kept
    assert report.clips == 6  # one, two of the cuts, two of the long one, the still


def test_every_field_of_a_sample(mixed: Path) -> None:
    writer, _, _, _, _ = run(mixed, precision="fp32")
    keys = [sample["key"] for sample in writer.samples_there]
    assert len(set(keys)) == len(keys)
    for sample in writer.samples_there:
        meta, bucket = sample["meta"], sample["bucket"]
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", sample["key"])
        assert meta.keys() == META_FIELDS
        assert meta["key"] == sample["key"]
        assert (meta["num_frames"], meta["height_px"], meta["width_px"]) == tuple(bucket)
        t = 1 + (bucket.frames - 1) // 4
        assert sample["latents"].shape == (3, t, bucket.height // 8, bucket.width // 8)
        assert sample["latents"].dtype == sample["tokens"].dtype == torch.float32
        caption = meta["caption"]
        assert sample["pooled"].tolist() == [len(caption), ord(caption[0])]
        if bucket.frames == 1:
            assert (meta["kind"], meta["fps"], meta["duration_s"], meta["motion_raw"]) == ("image", 0.0, 0.0, None)
        else:
            assert (meta["kind"], meta["fps"]) == ("video", FPS)
            assert meta["duration_s"] == pytest.approx(bucket.frames / FPS)
            assert meta["motion_raw"] > 0.05
        assert meta["visual_raw"] > 0
        assert meta["scores"]["brightness"] > 0
        json.dumps(meta, allow_nan=False)
    starts = {
        s["meta"]["caption"]: s["meta"]["start_s"] for s in writer.of("f9_h32_w32") if s["meta"]["source"] == "web"
    }
    assert starts["red"] == 0
    assert starts["green"] == pytest.approx(20 / FPS)
    still = next(s for s in writer.samples_there if s["meta"]["caption"] == "a still")
    data = (mixed / "in" / "web" / "still.jpg").read_bytes()
    assert still["meta"]["media_xxh128"] == xxhash.xxh128_hexdigest(data)


def test_the_right_frames_reach_the_vae(mixed: Path, tmp_path: Path) -> None:
    """The disk's place tells the frame: x = 8 + 2 n of 64; the bucket shows the middle 48 of them."""
    put(tmp_path / "in" / "a.mp4", np.concatenate([make_scene("red", 20), make_scene("blue", 20)]), "red\nblue")
    seen: dict[str, list[np.ndarray]] = {}

    class Watching(ToyVAE):
        def encode(self, video: torch.Tensor) -> torch.Tensor:
            for clip in video:
                name = "red" if clip[0, 0, 0, -1] > clip[2, 0, 0, -1] else "blue"
                seen.setdefault(f"{name}{video.shape[2]}", []).append(clip.permute(1, 2, 3, 0).numpy())
            return super().encode(video)

    config = CurateConfig(
        input=str(tmp_path / "in"), output=str(tmp_path / "out"), buckets=["f1_h48_w64", "f9_h48_w64"],
        min_clip_s=1.0, max_clip_s=3.0,
    )  # fmt: skip
    curate(config, Watching(), ToyText(), ListSink())
    for colour in ("red", "blue"):
        truth = make_scene(colour).astype(np.float32) / 127.5 - 1
        video, image = seen[f"{colour}9"][0], seen[f"{colour}1"][0]
        for n in range(9):
            errors = [np.abs(video[n] - frame).mean() for frame in truth]
            assert int(np.argmin(errors)) == n
        assert int(np.argmin([np.abs(image[0] - frame).mean() for frame in truth])) == 10  # the middle one of 20


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi"])
def test_frames_are_found_again_in_any_container(container: str, tmp_path: Path) -> None:
    """Key frames, reordered frames and (in AVI) missing times: clip n must hold the frames n x 12 to n x 12 + 9."""
    path = tmp_path / "in" / f"a.{container}"
    path.parent.mkdir()
    truth = np.concatenate([make_scene("red", 28), make_scene("red", 28)[::-1]])
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"crf": "10", "g": "7", "bf": "2", "x264-params": "mbtree=0:open-gop=1"}
        for pixels in truth:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    path.with_suffix(".txt").write_text("red")
    writer, *_ = run(tmp_path, buckets=["f9_h48_w64"], max_clip_s=1.5, precision="fp32", batch_size=1)
    assert len(writer.samples_there) == 4
    pixels = torch.from_numpy(truth).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    for n, sample in enumerate(writer.samples_there):
        errors = {
            start: float((sample["latents"] - ToyVAE().encode(pixels[:, :, start : start + 9])[0]).abs().mean())
            for start in range(len(truth) - 8)
        }
        assert min(errors, key=errors.__getitem__) == 12 * n


def test_clips_are_scored_and_filtered(tmp_path: Path) -> None:
    put(tmp_path / "in" / "moving.mp4", make_scene("red"), "moving")
    put(tmp_path / "in" / "still.mp4", make_scene("blue", 1).repeat(20, axis=0), "still")
    writer, rejects, report, _, _ = run(tmp_path, filters=FilterConfig(min_motion=0.02))
    assert {s["meta"]["caption"] for s in writer.of("f9_h32_w32")} == {"moving"}
    assert {s["meta"]["caption"] for s in writer.of("f1_h32_w32")} == {"moving", "still"}  # a good picture all the same
    assert [row["file"] for row in rejects] == ["still.mp4"]
    assert "min_motion 0.02 (f9_h32_w32, f17_h32_w48)" in rejects[0]["reason"]
    assert rejects[0]["scores"]["freeze_ratio"] == 1
    assert report.rejected == 1


def test_results_do_not_depend_on_the_number_of_processes(mixed: Path) -> None:
    alone = run(mixed, keep_media=True)
    together = run(mixed, keep_media=True, workers=2)
    assert [s["key"] for s in together[0].samples_there] == [s["key"] for s in alone[0].samples_there]
    assert together[1] == alone[1]
    for a, b in zip(alone[0].samples_there, together[0].samples_there, strict=True):
        assert a["meta"] == b["meta"]
        assert a["media"] == b["media"]
        assert torch.equal(a["latents"], b["latents"])


def test_the_order_is_the_seeds(tmp_path: Path) -> None:
    for n in range(3):
        put(tmp_path / "in" / f"{n}.mp4", make_scene("red", 9 + n), "red")
    names = [f"{n}.mp4" for n in range(3)]

    def order(**changes: Any) -> list[str]:
        writer, *_ = run(tmp_path, buckets=["f9_h32_w32"], batch_size=2, **changes)
        return [sample["key"][0] for sample in writer.samples_there]

    assert order(shuffle=False) == ["0", "1", "2"]
    assert order(seed=1) == [name[0] for name in ordered(names, CurateConfig(seed=1))]
    orders = {tuple(ordered(names, CurateConfig(seed=seed))) for seed in range(20)}
    assert len(orders) > 3
    assert all(sorted(one) == names for one in orders)


def test_captions_are_encoded_once_and_clips_in_batches(tmp_path: Path) -> None:
    for n in range(7):
        put(tmp_path / "in" / f"{n}.mp4", make_scene("red", 10 + n), f"caption {n % 2}")
    _, _, _, vae, text = run(tmp_path, batch_size=3, buckets=["f9_h32_w32"])
    assert sorted(text.encoded) == ["caption 0", "caption 1"]
    assert [shape[0] for shape in vae.batches] == [3, 3, 1]
    _, _, _, vae, _ = run(tmp_path, batch_size=3, buckets=["f9_h32_w32"], max_batch_pixels=2 * 9 * 32 * 32)
    assert [shape[0] for shape in vae.batches] == [2, 2, 2, 1]


def test_media_is_kept_on_request(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.mp4", make_scene("red"), "red")
    writer, *_ = run(tmp_path, keep_media=True)
    assert {(s["bucket"].frames, s["suffix"]) for s in writer.samples_there} == {(1, "jpg"), (9, "mp4"), (17, "mp4")}
    for sample in writer.samples_there:
        assert sample["meta"]["media_xxh128"] == xxhash.xxh128_hexdigest(sample["media"])
    assert all(s["media"] is None for s in run(tmp_path)[0].samples_there)


def test_webdataset_tars_are_read_like_files(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.mp4", make_scene("red"), "red")
    put(tmp_path / "in" / "b.jpg", encode_jpg_bytes(make_scene("blue", 1)[0]))
    (tmp_path / "in" / "b.json").write_text('{"caption": "blue"}')
    files = run(tmp_path)[0]
    packed = tmp_path / "packed"
    (packed / "in" / "src").mkdir(parents=True)
    with tarfile.open(packed / "in" / "src" / "0.tar", "w") as tar:
        for name in ("a.mp4", "a.txt", "b.jpg", "b.json"):
            tar.add(tmp_path / "in" / name, arcname=f"x/{name}")
        link = tarfile.TarInfo("evil.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (packed / "in" / "torn.tar").write_bytes((packed / "in" / "src" / "0.tar").read_bytes()[:700])
    tars, rejects, *_ = run(packed)
    assert {s["meta"]["source"] for s in tars.samples_there} == {"src"}

    def content(writer: ListSink) -> list[tuple[str, str, list[float]]]:
        return sorted(
            (s["meta"]["caption"], s["bucket"].name, s["latents"].flatten().tolist()) for s in writer.samples_there
        )

    assert content(tars) == content(files)
    assert [row["file"].partition("/")[0] for row in rejects] == ["torn.tar"] * len(rejects) != []
    with tarfile.open(packed / "in" / "src" / "0.tar") as tar:
        assert io.BytesIO(tar.extractfile("x/a.txt").read()).read() == b"red"


def test_sampling_at_another_rate(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.mp4", make_scene("red", 40), "red", fps=16)
    put(tmp_path / "in" / "slow.mp4", make_scene("blue", 20), "blue", fps=4)
    writer, rejects, *_ = run(tmp_path, fps=8.0, buckets=["f9_h32_w32", "f21_h32_w32"])
    (nine,) = writer.of("f9_h32_w32")
    assert nine["meta"]["fps"] == 8
    assert nine["meta"]["duration_s"] == pytest.approx(9 / 8)
    assert writer.of("f21_h32_w32") == []  # 2.5 s are 20 frames
    assert [(row["file"], row["reason"]) for row in rejects] == [("slow.mp4", "the video has 4 fps, less than fps=8")]


def test_frame_sampling_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        times = np.cumsum(rng.uniform(0.02, 0.06, 60))
        start, end = 5, int(rng.integers(8, 60))
        fps = float(rng.uniform(5, 30))
        end_s = float(times[end])
        frames = sample_frames(times, (start, end), end_s, fps, 10_000)
        for n, frame in enumerate(frames):
            wanted = times[start] + n / fps
            assert frame == min(range(start, end), key=lambda i: abs(times[i] - wanted))
        assert abs(len(frames) - (end_s - times[start]) * fps) <= 1
    assert sample_frames(np.arange(50) / 24, (10, 40), 40 / 24, 24.0, 10_000) == list(range(10, 40))
    assert len(sample_frames(np.array([0.0, 1e12]), (0, 2), 2e12, 24.0, 72)) == 72  # a file may claim any time


def test_upscaling_and_cropping_are_limited(tmp_path: Path) -> None:
    put(tmp_path / "in" / "wide.mp4", make_scene("red", height=32, width=128), "wide")
    buckets = ["f9_h32_w32", "f9_h64_w64"]
    writer, *_ = run(tmp_path, buckets=buckets)
    assert [s["bucket"].name for s in writer.samples_there] == ["f9_h32_w32"]
    writer, *_ = run(tmp_path, buckets=buckets, allow_upscale=True)
    assert sorted(s["bucket"].name for s in writer.samples_there) == buckets
    with pytest.raises(UserError, match="cropping would lose 75%") as caught:
        run(tmp_path, buckets=["f9_h32_w32"], max_crop=0.5)
    assert "nothing was kept" in str(caught.value)


def test_fitting_keeps_the_middle() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (64, 100, 3), dtype=np.uint8)
    fitted = fit_to_bucket(picture, Bucket(1, 32, 32))
    halved = cv2.resize(picture, (50, 32), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(fitted, halved[:, 9:41])
    np.testing.assert_array_equal(fit_to_bucket(picture, Bucket(1, 64, 40)), picture[:, 30:70])
    assert fit_to_bucket(picture, Bucket(1, 72, 33)).shape == (72, 33, 3)


@pytest.mark.parametrize("case", ["missing", "empty", "no captions", "bucket", "output"])
def test_mistakes_are_the_users_to_mend(case: str, tmp_path: Path) -> None:
    if case != "missing":
        (tmp_path / "in").mkdir()
    if case in ("no captions", "bucket", "output"):
        put(tmp_path / "in" / "a.mp4", make_scene("red"), None if case == "no captions" else "red")
    message = {
        "missing": "neither a folder nor a manifest",
        "empty": "no video or image files",
        "no captions": "no file has a caption",
        "bucket": "nearest is f9_h32_w32",
        "output": "output is not set",
    }[case]
    config = CurateConfig(
        input=str(tmp_path / "in"), output="" if case == "output" else str(tmp_path / "out"), min_clip_s=1.0,
        buckets=["f8_h32_w32" if case == "bucket" else "f9_h32_w32"],
    )  # fmt: skip
    writer = ListSink()
    with pytest.raises(UserError, match=message):
        curate(config, ToyVAE(), ToyText(), writer)
    assert not writer.closed


def test_an_interrupted_run_adds_nothing_to_the_dataset_and_goes_on(tmp_path: Path) -> None:
    for n in range(3):
        put(tmp_path / "in" / f"{n}.mp4", make_scene("red", 10 + n), "red")

    class Failing(ToyVAE):
        def encode(self, video: torch.Tensor) -> torch.Tensor:
            if len(self.batches) == 1:
                raise KeyboardInterrupt
            return super().encode(video)

    config = CurateConfig(
        input=str(tmp_path / "in"), output=str(tmp_path / "out"), buckets=["f9_h32_w32"], min_clip_s=1.0, batch_size=1,
        dedup=DedupConfig(near=False),
    )  # fmt: skip
    writer = ListSink()
    with pytest.raises(KeyboardInterrupt):
        curate(config, Failing(), ToyText(), writer)
    assert writer.added == 1
    assert not writer.finished
    assert not writer.closed
    assert curate(config, ToyVAE(), ToyText(), writer).kept == 3
    assert len({sample["key"] for sample in writer.samples_there}) == 3


def test_latents_that_are_not_finite_are_rejected(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.mp4", make_scene("red"), "red")
    put(tmp_path / "in" / "b.mp4", make_scene("blue"), "blue")

    class Overflowing(ToyVAE):
        def encode(self, video: torch.Tensor) -> torch.Tensor:
            latents = super().encode(video)
            latents[video[:, 0].mean((1, 2, 3)) < video[:, 2].mean((1, 2, 3))] *= float("inf")
            return latents

    config = CurateConfig(
        input=str(tmp_path / "in"), output=str(tmp_path / "out"), buckets=["f9_h32_w32"], min_clip_s=1.0
    )
    writer = ListSink()
    report = curate(config, Overflowing(), ToyText(), writer)
    assert [s["meta"]["caption"] for s in writer.samples_there] == ["red"]
    assert (report.kept, report.rejected) == (1, 1)
    assert "not finite" in (tmp_path / "out" / "rejects.jsonl").read_text()


def test_the_output_may_lie_in_the_input(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4", make_scene("red"), "red")
    put(tmp_path / "out" / "shards" / "x.tar", b"not for reading")
    config = CurateConfig(input=str(tmp_path), output=str(tmp_path / "out"), buckets=["f9_h32_w32"], min_clip_s=1.0)
    assert curate(config, ToyVAE(), ToyText(), ListSink()).files == 1


def test_a_crash_costs_one_task() -> None:
    with WorkerPool(2) as pool:
        results = list(pool.map(square_unless_three, range(7)))
    assert [task for task, _ in results] == list(range(7))
    assert [result for task, result in results if task != 3] == [0, 1, 4, 16, 25, 36]
    assert isinstance(results[3][1], WorkerCrashError)


def test_captions_of_scenes() -> None:
    one = parse_captions(b"a caption\n\n", None)
    assert [one.of_scene(n, 3, float(n), n + 1.0) for n in range(3)] == ["a caption"] * 3
    lines = parse_captions("eins\nzwei drei\n".encode("utf-8-sig"), b'{"caption": "not this"}')
    assert [lines.of_scene(n, 2, 0.0, 1.0) for n in range(2)] == ["eins", "zwei drei"]
    with pytest.raises(CaptionError, match="2 captions for 3 scenes"):
        lines.of_scene(0, 3, 0.0, 1.0)
    record = {
        "scenes": [{"caption": "first", "start_s": 0, "end_s": 2}, {"caption": "second", "start_s": 2, "end_s": 5}]
    }
    timed = parse_captions(None, json.dumps(record).encode())
    spans = [(0.0, 1.9), (1.9, 3.0), (3.0, 5.0)]  # the finder saw one cut more
    assert [timed.of_scene(n, 3, *span) for n, span in enumerate(spans)] == ["first", "second", "second"]
    with pytest.raises(CaptionError, match="no caption for 7"):
        timed.of_scene(0, 2, 7.0, 8.0)
    for text, record_bytes in (
        (None, None),
        (b"\n \n", None),
        (None, b"{}"),
        (None, b"[1]"),
        (None, b"{"),
        (b"\xff", None),
    ):
        with pytest.raises(CaptionError):
            parse_captions(text, record_bytes)


def test_the_configuration_checks_itself() -> None:
    schema = OmegaConf.structured(CurateConfig)
    merged = OmegaConf.merge(
        schema, OmegaConf.from_dotlist(["buckets=[f9_h64_w64]", "filters.min_visual=0.1", "fps=24"])
    )
    config = OmegaConf.to_object(merged)
    assert isinstance(config, CurateConfig)
    assert (config.buckets, config.filters.min_visual, config.fps) == (["f9_h64_w64"], 0.1, 24.0)
    for wrong in (
        {"buckets": ["9x64"]}, {"buckets": []}, {"workers": 0}, {"max_clip_s": 2.0}, {"precision": "fp8"},
        {"scene_detector": "contents"}, {"fps": 0.0}, {"max_crop": 2.0},
        {"buckets": ["f9_h33_w33"], "keep_media": True},
    ):  # fmt: skip
        with pytest.raises(UserError, match="|".join(wrong)):
            CurateConfig(**wrong)
