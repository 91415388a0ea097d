"""From documents to rows: keyed order, exact mixtures, best-fit packing. Pure functions, no I/O.

Everything here is a function of a few integers, so any process can work out any part of the order
on its own, and a position in it is a few integers too.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import isqrt
from typing import TypeVar

import numpy as np

from nanochat.errors import UserError

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15

Ints = TypeVar("Ints", int, np.ndarray)


def _scramble(x: Ints) -> Ints:
    """splitmix64's output function: a bijection of 64-bit integers that mixes every bit.

    For Python ints and uint64 arrays alike; the masks keep the former to 64 bits.
    """
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    mixed: Ints = x ^ (x >> 31)
    return mixed


def make_key(*parts: int) -> int:
    """One 64-bit key from several integers, negative ones included (-1 and 1 differ)."""
    key = 0
    for part in parts:
        key = _scramble(((key ^ (part & _MASK)) + _GOLDEN) & _MASK)
    return key


class Permutation:
    """A pseudo-random permutation of 0..n-1 that keeps no table.

    Four Feistel rounds over pairs of digits in base ceil(sqrt(n)), added modulo the base instead of
    XORed (Black and Rogaway, "Ciphers with arbitrary finite domains"), so that the pairs exceed n
    by at most 2·sqrt(n); a value outside is sent through again until it lands inside (cycle
    walking).

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
            left, right = right, (left + _scramble(right ^ key) % base) % base
        joined: Ints = left * base + right
        return joined

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(f"{index} is outside a permutation of {self.n}")
        index = self._encrypt(int(index))
        while index >= self.n:
            index = self._encrypt(index)
        return index

    def many(self, indices: np.ndarray) -> np.ndarray:
        """The images of `indices` (integers in 0..n-1), int64, same shape."""
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
    """The order in which the documents of weighted sources are visited, epoch after epoch.

    Source i is an infinite stream: pass after pass over its `sizes[i]` documents, each pass in its
    own keyed order. Epoch e takes the stream's elements floor(e·w·n) to floor((e+1)·w·n), so a
    weight of 2 means two passes an epoch, and a fraction comes out exactly in the long run. The
    sources of an epoch are mixed by another keyed permutation. Nothing is kept per document.

    Weights may be ints, floats (taken as the decimal number they print as), strings ("1/3") or
    Fractions.
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
        """Elements of the source's stream taken before `epoch`."""
        return int(epoch * self.weights[source] * self.sizes[source])  # floor: never negative

    def counts(self, epoch: int) -> list[int]:
        """Documents that `epoch` takes from each source."""
        return [
            self.stream_start(i, epoch + 1) - self.stream_start(i, epoch)
            for i in range(len(self.sizes))
        ]

    def epoch_length(self, epoch: int) -> int:
        return sum(self.counts(epoch))

    def locate(self, epoch: int, index: int) -> tuple[int, int]:
        """(source, document) of the `index`-th document of `epoch`."""
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
        """Sources and documents of the epoch's indices start..stop-1, both int64."""
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
    """0.1 -> 1/10, as written, not the binary fraction next to it."""
    try:
        exact = Fraction(str(weight))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"mixture weight {weight!r} is not a number; write it like 0.5, 2 or 1/3"
        ) from error
    if exact <= 0:
        raise UserError(f"mixture weight {weight} must be above 0; leave the source out instead")
    return exact


class PackedRows(Sequence[list[tuple[int, int, int]]]):
    """Rows of pieces; `rows[r]` is a list of (document, start, stop).

    Kept as arrays, since a window of books has hundreds of thousands of pieces: `documents`,
    `starts`, `stops` per piece in row order, and row r has the pieces `offsets[r]:offsets[r + 1]`.
    """

    def __init__(
        self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray, row_of: np.ndarray
    ):
        order = np.argsort(row_of, kind="stable")
        self.documents, self.starts, self.stops = documents[order], starts[order], stops[order]
        num_rows = int(row_of.max()) + 1 if len(row_of) else 0
        self.offsets = np.zeros(num_rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(row_of, minlength=num_rows), out=self.offsets[1:])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> list[tuple[int, int, int]]:  # type: ignore[override]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        span = slice(self.offsets[row], self.offsets[row + 1])
        return list(
            zip(
                self.documents[span].tolist(),
                self.starts[span].tolist(),
                self.stops[span].tolist(),
                strict=True,
            )
        )


