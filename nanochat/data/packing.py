"""From documents to rows: keyed order, exact mixtures, best-fit packing. Pure functions, no I/O.

Everything here is a function of a few integers, so any process can work out any part of the order
on its own, and a position in it is a few integers too.
"""

from collections.abc import Sequence

import numpy as np

from nanochat.data.order import Permutation
from nanochat.errors import UserError


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
