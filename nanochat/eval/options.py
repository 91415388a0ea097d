"""What evaluations share: option likelihoods, confidence intervals, and where results are kept.

B batch, T time, S cache slots, C channels, V vocabulary; P prompt length, L option length
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from nanochat.gpt import GPT

Ids = Sequence[int]

# What one forward pass may hold, whatever the number of problems handed over at once.
BATCH_SLOTS = 2**15
"""Tokens (and cached slots), padding included."""
BATCH_PAIRS = 2**24
"""Query-key pairs of a cached prompt: its masks are built from 8-byte distances, so 128 MiB."""
BATCH_LOGITS = 2**26
"""Logits: 256 MiB in float32."""


class Scored(NamedTuple):
    """An option as the continuation of its prompt."""

    logprob: float
    """Nats, summed over the option's tokens."""
    num_tokens: int
    greedy: bool
    """Whether every token was the most likely one, given the tokens before it."""


class Scorer(Protocol):
    """Anything that can tell how likely continuations are."""

    context_length: int
    """Tokens the model can read at once; a prompt and its option may be one token longer."""

    def score(self, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]) -> list[list[Scored]]:
        """Each prompt's options scored; prompts and options have at least one token."""
        ...


class GPTScorer:
    """Scores options with the prompt read once and its keys and values shared among them.

    Three cases, the cheapest that is enough for each problem:
    - every option is one token: one pass over the prompt, then a look at the logits after it;
    - one option: one pass over prompt and option;
    - otherwise the prompt goes into a KV cache, which is copied for each option's tokens.
    """

    def __init__(self, model: GPT):
        self.model = model
        self.context_length = model.config.context_length

    @torch.inference_mode()
    def score(self, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]) -> list[list[Scored]]:
        results: list[list[Scored]] = [[] for _ in prompts]
        read_once: list[int] = []
        shared: list[int] = []
        for i, choices in enumerate(options):
            many_tokens = max(len(choice) for choice in choices) > 1
            (shared if many_tokens and len(choices) > 1 else read_once).append(i)
        longest = [max(len(choice) for choice in choices) for choices in options]
        widths = [len(prompt) + longest[i] for i, prompt in enumerate(prompts)]
        widest_option = max((longest[i] for i in shared), default=1)

        def fits_once(problems: Sequence[int], width: int) -> bool:
            return len(problems) * width <= BATCH_SLOTS

        def fits_shared(problems: Sequence[int], width: int) -> bool:
            rows = sum(len(options[i]) for i in problems)
            return (
                rows * width <= BATCH_SLOTS
                and len(problems) * width * width <= BATCH_PAIRS
                and rows * widest_option * self.model.config.vocab_size <= BATCH_LOGITS
            )

        for indices, fits, read in (
            (read_once, fits_once, self._read_once),
            (shared, fits_shared, self._shared),
        ):
            for batch in _batches(indices, widths, fits):
                scored = read([prompts[i] for i in batch], [options[i] for i in batch])
                for i, result in zip(batch, scored, strict=True):
                    results[i] = result
        return results

    def _read_once(
        self, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]
    ) -> list[list[Scored]]:
        """One option of any length, or several of one token: no cache is needed."""
        rows = [
            [*prompt, *(choices[0][:-1] if len(choices) == 1 else ())]
            for prompt, choices in zip(prompts, options, strict=True)
        ]
        ids = pad(rows, self.model.device)  # (B, T)
        hidden = self.model.hidden(ids, self.model.make_layout(None, (len(ids), ids.shape[1])))
        # Only the positions that are scored go through the head.
        row_of, position_of, targets = [], [], []
        for b, (prompt, choices) in enumerate(zip(prompts, options, strict=True)):
            for choice in choices:
                for offset, token in enumerate(choice):
                    row_of.append(b)
                    position_of.append(len(prompt) - 1 + offset)
                    targets.append(token)
        at = hidden[torch.tensor(row_of), torch.tensor(position_of)]  # (N, C)
        logprobs, greedy = [], []
        chunk = max(1, BATCH_LOGITS // self.model.config.vocab_size)
        for start in range(0, len(targets), chunk):
            wanted = torch.tensor(targets[start : start + chunk], device=at.device)
            picked, best = _pick(self.model.logits(at[start : start + chunk]), wanted)
            logprobs += picked.tolist()
            greedy += best.tolist()
        return _gather(options, logprobs, greedy)

    def _shared(
        self, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]
    ) -> list[list[Scored]]:
        """Several options, some of several tokens: the prompt's cache is copied for each."""
        model, device = self.model, self.model.device
        flat = [choice for choices in options for choice in choices]
        owner = [b for b, choices in enumerate(options) for _ in choices]
        longest = max(len(prompt) for prompt in prompts)
        cache = model.new_cache(len(prompts), longest)
        counts = torch.tensor([len(prompt) for prompt in prompts], device=device)
        after_prompt = model.next_logits(pad(prompts, device), cache, counts)  # (B, V)
        first = torch.tensor([choice[0] for choice in flat], device=device)
        picked, best = _pick(after_prompt[torch.tensor(owner, device=device)], first)
        logprobs = [[value] for value in picked.tolist()]
        greedy = [[value] for value in best.tolist()]

        longer = [n for n, choice in enumerate(flat) if len(choice) > 1]  # N of them
        capacity = max(len(prompts[owner[n]]) + len(flat[n]) - 1 for n in longer)
        copies = model.new_cache(len(longer), max(capacity, longest))
        copies.copy_rows(cache, [owner[n] for n in longer], list(range(len(longer))), longest)
        del cache
        counts = torch.tensor([len(flat[n]) - 1 for n in longer], device=device)
        logits = model(pad([flat[n][:-1] for n in longer], device), cache=copies, counts=counts)
        targets = pad([flat[n][1:] for n in longer], device)  # (N, L-1)
        picked, best = _pick(logits, targets)
        for n, values, hits, count in zip(
            longer, picked.tolist(), best.tolist(), counts.tolist(), strict=True
        ):
            logprobs[n] += values[:count]
            greedy[n] += hits[:count]
        return _gather(
            options,
            [value for values in logprobs for value in values],
            [hit for hits in greedy for hit in hits],
        )


