"""Which bucket a clip goes to."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentv.base.types import Bucket
from contentv.curation.config import CurateConfig
from contentv.curation.plan import ClipRules, alike, choose_buckets, misfit
from contentv.curation.progress import bucket_table

WIDE, SQUARE, TALL = (Bucket(17, *shape) for shape in ((48, 80), (64, 64), (80, 48)))
SMALL = Bucket(17, 32, 32)
LONG = Bucket(33, 64, 64)
STILL = Bucket(1, 64, 64)


def rules(*buckets: Bucket, **changes: Any) -> ClipRules:
    settings: dict[str, Any] = {
        "min_clip_s": 1.0, "max_clip_s": 3.0, "fps": None, "allow_upscale": False, "max_crop": None,
        "images_from_video": True, "keep_media": False, **changes,
    }  # fmt: skip
    return ClipRules(tuple(buckets), **settings)


def chosen(all_of: ClipRules, height: int, width: int, frames: int = 17) -> set[Bucket]:
    fitting = [b for b in all_of.buckets if misfit(b, height, width, frames, False, all_of) is None]
    return set(choose_buckets(fitting, height, width, all_of))


@pytest.mark.parametrize(("height", "width", "bucket"), [(90, 160, WIDE), (100, 100, SQUARE), (200, 100, TALL)])
def test_the_nearest_shape_is_taken(height: int, width: int, bucket: Bucket) -> None:
    assert chosen(rules(WIDE, SQUARE, TALL), height, width) == {bucket}
    assert chosen(rules(WIDE, SQUARE, TALL, aspect="every"), height, width) == {WIDE, SQUARE, TALL}


def test_a_bucket_that_is_too_large_leaves_it_to_the_next() -> None:
    assert chosen(rules(WIDE, SQUARE, TALL), 66, 70) == {SQUARE}
    assert chosen(rules(WIDE, SQUARE, TALL), 50, 100) == {WIDE}
    assert chosen(rules(SQUARE, Bucket(17, 56, 72)), 60, 80) == {Bucket(17, 56, 72)}


def test_other_areas_and_lengths_are_choices_of_their_own() -> None:
    everything = rules(WIDE, SQUARE, SMALL, LONG, STILL)
    assert chosen(everything, 90, 90, frames=40) == {SQUARE, SMALL, LONG, STILL}
    assert chosen(everything, 90, 90, frames=20) == {SQUARE, SMALL, STILL}
    longest = rules(WIDE, SQUARE, SMALL, LONG, STILL, frames="longest")
    assert chosen(longest, 90, 90, frames=40) == {LONG, STILL}
    assert chosen(longest, 90, 90, frames=20) == {SQUARE, SMALL, STILL}


sizes = st.integers(1, 40).map(lambda n: 8 * n)


@given(st.lists(st.tuples(st.sampled_from([1, 17, 33]), sizes, sizes), min_size=1, max_size=12, unique=True))
def test_groups_are_a_partition_by_frames_and_area(shapes: list[tuple[int, int, int]]) -> None:
    buckets = [Bucket(*shape) for shape in shapes]
    groups = alike(buckets)
    assert sorted(itertools.chain.from_iterable(groups)) == sorted(buckets)
    for group in groups:
        assert len({bucket.frames for bucket in group}) == 1
        areas = [bucket.height * bucket.width for bucket in group]
        assert min(areas) >= 0.75 * max(areas)
    for first, second in itertools.combinations(groups, 2):
        if first[0].frames == second[0].frames:
            largest = max(max(b.height * b.width for b in group) for group in (first, second))
            smallest = min(max(b.height * b.width for b in group) for group in (first, second))
            assert smallest < 0.75 * largest


@given(sizes, sizes)
def test_no_fitting_bucket_of_like_area_is_nearer(height: int, width: int) -> None:
    these = rules(WIDE, SQUARE, TALL)
    fitting = [b for b in these.buckets if misfit(b, height, width, 17, False, these) is None]
    found = choose_buckets(fitting, height, width, these)
    assert len(found) == min(1, len(fitting))
    for bucket, other in itertools.product(found, fitting):
        ratio = math.log(width / height)
        distances = [abs(math.log(b.width / b.height) - ratio) for b in (bucket, other)]
        assert distances[0] <= distances[1]


def test_people_are_told_where_clips_go() -> None:
    config = CurateConfig(buckets=["f17_h48_w80", "f17_h64_w64", "f1_h64_w64"], fps=8.0)
    table = bucket_table(config)
    cells = [list(column.cells) for column in table.columns]
    edge = math.sqrt(80 / 48)
    assert cells[0] == config.buckets
    assert cells[3] == [f"{edge:.2f} and wider", f"0 to {edge:.2f}", "any"]
    assert cells[2][0] == "17 frames = 2.12 s, 48 x 80 px"
