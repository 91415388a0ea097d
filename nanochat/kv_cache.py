"""Keys and values of what was read so far, per layer, with a position of its own for every row.

B rows, K key/value heads, S slots (capacity), D head dim

A list of per-layer tensors, not slices of one stacked tensor: the latter was measured nine times
slower to decode under torch.compile.
"""

import torch


class KVCache:
    """Room for `capacity` tokens in each of `batch_size` rows.

    `lengths` (B,) int64 counts the tokens each row holds; slots at and beyond it hold garbage that
    no query sees, so appending right-padded tokens is harmless.
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
        shape = (batch_size, n_kv_head, capacity, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.batch_size = batch_size
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def append(
        self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v (B, T, K, D) at slots (B, T); return all keys and values (B, K, S, D).

        Slots at or beyond the capacity are not allowed. `lengths` is advanced by the model once
        all layers have written.
        """
        rows = torch.arange(self.batch_size, device=slots.device)[:, None]
        self.keys[layer].transpose(1, 2)[rows, slots] = k.to(self.keys[layer].dtype)
        self.values[layer].transpose(1, 2)[rows, slots] = v.to(self.values[layer].dtype)
        return self.keys[layer], self.values[layer]

    def reset(self, rows: torch.Tensor | slice = slice(None)) -> None:
        """Forget these rows."""
        self.lengths[rows] = 0

    def copy_from(self, other: "KVCache", source_row: int, rows: torch.Tensor) -> None:
        """Give each of `rows` the content of one row of another cache (a prompt's samples)."""
        length = int(other.lengths[source_row])
        if length > self.capacity:
            raise ValueError(f"{length} cached tokens do not fit into a capacity of {self.capacity}")
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for target, source in zip(mine, theirs, strict=True):
                target[rows, :, :length] = source[source_row, :, :length]
        self.lengths[rows] = length