class LogitsScorer:
    """Scores options one by one with a full forward pass: any causal model, nothing shared.

    forward: ids (B, T) int64 -> logits (B, T, V); right-padding with id 0 must be harmless.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        context_length: int,
        vocab_size: int,
        device: torch.device | None = None,
    ):
        self.forward = forward
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.device = device or torch.device("cpu")

    @torch.inference_mode()
    def score(self, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]) -> list[list[Scored]]:
        pairs = [(b, n) for b, choices in enumerate(options) for n in range(len(choices))]
        widths = [len(prompts[b]) + len(options[b][n]) - 1 for b, n in pairs]
        results = [[Scored(0.0, 0, False)] * len(choices) for choices in options]

        def fits(problems: Sequence[int], width: int) -> bool:
            slots = len(problems) * width
            return slots <= BATCH_SLOTS and slots * self.vocab_size <= BATCH_LOGITS

        for batch in _batches(range(len(pairs)), widths, fits):
            rows, targets = [], []
            for b, n in (pairs[i] for i in batch):
                row = [*prompts[b], *options[b][n]]
                rows.append(row[:-1])
                targets.append(row[1:])
            logits = self.forward(pad(rows, self.device)).float()
            picked, best = _pick(logits, pad(targets, self.device))
            for k, (b, n) in enumerate(pairs[i] for i in batch):
                scored = slice(len(prompts[b]) - 1, len(targets[k]))
                results[b][n] = Scored(
                    math.fsum(picked[k, scored].tolist()),
                    len(options[b][n]),
                    all(best[k, scored].tolist()),
                )
        return results


def pad(rows: Sequence[Ids], device: torch.device) -> torch.Tensor:
    """Rows of ids -> (B, longest) int64, filled up with 0 on the right."""
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
    return ids.to(device)


def _pick(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (..., V), targets (...) -> log-probabilities, and whether each is the largest."""
    picked = logits.gather(-1, targets[..., None])[..., 0]
    return (picked - logits.logsumexp(-1)).cpu(), (logits.argmax(-1) == targets).cpu()


def _gather(
    options: Sequence[Sequence[Ids]], logprobs: Sequence[float], greedy: Sequence[bool]
) -> list[list[Scored]]:
    """Per-token results in the order of the options' tokens -> per option."""
    results, position = [], 0
    for choices in options:
        scored = []
        for choice in choices:
            part = slice(position, position + len(choice))
            scored.append(Scored(math.fsum(logprobs[part]), len(choice), all(greedy[part])))
            position += len(choice)
        results.append(scored)
    return results


def _batches(
    indices: Sequence[int], widths: Sequence[int], fits: Callable[[Sequence[int], int], bool]
) -> list[list[int]]:
    """Split indices into batches of similar width, each such that fits(batch, its largest width).

    What fits nowhere goes alone.
    """
    batches: list[list[int]] = []
    for i in sorted(indices, key=lambda i: (-widths[i], i)):
        if batches and fits([*batches[-1], i], widths[batches[-1][0]]):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def length_blocks(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in blocks of `size`, longest first: padding is small, memory peaks at the start.

    Ranks take whole blocks, so what is computed together does not depend on their number.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def crop(
    prompt: Ids, options: Sequence[Ids], context_length: int
) -> tuple[Ids, Sequence[Ids], bool]:
    """Cut the beginning of a prompt that does not fit the context with its longest option.

    All options keep the same context. An option that fills the context alone keeps its end. The
    last value says whether anything was cut.
    """
    # The last token of an option is predicted, never read.
    room = context_length + 1 - max(len(option) for option in options)
    if room >= len(prompt):
        return prompt, options, False
    if room >= 1:
        return prompt[len(prompt) - room :], options, True
    return prompt[-1:], [option[-context_length:] for option in options], True
