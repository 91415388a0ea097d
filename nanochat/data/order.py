"""Order in which documents are read: keyed permutations and exact mixtures of sources."""

from collections.abc import Sequence
from fractions import Fraction
from math import isqrt
from typing import TypeVar

import numpy as np

from nanochat.errors import UserError

_MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
"""Odd number by which splitmix64 advances its state."""

Ints = TypeVar("Ints", int, np.ndarray)


def scramble(x: Ints) -> Ints:
    """Mix the bits of a 64-bit integer by splitmix64's finaliser (Steele et al., OOPSLA 2014).

    It is a bijection. x is a Python int or a uint64 array; the masks keep Python ints to 64 bits.
    """
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def make_key(*parts: int) -> int:
    """Make one 64-bit key of several integers; -1 and 1 give different keys."""
    key = 0
    for part in parts:
        key = scramble(((key ^ (part & _MASK)) + GOLDEN) & _MASK)
    return key


class Permutation:
    """A pseudo-random permutation of 0..n-1 that needs no table.

    A number is written as two digits in base ceil(sqrt(n)) and goes through four Feistel rounds,
    which add modulo the base instead of XORing (Black and Rogaway, "Ciphers with arbitrary finite
    domains"). There are at most 2·sqrt(n) more pairs of digits than numbers below n. A result of n
    or more goes through the rounds again until it is below n (cycle walking).

    >>> perm = Permutation(5, key=1)
    >>> sorted(perm[i] for i in range(5))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, key: int):
        self.n = n
        self._base = isqrt(n - 1) + 1 if n > 0 else 1
        self._round_keys = [make_key(key, r) for r in range(4)]

    def __len__(self) -> int:
        return self.n

    def _encrypt(self, x: Ints) -> Ints:
        base = self._base
        left, right = x // base, x % base
        for key in self._round_keys:
            left, right = right, (left + scramble(right ^ key) % base) % base
        return left * base + right

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(f"{index} is outside a permutation of {self.n}")
        index = self._encrypt(int(index))
        while index >= self.n:
            index = self._encrypt(index)
        return index

    def many(self, indices: np.ndarray) -> np.ndarray:
        """Permute `indices` (integers in 0..n-1); int64, same shape."""
        x = np.asarray(indices)
        if x.size and not 0 <= x.min() <= x.max() < self.n:
            raise IndexError(f"{x.min()}..{x.max()} is outside a permutation of {self.n}")
        x = self._encrypt(x.astype(np.uint64))
        outside = x >= self.n
        while outside.any():
            x[outside] = self._encrypt(x[outside])
            outside = x >= self.n
        return x.astype(np.int64)


class MixtureOrder:
    """Order of the documents of several sources, epoch after epoch.

    A source's mixture weight w is its number of passes per epoch. Source i with n = `sizes[i]`
    documents is an infinite stream: one pass over them after the other, each in a keyed order of
    its own. Epoch e takes the stream's elements floor(e·w·n) to floor((e+1)·w·n), so fractions of
    a pass are exact in the long run. Another keyed permutation mixes the sources of an epoch. No
    list with an entry per document is kept.

    Weights may be ints, floats (0.1 means 1/10), strings ("1/3") or Fractions.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float | str | Fraction], seed: int = 0
    ):
        if not sizes or len(sizes) != len(weights):
            raise UserError(
                f"{len(sizes)} sources with {len(weights)} weights; give each source one weight, "
                "and at least one source"
            )
        self.sizes = [int(size) for size in sizes]
        self.weights = [_exact_weight(weight) for weight in weights]
        self.seed = seed
        for i, size in enumerate(self.sizes):
            if size < 1:
                raise UserError(f"source {i} of the mixture has no documents; leave it out")

    def stream_start(self, source: int, epoch: int) -> int:
        """Number of elements of the source's stream that come before `epoch`."""
        return int(epoch * self.weights[source] * self.sizes[source])  # int is floor: no negatives

    def counts(self, epoch: int) -> list[int]:
        """Number of documents that `epoch` takes from each source."""
        return [
            self.stream_start(i, epoch + 1) - self.stream_start(i, epoch)
            for i in range(len(self.sizes))
        ]

    def epoch_length(self, epoch: int) -> int:
        return sum(self.counts(epoch))

    def locate(self, epoch: int, index: int) -> tuple[int, int]:
        """Find (source, document) of the `index`-th document of `epoch`."""
        place = Permutation(self.epoch_length(epoch), make_key(self.seed, -1, epoch))[index]
        source = 0
        for count in self.counts(epoch):
            if place < count:
                break
            place -= count
            source += 1
        stream = self.stream_start(source, epoch) + place
        return source, self._pass(source, stream // self.sizes[source])[stream % self.sizes[source]]

    def locate_many(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Find sources and documents of the epoch's indices start..stop-1; two int64 arrays."""
        counts = self.counts(epoch)
        order = Permutation(sum(counts), make_key(self.seed, -1, epoch))
        places = order.many(np.arange(start, stop))
        ends = np.cumsum(counts)
        sources = np.searchsorted(ends, places, side="right")
        documents = np.empty_like(places)
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            size = self.sizes[source]
            stream = places[chosen] - (ends[source] - counts[source])
            passes, within = np.divmod(stream + self.stream_start(source, epoch), size)
            for number in np.unique(passes).tolist():
                same = passes == number
                documents[chosen[same]] = self._pass(source, number).many(within[same])
        return sources, documents

    def _pass(self, source: int, number: int) -> Permutation:
        return Permutation(self.sizes[source], make_key(self.seed, source, number))


def _exact_weight(weight: float | str | Fraction) -> Fraction:
    """Read a weight as it is written: 0.1 is 1/10, not the binary fraction nearest to it."""
    try:
        exact = Fraction(str(weight))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"mixture weight {weight!r} is not a number; write it like 0.5, 2 or 1/3"
        ) from error
    if exact <= 0:
        raise UserError(f"mixture weight {weight} must be above 0; leave the source out instead")
    return exact
