"""The synthetic clips are what their captions and their truth say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from contentv.base.errors import UserError
from contentv.curation.synth import SynthConfig, render_scenes, sample_scenes, synthesize, truth_of, write_mp4
from contentv.curation.synth_captions import caption_of, every_caption
from contentv.curation.synth_world import COLOURS, DIRECTIONS, SHADES, VARIANTS, render_clip, sample_spec

cv2.setNumThreads(1)  # its threads wait for each other on a busy machine


def read_frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def coloured(picture: np.ndarray) -> np.ndarray:
    """Where the picture is far from grey: the object, found without knowing where it was drawn."""
    values = picture.astype(int)
    return (values.max(-1) - values.min(-1)) > 90


def test_same_seed_same_frames_and_other_seed_other_frames() -> None:
    config = SynthConfig(seed=3, joined_share=0.5)
    first, again = (render_scenes(sample_scenes(config, 7), 64) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = render_scenes(sample_scenes(SynthConfig(seed=4, joined_share=0.5), 7), 64)
    assert first.shape != other.shape or (first != other).mean() > 0.5


def test_a_clip_is_the_same_whatever_the_number_of_clips(tmp_path: Path) -> None:
    synthesize(tmp_path / "few", 1, 5, SynthConfig(size_px=32))
    synthesize(tmp_path / "more", 2, 5, SynthConfig(size_px=32))
    few, more = (json.loads((tmp_path / name / "clip-00000.json").read_text()) for name in ("few", "more"))
    assert few == more


@pytest.mark.parametrize("variant", ["clean", "jittery"])
def test_object_stays_in_view_and_goes_a_quarter_of_the_frame(variant: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        spec = sample_spec(rng, variant=variant, clip_frames=24)
        clip = render_clip(spec, 24, 64)
        assert all(coloured(picture).sum() > 0.5 * coloured(clip[0]).sum() for picture in clip[[8, 16, 23]])
        if variant == "clean":
            (y0, x0), (y1, x1) = (np.argwhere(coloured(clip[i])).mean(0) / 64 for i in (0, 16))
            along = np.dot((x1 - x0, y1 - y0), DIRECTIONS[spec.direction])
            assert along >= 0.25
            assert abs(along - spec.displacement) < 0.05


def test_objects_have_the_colour_and_backgrounds_are_dull() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        spec = sample_spec(rng)
        picture = render_clip(spec, 1, 96)[0]
        where = coloured(picture)
        assert np.abs(picture[where].mean(0) / 255 - np.array(COLOURS[spec.colour])).max() < 0.2
        rest = picture[~where].astype(int)
        assert np.percentile(rest.max(-1) - rest.min(-1), 90) < 70
        assert abs(rest.mean() / 255 - SHADES[spec.shade]) < 0.25


def test_variants_differ_from_clean_as_named() -> None:
    def sharpness(clip: np.ndarray) -> float:
        return float(np.abs(np.diff(clip.astype(int), axis=2)).mean())

    rng = np.random.default_rng(2)
    for _ in range(8):
        spec = sample_spec(rng)
        values = {
            v: render_clip(type(spec)(**{**vars(spec), "variant": v}), 5, 64) for v in ("clean", "blurred", "noisy")
        }
        assert sharpness(values["blurred"]) < sharpness(values["clean"]) < sharpness(values["noisy"])
    still = render_clip(sample_spec(rng, variant="static"), 10, 64)
    np.testing.assert_array_equal(still[0], still[9])


def test_captions_name_what_is_there_and_belong_to_the_grammar() -> None:
    known = set(every_caption())
    rng = np.random.default_rng(3)
    for variant in VARIANTS:
        for _ in range(30):
            spec = sample_spec(rng, variant=variant)
            caption = caption_of(spec)
            assert caption in known
            assert caption_of(spec, picture=True) in known
            assert spec.colour in caption
            assert spec.shape in caption
            named = [direction for direction in DIRECTIONS if direction in caption.split()]
            assert named == ([] if variant == "static" else [spec.direction]) or f"{spec.direction}," in caption
    assert len(known) == len(every_caption())


def test_files_lie_beside_each_other_and_decode_to_the_frames(tmp_path: Path) -> None:
    config = SynthConfig(size_px=64, joined_share=0.6, images=2)
    paths = synthesize(tmp_path, 4, 11, config)
    assert [path.name for path in paths] == [f"clip-{i:05d}.mp4" for i in range(4)] + [
        "image-00000.png",
        "image-00001.png",
    ]
    cuts = 0
    for index, path in enumerate(paths[:4]):
        truth = json.loads(path.with_suffix(".json").read_text())
        captions = path.with_suffix(".txt").read_text().splitlines()
        frames = read_frames(path)
        drawn = render_scenes(sample_scenes(SynthConfig(**{**vars(config), "clips": 4, "seed": 11}), index), 64)
        assert frames.shape == drawn.shape == (truth["num_frames"], 64, 64, 3)
        assert np.abs(frames.astype(int) - drawn).mean() < 8
        assert captions == [scene["caption"] for scene in truth["scenes"]]
        assert truth["cuts"] == [scene["start_frame"] for scene in truth["scenes"]][1:]
        assert all(scene["num_frames"] >= 17 for scene in truth["scenes"])
        for cut in truth["cuts"]:
            cuts += 1
            jump = np.abs(drawn[cut].astype(int) - drawn[cut - 1]).mean()
            assert jump > 4 * np.abs(drawn[cut].astype(int) - drawn[cut + 1]).mean()
    assert cuts > 0
    image = json.loads(paths[-1].with_suffix(".json").read_text())
    assert image["kind"] == "image"
    assert image["caption"] == paths[-1].with_suffix(".txt").read_text().strip()


def test_truth_of_joined_scenes_counts_frames() -> None:
    config = SynthConfig(joined_share=1.0, seed=1)
    scenes = sample_scenes(config, 0)
    truth = truth_of(scenes, 8, 128)
    assert len(scenes) in (2, 3)
    assert truth["num_frames"] == sum(scene.frames for scene in scenes)
    assert {scene["direction"] for scene in truth["scenes"]} <= {*DIRECTIONS, "still"}


def test_mp4_is_h264_yuv420p(tmp_path: Path) -> None:
    write_mp4(tmp_path / "x.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, int(stream.average_rate)) == (
            "h264",
            "yuv420p",
            8,
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size_px", 33),
        ("clips", -1),
        ("joined_share", 1.5),
        ("fps", 0),
        ("crf", 60),
        ("variants", {"wobbly": 1.0}),
        ("variants", {}),
    ],
)
def test_values_out_of_range_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        SynthConfig(**{key: value})


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        synthesize(tmp_path / "out", 1, 0)


def test_blur_and_pace_are_drawn_apart_and_told() -> None:
    plain, varied = (SynthConfig(seed=2, joined_share=0.5, **more) for more in ({}, {"blur_max": 0.03, "slowest": 0.1}))
    for index in range(6):
        old, new = sample_scenes(plain, index), sample_scenes(varied, index)
        assert [scene.frames for scene in old] == [scene.frames for scene in new]
        for before, after in zip(old, new, strict=True):
            assert (before.spec.shape, before.spec.seed, before.spec.blur) == (after.spec.shape, after.spec.seed, 0.0)
            assert 0 < after.spec.blur <= 0.03
            assert 0.1 * before.spec.displacement <= after.spec.displacement <= before.spec.displacement
    rows = truth_of(sample_scenes(varied, 0), 8, 64)["scenes"]
    assert [row["blur"] for row in rows] == [round(scene.spec.blur, 5) for scene in sample_scenes(varied, 0)]
    spec = sample_spec(np.random.default_rng(0), variant="clean")
    sharp, soft = (render_clip(dataclasses.replace(spec, blur=blur), 1, 96)[0] for blur in (0.0, 0.02))
    expected = cv2.GaussianBlur(sharp.astype(np.float32), (0, 0), 0.02 * 96)
    assert np.abs(soft - expected).max() < 2


@pytest.mark.parametrize("bad", [{"blur_max": 0.2}, {"slowest": 0.0}, {"slowest": 1.5}])
def test_blur_and_pace_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        SynthConfig(**bad)  # type: ignore[arg-type]
