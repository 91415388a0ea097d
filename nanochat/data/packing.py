"""Best-fit packing of documents into rows: pure functions of the documents' lengths.

Any process can therefore compute the rows of any packing window on its own.
"""

from collections.abc import Sequence

import numpy as np

from nanochat.data.order import Permutation
from nanochat.errors import UserError


class PackedRows(Sequence[list[tuple[int, int, int]]]):
    """Rows of pieces; `rows[r]` is a list of (document, start, stop).

    A window of books has hundreds of thousands of pieces, so they are kept as arrays. `documents`,
    `starts` and `stops` have an entry per piece; row r has the pieces `offsets[r]:offsets[r + 1]`.
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

    The method is best-fit decreasing (arXiv 2404.10830): the longest document comes first, and each
    goes into the row with the least free space that is enough. A document longer than a row is cut
    into full rows that overlap by one token, and a remainder, which is packed like a document. A
    document of n tokens therefore has exactly n - 1 (input, target) pairs, however it is cut.
    Documents of one token have none and are left out. With a `key` the rows are shuffled by it,
    else the fullest come first. Raises UserError for a capacity below 2.

    >>> list(pack_window([7, 3, 2], capacity=4))
    [[(0, 0, 4)], [(0, 3, 7)], [(1, 0, 3)], [(2, 0, 2)]]
    """
    sizes = _checked_lengths(lengths, capacity)
    documents = np.flatnonzero(sizes > 1)
    sizes = sizes[documents]
    full = _full_rows(sizes, capacity)

    # Full rows of long documents, numbered 0, 1, 2.. within each document.
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
    """Count the rows of `pack_window(lengths, capacity)` without building them."""
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
    """Number of full rows that each document fills before its remainder of 2..capacity tokens."""
    return np.maximum(0, -((capacity - sizes) // (capacity - 1)))


def _best_fit(sizes: list[int], capacity: int) -> tuple[list[int], int]:
    """Choose the row of each piece; returns them and the number of rows.

    `sizes` must decrease and be 2..capacity. Rows with the same free space are on one stack. An int
    has a bit for each amount of free space that occurs; the lowest bit from `size` up is the best
    fit.
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
        if free > 1:  # one free token cannot hold an (input, target) pair
            stack = free_rows.setdefault(free, [])
            if not stack:
                in_use |= 1 << free
            stack.append(row)
    return rows, num_rows
