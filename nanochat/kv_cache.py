"""Cache of the keys and values of the tokens read so far; every row has a length of its own.

B rows, T new tokens, K key/value heads, S slots (capacity), D head dim

The cache is a list of tensors, one per layer. Slices of one stacked tensor were measured nine times
slower to decode under torch.compile.
"""

import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Reading:
    """A plan for T new tokens per row: where their keys and values go, and what they see."""

    positions: torch.Tensor
    """Positions (B, T) of the new tokens in their rows. Padding that does not fit gets S."""
    slots: torch.Tensor
    """Indices (B * T * K,) of the new vectors among a layer's B * K * S vectors."""
    biases: dict[int, torch.Tensor]
    """Biases (B, 1, T, S) by window size (0: no window), 0 where attended and -inf elsewhere."""
    column: int | None = None
    """The position, if every row gets one token at the same position."""


class KVCache:
    """Keys and values of up to `capacity` tokens in each of `batch_size` rows.

    `lengths` (B,) int64 counts the tokens of each row. Slots from there on hold garbage that no
    query sees, so right-padded tokens may be appended. `last_ids` (B,) int64 are the ids of the
    rows' last tokens, -1 in an empty row.

    `shortest` and `longest` bound `lengths` from below and above. The host knows them without
    asking the device, and skips slots that no row needs. A caller that knows the lengths may
    tighten them.
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
        # One slot beyond the capacity takes the padding that would not fit. A multiple of 8 keeps
        # masks aligned for GPU kernels. The slots start as zeros: a masked slot still enters a
        # product, and 0 times uninitialised memory may be NaN.
        shape = (batch_size, n_kv_head, capacity // 8 * 8 + 8, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.last_ids = torch.full_like(self.lengths, -1)
        self.batch_size = batch_size
        self.capacity = capacity
        self.shortest = 0
        self.longest = 0
        self.pinned = False

    def pin(self) -> None:
        """Tell compiled graphs, which write to the cache, that its memory never moves."""
        for tensor in (self.lengths, self.last_ids, *self.keys, *self.values):
            torch._dynamo.mark_static_address(tensor)
        self.pinned = True

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def read(
        self, T: int, counts: torch.Tensor | None, windows: set[int], dtype: torch.dtype
    ) -> Reading:
        """Plan T more tokens per row, of which the first counts (B,) are real and the rest padding.

        A token sees itself and the window - 1 tokens before it (window 0: all). Padding may see
        anything. Raises ValueError if T tokens do not fit.
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

    def advance(self, ids: torch.Tensor, counts: torch.Tensor | None) -> None:
        """Count the appended ids (B, T) in every row, or the first counts (B,) of them."""
        T = ids.shape[1]
        self.lengths += T if counts is None else counts
        keep_last(self.last_ids, ids, counts)
        self.widen_bounds(T, counts)

    def widen_bounds(self, T: int, counts: torch.Tensor | None) -> None:
        """Advance only `shortest` and `longest`; a compiled graph has advanced the rest."""
        self.shortest += T if counts is None else 0
        self.longest = min(self.longest + T, self.capacity)

    def take_back(self, count: int, last_id: int) -> None:
        """Forget the last `count` tokens of every row; `last_id` is then the last one's id."""
        self.lengths -= count
        self.last_ids.fill_(last_id)
        self.shortest -= count
        self.longest -= count

    def reset(self, rows: torch.Tensor | slice = slice(None)) -> None:
        """Empty these rows."""
        self.lengths[rows] = 0
        self.last_ids[rows] = -1
        self.shortest = 0

    def head(self, rows: int) -> "KVCache":
        """Return the first rows as a cache that shares this one's memory, with its own bounds."""
        view = object.__new__(KVCache)
        view.keys = [t[:rows] for t in self.keys]
        view.values = [t[:rows] for t in self.values]
        view.lengths, view.last_ids = self.lengths[:rows], self.last_ids[:rows]
        view.batch_size, view.capacity = rows, self.capacity
        view.shortest, view.longest = self.shortest, self.longest
        view.pinned = False
        return view

    def copy_rows(
        self, other: "KVCache", sources: list[int], targets: list[int], length: int
    ) -> None:
        """Copy the first `length` slots and the length of row sources[i] of `other` to targets[i].

        `length` must be at least the longest of those rows. `other` may be this cache. Raises
        ValueError if `length` exceeds the capacity.
        """
        if length > self.capacity:
            raise ValueError(f"{length} cached tokens do not fit into {self.capacity}")
        source = torch.tensor(sources, device=self.lengths.device)
        target = torch.tensor(targets, device=self.lengths.device)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for to, of in zip(mine, theirs, strict=True):
                to[target, :, :length] = of[source, :, :length]
        self.lengths[target] = other.lengths[source]
        self.last_ids[target] = other.last_ids[source]
        self.shortest = min(self.shortest, other.shortest)
        self.longest = max(self.longest, min(other.longest, length))

    def load(self, other: "KVCache") -> None:
        """Copy the rows and tokens of another cache that fit; the remaining rows become empty."""
        rows = min(self.batch_size, other.batch_size)
        length = min(self.capacity, other.capacity, other.longest)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for to, of in zip(mine, theirs, strict=True):
                to[:rows, :, :length] = of[:rows, :, :length]
        self.lengths.zero_()
        self.lengths[:rows] = other.lengths[:rows].clamp(max=self.capacity)
        self.last_ids.fill_(-1)
        self.last_ids[:rows] = other.last_ids[:rows]
        self.shortest, self.longest = 0, length


def plan_reading(
    lengths: torch.Tensor,
    T: int,
    shape: tuple[int, int],
    capacity: int,
    windows: set[int],
    dtype: torch.dtype,
) -> Reading:
    """Plan T tokens after each row's lengths (B,); shape is the (K, S) of the cache's rows."""
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


def keep_last(last_ids: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor | None) -> None:
    """Set last_ids (B,) to each row's last valid id of ids (B, T), in place.

    The first counts[b] of row b are valid; by default all are. A row with none keeps its id.
    """
    if counts is None:
        last_ids.copy_(ids[:, -1])
    else:
        last = ids.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        last_ids.copy_(torch.where(counts > 0, last, last_ids))


def write(vectors: torch.Tensor, slots: torch.Tensor, new: torch.Tensor) -> None:
    """Write new (B, T, K, D) to a `Reading`'s slots of vectors (B, K, S, D), in place."""
    D = vectors.shape[3]
    vectors.view(-1, D).index_copy_(0, slots, new.reshape(-1, D).to(vectors.dtype))
