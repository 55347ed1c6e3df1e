"""Cuts in made-up videos, and long scenes to clips."""

from __future__ import annotations

import numpy as np
import pytest

from contentv.curation.scenes import SceneFinder, cut_scene, find_scenes


def scene(colour: tuple[int, int, int], frames: int, size: int = 64) -> np.ndarray:
    """A disk that crosses a plain background."""
    y, x = np.mgrid[0:size, 0:size]
    clip = np.zeros((frames, size, size, 3), np.uint8)
    for number in range(frames):
        disk = (x - 10 - 2 * number) ** 2 + (y - 32) ** 2 < 80
        clip[number] = np.where(disk[..., None], 255 - np.array(colour), colour)
    return clip


COLOURS = [(200, 30, 30), (30, 30, 200), (40, 180, 40)]


@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_hard_cuts_are_found_exactly(detector: str) -> None:
    lengths = [14, 20, 17]
    video = np.concatenate([scene(c, n) for c, n in zip(COLOURS, lengths, strict=True)])
    assert find_scenes(video, 8, detector) == [(0, 14), (14, 34), (34, 51)]


def test_motion_alone_is_no_cut() -> None:
    assert find_scenes(scene(COLOURS[0], 24), 8) == [(0, 24)]


def test_large_frames_are_cut_where_small_ones_are() -> None:
    video = np.concatenate([scene(c, 12, 64) for c in COLOURS[:2]])
    large = video.repeat(5, axis=1).repeat(5, axis=2)
    assert find_scenes(large, 8) == find_scenes(video, 8) == [(0, 12), (12, 24)]


def test_without_a_detector_a_video_is_one_scene() -> None:
    finder = SceneFinder(8.0, "none")
    assert not finder.wants_pixels
    for _ in range(5):
        finder.add(None)
    assert finder.finish() == [(0, 5)]
    assert find_scenes(np.zeros((0, 8, 8, 3), np.uint8), 8) == []


def test_a_higher_threshold_finds_fewer_cuts() -> None:
    faint = np.concatenate([scene((100, 100, 100), 12), scene((125, 125, 125), 12)])
    assert len(find_scenes(faint, 8, threshold=3.0)) == 2
    assert len(find_scenes(faint, 8, threshold=100.0)) == 1


@pytest.mark.parametrize(
    ("span", "clips"),
    [
        ((0, 72), [(0, 72)]),  # 3 s exactly
        ((10, 81), []),  # one frame too short
        ((0, 144), [(0, 144)]),  # 6 s exactly
        ((0, 145), [(0, 144)]),  # the rest is too short for a clip
        ((100, 400), [(100, 244), (244, 388)]),
        ((0, 216), [(0, 144), (144, 216)]),  # the rest is a clip of 3 s
    ],
)
def test_scenes_to_clips(span: tuple[int, int], clips: list[tuple[int, int]]) -> None:
    assert cut_scene(*span, 24.0, 3.0, 6.0) == clips


def test_clips_keep_their_bounds_at_any_rate() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        fps = float(rng.choice([8.0, 23.976, 29.97, 25.0, 60.0]))
        low = float(rng.uniform(0, 4))
        high = low + float(rng.uniform(0.2, 5))
        start = int(rng.integers(0, 50))
        end = start + int(rng.integers(1, 900))
        clips = cut_scene(start, end, fps, low, high)
        for first, last in clips:
            assert low * fps - 1e-3 <= last - first <= max(1.0, high * fps + 1e-3)
        covered = [n for first, last in clips for n in range(first, last)]
        assert covered == list(range(start, start + len(covered)))  # in order, without gaps or overlap
        assert end - start - len(covered) < max(1, low * fps) + 1e-3


def lit(video: np.ndarray, gains: dict[int, float]) -> np.ndarray:
    """The video with some frames as through another light; 2 = half way to white, 0 = black."""
    bright = video.astype(float)
    for frame, gain in gains.items():
        bright[frame] = bright[frame] * gain if gain <= 1 else 255 - (255 - bright[frame]) / gain
    return bright.round().astype(np.uint8)


@pytest.mark.parametrize("detector", ["content", "adaptive"])
@pytest.mark.parametrize(
    "gains",
    [
        {20: 6.0},  # a flash of one frame
        {20: 6.0, 21: 6.0},
        {n: n / 5 for n in range(5)},  # a fade out of black
        {43 - n: n / 5 for n in range(5)},  # and into it
        {n: 1 + 5 / (n + 1) for n in range(6)},  # out of white
    ],
    ids=["flash", "longer flash", "fade in", "fade out", "from white"],
)
def test_light_that_changes_is_no_cut(detector: str, gains: dict[int, float]) -> None:
    video = np.concatenate([scene(COLOURS[0], 14), scene(COLOURS[1], 30)])
    assert find_scenes(lit(video, gains), 8, detector) == [(0, 14), (14, 44)]


def test_a_cut_to_a_brighter_scene_is_one() -> None:
    dark, bright = scene((40, 20, 20), 14), np.rot90(scene((230, 220, 180), 14), axes=(1, 2))
    assert find_scenes(np.concatenate([dark, bright]), 8) == [(0, 14), (14, 28)]
    leader = np.zeros_like(bright)  # black for more than a moment is a scene of its own
    assert find_scenes(np.concatenate([leader, bright]), 8) == [(0, 14), (14, 28)]
