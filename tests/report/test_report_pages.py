"""Whole pages from small made-up folders: well formed, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import base64
import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from contentv.base.errors import UserError
from contentv.report import write_dataset_report, write_demo_report, write_run_report

VOID = {"meta", "img", "br"}
NASTY = '<script>alert("x")</script> & "red" square'


class Page(HTMLParser):
    """Parses a document strictly: every element that is not void must be closed, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute stands twice on {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + "\n"

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)

    def check_self_contained(self) -> None:
        assert self.count("script") == self.count("link") == self.count("iframe") == self.count("a") == 0
        for tag, attributes in self.tags:
            for name, value in attributes.items():
                assert not name.startswith("on"), f"{tag} has an event handler"
                if name in ("src", "href", "poster", "srcset", "data", "action"):
                    assert (value or "").startswith("data:"), f"{tag} loads {value!r}"
        assert "url(" not in self.source
        assert "@import" not in self.source
        policies = [
            a["content"] for t, a in self.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policies
        assert "default-src 'none'" in (policies[0] or "")


def write_clip(path: Path, codec: str = "libx264", frames: int = 9) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            image = np.full((32, 32, 3), 30, np.uint8)
            image[8:20, i : i + 12] = (220, 40, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def write_run(folder: Path, stage: str, steps: int = 60, **extra: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(steps)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            row = {
                "stage": stage, "step": step, "loss": 2.0 / step + 0.1 * draw.random(), "grad_norm": 0.5,
                "lr": 1e-4, "samples_seen": 8 * step, "tokens_seen": 8 * 180 * step, "step_s": 0.5, "data_wait_s": 0.05,
                "tokens_per_s": 2880.0, "mfu": None, "peak_memory_bytes": 3 * 2**30, **extra,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    (folder / "config.yaml").write_text(
        "optim:\n  lr: 0.0001\n  betas: [0.9, 0.999]\nwandb:\n  api_key: hunter2\ntext:\n  path: '<b>here</b>'\n"
    )
    return folder


def make_metas(count: int = 40) -> list[dict[str, Any]]:
    draw = random.Random(7)
    metas: list[dict[str, Any]] = []
    for i in range(count):
        motion = draw.random()
        metas.append(
            {
                "key": f"{i:04d}",
                "caption": NASTY,
                "source": NASTY,
                "kind": "video",
                "duration_s": 1.5,
                "motion_raw": motion,
                "visual_raw": 1.0 - motion + 0.3 * draw.random(),
                "scores": {"sharpness": 3.0 * motion},
            }
        )
    return metas


INFO = {
    "buckets": {"f17_h96_w96": {"samples": 30, "latent_shape": [16, 5, 12, 12]}, "f1_h96_w96": {"samples": 10}},
    "shards": [{"name": "f17_h96_w96/000000.tar", "samples": 40, "bytes": 5 * 2**20}],
}


def test_run_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sft", "sft", loss_low_sigma=0.4)
    clip = write_clip(run / "samples" / "a red square.mp4")
    path = write_run_report(run)
    assert path == run / "report.html"
    page = Page(path)
    page.check_self_contained()
    assert len(page.source) < 2_000_000
    for title in ("Loss (log scale)", "Gradient norm (log scale)", "Learning rate", "Throughput", "Waiting for data"):
        assert title in page.text
    assert "Loss in parts" in page.text
    assert "10.0%" in page.text  # 0.05 s of 0.5 s waited for data
    assert "3 GiB" in page.text
    assert "Model FLOP utilisation" not in page.text  # logged as null throughout
    assert "optim.lr" in page.text
    assert "[0.9, 0.999]" in page.text
    assert "<b>here</b>" in page.text  # as text: the parser decoded it, and no <b> element exists
    assert page.count("b") == 0
    assert "hunter2" not in page.source
    videos = [a for t, a in page.tags if t == "video"]
    assert len(videos) == 1
    assert {"autoplay", "loop", "muted", "playsinline"} <= set(videos[0])
    assert base64.b64decode((videos[0]["src"] or "").split(",", 1)[1]) == clip
    assert (videos[0]["poster"] or "").startswith("data:image/jpeg;base64,/9j/")


def test_run_report_is_the_same_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sft", "sft")
    assert write_run_report(run).read_bytes() == write_run_report(run).read_bytes()


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_run_report_says_what_is_missing(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    page = Page(write_run_report(tmp_path))
    page.check_self_contained()
    assert "no step was logged" in page.text
    assert "no samples/*.mp4" in page.text
    assert "no config.yaml" in page.text


def test_run_report_of_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_run_report(tmp_path / "nowhere")


def test_malformed_line_leaves_an_old_report_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sft", "sft")
    before = write_run_report(run).read_bytes()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    with pytest.raises(UserError, match=r"metrics\.jsonl:61"):
        write_run_report(run)
    assert (run / "report.html").read_bytes() == before


def test_videos_that_cannot_play_are_said_to(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sft", "sft")
    write_clip(run / "samples" / "old.mp4", codec="mpeg4")
    (run / "samples" / "torn.mp4").write_bytes(b"not a video")
    page = Page(write_run_report(run))
    page.check_self_contained()
    assert page.count("video") == 0
    assert "old.mp4 is mpeg4; browsers play h264" in page.text
    assert page.count("img") == 1
    assert "torn.mp4: not a readable video" in page.text


def test_videos_beyond_the_limits_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "sft", "sft")
    sizes = [
        len(write_clip(run / "samples" / name, frames=n)) for name, n in (("a.mp4", 4), ("b.mp4", 30), ("c.mp4", 4))
    ]
    monkeypatch.setattr("contentv.report.media.MAX_VIDEO_BYTES", sizes[1] - 1)
    monkeypatch.setattr("contentv.report.run.MAX_PAGE_BYTES", sizes[0] + sizes[1])
    page = Page(write_run_report(run))
    assert page.count("video") == 1
    assert "b.mp4: " in page.text
    assert "too large to put into the page" in page.text
    assert "not on this page, to keep it small: 1 of" in page.text


def test_dataset_report(tmp_path: Path) -> None:
    (tmp_path / "rejects.jsonl").write_text("".join(f'{{"reason": "{r}"}}\n' for r in ["blurred"] * 3 + ["static"]))
    out = tmp_path / "pages" / "data.html"
    assert write_dataset_report(tmp_path, iter(make_metas()), INFO, None, out) == out
    page = Page(out)
    page.check_self_contained()
    assert NASTY in page.text
    assert "4 rejected, by reason" in page.text
    assert "1 min 00 s" in page.text  # 40 clips of 1.5 s
    assert "5 MiB" in page.text
    assert "16 x 5 x 12 x 12" in page.text
    assert "40 clips)" in page.text
    for name in ("motion-rich", "clean-looking", "both", "neither", "sharpness"):
        assert name in page.text


def test_dataset_quadrants_are_counted_on_normalised_scores(tmp_path: Path) -> None:
    corners = {"a": (0.9, 0.1), "b": (0.1, 0.9), "c": (0.9, 0.9), "d": (0.1, 0.1), "e": (float("nan"), 0.4)}
    metas = [{"key": k} for k, n in (("a", 5), ("b", 4), ("c", 3), ("d", 2), ("e", 1)) for _ in range(n)]
    page = Page(write_dataset_report(tmp_path, metas, {}, lambda m: corners[m["key"]], tmp_path / "r.html"))
    for text in ("motion-rich  5 (36%)", "clean-looking  4 (29%)", "both  3 (21%)", "neither  2 (14%)"):
        assert text in page.text
    assert "Clips without both scores are left out: 1." in page.text
    assert "no buckets" in page.text
    assert "nothing is known of rejected clips" in page.text


def test_dataset_report_of_nothing(tmp_path: Path) -> None:
    page = Page(write_dataset_report(tmp_path, [], {}, None, tmp_path / "r.html"))
    page.check_self_contained()
    assert "no clip has both scores" in page.text
    assert "too few scored clips" in page.text


def test_damaged_lines_of_rejects_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rejects.jsonl").write_text('{"reason": "static"}\n{"why": "x"}\n[]\n{"reason": "torn')
    page = Page(write_dataset_report(tmp_path, [], {}, None, tmp_path / "r.html"))
    assert "1 rejected, by reason" in page.text
    assert "3 lines of rejects.jsonl cannot be read" in page.text


def make_demo(tmp_path: Path, **summary: Any) -> Page:
    stages = [
        ("image", write_run(tmp_path / "image", "image")),
        ("rlhf", write_run(tmp_path / "rlhf", "rlhf", reward=0.4)),
    ]
    clip = tmp_path / "samples" / "0.mp4"
    write_clip(clip)
    density = ([0.1, 0.5, 0.9], [0.5, 1.0, 2.0])
    samples = [
        (NASTY, clip, {"colour": True, "direction": False, "reward": 0.25}),
        ("a blue disc", clip, {"colour": None}),
    ]
    return Page(
        write_demo_report(
            tmp_path,
            summary,
            stages,
            make_metas(),
            {"motion-rich": density, "base": density},
            samples,
            before={"a blue disc": clip},
        )
    )


def test_demo_report(tmp_path: Path) -> None:
    page = make_demo(
        tmp_path, prompts=[NASTY] * 96, colour_accuracy=0.917, colour_accuracy_interval=[0.844, 0.957],
        colour_accuracy_chance=0.25, direction_accuracy=1, direction_accuracy_before=0.5,
        reward_before=0.4, reward_after=0.55,
        seconds_per_stage={"image": 60, "rlhf": 45.5},
    )  # fmt: skip
    page.check_self_contained()
    assert len(page.source) < 2_000_000
    for text in (
        "91.7%", "95 % interval 84.4% to 95.7%, guessing 25.0%", "100.0%", "change +0.15",
        "no interval given, before RLHF 50.0%",
        "Measured on 96 prompts.", "1 min 46 s", "45.5 s", "✓ colour right", "✗ direction wrong", "reward 0.25",
        "before RLHF", "Stage: image", "Stage: rlhf", "Noise levels drawn for each kind of clip", NASTY,
    ):  # fmt: skip
        assert text in page.text, text
    assert page.count("video") == 3  # one alone, and a pair
    assert "colour None" not in page.text


def test_demo_report_before_anything_was_measured(tmp_path: Path) -> None:
    page = Page(write_demo_report(tmp_path, {}, [("image", tmp_path / "image")], [], {}, []))
    page.check_self_contained()
    for text in ("holds no result yet", "no video was sampled", "no densities were given", "no step was logged"):
        assert text in page.text


def test_demo_report_refuses_a_broken_interval(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="colour_accuracy_interval"):
        make_demo(tmp_path, colour_accuracy=0.9, colour_accuracy_interval=[0.8])
