"""Degraded twins: the picture loses detail and keeps its motion, or the other way round."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from contentv.analysis.config import GradientConfig, TwinConfig
from contentv.analysis.twins import degrade_motion, degrade_picture, make_twins
from contentv.base.errors import UserError
from contentv.curation.synth_world import render_clip, sample_spec


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return render_clip(sample_spec(np.random.default_rng(0)), 9, 64)


def sharpness(frames: np.ndarray) -> float:
    return float(np.mean([cv2.Laplacian(f, cv2.CV_64F).var() for f in frames]))


def moved(frames: np.ndarray) -> float:
    return float(np.abs(np.diff(frames.astype(np.float64), axis=0)).mean())


@pytest.mark.parametrize("operator", ["blur", "resample", "jpeg"])
def test_the_picture_gets_worse_and_the_motion_stays(frames: np.ndarray, operator: str) -> None:
    worse = degrade_picture(frames, TwinConfig(visual=operator))
    assert worse.shape == frames.shape
    assert worse.dtype == np.uint8
    assert np.abs(worse.astype(float) - frames).mean() > 1.0
    assert worse.mean() == pytest.approx(frames.mean(), rel=0.03)
    assert moved(worse) > 0.5 * moved(frames)
    if operator != "jpeg":  # which draws edges of its own
        assert sharpness(worse) < 0.3 * sharpness(frames)


def test_more_blur_is_less_detail(frames: np.ndarray) -> None:
    found = [sharpness(degrade_picture(frames, TwinConfig(blur=blur))) for blur in (0.01, 0.03, 0.09)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("operator", "shown"),
    [("freeze", [0] * 9), ("slow", [0, 0, 0, 1, 1, 1, 2, 2, 2]), ("hold", [0, 0, 0, 3, 3, 3, 6, 6, 6])],
)
def test_motion_is_spoilt_by_showing_other_frames(frames: np.ndarray, operator: str, shown: list[int]) -> None:
    worse = degrade_motion(frames, TwinConfig(motion=operator, motion_factor=3))
    np.testing.assert_array_equal(worse, frames[shown])


def test_the_golden_twin_is_the_clip_itself(frames: np.ndarray) -> None:
    twins = make_twins(frames, TwinConfig())
    assert list(twins) == ["golden", "visual", "motion"]
    np.testing.assert_array_equal(twins["golden"], frames)
    with pytest.raises(UserError, match="no motion"):
        make_twins(frames[:1], TwinConfig())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"visual": "fog"}, "visual=fog"),
        ({"motion": "reverse"}, "motion=reverse"),
        ({"blur": 0.0}, "blur=0"),
        ({"resample": 1}, "resample=1"),
        ({"jpeg_quality": 0}, "jpeg_quality=0"),
        ({"motion_factor": 1}, "motion_factor=1"),
        ({"groups": 5}, "groups=5"),
        ({"clips": 4}, "clips=4"),
        ({"golden": 1.0}, "golden=1"),
        ({"bins": 2}, "bins=2"),
        ({"draws": 0}, "draws=0"),
        ({"pixels": "video"}, "pixels=video"),
    ],
)
def test_what_cannot_be_is_refused_with_key_and_value(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        GradientConfig(**values)
