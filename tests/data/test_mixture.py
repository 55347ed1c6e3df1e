"""Shares of sources, buckets and kinds: exact at any time, with budgets, resumable."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contentv.base.errors import UserError
from contentv.data.mixture import Cell, MixtureOrder
from contentv.data.plan import PlannedBatch
from contentv.data.shares import WHOLE, Targets, apportion, fit_shares
from contentv.data.streams import SampleStream

IMAGES, SHORT, LONG = "f1_h16_w16", "f5_h16_w16", "f9_h16_w16"
Sizes = dict[tuple[str, str], int]
SIZES: Sizes = {(IMAGES, "A"): 40, (SHORT, "A"): 90, (SHORT, "B"): 30, (LONG, "B"): 60, (LONG, "C"): 11}
OFFSET = 1_000_000  # numbers say which cell they are of


def order_of(
    sizes: Sizes, batch: dict[str, int] | int = 8, caps: dict[str, int] | None = None, seed: int = 0, **targets: Any
) -> MixtureOrder:
    cap = caps or {}
    cells = [
        Cell(bucket, source, SampleStream(f"{bucket}/{source}", n, seed, select=shift(i), max_epochs=cap.get(source)))
        for i, ((bucket, source), n) in enumerate(sizes.items())
    ]
    batches = batch if isinstance(batch, dict) else {bucket: batch for bucket, _ in sizes}
    return MixtureOrder(cells, batches, Targets(**targets), seed)


def shift(i: int) -> Any:
    return lambda places: places + i * OFFSET


def cell_counts(batches: list[PlannedBatch], sizes: Sizes) -> Counter[tuple[str, str]]:
    cells = list(sizes)
    return Counter(cells[int(sample) // OFFSET] for b in batches for sample in b.samples)


def by_source(counts: Counter[tuple[str, str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for (_, source), n in counts.items():
        found[source] += n
    return found


def take(order: MixtureOrder, steps: int) -> list[PlannedBatch]:
    batches = []
    for _ in range(steps):
        batch = order.next()
        if batch is None:
            break
        batches.append(batch)
    return batches


@given(weights=st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=1, max_size=30).filter(any))
def test_apportioned_parts_sum_up_and_are_in_proportion(weights: list[float]) -> None:
    parts = apportion(WHOLE, weights)
    assert sum(parts) == WHOLE
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - weight / sum(weights) * WHOLE) <= len(weights) + 1
        assert (part > 0) == (weight > 0)


def test_shares_are_the_nearest_to_the_data() -> None:
    cells, sizes = list(SIZES), [float(n) for n in SIZES.values()]
    plain = fit_shares(cells, sizes, Targets())
    assert [part / WHOLE for part in plain] == pytest.approx([n / sum(sizes) for n in sizes], abs=1e-5)
    weighted = fit_shares(cells, sizes, Targets({"A": 2.0, "B": 1.0, "C": 1.0}))
    expected = [0.5 * 40 / 130, 0.5 * 90 / 130, 0.25 * 30 / 90, 0.25 * 60 / 90, 0.25]
    assert [part / WHOLE for part in weighted] == pytest.approx(expected, abs=1e-5), "a source over its buckets as is"
    both = fit_shares(cells, sizes, Targets({"A": 0.5, "B": 0.3, "C": 0.2}, {}, 0.25), strict=True)
    table = {cell: part / WHOLE for cell, part in zip(cells, both, strict=True)}
    assert table[IMAGES, "A"] == pytest.approx(0.25, abs=1e-5)
    for source, share in (("A", 0.5), ("B", 0.3), ("C", 0.2)):
        assert sum(v for (_, s), v in table.items() if s == source) == pytest.approx(share, abs=1e-5)
    buckets = {IMAGES: 1.0, SHORT: 2.0, LONG: 1.0}
    rows = fit_shares(cells, sizes, Targets({}, buckets))
    for bucket, share in ((IMAGES, 0.25), (SHORT, 0.5), (LONG, 0.25)):
        assert sum(p for (b, _), p in zip(cells, rows, strict=True) if b == bucket) == pytest.approx(
            share * WHOLE, 1e-5
        )


@pytest.mark.parametrize(
    "targets",
    [
        Targets({"A": 0.1, "B": 0.5, "C": 0.4}, {}, 0.3),
        Targets({"A": 1.0, "B": 1.0, "C": 8.0}, {IMAGES: 1.0, SHORT: 1.0, LONG: 1.0}),
    ],
)
def test_shares_that_do_not_go_together_are_refused(targets: Targets) -> None:
    with pytest.raises(UserError, match="do not go together"):
        fit_shares(list(SIZES), [float(n) for n in SIZES.values()], targets, strict=True)


def test_shares_at_the_edge_of_what_is_possible_hold() -> None:
    """All images are of A: with as many images as A is to have, A's videos get next to nothing."""
    shares = fit_shares(
        list(SIZES), [float(n) for n in SIZES.values()], Targets({"A": 2.0, "B": 1.0, "C": 1.0}, {}, 0.5), True
    )
    assert shares[0] / WHOLE == pytest.approx(0.5, abs=1e-3)
    assert 0 < shares[1] / WHOLE < 2e-3


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=5, max_size=5), batch=st.integers(1, 20), seed=st.integers(0, 9),
    weights=st.one_of(st.none(), st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3)), larger=st.integers(1, 3),
)  # fmt: skip
def test_shares_hold_at_any_time(
    sizes: list[int], batch: int, seed: int, weights: list[float] | None, larger: int
) -> None:
    table = dict(zip(SIZES, sizes, strict=True))
    wanted = {} if weights is None else dict(zip("ABC", weights, strict=True))
    batches = {IMAGES: batch * larger, SHORT: batch, LONG: batch}
    order = order_of(table, batches, seed=seed, source_weights=wanted)
    seen: list[PlannedBatch] = []
    shares = {
        s: wanted[s] / sum(wanted.values()) if wanted else by_source(Counter(table))[s] / sum(sizes) for s in "ABC"
    }
    for _ in range(40):
        seen += take(order, 1)
        total = sum(len(b.samples) for b in seen)
        found = by_source(cell_counts(seen, table))
        for source, share in shares.items():
            assert abs(found[source] - share * total) <= 2 * batch * larger, "within the batches that are under way"
    assert [b.first_index for b in seen] == [sum(len(b.samples) for b in seen[:i]) for i in range(len(seen))]


