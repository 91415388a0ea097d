"""Losses on held-out data: bits per byte of text, nats per token by role and by position.

B batch, T time, V vocabulary
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from nanochat.data.loader import DataLoader
from nanochat.data.sources import HeldOut, Source
from nanochat.data.store import LongDocuments, TokenStore
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.plan import Phase
from nanochat.runtime import Runtime
from nanochat.tokenizer import ROLE_NAMES, Tokenizer
from nanochat.train import Batch


def held_out_batches(
    sources: Sequence[Source],
    tokens: int,
    *,
    sequence_length: int,
    batch_size: int,
    runtime: Runtime,
    with_roles: bool = False,
) -> Iterator[Batch]:
    """Yield this rank's share of the first rows of one pass over `sources`.

    Over all ranks these are `tokens // sequence_length` rows, but at least one and at most all. The
    choice of rows depends neither on `batch_size` nor on the number of ranks. Every batch has
    `batch_size` rows; empty rows (targets -1) fill up the last batch. Every rank gets the same
    number of batches.
    """
    loader = DataLoader(
        sources,
        batch_size=batch_size,
        sequence_length=sequence_length,
        rank=runtime.rank,
        world_size=runtime.world_size,
        epochs=1,
        device=runtime.device,
        with_roles=with_roles,
    )
    left = max(1, tokens // sequence_length)
    while left > 0 and not loader.finished:
        batch = next(loader)
        # Row r of a batch on rank k is row r * world_size + k of the rows of all ranks.
        mine = max(0, -(-(left - runtime.rank) // runtime.world_size))
        batch.targets[mine:], batch.weights[mine:] = -1, 0
        if batch.roles is not None:
            batch.roles[mine:] = -1
        left -= batch_size * runtime.world_size
        yield batch


@torch.no_grad()
def evaluate_bpb(
    model: GPT, batches: Iterable[Batch], token_bytes: np.ndarray | torch.Tensor, runtime: Runtime
) -> dict[str, Any]:
    """Compute bits per byte and mean loss over the batches of all ranks; every rank must call this.

    token_bytes: number of bytes that each token stands for, (V,), 0 for special tokens.

    Returns a dictionary: "bpb" is bits per byte over the targets that stand for bytes. "ci" is its
    95 % interval, or None for a single row; it covers the choice of other rows of the same text
    (the interval of a ratio of sums over rows). "loss" is nats per target over all targets.
    "tokens", "bytes" and "rows" count targets, bytes of their text, and rows with text. Raises
    UserError if there is no text, so that no result is infinite or undefined.
    """
    # Sums: nats of byte tokens, bytes, nats, targets. For the interval: rows, and sums over rows of
    # nats squared, nats times bytes, bytes squared.
    totals = torch.zeros(8, dtype=torch.float64)
    bytes_of = torch.as_tensor(token_bytes)
    for batch in batches:
        nll = model.nll(batch.inputs, batch.targets, batch.doc_ids, boundaries=batch.boundaries)
        nll, targets = nll.cpu().double(), batch.targets.cpu()  # not every device has float64
        valid = targets >= 0
        size = torch.where(valid, bytes_of[targets.clamp(min=0)], 0)
        x, y = (nll * (size > 0)).sum(1), size.sum(1).double()  # (B,)
        sums = [x.sum(), y.sum(), nll.sum(), valid.sum(), (y > 0).sum(), x @ x, x @ y, y @ y]
        totals += torch.stack([one.double() for one in sums])
    nats, size_sum, all_nats, count, rows, xx, xy, yy = summed(totals, runtime).tolist()
    if size_sum == 0 or count == 0:
        raise UserError("the evaluation saw no text: the validation split is empty")
    bpb, ratio = nats / math.log(2) / size_sum, nats / size_sum
    interval = None
    if rows > 1:
        squares = max(0.0, xx - 2 * ratio * xy + ratio * ratio * yy)  # squared deviations
        half = 1.959964 * math.sqrt(squares * rows / (rows - 1)) / size_sum / math.log(2)
        interval = [bpb - half, bpb + half]
    return {
        "bpb": bpb,
        "ci": interval,
        "loss": all_nats / count,
        "tokens": int(count),
        "bytes": int(size_sum),
        "rows": int(rows),
    }


def bits_per_byte(
    model: GPT,
    tokenizer: Tokenizer,
    store: TokenStore,
    tokens: int,
    *,
    sequence_length: int,
    batch_size: int,
    runtime: Runtime,
) -> dict[str, Any]:
    """Run `evaluate_bpb` on the first rows of an encoded split, about `tokens` tokens."""
    batches = held_out_batches(
        [Source(store)],
        tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        runtime=runtime,
    )
    return evaluate_bpb(model, batches, tokenizer.token_bytes(), runtime)


def text_loss(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    *,
    sequence_length: int,
    batch_size: int,
    runtime: Runtime,
) -> dict[str, Any]:
    """Run `evaluate_bpb` on one text; the result has the perplexity of its words too.

    Every token is a target once. Its context is `<|bos|>` and the tokens before it in its row of
    `sequence_length` tokens; rows do not overlap. "words" counts words separated by white space.
    "word_perplexity" is e to the power of the nats per word; it can be compared between tokenizers
    for texts in one language. `text` must have at least one word.
    """
    ids = torch.tensor([tokenizer.bos, *tokenizer.encode(text)])
    T = sequence_length
    num_rows = -(-(len(ids) - 1) // T)
    padded = torch.zeros(num_rows * T + 1, dtype=torch.int64)
    padded[: len(ids)] = ids
    inputs = padded[:-1].view(num_rows, T)
    targets = torch.where(torch.arange(num_rows * T) < len(ids) - 1, padded[1:], -1)
    targets = targets.view(num_rows, T)

    def batches() -> Iterator[Batch]:
        mine = range(runtime.rank, num_rows, runtime.world_size)
        for start in range(0, len(mine), batch_size):
            rows = list(mine[start : start + batch_size])
            weights = (targets[rows] >= 0).float()
            one_document = torch.zeros(len(rows), T, dtype=torch.int32)
            yield Batch(inputs[rows], targets[rows], weights, one_document).to(runtime.device)

    result = evaluate_bpb(model, batches(), tokenizer.token_bytes(), runtime)
    words = len(text.split())
    nats = result["loss"] * result["tokens"]
    return {**result, "words": words, "word_perplexity": math.exp(min(700.0, nats / words))}


def mixture_bpb(sources: Sequence[Source], results: Sequence[Mapping[str, float]]) -> float:
    """Bits per byte of a text in which the sources are mixed by their mixture weights.

    results: the result of `evaluate_bpb` for each source.
    """
    bits = size = 0.0
    for source, result in zip(sources, results, strict=True):
        passes = float(Fraction(str(source.weight)))
        targets = passes * source.store.num_targets
        mixed = targets * result["bytes"] / result["tokens"]  # bytes of the source in an epoch
        bits, size = bits + result["bpb"] * mixed, size + mixed
    return bits / size


@torch.no_grad()
def evaluate_roles(model: GPT, batches: Iterable[Batch], runtime: Runtime) -> dict[str, float]:
    """Compute the mean loss of conversations by role, in nats per token; every rank must call this.

    The batches must have roles, and every token must be a target; a loss weight below 1 marks the
    tokens that the assistant does not produce. Returns "loss_masked", over the tokens that the
    assistant must produce (the objective of instruction tuning), and "loss_<role>", over the tokens
    of each role that occurs.
    """
    totals = torch.zeros(len(ROLE_NAMES) + 1, 2, dtype=torch.float64)  # nats, targets
    for batch in batches:
        assert batch.roles is not None
        nll = model.nll(batch.inputs, batch.targets, batch.doc_ids, boundaries=batch.boundaries)
        nll = nll.cpu().double()
        roles = batch.roles.cpu()
        chosen = [roles == role for role in range(len(ROLE_NAMES))]
        for row, where in enumerate([*chosen, (batch.weights == 1).cpu() & (roles >= 0)]):
            totals[row] += torch.stack([nll[where].sum(), where.sum().double()])
    names = [*ROLE_NAMES, "masked"]
    sums = summed(totals, runtime).tolist()
    means = {n: nats / count for n, (nats, count) in zip(names, sums, strict=True) if count}
    return {f"loss_{name}": means[name] for name in ["masked", *ROLE_NAMES] if name in means}


CONVERSATION_TOKENS = 2**14
"""Largest number of held-out tokens of conversations per evaluation; one row is always used."""


def evaluate_held_out(
    model: GPT,
    tokenizer: Tokenizer,
    held_out: HeldOut,
    tokens: int,
    phase: Phase,
    runtime: Runtime,
) -> dict[str, float]:
    """Evaluate a model on the first rows of the held-out data, the same ones each time.

    Returns bits per byte of the texts, on `tokens` tokens over all texts; if there are several,
    also of each one; and losses by role of the conversations. `phase` gives the length of rows and
    their number in a batch.
    """

    def batches(sources: Sequence[Source], limit: int, with_roles: bool = False) -> Iterator[Batch]:
        return held_out_batches(
            sources,
            limit,
            sequence_length=phase.sequence_length,
            batch_size=phase.device_batch_size,
            runtime=runtime,
            with_roles=with_roles,
        )

    sizes, texts = tokenizer.token_bytes(), held_out.texts
    share = tokens // len(texts)
    results = [
        # Each corpus is read alone: a mixture weight is its part in the mixture, and all corpora
        # are measured on as many tokens.
        evaluate_bpb(model, batches([replace(source, weight=1)], share), sizes, runtime)
        for source in texts
    ]
    metrics: dict[str, float] = {"bpb": results[0]["bpb"]}
    if len(texts) > 1:
        metrics = {"bpb": mixture_bpb(texts, results)}
        for source, result in zip(texts, results, strict=True):
            name = re.sub(r"[^A-Za-z0-9.-]+", "_", source.name).strip("._")
            metrics[f"bpb_{name}"] = result["bpb"]
    if held_out.conversations:
        # Every token is a target, and a loss weight below 1 marks tokens that are not the
        # assistant's.
        sources = [replace(s, weight=1, prompt_weight=0.5) for s in held_out.conversations]
        limit = min(tokens, CONVERSATION_TOKENS)
        metrics |= evaluate_roles(model, batches(sources, limit, with_roles=True), runtime)
    return metrics


@torch.no_grad()
def losses_by_position(
    model: GPT, store: TokenStore, T: int, eval_tokens: int, batch_size: int, runtime: Runtime
) -> dict[str, Any]:
    """Measure the loss by position in the row, and the gain from context beyond the last W tokens.

    The rows are T + 1 consecutive tokens of documents that are long enough. W is 512, or a quarter
    of T if that is less. The gain is measured on targets with at least 2 W tokens before them: it
    is their loss with the last W tokens only, minus their loss with all tokens. (S = W/8 targets
    are computed together, so the short context has up to W + W/8 tokens.) Losses are in nats.
    Raises UserError if no document is long enough.
    """
    W = min(512, T // 4)
    S = max(1, W // 8)
    starts = range(2 * W, T + 2 - S, S) if W else range(0)
    buckets = max(1, math.ceil(math.log2(T)))
    by_position = torch.zeros(buckets, 2, dtype=torch.float64)  # nats, targets
    with_all, with_last = (torch.zeros(2, dtype=torch.float64) for _ in range(2))
    rows = list(long_rows(store, T, max(1, eval_tokens // T)))
    position = torch.arange(1, T + 1)
    bucket = (position.log2().floor().long()).clamp(max=buckets - 1)
    for chosen in rows[runtime.rank :: runtime.world_size]:
        row = torch.from_numpy(chosen).to(runtime.device)  # (T + 1,)
        nll = model.nll(row[None, :-1], row[None, 1:])[0].cpu().double()
        by_position[:, 0].index_add_(0, bucket, nll)
        by_position[:, 1].index_add_(0, bucket, torch.ones(T, dtype=torch.float64))
        # A short row gives the first of its last S targets W tokens of context.
        short = [row[start - W : start + S] for start in starts]
        for at in range(0, len(short), per_batch := max(1, batch_size * T // (W + S))):
            part = torch.stack(short[at : at + per_batch])  # (B, W + S)
            losses = model.nll(part[:, :-1], part[:, 1:])[:, -S:].cpu().double()
            with_last += torch.stack([losses.sum(), torch.tensor(losses.numel())])
        for start in starts:
            with_all += torch.stack([nll[start - 1 : start + S - 1].sum(), torch.tensor(S)])
    by_position, with_all, with_last = (
        summed(totals, runtime) for totals in (by_position, with_all, with_last)
    )
    losses_of = (by_position[:, 0] / by_position[:, 1]).tolist()
    result: dict[str, Any] = {
        "rows": len(rows),
        "loss_by_position": [
            {"from": 2**i, "to": min(2 ** (i + 1) - 1, T) if i < buckets - 1 else T, "loss": loss}
            for i, loss in enumerate(losses_of)
        ],
    }
    if starts:
        loss_all, loss_last = (float(x[0] / x[1]) for x in (with_all, with_last))
        result["context_gain"] = {
            "last_tokens": W,
            "targets": int(with_all[1]),
            "loss_all": loss_all,
            "loss_last": loss_last,
            "gain": loss_last - loss_all,
        }
    return result


def long_rows(store: TokenStore, T: int, limit: int) -> Iterator[np.ndarray]:
    """Yield up to `limit` rows (T + 1,) int64 of consecutive tokens; rows do not overlap."""
    documents = LongDocuments(store, T + 1)
    if not len(documents):
        raise UserError(
            f"no document in {store.folder} has {T + 1} tokens, the longest has "
            f"{documents.longest}; measure up to that with --context-length, or take another "
            "--corpus or --split"
        )
    count = 0
    for document in range(len(documents)):
        ids = documents.ids(document)
        for start in range(0, len(ids) - T, T + 1):
            if count == limit:
                return
            count += 1
            yield ids[start : start + T + 1].astype(np.int64)


def summed(totals: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """Sum float64 totals over all ranks; returns them on the CPU.

    float32 would lose counts, and MPS has no float64.
    """
    device = "cpu" if runtime.device.type == "mps" else runtime.device
    return runtime.all_reduce_sum(totals.to(device)).cpu()
