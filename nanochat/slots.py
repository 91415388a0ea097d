"""The rows being decoded and the cache they share.

Rows are kept dense: row i of the cache belongs to rows[i], and a row that ends is replaced by the
last one. So a step computes nothing for absent rows, and its products run over contiguous memory.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from nanochat.completion import Completion, Request
from nanochat.kv_cache import KVCache
from nanochat.transcript import Transcript


@dataclass(eq=False)
class Row:
    """A sample being decoded."""

    request: Request
    sample: int
    transcript: Transcript
    key: int
    """Names the random stream."""
    position: int
    """Tokens in the cache."""
    next_id: int = 0
    """The token to be read next; it is the last of the completion's ids."""
    forced: deque[int] = field(default_factory=deque)
    tool: Future[str] | None = None

    @property
    def completion(self) -> Completion:
        return self.request.completions[self.sample]

    @property
    def history(self) -> list[int]:
        """All tokens read and drawn."""
        return self.request.prompt + self.completion.ids


class Slots:
    """new_cache (rows, capacity) makes a cache.

    fixed: the cache always has max_slots rows, its capacity is doubled up to the context length
    when it is too small, and it stays when there are no rows: compiled graphs are made for a shape
    and an address. Otherwise it follows the rows.
    """

    def __init__(
        self,
        max_slots: int,
        context_length: int,
        new_cache: Callable[[int, int], KVCache],
        fixed: bool = False,
    ):
        self.max_slots = max_slots
        self.context_length = context_length
        self.fixed = fixed
        self.rows: list[Row] = []
        self.cache: KVCache | None = None
        self._new_cache = new_cache
        self._view: KVCache | None = None

    @property
    def available(self) -> int:
        """Rows that could be added."""
        return self.max_slots - len(self.rows)

    def add(self, rows: list[Row], prompts: KVCache, sources: list[int], waiting: int) -> None:
        """Append rows whose tokens are in rows `sources` of `prompts`; `waiting` may follow."""
        first = len(self.rows)
        self.rows += rows
        self.reserve(waiting)
        assert self.cache is not None
        targets = list(range(first, len(self.rows)))
        self.cache.copy_rows(prompts, sources, targets, max(row.position for row in rows))
        self._view = None

    def keep(self, flags: list[bool]) -> None:
        """Remove the rows whose flag is False and close the gaps with the last ones."""
        kept = sum(flags)
        holes = [i for i in range(kept) if not flags[i]]
        movers = [i for i in range(kept, len(flags)) if flags[i]]
        if movers and self.cache is not None:
            length = max(self.rows[i].position for i in movers)
            self.cache.copy_rows(self.cache, movers, holes, length)
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[kept:]
        self._view = None

    def free(self) -> None:
        """Free the cache, if it is not a fixed one."""
        if not self.fixed:
            self.cache = self._view = None

    def reserve(self, waiting: int) -> None:
        """Make the cache large enough for the rows, as they are and as they will be soon.

        Its slots follow the longest row in steps of a quarter instead of being allocated for the
        longest possible answer: all slots are computed on, and products over a part of them were
        measured 2-3 times slower on CPUs than over contiguous ones.
        """
        needed = max(row.position for row in self.rows) + 1
        cache = self.cache
        count = 0 if cache is None else cache.batch_size
        capacity = 0 if cache is None else cache.capacity
        if needed > capacity and self.fixed:
            capacity = max(256, 1 << needed.bit_length()) - 1
            if capacity + 1 >= self.context_length:
                capacity = self.context_length
        elif needed > capacity:
            limit = max(len(row.request.prompt) + row.request.max_tokens for row in self.rows)
            steps = -(-max(needed + 32, capacity * 5 // 4) // 64) * 64 - 1
            capacity = min(max(limit, needed), steps)
        if self.fixed:
            count = self.max_slots
        elif len(self.rows) > count:
            count = min(self.max_slots, max(len(self.rows) + waiting, 2 * count))
        if cache is None or (count, capacity) != (cache.batch_size, cache.capacity):
            self.cache = self._new_cache(count, capacity)
            if self.fixed:
                self.cache.pin()
            if cache is not None:
                cache.longest = min(max(row.position for row in self.rows), cache.capacity)
                self.cache.load(cache)
        if self.cache is not cache:
            self._view = None

    def view(self) -> KVCache:
        """The rows' part of the cache (all of it, if fixed), with the bounds of their lengths."""
        assert self.cache is not None
        if self._view is None:
            self._view = self.cache if self.fixed else self.cache.head(len(self.rows))
        positions = [row.position for row in self.rows]
        self._view.shortest, self._view.longest = min(positions), max(positions)
        return self._view
