"""Log-probabilities of options after a prompt, for multiple-choice evaluations.

B batch, T time, S cache slots, C channels, V vocabulary; P prompt length, L option length
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from nanochat.gpt import GPT

Ids = Sequence[int]

# Limits of one forward pass, whatever the number of problems.
BATCH_SLOTS = 2**15
"""Largest number of tokens (and cached slots), padding included."""
BATCH_PAIRS = 2**24
"""Largest number of query-key pairs of a cached prompt: 128 MiB of 8-byte distances for masks."""
BATCH_LOGITS = 2**26
"""Largest number of logits: 256 MiB in float32."""


class Scored(NamedTuple):
    """Score of an option as the continuation of its prompt."""

    logprob: float
    """Log-probability in nats, summed over the option's tokens."""
    num_tokens: int
    greedy: bool
    """True if every token was the most likely one, given the tokens before it."""


class Scorer(Protocol):
    """Interface of objects that score continuations."""

    context_length: int
    """Tokens that the model can read at once; prompt and option together may be one longer."""

    def score(self, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]) -> list[list[Scored]]:
        """Score each prompt's options; prompts and options must have at least one token."""
        ...


class GPTScorer:
    """Scores options with a GPT, which reads the prompt once for all of them.

    Each problem is scored in the cheapest of three ways:
    - If every option is one token, one pass over the prompt gives their logits.
    - A single option takes one pass over prompt and option.
    - Otherwise the prompt is read into a KV cache, which is copied for each option's tokens.
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
        """Score one option of any length, or several of one token, without a cache."""
        rows = [
            [*prompt, *(choices[0][:-1] if len(choices) == 1 else ())]
            for prompt, choices in zip(prompts, options, strict=True)
        ]
        ids = pad(rows, self.model.device)  # (B, T)
        hidden = self.model.hidden(ids, self.model.make_layout(None, (len(ids), ids.shape[1])))
        # The head runs only at the positions that are scored.
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
        """Score several options of several tokens; the prompt's cache is copied for each."""
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

        longer = [n for n, choice in enumerate(flat) if len(choice) > 1]  # N options
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
    """Scores options with any causal model, with a full forward pass for each option.

    forward: ids (B, T) int64 -> logits (B, T, V). Rows are padded on the right with id 0, which
    must not change the logits before it.
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
    """Make a tensor (B, longest) int64 of rows of ids, padded with 0 on the right."""
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
    return ids.to(device)


def _pick(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of targets (...) under logits (..., V), and whether each is the largest."""
    picked = logits.gather(-1, targets[..., None])[..., 0]
    return (picked - logits.logsumexp(-1)).cpu(), (logits.argmax(-1) == targets).cpu()


def _gather(
    options: Sequence[Sequence[Ids]], logprobs: Sequence[float], greedy: Sequence[bool]
) -> list[list[Scored]]:
    """Sum per-token results, given in the order of the options' tokens, for each option."""
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
    """Split indices into batches of similar width for which fits(batch, largest width) is true.

    An index that does not fit even alone gets a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(indices, key=lambda i: (-widths[i], i)):
        if batches and fits([*batches[-1], i], widths[batches[-1][0]]):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def length_blocks(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Group indices into blocks of `size`, longest first.

    Padding is then small, and memory use is highest at the start. Ranks take whole blocks, so that
    a block's results do not depend on the number of ranks.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def crop(
    prompt: Ids, options: Sequence[Ids], context_length: int
) -> tuple[Ids, Sequence[Ids], bool]:
    """Cut the beginning of a prompt that does not fit the context with its longest option.

    All options keep the same prompt. An option that is longer than the context keeps its end. The
    last value is True if anything was cut.
    """
    # The last token of an option is predicted and never read.
    room = context_length + 1 - max(len(option) for option in options)
    if room >= len(prompt):
        return prompt, options, False
    if room >= 1:
        return prompt[len(prompt) - room :], options, True
    return prompt[-1:], [option[-context_length:] for option in options], True
