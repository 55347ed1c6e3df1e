"""The order of training as arithmetic: what is seen when, and that a saved place is the whole state."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from contentv.base.errors import UserError
from contentv.data.permutation import Ids, key64, keyed_uniform
from contentv.data.plan import EpochOrder, PlannedBatch, WeightedOrder
from contentv.data.streams import RATE_ONE, Cursor, Keep, SampleStream

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def keeping(words: NDArray[np.uint64], probability: NDArray[np.float64], seed: int) -> Keep:
    """Keeps each sample with its probability, as the loader does from a dataset's table."""

    def mask(numbers: Ids, epoch: int) -> NDArray[np.bool_]:
        return keyed_uniform(words[numbers], key64(seed, epoch, "keep")) < probability[numbers]

    return Keep(mask, int(probability.mean() * RATE_ONE))


def stream_of(name: str, size: int, seed: int, keep: float | None = None, salt: int = 0) -> SampleStream:
    words = np.arange(size, dtype=np.uint64) * np.uint64(0x1234567) + np.uint64(salt)
    return SampleStream(name, size, seed, keep=None if keep is None else keeping(words, np.full(size, keep), seed))


def streams(sizes: list[int], seed: int = 0, keep: float | None = None) -> list[SampleStream]:
    return [stream_of(f"b{i}", size, seed, keep, i) for i, size in enumerate(sizes)]


def epoch_samples(stream: SampleStream, epoch: int) -> Ids:
    """All of one epoch's samples in order."""
    return stream.take(Cursor(epoch, 0), stream.size, epoch + 1)[0]


def epoch_order(sizes: list[int], batch: int, seed: int = 0, keep: float | None = None) -> EpochOrder:
    return EpochOrder(streams(sizes, seed, keep), {f"b{i}": batch for i in range(len(sizes))}, seed)


def take(order: EpochOrder | WeightedOrder, steps: int) -> list[PlannedBatch]:
    return [order.next() for _ in range(steps)]


def plain(batches: list[PlannedBatch]) -> list[tuple[int, int, str, list[int]]]:
    return [(b.step, b.epoch, b.bucket, b.samples.tolist()) for b in batches]


def test_the_order_is_pinned_down_to_the_number() -> None:
    """A changed order would break the resumption of every running job: these numbers may not change."""
    assert epoch_samples(stream_of("b0", 8, 1), 2).tolist() == [5, 7, 6, 0, 3, 4, 2, 1]
    batches = [(b.bucket, b.samples.tolist()) for b in take(epoch_order([3, 4], 2, 1), 4)]
    assert batches == [("b1", [3, 1]), ("b1", [0, 2]), ("b0", [1, 0]), ("b1", [1, 3])]
    assert keyed_uniform(np.array([1, 2], dtype=np.uint64), key64("u")).tolist() == [
        0.6157682243099117,
        0.21058647784959694,
    ]


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, batch=st.integers(1, 16), seed=st.integers(0, 99))
def test_every_sample_is_seen_once_an_epoch(sizes: list[int], batch: int, seed: int) -> None:
    order = epoch_order(sizes, batch, seed)
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
        batch_sizes = {stream.name: batch * (i + 1) for i, stream in enumerate(made)}
        if weighted:
            return WeightedOrder(made, batch_sizes, {s.name: float(s.size) for s in made}, 5)
        return EpochOrder(made, batch_sizes, 5)

    straight = build()
    take(straight, stop)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = build()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert len(json.dumps(state)) < 400
    assert plain(take(resumed, 12)) == plain(take(straight, 12))