def pack_window(
    lengths: Sequence[int] | np.ndarray, capacity: int, key: int | None = None
) -> PackedRows:
    """Pack documents of these `lengths` into rows of `capacity` tokens (T + 1).

    Best-fit decreasing (arXiv 2404.10830): the longest first, each into the row with the least
    space that still takes it. A document that is longer than a row is cut into full rows that
    overlap by one token, and its remainder is packed with the rest, so a document of n tokens has
    exactly n - 1 (input, target) pairs whatever the cuts. Documents of one token have none and
    take no space. With a `key` the rows are shuffled by it, else the fullest come first.

    >>> list(pack_window([7, 3, 2], capacity=4))
    [[(0, 0, 4)], [(0, 3, 7)], [(1, 0, 3)], [(2, 0, 2)]]
    """
    sizes = _checked_lengths(lengths, capacity)
    documents = np.flatnonzero(sizes > 1)
    sizes = sizes[documents]
    full = _full_rows(sizes, capacity)

    # Full rows of long documents: number 0, 1, 2.. within the document, a row each.
    number = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    full_starts = number * (capacity - 1)
    rest_starts = full * (capacity - 1)
    longest_first = np.argsort(rest_starts - sizes, kind="stable")
    rest_rows, _ = _best_fit((sizes - rest_starts)[longest_first].tolist(), capacity)

    row_of = np.concatenate([np.arange(len(number)), np.array(rest_rows, np.int64) + len(number)])
    if key is not None and len(row_of):
        num_rows = int(row_of.max()) + 1
        row_of = Permutation(num_rows, key).many(np.arange(num_rows))[row_of]
    return PackedRows(
        documents=np.concatenate([np.repeat(documents, full), documents[longest_first]]),
        starts=np.concatenate([full_starts, rest_starts[longest_first]]),
        stops=np.concatenate([full_starts + capacity, sizes[longest_first]]),
        row_of=row_of,
    )


def count_rows(lengths: Sequence[int] | np.ndarray, capacity: int) -> int:
    """`len(pack_window(lengths, capacity))`, for less."""
    sizes = _checked_lengths(lengths, capacity)
    sizes = sizes[sizes > 1]
    full = _full_rows(sizes, capacity)
    rest = np.sort(sizes - full * (capacity - 1))[::-1]
    return int(full.sum()) + _best_fit(rest.tolist(), capacity)[1]


def _checked_lengths(lengths: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    if capacity < 2:
        raise UserError(f"sequence length {capacity - 1} must be at least 1")
    return np.asarray(lengths, dtype=np.int64)


def _full_rows(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """How many full rows each document fills before a remainder of 2..capacity tokens is left."""
    rows: np.ndarray = np.maximum(0, -((capacity - sizes) // (capacity - 1)))
    return rows


def _best_fit(sizes: list[int], capacity: int) -> tuple[list[int], int]:
    """The row of each piece, and the number of rows; `sizes` decrease and are 2..capacity.

    Rows that still have space are kept on a stack per amount of free space, and which amounts are
    in use is one int with a bit for each: the tightest fit is its lowest bit from `size` up.
    """
    rows: list[int] = []
    num_rows = 0
    free_rows: dict[int, list[int]] = {}
    in_use = 0
    for size in sizes:
        fitting = in_use >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            stack = free_rows[free]
            row = stack.pop()
            if not stack:
                in_use ^= 1 << free
        else:
            free, row = capacity, num_rows
            num_rows += 1
        rows.append(row)
        free -= size
        if free > 1:  # a space of one token holds no (input, target) pair
            stack = free_rows.setdefault(free, [])
            if not stack:
                in_use |= 1 << free
            stack.append(row)
    return rows, num_rows
