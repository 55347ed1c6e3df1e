"""Keyed orders and keyed draws from integer mixing alone: the same under every version of numpy and on every machine.

An order of n things is a bijection of 0..n-1 that is computed place by place, so the place of any sample in any epoch
costs the same, and an order of a hundred million samples takes no memory.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Words = NDArray[np.uint64]
ROUNDS = 8
_MIN_HALF_BITS = 3
_TABLE_HALF_BITS = 5
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key64(*parts: object) -> np.uint64:
    """Returns 64 bits that depend on all parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    word: np.uint64 = np.frombuffer(digest, dtype="<u8").astype(np.uint64)[0]
    return word


def mix64(values: Words) -> Words:
    """Returns 64-bit words whose every bit depends on every bit of the input word (SplitMix64's finaliser)."""
    mixed: Words = values.copy()
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def keyed_uniform(words: Words, key: np.uint64) -> NDArray[np.float64]:
    """Returns a number in [0, 1) for each word, a function of the word and `key`."""
    bits: Words = mix64(mix64(words ^ key) + _GOLDEN) >> np.uint64(11)
    draws: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return draws


def keyed_below(total: int, *key: object) -> int:
    """Returns a whole number in 0..total-1, a function of `key`; `total` is at least 1."""
    return int(key64(*key)) * total >> 64


class Permutation:
    """A bijection of 0..size-1 that depends on `key` alone, computed for the places asked for.

    A balanced Feistel network permutes the numbers of an even number of bits, the fewest that hold `size` (but
    at least six: narrower ones favour some orders). What falls outside 0..size-1 goes through again until it is inside,
    which keeps the map a bijection and takes less than four passes on average for any size above 16.

    Args:
        size: how many numbers are permuted, at least 1.
        key: 64 bits from `key64`.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002), cycle walking; the round function
        is SplitMix64's finaliser.
    """

    def __init__(self, size: int, key: np.uint64) -> None:
        self.size = size
        bits = max(_MIN_HALF_BITS, (max(size - 1, 1).bit_length() + 1) // 2)
        self._half = np.uint64(bits)
        self._mask = np.uint64((1 << bits) - 1)
        self._keys = mix64(np.arange(1, ROUNDS + 1, dtype=np.uint64) * _GOLDEN + key)
        self._table = self._small_table() if bits <= _TABLE_HALF_BITS else None

    def __call__(self, places: Ids) -> Ids:
        """Returns the number at each place; places lie in 0..size-1."""
        if self._table is not None:
            return self._table[places]
        numbers = self._rounds(places.astype(np.uint64))
        outside = np.flatnonzero(numbers >= self.size)
        while len(outside):
            walked = self._rounds(numbers[outside])
            numbers[outside] = walked
            outside = outside[walked >= self.size]
        return numbers.astype(np.int64)

    def stretch(self, first: int, last: int) -> Ids:
        """Returns the numbers at the places first..last-1."""
        return self(np.arange(first, last, dtype=np.int64))

    def _rounds(self, values: Words) -> Words:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            # The upper bits of the mixed word: they depend on all of its input.
            left, right = right, left ^ (mix64(right + key) >> (np.uint64(64) - self._half))
        joined: Words = (left << self._half) | right
        return joined

    def _small_table(self) -> Ids:
        """Returns the same numbers for all places: of few, the whole network at once is cheaper than its walks."""
        follows = self._rounds(np.arange(1 << 2 * int(self._half), dtype=np.uint64)).tolist()
        table = follows[: self.size]
        for place, number in enumerate(table):
            while number >= self.size:
                number = follows[number]
            table[place] = number
        return np.array(table, dtype=np.int64)


def shuffled(values: Ids, key: np.uint64) -> Ids:
    """Returns the values in an order that depends on `key` alone."""
    return values[Permutation(len(values), key).stretch(0, len(values))] if len(values) else values
