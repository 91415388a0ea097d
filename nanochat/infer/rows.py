"""Rows that are being decoded, the cache they share, and the reading of prompts.

Row i of the cache belongs to rows[i]. When a row ends, the last row takes its place. A step
therefore computes nothing for missing rows, and its products run over contiguous memory.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from nanochat.infer.requests import Completion, Request
from nanochat.infer.transcript import Transcript
from nanochat.kv_cache import KVCache


@dataclass(eq=False)
class Row:
    """A sample being decoded."""

    request: Request
    sample: int
    transcript: Transcript
    key: int
    """Key of the sample's random stream (`order.make_key`)."""
    position: int
    """Number of the row's tokens in the cache."""
    next_id: int = 0
    """Token to read next: the last one of the completion's ids."""
    forced: deque[int] = field(default_factory=deque)
    tool: Future[str] | None = None
    _after: dict[tuple[int, int], int] = field(default_factory=dict)
    """For each pair of tokens, where the token after its last occurrence is in `history`."""
    _indexed: int = 0
    """Number of pairs of `history` that are in `_after`."""

    @property
    def completion(self) -> Completion:
        return self.request.completions[self.sample]

    @property
    def history(self) -> list[int]:
        """All tokens of prompt and completion."""
        return self.request.prompt + self.completion.ids

    def guess(self, count: int) -> list[int]:
        """Guess `count` tokens after `next_id`, or none.

        They are what is left of a tool's output, or what followed the last two tokens where these
        occurred before, repeated if it is too short: steps then have one more shape, not `count`.
        There is no guess with a repetition penalty, as a token then changes the next one's logits.
        """
        params, room = self.request.params, self.request.max_tokens - len(self.completion.ids)
        if count == 0 or room <= count or params.repetition_penalty != 1:
            return []
        if self.forced:
            return (list(self.forced) * count)[:count]
        ids = self.history
        for i in range(self._indexed, len(ids) - 2):
            self._after[ids[i], ids[i + 1]] = i + 2
        self._indexed = len(ids) - 2
        at = self._after.get((ids[-2], ids[-1]), len(ids))
        return (ids[at : at + count] * count)[:count]


def power_of_two(number: int) -> int:
    """Round a number of at least 1 up to a power of two."""
    return 1 << (number - 1).bit_length()


class Slots:
    """The rows and their cache, which grows and shrinks with them.

    new_cache(rows, capacity) makes a cache. few_shapes: steps run over 1, 2, 4, 8 ... rows (at most
    max_slots), some of them unused, and the capacity is doubled when it is too small, up to the
    context length. GPUs want this: cuDNN searches a plan for every new shape. fixed: in addition,
    the cache always has max_slots rows, and stays when there are none. Compiled graphs need this,
    since each is made for one shape and one address.
    """

    def __init__(
        self,
        max_slots: int,
        context_length: int,
        new_cache: Callable[[int, int], KVCache],
        few_shapes: bool = False,
        fixed: bool = False,
    ):
        self.max_slots = max_slots
        self.context_length = context_length
        self.few_shapes = few_shapes or fixed
        self.fixed = fixed
        self.rows: list[Row] = []
        self.cache: KVCache | None = None
        self._new_cache = new_cache
        self._view: KVCache | None = None

    @property
    def available(self) -> int:
        """Number of rows that can be added."""
        return self.max_slots - len(self.rows)

    def add(self, rows: list[Row], prompts: KVCache, sources: list[int], waiting: int) -> None:
        """Append rows whose tokens are in rows `sources` of `prompts`.

        `waiting` is the number of samples that may need a row soon.
        """
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

    def reserve(self, waiting: int, guessed: int = 0) -> None:
        """Make the cache large enough for the rows, their next tokens and those guessed.

        The capacity follows the longest row in steps of a quarter. A cache for the longest possible
        answer would be slower: a step computes over all slots, and products over a part of them
        were measured 2-3 times slower on CPUs than over contiguous memory.
        """
        needed = max(row.position for row in self.rows) + 1 + guessed
        cache = self.cache
        count = 0 if cache is None else cache.batch_size
        capacity = 0 if cache is None else cache.capacity
        if needed > capacity and self.few_shapes:
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
            if self.few_shapes:
                count = min(self.max_slots, power_of_two(count))
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
        """Return the rows' part of the cache, with the bounds of lengths.

        It has more rows than are in use if it is fixed, or must have one of few shapes.
        """
        assert self.cache is not None
        if self._view is None:
            rows = power_of_two(len(self.rows)) if self.few_shapes else len(self.rows)
            rows = min(rows, self.cache.batch_size)
            self._view = self.cache if self.fixed else self.cache.head(rows)
        positions = [row.position for row in self.rows]
        self._view.shortest, self._view.longest = min(positions), max(positions)
        return self._view


PADDING = 1.25
"""Largest factor by which padding may lengthen prompts that are read together."""


@dataclass
class Prefill:
    """Prompts that are read together and then copied to rows."""

    requests: list[Request]
    cache: KVCache
    ids: torch.Tensor
    """Ids (B, T) of the prompts, padded on the right."""
    lengths: torch.Tensor
    samples: deque[tuple[int, int]]
    """Pairs (number of the prompt, number of the sample) that still wait for a row."""
    start: int = 0
    """Number of tokens of each prompt read so far."""
    logits: torch.Tensor | None = None
    """Logits (B, V) after the tokens read so far."""

    @property
    def done(self) -> bool:
        return self.start >= self.ids.shape[1]

    def read(self, next_logits: Callable[..., torch.Tensor], tokens: int) -> None:
        """Read one more chunk of at most `tokens` tokens; a prompt of several chunks is alone."""
        end = min(self.start + tokens // len(self.requests), self.ids.shape[1])
        counts = (self.lengths - self.start).clamp(max=end - self.start)
        self.logits = next_logits(self.ids[:, self.start : end], self.cache, counts)
        self.start = end

    def drop(self, request: Request) -> None:
        """Remove a request's samples, which need no rows any more."""
        if request in self.requests:
            which = self.requests.index(request)
            self.samples = deque(sample for sample in self.samples if sample[0] != which)


def start_prefill(
    waiting: deque[Request],
    rows: int,
    tokens: int,
    new_cache: Callable[[int, int], KVCache],
    device: torch.device,
) -> Prefill:
    """Take prompts from `waiting` that are to be read together.

    At least one prompt is taken. More are taken as long as there are rows for them, they fit into
    `tokens` tokens, and little of that is padding.
    """
    requests: list[Request] = []
    total = longest = 0
    while waiting and rows > 0:
        length = len(waiting[0].prompt)
        total += length
        padded = max(longest, length) * (len(requests) + 1)
        if requests and (padded > tokens or padded > PADDING * total):
            break
        longest = max(longest, length)
        requests.append(waiting.popleft())
        rows -= len(requests[-1].completions)
    ids = np.zeros((len(requests), longest), dtype=np.int64)
    for i, request in enumerate(requests):
        ids[i, : len(request.prompt)] = request.prompt
    samples = [(i, k) for i, r in enumerate(requests) for k in range(len(r.completions))]
    return Prefill(
        requests,
        new_cache(len(requests), longest),
        torch.from_numpy(ids).to(device),
        torch.tensor([len(request.prompt) for request in requests], device=device),
        deque(samples),
    )
