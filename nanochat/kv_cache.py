"""Keys and values of what was read so far, per layer, with a position of its own for every row.

B rows, K key/value heads, S slots (capacity), D head dim

A list of per-layer tensors, not slices of one stacked tensor: the latter was measured nine times
slower to decode under torch.compile.
"""

import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Reading:
    """Where T more tokens per row go, and what they see."""

    positions: torch.Tensor
    """(B, T): their places in the rows; padding that does not fit is at the capacity."""
    slots: torch.Tensor
    """(B * T * K,): where their keys and values go, in a layer's vectors numbered (B, K, S)."""
    biases: dict[int, torch.Tensor]
    """Per window size (0 = none): (B, 1, T, S), 0 where attended and -inf elsewhere."""
    column: int | None = None
    """The position of all rows, if they go on with one token at the same one."""


class KVCache:
    """Room for `capacity` tokens in each of `batch_size` rows.

    `lengths` (B,) int64 counts the tokens each row holds; slots at and beyond it hold garbage that
    no query sees, so appending right-padded tokens is harmless.

    `shortest` and `longest` bound `lengths` from below and above. They are known without asking the
    device, and let a reader skip what no row needs. Whoever knows the lengths may tighten them.
    """

    def __init__(
        self,
        n_layer: int,
        n_kv_head: int,
        head_dim: int,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        # One slot beyond the capacity takes the padding that would not fit; a multiple of 8 lets
        # GPU kernels read masks aligned. Zeros, since a masked slot still enters a product, and 0
        # times whatever memory held may be NaN.
        shape = (batch_size, n_kv_head, capacity // 8 * 8 + 8, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.batch_size = batch_size
        self.capacity = capacity
        self.shortest = 0
        self.longest = 0
        self.pinned = False

    def pin(self) -> None:
        """Promise compiled graphs, which write to the cache, that its memory stays where it is."""
        for tensor in (self.lengths, *self.keys, *self.values):
            torch._dynamo.mark_static_address(tensor)
        self.pinned = True

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def read(
        self, T: int, counts: torch.Tensor | None, windows: set[int], dtype: torch.dtype
    ) -> Reading:
        """Plan for T more tokens per row, of which the first counts (B,) are no padding.

        A token sees itself and the window - 1 tokens before it (0: all). Padding may see anything.
        """
        if self.shortest + (T if counts is None else 0) > self.capacity:
            raise ValueError(f"{T} more tokens do not fit into a cache of {self.capacity}")
        _, K, S, _ = self.keys[0].shape
        reading = plan_reading(self.lengths, T, (K, S), self.capacity, windows, dtype)
        if T == 1 and counts is None and self.shortest == self.longest:
            return replace(reading, column=self.longest)
        return reading

    def append(
        self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v (B, T, K, D) to a `Reading`'s slots; return all keys and values (B, K, S, D).

        `lengths` is advanced by the model once all layers have written.
        """
        keys, values = self.keys[layer], self.values[layer]
        write(keys, slots, k)
        write(values, slots, v)
        return keys, values

    def advance(self, T: int, counts: torch.Tensor | None) -> None:
        """Count T appended tokens in every row, or counts (B,) of them, each at most T."""
        self.lengths += T if counts is None else counts
        self.widen_bounds(T, counts)

    def widen_bounds(self, T: int, counts: torch.Tensor | None) -> None:
        """`advance` for the bounds alone, where something else has counted."""
        self.shortest += T if counts is None else 0
        self.longest = min(self.longest + T, self.capacity)

    def reset(self, rows: torch.Tensor | slice = slice(None)) -> None:
        """Forget these rows."""
        self.lengths[rows] = 0
        self.shortest = 0

    def head(self, rows: int) -> "KVCache":
        """The first rows as a cache that shares this one's memory (its bounds are its own)."""
        view = object.__new__(KVCache)
        view.keys = [t[:rows] for t in self.keys]
        view.values = [t[:rows] for t in self.values]
        view.lengths = self.lengths[:rows]
        view.batch_size, view.capacity = rows, self.capacity
        view.shortest, view.longest = self.shortest, self.longest
        view.pinned = False
        return view

    def copy_rows(
        self, other: "KVCache", sources: list[int], targets: list[int], length: int
    ) -> None:
        """Row targets[i] gets the first `length` slots and the length of row sources[i] of `other`.

        `length` is at least the longest of those rows. `other` may be this cache.
        """
        if length > self.capacity:
            raise ValueError(f"{length} cached tokens do not fit into {self.capacity}")
        source = torch.tensor(sources, device=self.lengths.device)
        target = torch.tensor(targets, device=self.lengths.device)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for to, of in zip(mine, theirs, strict=True):
                to[target, :, :length] = of[source, :, :length]
        self.lengths[target] = other.lengths[source]
        self.shortest = min(self.shortest, other.shortest)
        self.longest = max(self.longest, min(other.longest, length))

    def load(self, other: "KVCache") -> None:
        """Take over the rows and tokens of another cache that fit; the other rows become empty."""
        rows = min(self.batch_size, other.batch_size)
        length = min(self.capacity, other.capacity, other.longest)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for to, of in zip(mine, theirs, strict=True):
                to[:rows, :, :length] = of[:rows, :, :length]
        self.lengths.zero_()
        self.lengths[:rows] = other.lengths[:rows].clamp(max=self.capacity)
        self.shortest, self.longest = 0, length


def plan_reading(
    lengths: torch.Tensor,
    T: int,
    shape: tuple[int, int],
    capacity: int,
    windows: set[int],
    dtype: torch.dtype,
) -> Reading:
    """Where T tokens go behind each row's lengths (B,), in a cache with (K, S) vectors per row."""
    K, S = shape
    device = lengths.device
    positions = lengths[:, None]
    if T > 1:
        positions = positions + torch.arange(T, device=device)
    positions = positions.clamp(max=capacity)
    heads = torch.arange(0, lengths.shape[0] * K * S, S, device=device).view(-1, 1, K)
    slots = (heads + positions[:, :, None]).flatten()
    seen = torch.arange(S, device=device)
    biases = {}
    for window in windows:
        unseen = seen > positions[:, :, None]
        if window > 0:
            unseen |= seen <= positions[:, :, None] - window
        bias = torch.zeros(unseen.shape, dtype=dtype, device=device)
        biases[window] = bias.masked_fill_(unseen, -math.inf)[:, None]
    return Reading(positions, slots, biases)


def write(vectors: torch.Tensor, slots: torch.Tensor, new: torch.Tensor) -> None:
    """new (B, T, K, D) to a `Reading`'s slots of vectors (B, K, S, D)."""
    D = vectors.shape[3]
    vectors.view(-1, D).index_copy_(0, slots, new.reshape(-1, D).to(vectors.dtype))
