"""Reading prompts: side by side, in chunks, into a cache of their own.

B prompts, T time, V vocabulary
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.completion import Request
from nanochat.kv_cache import KVCache

PADDING = 1.25
"""Prompts are read together if padding makes them at most so many times as long."""


@dataclass
class Prefill:
    """Prompts that are being read side by side, then handed out to rows."""

    requests: list[Request]
    cache: KVCache
    ids: torch.Tensor
    """(B, T), padded on the right."""
    lengths: torch.Tensor
    samples: deque[tuple[int, int]]
    """(which prompt, which sample) that still wait for a row."""
    start: int = 0
    """Tokens read so far."""
    logits: torch.Tensor | None = None
    """(B, V) after the tokens read so far."""

    @property
    def done(self) -> bool:
        return self.start >= self.ids.shape[1]

    def read(self, next_logits: Callable[..., torch.Tensor], tokens: int) -> None:
        """One more chunk of at most so many tokens; a prompt of several chunks is read alone."""
        end = min(self.start + tokens // len(self.requests), self.ids.shape[1])
        counts = (self.lengths - self.start).clamp(max=end - self.start)
        self.logits = next_logits(self.ids[:, self.start : end], self.cache, counts)
        self.start = end

    def drop(self, request: Request) -> None:
        """Its samples need no rows any more."""
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
    """Take prompts from `waiting` while there are rows for them and little of `tokens` is padding.

    At least one, however long.
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
