"""What single phases do: captions by a model, parts of films, embeddings, crashes, thumbnails, the summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curation_process import config_of, curate_folder
from toy_encoders import ListSink, ToyText, ToyVAE
from toy_media import FPS, make_scene, make_world, put

from contentv.base.errors import UserError
from contentv.curation import curate as curate_module
from contentv.curation import look
from contentv.curation.captioner import CaptionerConfig, CaptionRequest
from contentv.curation.captions import CaptionError
from contentv.curation.curate import curate
from contentv.curation.timing import ChunkTask
from contentv.curation.workers import WorkerCrashError
from contentv.data import read_metas


class ToyCaptioner:
    """Says how many frames it saw and which colour is strongest; fails on green."""

    fingerprint = "toy"

    def __init__(self) -> None:
        self.asked: list[CaptionRequest] = []

    def caption(self, clips: Sequence[CaptionRequest]) -> list[str | CaptionError]:
        self.asked.extend(clips)
        names = ["red", "green", "blue"]
        colours = [names[int(clip.frames[..., :, :10, :].mean(axis=(0, 1, 2)).argmax())] for clip in clips]
        return [
            CaptionError("no idea", "captioner") if colour == "green" else f"{len(clip.frames)} frames of {colour}"
            for clip, colour in zip(clips, colours, strict=True)
        ]


def rejects(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rejects.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("when", ["missing", "always"])
def test_captions_by_a_model(when: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    put(source / "mute.mp4", make_scene("blue"))
    put(source / "told.mp4", make_scene("red"), "told")
    put(source / "hard.mp4", make_scene("green"))
    config = config_of(
        source, tmp_path / "d", dedup={"near": False}, chunk_size=2,
        captioner=CaptionerConfig(kind="endpoint", url="http://localhost:1/v1", model="m", frames=4, when=when),
    )  # fmt: skip
    captioner, sink = ToyCaptioner(), ListSink()
    report = curate(config, ToyVAE(), ToyText(), sink, captioner=captioner)
    told = "told" if when == "missing" else "4 frames of red"
    assert {s["meta"]["caption"] for s in sink.samples_there} == {"4 frames of blue", told}
    assert report.rules == {"captioner": 1}
    assert [(row["file"], row["reason"]) for row in rejects(tmp_path / "d")] == [("hard.mp4", "no idea")]
    assert len(captioner.asked) == (2 if when == "missing" else 3)
    assert {request.hint for request in captioner.asked} == ({""} if when == "missing" else {"", "told"})
    # What failed for want of a caption is tried again; the rest is not.
    assert curate(config, ToyVAE(), ToyText(), sink, captioner=captioner).skipped == 2


def test_parts_of_a_film_that_a_manifest_names(tmp_path: Path) -> None:
    film = np.concatenate([make_world(n, 24) for n in range(3)])
    put(tmp_path / "in" / "film.mp4", film)
    spans = [(0.0, 3.0, "first"), (3.0, 6.0, "second"), (6.0, 9.0, "third")]
    rows = [{"path": "film.mp4", "start_s": a, "end_s": b, "caption": text} for a, b, text in spans]
    manifest = tmp_path / "in" / "list.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = curate_folder(manifest, tmp_path / "d", buckets=["f17_h48_w64"])
    assert (report.kept, report.rejected) == (3, 0), "parts of one file are no copies of each other"
    found = {meta["caption"]: meta["start_s"] for meta in read_metas(tmp_path / "d")}
    assert found == {"first": 0.0, "second": pytest.approx(3.0), "third": pytest.approx(6.0)}

    class Watching(ToyVAE):
        def encode(self, video: Any) -> Any:
            for clip in video:
                pixels = ((clip[:, 0].permute(1, 2, 0).numpy() + 1) * 127.5).astype(float)
                errors = [np.abs(film[n].astype(float) - pixels).mean() for n in range(len(film))]
                seen.append(int(np.argmin(errors)))
            return super().encode(video)

    seen: list[int] = []
    curate(config_of(manifest, tmp_path / "t", buckets=["f17_h48_w64"]), Watching(), ToyText(), ListSink())
    assert sorted(seen) == [0, 3 * FPS, 6 * FPS], "each part begins at its own frame"


def test_embeddings_find_copies_that_look_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Embedder:
        def embed(self, frames: np.ndarray) -> np.ndarray:
            strongest = frames[..., :10, :].mean(axis=(0, 1, 2)).argmax()
            return np.eye(3, dtype=np.float32)[strongest]

    monkeypatch.setattr(look, "_embedder", lambda path: Embedder())
    source = tmp_path / "in"
    put(source / "a.mp4", make_scene("red"), "red")
    put(source / "b.mp4", make_scene("blue"), "blue")
    dedup = {"encoder": "an/encoder", "max_distance": 0.0}
    assert curate_folder(source, tmp_path / "d", dedup=dedup).kept == 4
    put(source / "c.mp4", make_scene("red")[:, ::-1, :, :] // 2, "darker, upside down")
    report = curate_folder(source, tmp_path / "d", dedup=dedup)
    assert (report.kept, report.skipped, report.rules) == (0, 2, {"duplicate:near": 1})
    assert rejects(tmp_path / "d")[0]["reason"] == "looks like a.mp4 (scene 0, clip 0) (similarity 1.000)"


def test_a_crash_costs_a_file_in_any_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool whose workers die on some files; here the tasks tell which."""

    class Crashing:
        workers = 1

        def __enter__(self) -> Crashing:
            return self

        def __exit__(self, *_: object) -> None: ...

        def map(
            self, function: Callable[[Any], Any], tasks: Iterable[ChunkTask], ahead: int = 2
        ) -> Iterator[tuple[Any, Any]]:
            for task in tasks:
                inner = task.task
                name = getattr(getattr(inner, "item", None) or getattr(inner, "record", None), "name", "")
                phase = type(inner).__name__
                if (phase, name) in {("ScanTask", "a.mp4"), ("EncodeTask", "b.mp4")}:
                    yield task, WorkerCrashError("the process that decoded it died")
                else:
                    yield task, function(task)

    monkeypatch.setattr(curate_module, "make_pool", lambda config: Crashing())
    for n, name in enumerate("abc"):
        put(tmp_path / "in" / f"{name}.mp4", make_world(n), name)
    report = curate_folder(tmp_path / "in", tmp_path / "d")
    assert (report.kept, report.rules) == (2, {"crashed": 2})
    assert {row["file"] for row in rejects(tmp_path / "d")} == {"a.mp4", "b.mp4"}


