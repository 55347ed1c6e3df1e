"""The order of training as arithmetic: what is seen when, and that a saved place is the whole state."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contentv.base.errors import UserError
from contentv.data.plan import (
    BucketStream,
    Cursor,
    EpochOrder,
    PlannedBatch,
    WeightedOrder,
    key64,
    keyed_order,
    keyed_uniform,
)

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def streams(sizes: list[int], seed: int = 0, keep: float | None = None) -> list[BucketStream]:
    built = []
    for i, size in enumerate(sizes):
        words = np.arange(size, dtype=np.uint64) * np.uint64(0x1234567) + np.uint64(i)
        kept = None if keep is None else (words, np.full(size, keep))
        built.append(BucketStream(f"b{i}", size, seed, kept))
    return built


def take(order: EpochOrder | WeightedOrder, steps: int) -> list[PlannedBatch]:
    return [order.next() for _ in range(steps)]


def plain(batches: list[PlannedBatch]) -> list[tuple[int, int, str, list[int]]]:
    return [(b.step, b.epoch, b.bucket, b.samples.tolist()) for b in batches]


def test_the_order_is_pinned_down_to_the_number() -> None:
    """A changed order would break the resumption of every running job: these numbers may not change."""
    assert keyed_order(8, key64(1, 2, "b0", "order")).tolist() == [1, 4, 6, 0, 7, 2, 3, 5]
    assert keyed_uniform(np.array([1, 2], dtype=np.uint64), key64("u")).tolist() == [
        0.6157682243099117,
        0.21058647784959694,
    ]


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, batch=st.integers(1, 16), seed=st.integers(0, 99))
def test_every_sample_is_seen_once_an_epoch(sizes: list[int], batch: int, seed: int) -> None:
    order = EpochOrder(streams(sizes, seed), batch, seed)
    batches = take(order, 3 * sum(sizes) // batch + 2)
    assert [b.step for b in batches] == list(range(len(batches)))
    assert [b.epoch for b in batches] == sorted(b.epoch for b in batches)
    for i, size in enumerate(sizes):
        for epoch in range(batches[-1].epoch):  # all of it has been delivered
            seen = [int(s) for b in batches if b.epoch <= epoch and b.bucket == f"b{i}" for s in b.samples]
            counts = [Counter(seen)[s] for s in range(size)]
            assert len(seen) == (epoch + 1) * size // batch * batch, "an epoch holds every batch that it completes"
            assert set(counts) <= {len(seen) // size, len(seen) // size + 1}, "no sample is ahead by more than one pass"
            assert max(counts) <= epoch + 1


@settings(max_examples=40, deadline=None)
@given(
    sizes=SIZES, batch=st.integers(1, 50), keep=st.sampled_from([None, 0.3, 0.9]), weighted=st.booleans(),
    stop=st.integers(0, 25),
)  # fmt: skip
def test_a_saved_place_continues_exactly(
    sizes: list[int], batch: int, keep: float | None, weighted: bool, stop: int
) -> None:
    def build() -> EpochOrder | WeightedOrder:
        made = streams(sizes, 5, keep)
        return (
            WeightedOrder(made, {s.name: float(s.size) for s in made}, batch, 5)
            if weighted
            else EpochOrder(made, batch, 5)
        )

    straight = build()
    take(straight, stop)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = build()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert len(json.dumps(state)) < 400
    assert plain(take(resumed, 12)) == plain(take(straight, 12))


def test_epochs_and_seeds_have_their_own_orders_and_no_order_is_stored_order() -> None:
    stream, other = BucketStream("b", 50, 1), BucketStream("b", 50, 2)
    first, second = stream.epoch_samples(0), stream.epoch_samples(1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.epoch_samples(0).tolist()
    assert first.tolist() != list(range(50))
    assert first.tolist() != BucketStream("c", 50, 1).epoch_samples(0).tolist()


def test_places_in_the_order_are_uniform() -> None:
    counts = np.zeros((6, 6))
    for seed in range(1_500):
        counts[np.arange(6), keyed_order(6, key64(seed))] += 1
    chi2 = ((counts - 250) ** 2 / 250).sum()
    assert chi2 < 60, "25 degrees of freedom; 60 is p < 1e-4"


def test_buckets_are_mixed_within_an_epoch() -> None:
    batches = take(EpochOrder(streams([60, 60], 3), 4, 3), 30)
    changes = sum(a.bucket != b.bucket for a, b in itertools.pairwise(batches))
    assert batches[-1].epoch == 0
    assert 6 <= changes <= 24, "about 15 changes of bucket in 30 steps"


def test_every_epoch_mixes_its_buckets_anew() -> None:
    batches = take(EpochOrder(streams([40, 40], 3), 4, 3), 40)
    epochs = [[b.bucket for b in batches if b.epoch == epoch] for epoch in (0, 1)]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert epochs[0] != epochs[1]


def test_a_bucket_smaller_than_a_batch_repeats_over_epochs() -> None:
    batches = take(EpochOrder(streams([3], 0), 8, 0), 6)
    assert all(len(b.samples) == 8 for b in batches)
    assert Counter(int(s) for b in batches for s in b.samples) == {0: 16, 1: 16, 2: 16}
    assert [b.epoch for b in batches] == [2, 5, 7, 10, 13, 15], "8 samples take 2 2/3 epochs of 3"


def test_keep_probability_is_the_rate_and_is_drawn_anew_each_epoch() -> None:
    words = np.random.default_rng(0).integers(0, 2**63, 20_000).astype(np.uint64)
    probability = np.repeat([0.0, 0.25, 0.7, 1.0], 5_000)
    stream = BucketStream("b", 20_000, 4, (words, probability))
    masks = [np.isin(np.arange(20_000), stream.epoch_samples(epoch)).reshape(4, 5_000) for epoch in (0, 1)]
    for mask in masks:
        assert mask.mean(axis=1) == pytest.approx([0.0, 0.25, 0.7, 1.0], abs=0.02)
    both = (masks[0] & masks[1]).mean(axis=1)
    assert both == pytest.approx([0.0, 0.0625, 0.49, 1.0], abs=0.02), "epochs are independent"


def test_keeping_depends_on_the_key_not_on_the_place() -> None:
    words = np.random.default_rng(1).integers(0, 2**63, 500).astype(np.uint64)
    turned = BucketStream("b", 500, 4, (words[::-1].copy(), np.full(500, 0.5)))
    stream = BucketStream("b", 500, 4, (words, np.full(500, 0.5)))
    assert sorted(499 - turned.epoch_samples(7)) == sorted(stream.epoch_samples(7))


def test_weights_are_the_frequencies_of_buckets() -> None:
    order = WeightedOrder(streams([5, 50, 500]), {"b0": 6.0, "b1": 3.0, "b2": 1.0}, 2, 1)
    batches = take(order, 4_000)
    counts = Counter(b.bucket for b in batches)
    assert [counts[f"b{i}"] / 4_000 for i in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    seen = [int(s) for b in batches if b.bucket == "b1" for s in b.samples]
    for start in range(0, len(seen) - 50, 50):
        assert sorted(seen[start : start + 50]) == list(range(50)), "each bucket goes through its samples in turn"


def test_nothing_to_see_is_an_error_not_an_endless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contentv.data.plan._MAX_EMPTY_EPOCHS", 500)
    with pytest.raises(UserError, match="no samples"):
        BucketStream("b", 5, 0, (np.arange(5, dtype=np.uint64), np.zeros(5)))
    with pytest.raises(UserError, match="no samples"):
        BucketStream("b", 0, 0)
    rare = BucketStream("b", 2, 0, (np.arange(2, dtype=np.uint64), np.full(2, 1e-9)))
    with pytest.raises(UserError, match="did not keep enough"):
        EpochOrder([rare], 4, 0).next()
    with pytest.raises(UserError, match="did not keep enough"):
        WeightedOrder([rare], {"b": 1.0}, 4, 0).next()


def test_take_crosses_epochs_in_one_stream() -> None:
    stream = BucketStream("b", 7, 0)
    whole = np.concatenate([stream.epoch_samples(e) for e in range(4)])
    cursor, parts = Cursor(), []
    for count in (3, 4, 9, 1, 5, 6):
        part, cursor = stream.take(cursor, count)
        parts.append(part)
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert cursor == Cursor(4, 0)


@pytest.mark.parametrize(
    "change", [{"step": "x"}, {"epoch": -1}, {"cursors": {}}, {"cursors": {"b0": [0]}}, {"batch": 900}, {"batch": None}]
)
def test_a_state_that_cannot_be_right_is_refused(change: dict[str, object]) -> None:
    order = EpochOrder(streams([20]), 4, 0)
    state = {**order.state_dict(), **change}
    with pytest.raises(UserError, match="state"):
        order.load_state_dict(state)