def test_epochs_and_seeds_have_their_own_orders_and_no_order_is_stored_order() -> None:
    stream, other = stream_of("b", 50, 1), stream_of("b", 50, 2)
    first, second = epoch_samples(stream, 0), epoch_samples(stream, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()
    assert first.tolist() != epoch_samples(other, 0).tolist()
    assert first.tolist() != list(range(50))
    assert first.tolist() != epoch_samples(stream_of("c", 50, 1), 0).tolist()


def test_buckets_are_mixed_within_an_epoch() -> None:
    batches = take(epoch_order([60, 60], 4, 3), 30)
    changes = sum(a.bucket != b.bucket for a, b in itertools.pairwise(batches))
    assert batches[-1].epoch == 0
    assert 6 <= changes <= 24, "about 15 changes of bucket in 30 steps"


def test_every_epoch_mixes_its_buckets_anew() -> None:
    batches = take(epoch_order([40, 40], 4, 3), 40)
    epochs = [[b.bucket for b in batches if b.epoch == epoch] for epoch in (0, 1)]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert epochs[0] != epochs[1]


def test_a_bucket_smaller_than_a_batch_repeats_over_epochs() -> None:
    batches = take(epoch_order([3], 8), 6)
    assert all(len(b.samples) == 8 for b in batches)
    assert Counter(int(s) for b in batches for s in b.samples) == {0: 16, 1: 16, 2: 16}
    assert [b.epoch for b in batches] == [2, 5, 7, 10, 13, 15], "8 samples take 2 2/3 epochs of 3"


def test_keep_probability_is_the_rate_and_is_drawn_anew_each_epoch() -> None:
    words = np.random.default_rng(0).integers(0, 2**63, 20_000).astype(np.uint64)
    probability = np.repeat([0.0, 0.25, 0.7, 1.0], 5_000)
    stream = SampleStream("b", 20_000, 4, keep=keeping(words, probability, 4))
    masks = [np.isin(np.arange(20_000), epoch_samples(stream, epoch)).reshape(4, 5_000) for epoch in (0, 1)]
    for mask in masks:
        assert mask.mean(axis=1) == pytest.approx([0.0, 0.25, 0.7, 1.0], abs=0.02)
    both = (masks[0] & masks[1]).mean(axis=1)
    assert both == pytest.approx([0.0, 0.0625, 0.49, 1.0], abs=0.02), "epochs are independent"


def test_keeping_depends_on_the_key_not_on_the_place() -> None:
    words = np.random.default_rng(1).integers(0, 2**63, 500).astype(np.uint64)
    half = np.full(500, 0.5)
    turned = SampleStream("b", 500, 4, keep=keeping(words[::-1].copy(), half, 4))
    stream = SampleStream("b", 500, 4, keep=keeping(words, half, 4))
    assert sorted(499 - epoch_samples(turned, 7)) == sorted(epoch_samples(stream, 7))


def test_weights_are_the_frequencies_of_buckets() -> None:
    weights = {"b0": 6.0, "b1": 3.0, "b2": 1.0}
    order = WeightedOrder(streams([5, 50, 500]), dict.fromkeys(weights, 2), weights, 1)
    batches = take(order, 4_000)
    counts = Counter(b.bucket for b in batches)
    assert [counts[f"b{i}"] / 4_000 for i in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    seen = [int(s) for b in batches if b.bucket == "b1" for s in b.samples]
    for start in range(0, len(seen) - 50, 50):
        assert sorted(seen[start : start + 50]) == list(range(50)), "each bucket goes through its samples in turn"


def test_nothing_to_see_is_an_error_not_an_endless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contentv.data.streams.MAX_EMPTY_EPOCHS", 500)
    with pytest.raises(UserError, match="no samples"):
        stream_of("b", 5, 0, keep=0.0)
    with pytest.raises(UserError, match="no samples"):
        stream_of("b", 0, 0)
    never = Keep(lambda numbers, epoch: np.zeros(len(numbers), dtype=bool), 1)
    rare = SampleStream("b", 2, 0, keep=never)
    with pytest.raises(UserError, match="did not keep enough"):
        EpochOrder([rare], {"b": 4}, 0).next()
    with pytest.raises(UserError, match="did not keep enough"):
        WeightedOrder([rare], {"b": 4}, {"b": 1.0}, 0).next()


@pytest.mark.parametrize("keep", [None, 0.4])
def test_take_crosses_epochs_in_one_stream(monkeypatch: pytest.MonkeyPatch, keep: float | None) -> None:
    monkeypatch.setattr("contentv.data.streams._BLOCK", 8)
    stream = stream_of("b", 29, 0, keep)
    whole = np.concatenate([epoch_samples(stream, e) for e in range(60)]).tolist()
    cursor, parts = Cursor(), []
    for count in (3, 4, 0, 90, 1, 50, 6):
        part, cursor = stream.take(cursor, count)
        assert len(part) == count
        parts += part.tolist()
    assert parts == whole[: len(parts)]
    fresh = stream_of("b", 29, 0, keep)
    assert fresh.take(cursor, 40)[0].tolist() == whole[len(parts) : len(parts) + 40], "a cursor is the whole state"


def test_a_stream_with_a_budget_ends_after_it() -> None:
    stream = SampleStream("b", 5, 0, max_epochs=2)
    samples, cursor = stream.take(Cursor(), 99)
    assert Counter(samples.tolist()) == dict.fromkeys(range(5), 2)
    assert cursor == Cursor(2, 0)
    assert len(stream.take(cursor, 1)[0]) == 0


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, batch=st.integers(1, 9), keep=st.sampled_from([0.2, 0.6, 0.95]), seed=st.integers(0, 20))
def test_dropping_keeps_epochs_exact(sizes: list[int], batch: int, keep: float, seed: int) -> None:
    """Each epoch of training holds all batches that the kept samples of its and earlier epochs complete."""
    made = streams(sizes, seed, keep)
    kept = [[epoch_samples(stream, epoch) for epoch in range(12)] for stream in made]
    batches = list(
        itertools.takewhile(lambda b: b.epoch < 12, (b for order in [epoch_order(sizes, batch, seed, keep)]
                                                     for b in iter(order.next, None)))
    )  # fmt: skip
    for i, epochs in enumerate(kept):
        stream_so_far = 0
        for epoch in range(12):
            stream_so_far += len(epochs[epoch])
            seen = [int(s) for b in batches if b.epoch <= epoch and b.bucket == f"b{i}" for s in b.samples]
            assert len(seen) == stream_so_far // batch * batch
            assert seen == np.concatenate(epochs).tolist()[: len(seen)]


def test_a_bucket_with_larger_batches_is_drawn_less_often() -> None:
    made = streams([400, 400])
    batches = take(EpochOrder(made, {"b0": 4, "b1": 40}, 0), 220)
    assert [b.first_index for b in batches] == [0, *itertools.accumulate(len(b.samples) for b in batches[:-1])]
    for b in batches:
        assert len(b.samples) == {"b0": 4, "b1": 40}[b.bucket]
    first = [b for b in batches if b.epoch == 0]
    assert Counter(b.bucket for b in first) == {"b0": 100, "b1": 10}
    halves = [sum(b.bucket == "b1" for b in part) for part in (first[:55], first[55:])]
    assert min(halves) >= 1, "both are drawn all through the epoch"


def test_every_order_of_an_epochs_batches_is_equally_likely() -> None:
    counts = Counter("".join(b.bucket[1] for b in take(epoch_order([4, 4, 2], 2, seed), 5)) for seed in range(1_500))
    assert len(counts) == 30, "5! / (2! 2! 1!) sequences"
    chi2 = sum((n - 50) ** 2 / 50 for n in counts.values())
    assert chi2 < 65, "29 degrees of freedom; 65 is p < 1e-4"


@pytest.mark.parametrize(
    "change",
    [{"step": "x"}, {"epoch": -1}, {"cursors": {}}, {"cursors": [0]}, {"cursors": [0, 20]}, {"cursors": [0, 0, 0, 0]},
     {"over": [1]}, {"samples": None}],
)  # fmt: skip
def test_a_state_that_cannot_be_right_is_refused(change: dict[str, object]) -> None:
    order = epoch_order([20], 4)
    state = {**order.state_dict(), **change}
    with pytest.raises(UserError, match="state"):
        order.load_state_dict(state)
