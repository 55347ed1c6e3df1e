"""Scores rank synthetic clips by what is known of them; benchmarks/score_meaning.py asks the same of more clips."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
from scipy.stats import spearmanr

from contentv.curation.scenes import find_scenes
from contentv.curation.scorers import ClipScores, ScoringConfig, score_clip
from contentv.curation.synth import SynthConfig, render_scenes, sample_scenes
from contentv.curation.synth_world import DIRECTIONS, ClipSpec, render_clip, sample_spec

CLIPS = 24
SIZE = 192
FPS = 8.0
RULE = ScoringConfig(skip=["text_area", "blockiness", "sharpness", "black_border"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    cv2.setNumThreads(1)


def scored(config: SynthConfig, frames: int) -> tuple[list[ClipSpec], list[ClipScores]]:
    scenes = [sample_scenes(config, index)[0] for index in range(CLIPS)]
    return [scene.spec for scene in scenes], [score_clip(render_clip(s.spec, frames, SIZE), FPS, RULE) for s in scenes]


def agreement(known: list[float], found: list[float]) -> float:
    return float(spearmanr(known, found).statistic)


def settings(**values: float) -> SynthConfig:
    return SynthConfig(size_px=SIZE, joined_share=0.0, variants={"clean": 1.0}, **values)  # type: ignore[arg-type]


def test_the_visual_score_ranks_clips_by_sharpness() -> None:
    specs, scores = scored(settings(pan_share=0.3, blur_max=0.03), frames=2)
    sharpness = [-spec.blur for spec in specs]
    assert agreement(sharpness, [score.visual_raw for score in scores]) >= 0.9
    assert agreement(sharpness, [score.scores["focus"] for score in scores]) >= 0.9


def test_the_motion_score_ranks_clips_by_speed() -> None:
    specs, scores = scored(settings(pan_share=0.0, slowest=0.05), frames=8)
    speed = [spec.displacement for spec in specs]
    assert agreement(speed, [score.motion_raw or 0.0 for score in scores]) >= 0.9
    assert agreement(speed, [score.scores["foreground_motion"] for score in scores]) >= 0.9


def test_pans_are_counted_apart() -> None:
    """The object's speed against the ground stays the same in these clips, whatever the camera does."""
    pans = np.linspace(0.002, 0.016, CLIPS)
    scores = []
    for number, pan in enumerate(pans):
        spec = sample_spec(np.random.default_rng(number), pan_share=0.0)
        heading = np.array(DIRECTIONS[spec.direction])
        # The ground moves against the camera: an object with this speed in the picture has 0.02 against the ground.
        spec = dataclasses.replace(
            spec, pan=tuple(float(x) for x in -pan * heading), displacement=16 * (0.02 + pan), start=(0.5, 0.5),
        )  # fmt: skip
        start = tuple(0.5 - 0.5 * (0.02 + pan) * 9 * h for h in heading)
        spec = dataclasses.replace(spec, start=(float(start[0]), float(start[1])))
        scores.append(score_clip(render_clip(spec, 10, SIZE), FPS, RULE).scores)
    camera = [score["camera_motion"] for score in scores]
    foreground = [score["foreground_motion"] for score in scores]
    assert agreement(list(pans), camera) >= 0.9
    np.testing.assert_allclose(camera, pans * FPS, rtol=0.35)
    assert np.std(foreground) < 0.25 * np.mean(foreground)


@pytest.mark.parametrize("detector", ["adaptive"])
def test_cuts_are_found_and_nothing_else(detector: str) -> None:
    hits = false = missed = 0
    for index in range(12):
        scenes = sample_scenes(SynthConfig(seed=1, size_px=96, joined_share=1.0, pan_share=0.5), index)
        frames = render_scenes(scenes, 96).astype(np.float32)
        if index % 3 == 0:
            frames[8] = 255 - (255 - frames[8]) / 5  # a flash
        elif index % 3 == 1:
            frames[:8] *= np.linspace(0, 1, 8)[:, None, None, None]  # a fade
        found = {start for start, _ in find_scenes(frames.round().astype(np.uint8), FPS, detector)} - {0}
        truth = set(np.cumsum([scene.frames for scene in scenes])[:-1].tolist())
        hits, false, missed = hits + len(found & truth), false + len(found - truth), missed + len(truth - found)
    assert 2 * hits / (2 * hits + false + missed) >= 0.95
