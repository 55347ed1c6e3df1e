"""The pixel classifier against clips whose content is known, and the interval against a textbook's numbers."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from contentv.curation.synth_world import render_clip, sample_spec
from contentv.demo.classifier import classify, wilson_interval

cv2.setNumThreads(1)  # its threads wait for each other on a busy machine


@pytest.mark.parametrize(("frames", "side"), [(17, 96), (9, 64)])
def test_clean_clips_are_read_right(frames: int, side: int) -> None:
    rng = np.random.default_rng(frames)
    wrong = 0
    for index in range(150):
        spec = sample_spec(rng, variant="static" if index % 10 == 0 else "clean")
        colour, direction, confidence = classify(render_clip(spec, frames, side))
        wrong += (colour, direction) != (spec.colour, spec.direction)
        assert 0.0 <= confidence <= 1.0
    assert wrong <= 1


def test_hand_made_clip() -> None:
    """A plain array, drawn here, so that the test does not lean on the renderer."""
    clip = np.full((9, 40, 60, 3), 128, np.uint8)
    for frame in range(9):
        clip[frame, 5 + 3 * frame : 13 + 3 * frame, 20:30] = (20, 40, 230)
    assert classify(clip)[:2] == ("blue", "down")
    assert classify(clip[::-1])[:2] == ("blue", "up")
    assert classify(clip.transpose(0, 2, 1, 3))[:2] == ("blue", "right")
    assert classify(clip[[0] * 9])[:2] == ("blue", "still")


def test_nothing_coloured_is_none_with_no_confidence() -> None:
    noise = np.random.default_rng(0).integers(90, 150, (9, 64, 64, 1), np.uint8).repeat(3, -1)
    assert classify(noise) == ("none", "still", 0.0)


def test_one_bad_frame_does_not_turn_the_answer() -> None:
    rng = np.random.default_rng(5)
    spec = sample_spec(rng)
    clip = render_clip(spec, 17, 96)
    clip[-1] = 100
    assert classify(clip)[:2] == (spec.colour, spec.direction)


def test_two_colours_lower_the_confidence() -> None:
    clip = np.full((5, 40, 40, 3), 128, np.uint8)
    for frame in range(5):
        clip[frame, 4:14, 2 + 5 * frame : 12 + 5 * frame] = (220, 20, 20)
    sure = classify(clip)
    clip[:, 25:34, 5:14] = (20, 180, 30)
    unsure = classify(clip)
    assert sure.colour == unsure.colour == "red"
    assert unsure.confidence < 0.75 * sure.confidence


def test_a_single_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        classify(np.zeros((8, 8, 3), np.uint8))


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 0/20
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(3, 2)
