"""Loss by position in long documents."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nanochat.data.store import LongDocuments, TokenStore
from nanochat.errors import UserError
from nanochat.eval.losses import summed
from nanochat.gpt import GPT
from nanochat.runtime import Runtime


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
