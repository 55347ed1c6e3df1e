"""The keyed orders: bijections of any size, without structure, and the same on every machine."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contentv.data.permutation import Permutation, key64, keyed_below, shuffled


def order(count: int, *key: object) -> list[int]:
    return Permutation(count, key64(*key)).stretch(0, count).tolist()


def chi2_limit(freedom: int) -> float:
    """A bound that independent uniform counts pass 99.997 % of the time (normal approximation, 4 sigma)."""
    return freedom + 4 * math.sqrt(2 * freedom) + 4


def test_the_orders_are_pinned_down_to_the_number() -> None:
    """A changed order would break the resumption of every running job: these numbers may not change."""
    assert order(10, 1) == [7, 2, 3, 5, 8, 6, 0, 4, 1, 9]
    assert Permutation(10**12, key64(2)).stretch(5, 8).tolist() == [411675044379, 713103810648, 570744868530]
    assert [keyed_below(100, 3, i) for i in range(5)] == [12, 69, 98, 82, 34]


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 5_000), key=st.integers(0, 2**64 - 1))
def test_every_size_is_permuted(size: int, key: int) -> None:
    permutation = Permutation(size, np.uint64(key))
    whole = permutation.stretch(0, size)
    assert np.array_equal(np.sort(whole), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_any_place_can_be_asked_for_alone(size: int, key: int, data: st.DataObject) -> None:
    permutation = Permutation(size, np.uint64(key))
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=30, unique=True)))
    numbers = permutation(places)
    assert ((numbers >= 0) & (numbers < size)).all()
    assert len(set(numbers.tolist())) == len(places), "no two places have the same number"
    assert [int(permutation(np.array([place]))[0]) for place in places] == numbers.tolist()


def test_small_sets_are_permuted_as_large_ones_are() -> None:
    """The table of a small set is a faster way to the same numbers."""
    for size in (1, 2, 5, 16, 17, 700, 1024):
        permutation = Permutation(size, key64(size))
        table = permutation.stretch(0, size)
        permutation._table = None
        assert np.array_equal(permutation.stretch(0, size), table)


@pytest.mark.parametrize("size", [2, 6, 17])
def test_places_are_uniform(size: int) -> None:
    repeats = 3_000
    counts = np.zeros((size, size))
    for seed in range(repeats):
        counts[np.arange(size), order(size, "places", seed)] += 1
    expected = repeats / size
    assert ((counts - expected) ** 2 / expected).sum() < chi2_limit((size - 1) ** 2)


def test_all_orders_of_a_small_set_are_equally_likely() -> None:
    counts = Counter(tuple(order(5, "all", seed)) for seed in range(6_000))
    assert set(counts) == set(itertools.permutations(range(5)))
    assert sum((n - 50) ** 2 / 50 for n in counts.values()) < chi2_limit(119)


@pytest.mark.parametrize("size", [100_000, 2**16, 10**8])
def test_orders_have_no_structure(size: int) -> None:
    """Places, neighbours and epochs are uncorrelated, and stretches are spread evenly over the whole set."""
    count = min(size, 100_000)
    first, second = (Permutation(size, key64("epoch", e)).stretch(0, count).astype(float) for e in (0, 1))
    for a, b in ((first, second), (first[1:], first[:-1]), (first, np.arange(count)), (first[7:], first[:-7])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / math.sqrt(count)
    cells = np.bincount((first[: count // 10] * 64 / size).astype(int), minlength=64)
    assert ((cells - count / 640) ** 2 / (count / 640)).sum() < chi2_limit(63)
    gaps = np.diff(np.sort(first[: count // 100]))
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.2), "gaps between chosen numbers are exponential"


def test_a_shuffle_moves_everything_and_loses_nothing() -> None:
    values = np.arange(100, 200)
    assert sorted(shuffled(values, key64(1)).tolist()) == values.tolist()
    assert shuffled(values, key64(1)).tolist() != shuffled(values, key64(2)).tolist()
    assert shuffled(values[:0], key64(1)).tolist() == []


def test_a_keyed_number_is_uniform_below_its_bound() -> None:
    counts = np.bincount([keyed_below(7, "draw", i) for i in range(7_000)], minlength=7)
    assert len(counts) == 7
    assert ((counts - 1_000) ** 2 / 1_000).sum() < chi2_limit(6)