def test_thumbnails_and_summary(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "d"
    for n in range(6):
        put(source / f"{n}.mp4", make_world(n), f"world {n}")
    put(source / "dup.mp4", np.ascontiguousarray(make_world(0)[:, 1:-1, 1:-1]), "a copy, cropped")
    report = curate_folder(source, output, shuffle=False, chunk_size=100)
    rows = [json.loads(line) for line in (output / "thumbnails.jsonl").read_text().splitlines()]
    assert [(row["file"], row["rule"]) for row in rows] == [
        *((f"{n}.mp4", None) for n in range(4)), ("dup.mp4", "duplicate:near"),
    ]  # fmt: skip
    keys = {meta["key"] for meta in read_metas(output)}
    assert all((output / row["path"]).read_bytes()[:2] == b"\xff\xd8" for row in rows)
    assert all((row["key"] in keys) == (row["rule"] is None) for row in rows)
    summary = json.loads((output / "curation" / "run-0001" / "summary.json").read_text())
    assert summary["phases"].keys() == {"scan", "decide", "encode", "merge"}
    assert {name: phase["items"] for name, phase in summary["phases"].items()} == {
        "scan": 7, "decide": 7, "encode": 12, "merge": 12,
    }  # fmt: skip
    assert (summary["files"], summary["clips"], summary["kept"], summary["rejected"]) == (7, 7, 12, 1)
    assert report.seconds > 0
    assert not list(output.rglob("scan/*.thumbnails.safetensors"))


def test_a_dataset_from_elsewhere_is_added_to(tmp_path: Path) -> None:
    """Without a work folder nothing is known of its files, but their samples are not written twice."""
    source, output = tmp_path / "in", tmp_path / "d"
    put(source / "a.mp4", make_world(0), "a")
    curate_folder(source, output)
    for path in list(output.rglob("r0001-*")):
        path.rename(path.with_name(path.name.replace("r0001-c000000-000", "000000")))
    record = (output / "dataset.json").read_text().replace("r0001-c000000-000", "000000")
    (output / "dataset.json").write_text(record)
    for path in sorted((output / "curation").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    put(source / "b.mp4", make_world(1), "b")
    report = curate_folder(source, output)
    assert (report.kept, report.rules) == (2, {"duplicate:bytes": 1})


def test_nothing_new_in_an_empty_output_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.mp4", make_world(0, 4), "too short")
    with pytest.raises(UserError, match="nothing was kept"):
        curate_folder(tmp_path / "in", tmp_path / "d")
    assert rejects(tmp_path / "d")[0]["rule"] == "too_short"
    assert not list((tmp_path / "d" / "curation").iterdir()), "the next start begins anew"