@settings(max_examples=30, deadline=None)
@given(
    ratio=st.floats(0.02, 0.98), batch=st.integers(1, 20), larger=st.integers(1, 4),
    weights=st.sampled_from([{}, {IMAGES: 1.0, SHORT: 5.0, LONG: 1.0}]),
)  # fmt: skip
def test_the_ratio_of_images_is_exact_to_within_a_batch(
    ratio: float, batch: int, larger: int, weights: dict[str, float]
) -> None:
    sizes: Sizes = {(IMAGES, ""): 7, (SHORT, ""): 50, (LONG, ""): 20}
    batches = {IMAGES: batch * larger, SHORT: batch, LONG: batch}
    order = order_of(sizes, batches, image_ratio=ratio, bucket_weights=weights)
    images = total = 0
    buckets: Counter[str] = Counter()
    for planned in take(order, 80):
        total += len(planned.samples)
        images += len(planned.samples) * (planned.bucket == IMAGES)
        buckets[planned.bucket] += len(planned.samples)
        assert abs(images - ratio * total) <= max(batches.values()) + 1e-3
    parts = (5.0, 1.0) if weights else (50.0, 20.0)
    videos = total - images
    assert abs(buckets[SHORT] - videos * parts[0] / sum(parts)) <= 2 * max(batches.values())


