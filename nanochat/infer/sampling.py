"""Sampling: chooses the next token of every row, with a random stream per sample.

B rows, V vocabulary, K candidates
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.data.order import GOLDEN, scramble
from nanochat.errors import UserError

CANDIDATES, SPARE_CANDIDATES = 250, 14
"""Number of tokens, on a CPU, in which the limit of top_p is searched first; and of tokens beyond
top_k, which may be as likely as the last one."""


@dataclass(frozen=True)
class SamplingParams:
    """Settings of sampling, applied in the order of the fields; UserError if out of range."""

    repetition_penalty: float = 1.0
    """Divisor of the logits of tokens that prompt or completion contain; negative logits are
    multiplied by it (CTRL, arXiv 1909.05858). 1 changes nothing."""
    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most likely token and ignores the three limits below."""
    top_k: int = 0
    """Keep the k most likely tokens, and those as likely as the k-th; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens that together reach this probability (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Keep tokens whose probability is at least this fraction of the highest one (arXiv
    2407.01082)."""
    max_tokens: int = 256
    """Tokens of the longest completion; the end of the context may stop it earlier."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end the text; it stops before the first one that occurs."""
    top_logprobs: int = 0
    """Number of most likely tokens to report at each position."""

    def __post_init__(self) -> None:
        limits = (
            (0 <= self.temperature < math.inf, "temperature", "at least 0"),
            (self.top_k >= 0, "top_k", "at least 0 (0 keeps all)"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (1 keeps all)"),
            (0 <= self.min_p <= 1, "min_p", "between 0 (keeps all) and 1"),
            (0 < self.repetition_penalty < math.inf, "repetition_penalty", "above 0 (1 is none)"),
            (self.max_tokens >= 1, "max_tokens", "at least 1"),
            (self.top_logprobs >= 0, "top_logprobs", "at least 0"),
        )
        for holds, name, limit in limits:
            if not holds:
                raise UserError(f"{name} {getattr(self, name)} must be {limit}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise UserError(f"stop {self.stop!r} must be a tuple of non-empty strings")


def uniforms(keys: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Draw one float32 in [0, 1) per stream (uint64 keys) and step, without any state.

    A number has 24 random bits, so that u * total < total in float32 for every total.
    """
    bits = scramble(keys + (steps.astype(np.uint64) + 1) * GOLDEN) >> 40
    return bits.astype(np.float32) * np.float32(2**-24)


class Sampler:
    """Draws a token for each of a fixed list of rows, all at once.

    A row's limits become one threshold on its logits, so equal logits are all kept or all dropped.
    The token is found by inverting the cumulative distribution in the order of the vocabulary. A
    row's token therefore does not depend on the limits of other rows.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        keys: Sequence[int],
        vocab_size: int,
        device: torch.device,
        history: Callable[[int], Sequence[int]] = lambda row: (),
    ):
        """Prepare the limits of each row.

        keys: `order.make_key` of each row. history(row): ids of its prompt and completion so far.
        """
        self.device, self.vocab_size = device, vocab_size
        self.keys = np.array(keys, dtype=np.uint64)
        greedy = [p.temperature == 0 for p in params]
        self.all_greedy = all(greedy)
        self.greedy = self._column(greedy) if any(greedy) else None

        def column(values: list[float], neutral: float) -> torch.Tensor | None:
            """Make a column (B, 1) of the rows' values, or None if all are neutral."""
            values = [neutral if g else v for v, g in zip(values, greedy, strict=True)]
            return None if all(v == neutral for v in values) else self._column(values)

        self.temperature = column([p.temperature for p in params], 1.0)
        self.top_p = column([p.top_p for p in params], 1.0)
        self.min_p = column(
            [math.log(p.min_p) if p.min_p else -math.inf for p in params], -math.inf
        )
        top_k = [
            vocab_size if g or not p.top_k else min(p.top_k, vocab_size)
            for p, g in zip(params, greedy, strict=True)
        ]
        self.top_k = None if min(top_k) == vocab_size else self._column(top_k)
        sampled = [(p, k) for p, k in zip(params, top_k, strict=True) if p.temperature > 0]
        limits = [k for k in top_k if k < vocab_size]
        without_k = any(p.top_p < 1 and k == vocab_size for p, k in sampled)
        # Number of the largest logits needed to find the thresholds; all, if top_p needs all.
        self.num_sorted = vocab_size if without_k else max(limits, default=0)
        # On a CPU, passes over the vocabulary take longer than the products of a small model. If
        # every row has a limit, only a few candidates are looked at.
        self.num_candidates = 0
        if device.type == "cpu" and not any(greedy):
            limited = all(k < vocab_size or p.top_p < 1 for p, k in sampled)
            few = max(CANDIDATES if k == vocab_size else k for _, k in sampled)
            if limited and few + SPARE_CANDIDATES < vocab_size:
                self.num_candidates = few + SPARE_CANDIDATES
        self.top_logprobs = max(p.top_logprobs for p in params)
        self.penalty = self.seen = None
        if any(p.repetition_penalty != 1 for p in params):
            self.penalty = self._column([p.repetition_penalty for p in params])
            self.seen = torch.zeros(len(params), vocab_size, dtype=torch.bool, device=device)
            for i in range(len(params)):
                ids = torch.tensor(list(history(i)), dtype=torch.int64, device=device)
                self.seen[i, ids] = True

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=self.device)[:, None]

    def see(self, tokens: list[int]) -> None:
        """Record the rows' next tokens for the repetition penalty."""
        if self.seen is not None:
            self.seen.scatter_(1, self._column(tokens), True)

    def draw(
        self, logits: torch.Tensor, steps: list[int]
    ) -> tuple[list[int], list[float], list[list[tuple[int, float]]]]:
        """Draw a token per row; returns tokens, log-probabilities, and the most likely tokens.

        logits is (B, V) float32, steps the B positions in the random streams. A sampler of a single
        row also draws several of its tokens at once, from logits (T, V) at T positions. The most
        likely tokens are (id, log-probability) pairs; the lists are empty if no row asks for them.
        """
        x = logits
        if self.seen is not None and self.penalty is not None:
            x = torch.where(self.seen, torch.where(x > 0, x / self.penalty, x * self.penalty), x)
        if self.temperature is not None:
            x = x / self.temperature
        ids: torch.Tensor | None = None
        if not self.all_greedy:
            x, ids = self._limited(x)
        p = x.softmax(dim=-1)
        if self.all_greedy:
            chosen = _argmax(x)
        else:
            cumulative = p.cumsum(dim=-1)
            u = torch.from_numpy(uniforms(self.keys, np.array(steps))).to(self.device)
            target = u[:, None] * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, target, right=True)
            chosen = chosen.clamp_(max=x.shape[1] - 1)
            if self.greedy is not None:
                chosen = torch.where(self.greedy, _argmax(x), chosen)
        tokens = chosen if ids is None else ids.gather(1, chosen)
        # One transfer to the host per step, and so one wait for the device.
        columns = [tokens, p.gather(1, chosen).log()]
        if self.top_logprobs:
            best = p.topk(min(self.top_logprobs, p.shape[1]), dim=-1)
            columns += [best.indices if ids is None else ids.gather(1, best.indices)]
            columns += [best.values.log()]
        packed = torch.cat(
            [c.view(torch.int32) if c.is_floating_point() else c.int() for c in columns], dim=1
        )
        host = packed.cpu().numpy()
        n = (host.shape[1] - 2) // 2
        floats = host.view(np.float32)
        top = [
            list(zip(host[i, 2 : 2 + n].tolist(), floats[i, 2 + n :].tolist(), strict=True))
            for i in range(len(host))
        ]
        return host[:, 0].tolist(), floats[:, 1].tolist(), top

    def _limited(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply the limits to scaled logits x (B, V); tokens beyond a row's limits get -inf.

        Returns all logits (B, V) and None; or, if N candidates are all that any row keeps, those
        (B, N) and their ids, in the order of the vocabulary.
        """
        if self.num_candidates:
            largest, ids = x.topk(self.num_candidates, dim=-1)
            threshold = self._threshold(x, largest)
            assert threshold is not None
            if bool((largest[:, -1:] < threshold).all()):
                ids, order = ids.sort(dim=-1)
                values = largest.gather(1, order)
                return values.masked_fill(values < threshold, -math.inf), ids
        largest = x.topk(self.num_sorted, dim=-1).values if self.num_sorted else x[:, :0]
        threshold = self._threshold(x, largest)
        if threshold is not None:
            x = x.masked_fill(x < threshold, -math.inf)
        return x, None

    def _threshold(self, x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor | None:
        """Find the smallest scaled logit that each row keeps, (B, 1); None if all rows keep all.

        largest (B, K) are the largest logits of each row in falling order. If K is too small to
        find a threshold, the result is the last of them or less.
        """
        K = largest.shape[1]
        threshold = None
        if self.top_k is not None or self.top_p is not None:
            last = torch.full_like(largest[:, :1], K - 1, dtype=torch.int64)
            if self.top_k is not None:
                last = torch.minimum(last, self.top_k - 1)
            if self.top_p is not None:
                kept = largest.masked_fill(torch.arange(K, device=x.device) > last, -math.inf)
                total = kept.logsumexp(dim=-1, keepdim=True)
                if self.vocab_size > K:
                    whole = x.logsumexp(dim=-1, keepdim=True)
                    has_k = False if self.top_k is None else self.top_k < self.vocab_size
                    total = torch.where(torch.as_tensor(has_k, device=x.device), total, whole)
                p = (kept - total).exp()
                # A token is kept if the tokens before it have less than top_p together; the first
                # one always is.
                count = (p.cumsum(dim=-1) - p < self.top_p).sum(dim=-1, keepdim=True)
                last = torch.minimum(last, (count - 1).clamp_(min=0))
            threshold = largest.gather(1, last)
            # Rows without a limit keep all tokens, also those outside of `largest`.
            free = torch.ones_like(threshold, dtype=torch.bool)
            if self.top_k is not None:
                free &= self.top_k == self.vocab_size
            if self.top_p is not None:
                free &= self.top_p == 1
            threshold = threshold.masked_fill(free, -math.inf)
        if self.min_p is not None:
            floor = x.amax(dim=-1, keepdim=True) + self.min_p
            threshold = floor if threshold is None else torch.maximum(threshold, floor)
        return threshold


def _argmax(x: torch.Tensor) -> torch.Tensor:
    """Index of the largest value of each row, (B, V) -> (B, 1); numpy is 10 times faster on CPU."""
    if x.device.type == "cpu":
        return torch.from_numpy(x.numpy().argmax(axis=-1))[:, None]
    return x.argmax(dim=-1, keepdim=True)
