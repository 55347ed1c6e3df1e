"""Scores rank made-up clips as people would: independent truth is how each clip was made."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from contentv.base.errors import UserError
from contentv.curation.filters import FilterConfig, failures
from contentv.curation.motion import measure_motion
from contentv.curation.scorers import SCORERS, ClipScores, score_clip
from contentv.curation.scoring.pictures import noise_level
from contentv.curation.synth_world import render_clip, sample_spec

FPS = 8.0
FRAMES = 12


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    cv2.setNumThreads(1)  # the flow depends on the number of threads


def texture(side: int, seed: int = 0) -> np.ndarray:
    """A picture with detail at many scales, 30..220."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((side, side, 3), np.float32)
    for cells in (6, 20, 60):
        coarse = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC) * (12 / cells) ** 0.5
    low, high = picture.min(), picture.max()
    return 30 + 190 * (picture - low) / (high - low)


def make_clip(
    size: int = 128,
    step: float = 2.0,
    pan: float = 0.0,
    jitter: float = 0.0,
    shake: float = 0.0,
    seed: int = 0,
    frames: int = FRAMES,
) -> np.ndarray:
    """A disk with its own texture over a textured ground; lengths in 128ths of the side per frame."""
    rng = np.random.default_rng(seed + 100)
    unit = size / 128
    ground, skin = texture(3 * size, seed), texture(size, seed + 1)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    clip = []
    for n in range(frames):
        dx, dy = (pan * n + shake * rng.normal()) * unit, shake * rng.normal() * unit
        view = np.array([[1, 0, size + dx], [0, 1, size + dy]], np.float32)
        picture = cv2.warpAffine(ground, view, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        centre = (30 + step * n + jitter * rng.normal()) * unit, (64 + jitter * rng.normal()) * unit
        move = np.array([[1, 0, 64 * unit - centre[0]], [0, 1, 64 * unit - centre[1]]], np.float32)
        body = cv2.warpAffine(skin, move, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        distance = np.hypot(x - centre[0], y - centre[1])
        cover = np.clip(18 * unit - distance + 0.5, 0, 1)[..., None]
        clip.append(picture * (1 - cover) + body * cover)
    return np.clip(np.rint(np.stack(clip)), 0, 255).astype(np.uint8)


def blurred(clip: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip])


def noisy(clip: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, clip.shape)
    return np.clip(np.rint(clip + noise), 0, 255).astype(np.uint8)


def scored(clip: np.ndarray) -> ClipScores:
    return score_clip(clip, FPS)


@pytest.mark.parametrize("size", [96, 128, 400])
@pytest.mark.parametrize("seed", [0, 1])
def test_blur_and_noise_lower_the_visual_score(size: int, seed: int) -> None:
    clean = make_clip(size, seed=seed, frames=3)
    unit = size / 128
    levels = [scored(clip).visual_raw for clip in (clean, blurred(clean, unit), blurred(clean, 3 * unit))]
    assert levels[0] > 1.3 * levels[1] > 1.3 * levels[2]
    coarse = unit if size > 256 else 1.0  # shrinking to the scoring size averages noise away
    noises = [scored(noisy(clean, sigma * coarse)).visual_raw for sigma in (8, 20)]
    assert levels[0] > 1.3 * noises[0] > 1.3 * noises[1]


def test_noise_is_measured_in_grey_levels() -> None:
    flat = np.full((128, 160), 120, np.float32)
    smooth = cv2.GaussianBlur(texture(160)[:128, :, 0], (0, 0), 2)
    for sigma in (2.0, 6.0, 15.0):
        noise = np.random.default_rng(0).normal(0, sigma, flat.shape).astype(np.float32)
        assert noise_level(flat + noise) == pytest.approx(sigma, rel=0.12)
        assert noise_level(smooth + noise) == pytest.approx(sigma, rel=0.2)
    assert noise_level(flat) == 0
    assert noise_level(texture(128)[..., 0]) < 2.0  # detail is not noise


def test_exposure_brightness_and_borders() -> None:
    clip = make_clip(frames=3)
    fine = scored(clip)
    dark = scored((clip * 0.05).astype(np.uint8))
    burnt = scored(np.clip(clip.astype(int) + 150, 0, 255).astype(np.uint8))
    assert fine.scores["exposure"] > 0.95
    assert max(dark.scores["exposure"], burnt.scores["exposure"]) < 0.5
    assert max(dark.visual_raw, burnt.visual_raw) < 0.5 * fine.visual_raw
    assert dark.scores["brightness"] < fine.scores["brightness"] < burnt.scores["brightness"]
    boxed = clip.copy()
    boxed[:, :16] = boxed[:, -16:] = 0
    assert fine.scores["black_border"] == 0
    assert scored(boxed).scores["black_border"] == pytest.approx(0.25)
    assert scored(np.zeros_like(clip)).scores["black_border"] == 1


def test_static_slow_and_fast_things() -> None:
    static, slow, fast = (scored(make_clip(step=step)) for step in (0.0, 1.0, 3.0))
    assert static.motion_raw == pytest.approx(0, abs=0.01)
    assert static.scores["freeze_ratio"] == 1
    assert fast.motion_raw > 1.3 * slow.motion_raw > 0.1
    assert slow.scores["freeze_ratio"] == 0
    # A disk that moves 3/128 of the side a frame at 8 fps.
    assert fast.scores["foreground_motion"] == pytest.approx(3 / 128 * FPS, rel=0.15)


def test_a_pan_is_the_cameras_motion() -> None:
    pan = scored(make_clip(step=0.0, pan=2.0)).scores
    # The disk stays where it is while the ground moves by: against the camera it moves.
    assert pan["camera_motion"] == pytest.approx(2 / 128 * FPS, rel=0.1)
    ground = make_clip(step=-400.0, pan=2.0)[1:]  # the disk is out of the picture
    only = scored(ground)
    assert only.scores["camera_motion"] == pytest.approx(2 / 128 * FPS, rel=0.1)
    assert only.scores["foreground_motion"] < 0.15 * only.scores["camera_motion"]
    thing = scored(make_clip(step=2.0))
    assert thing.scores["camera_motion"] < 0.1 * thing.scores["foreground_motion"]
    assert thing.motion_raw > 1.5 * only.motion_raw  # the same speed in the foreground is worth more


def test_a_zoom_is_the_cameras_motion() -> None:
    picture = texture(256)
    clip = []
    for n in range(6):
        matrix = cv2.getRotationMatrix2D((128, 128), 0, 1.03**n)
        clip.append(cv2.warpAffine(picture, matrix, (256, 256), borderMode=cv2.BORDER_REFLECT)[64:192, 64:192])
    motion = measure_motion(np.clip(np.stack(clip), 0, 255).astype(np.uint8), FPS)
    assert motion.camera > 0.05
    assert motion.foreground < 0.25 * motion.camera


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shake_does_not_pay(seed: int) -> None:
    """The shaking clips move more from frame to frame than the smooth one, and score less."""
    smooth = scored(make_clip(step=2.0, seed=seed))
    for shaking in (make_clip(step=2.0, jitter=4.0, seed=seed), make_clip(step=0.0, shake=4.0, seed=seed)):
        scores = scored(shaking)
        moved = scores.scores["foreground_motion"] + scores.scores["camera_motion"]
        assert moved > 1.3 * smooth.scores["foreground_motion"]
        assert scores.motion_raw < 0.5 * smooth.motion_raw
        assert scores.scores["incoherence"] > 0.5 > 0.25 > smooth.scores["incoherence"]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_faults_of_synthetic_clips_are_found(seed: int) -> None:
    def made(variant: str) -> ClipScores:
        spec = sample_spec(np.random.default_rng(seed), variant=variant)
        return scored(render_clip(spec, 17, 96))

    clean = made("clean")
    assert max(made("blurred").visual_raw, made("noisy").visual_raw) < 0.3 * clean.visual_raw
    assert max(made("static").motion_raw, made("jittery").motion_raw) < 0.3 * clean.motion_raw
    assert made("noisy").motion_raw < clean.motion_raw


def test_repeated_frames_are_not_smooth_motion() -> None:
    clip = make_clip(step=2.0)
    stuttering = clip[np.arange(FRAMES) // 2 * 2]
    scores = scored(stuttering)
    assert scores.scores["freeze_ratio"] == pytest.approx(0.5, abs=0.1)
    assert scores.motion_raw < 0.5 * scored(clip).motion_raw


def test_flicker_but_not_fading() -> None:
    clip = make_clip(step=2.0)
    flicker = np.where(np.arange(FRAMES) % 2, 1.0, 0.85)[:, None, None, None]
    fade = np.linspace(1.0, 0.6, FRAMES)[:, None, None, None]
    values = [scored((clip * gain).astype(np.uint8)).scores["flicker"] for gain in (flicker, fade, 1.0)]
    assert values[0] > 0.05 > 0.01 > max(values[1:])


def test_scores_do_not_depend_on_resolution_or_rate() -> None:
    small, large = scored(make_clip(128)), scored(make_clip(256))
    assert large.scores["foreground_motion"] == pytest.approx(small.scores["foreground_motion"], rel=0.15)
    assert large.motion_raw == pytest.approx(small.motion_raw, rel=0.15)
    huge = np.stack([cv2.resize(frame, (512, 512), interpolation=cv2.INTER_CUBIC) for frame in make_clip(256)])
    assert scored(huge).visual_raw == pytest.approx(large.visual_raw, rel=0.35)
    twice = score_clip(make_clip(step=1.0, frames=23), 2 * FPS)  # the same motion, filmed at twice the rate
    assert twice.scores["foreground_motion"] == pytest.approx(small.scores["foreground_motion"], rel=0.2)


def test_single_pictures_have_no_motion() -> None:
    scores = scored(make_clip(frames=1))
    assert scores.motion_raw is None
    assert scores.visual_raw > 0
    assert scores.value("motion") is None
    assert set(scores.scores) == {name for name, scorer in SCORERS.items() if not scorer.needs_time}
    with pytest.raises(ValueError, match="without frames"):
        scored(make_clip(frames=1)[:0])


def test_odd_shapes_and_blank_clips_score_without_faults() -> None:
    for shape in ((2, 8, 8, 3), (3, 16, 200, 3), (60, 24, 20, 3), (1, 4, 4, 3)):
        for level in (0, 128, 255):
            scores = scored(np.full(shape, level, np.uint8))
            values = [scores.visual_raw, scores.motion_raw or 0.0, *scores.scores.values()]
            assert all(np.isfinite(values))
            assert 0 <= scores.visual_raw <= 0.01


def test_filters() -> None:
    moving, still = scored(make_clip()), scored(make_clip(frames=1))
    assert failures(FilterConfig(), moving) == []
    tight = FilterConfig(min_motion=0.9, max_noise=0.0, min_brightness=0.99)
    told = failures(tight, moving)
    assert [reason.split()[0] for reason in told] == ["noise", "brightness", "motion"]
    assert told[2] == f"motion {moving.motion_raw:.4g} < min_motion 0.9"
    assert not any(reason.startswith("motion") for reason in failures(tight, still))  # a picture may stand still
    assert failures(FilterConfig(max_camera_motion=0.0), scored(make_clip(pan=2.0))) != []
    with pytest.raises(UserError, match=r"min_motion=0\.5 is above max_motion=0\.1"):
        FilterConfig(min_motion=0.5, max_motion=0.1)