def test_sources_are_mixed_within_every_batch_and_slice() -> None:
    sizes: Sizes = {(SHORT, "A"): 1000, (SHORT, "B"): 50}
    batches = take(order_of(sizes, 32, source_weights={"A": 1.0, "B": 1.0}), 60)
    for planned in batches:
        assert cell_counts([planned], sizes) == {(SHORT, "A"): 16, (SHORT, "B"): 16}
    slices = np.array([[(planned.samples[r * 8 : r * 8 + 8] < OFFSET).sum() for r in range(4)] for planned in batches])
    assert slices.mean(axis=0) == pytest.approx([4] * 4, abs=0.8), "no rank gets one source alone"
    assert slices.std() > 0.5, "the places are drawn, not dealt out in turn"


def test_every_stream_goes_through_its_samples_in_turn() -> None:
    batches = take(order_of(SIZES, 8, source_weights={"A": 1.0, "B": 1.0, "C": 1.0}), 200)
    for i, size in enumerate(SIZES.values()):
        seen = [int(s) - i * OFFSET for b in batches for s in np.sort(b.samples) if int(s) // OFFSET == i]
        counts = Counter(seen)
        assert max(counts[n] for n in range(size)) - min(counts[n] for n in range(size)) <= 1


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 12), caps=st.fixed_dictionaries({s: st.integers(1, 3) for s in "ABC"}),
    weighted=st.booleans(), ratio=st.sampled_from([0.0, 0.2]), stop=st.integers(0, 60),
)  # fmt: skip
def test_budgets_end_the_data_after_every_sample_was_seen(
    batch: int, caps: dict[str, int], weighted: bool, ratio: float, stop: int
) -> None:
    weights = {"A": 0.5, "B": 0.3, "C": 0.2} if weighted else {}
    build = lambda: order_of(SIZES, batch, caps, source_weights=weights, image_ratio=ratio)  # noqa: E731
    order = build()
    batches = take(order, 10_000)
    assert len(batches) < 10_000
    assert order.next() is None
    counts = Counter(int(s) for b in batches for s in b.samples)
    missing = Counter({bucket: 0 for bucket, _ in SIZES})
    for i, ((bucket, source), size) in enumerate(SIZES.items()):
        seen = [counts[i * OFFSET + n] for n in range(size)]
        assert max(seen) <= caps[source]
        missing[bucket] += sum(caps[source] - n for n in seen)
    assert max(missing.values()) < batch, "less than a batch of each bucket is left"
    resumed = build()
    first = take(resumed, stop)
    state = json.loads(json.dumps(resumed.state_dict()))
    again = build()
    again.load_state_dict(state)
    assert again.state_dict() == state
    rest = take(again, 10_000)
    assert [b.samples.tolist() for b in first + rest] == [b.samples.tolist() for b in batches]


def test_a_source_with_a_budget_drops_out_and_the_others_share_what_it_had() -> None:
    weights = {"A": 2.0, "B": 1.0, "C": 1.0}
    sizes: Sizes = {(SHORT, "A"): 64, (SHORT, "B"): 40, (SHORT, "C"): 40}
    batches = take(order_of(sizes, 16, {"A": 2}, source_weights=weights), 60)
    counts = Counter(int(s) for b in batches for s in b.samples)
    assert [counts[n] for n in range(64)] == [2] * 64, "in full, twice, exactly"
    assert by_source(cell_counts(batches[:16], sizes)) == {"A": 128, "B": 64, "C": 64}
    assert by_source(cell_counts(batches[16:], sizes)) == {"B": 352, "C": 352}


@pytest.mark.parametrize(
    "change", [{"credits": [0]}, {"ended": [7]}, {"cursors": [0] * 8}, {"step": -1}, {"samples": ""}]
)
def test_a_state_that_cannot_be_right_is_refused(change: dict[str, object]) -> None:
    order = order_of(SIZES)
    with pytest.raises(UserError, match="state"):
        order.load_state_dict({**order.state_dict(), **change})


def test_the_state_of_many_streams_is_small() -> None:
    sizes: Sizes = {(f"f{4 * i + 1}_h16_w16", f"source-{j}"): 100_000 for i in range(10) for j in range(20)}
    order = order_of(sizes, 256, source_weights={f"source-{j}": 1.0 + j for j in range(20)}, image_ratio=0.3)
    take(order, 60)
    assert len(json.dumps(order.state_dict())) < 8_000
