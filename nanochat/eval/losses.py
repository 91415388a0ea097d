"""Losses on held-out data: bits per byte of text, nats per token of conversations by role.

B batch, T time, V vocabulary
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch

from nanochat.data.loader import Batch
from nanochat.data.sources import Source
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import ROLE_NAMES


@torch.no_grad()
def evaluate_bpb(
    model: GPT, batches: Iterable[Batch], token_bytes: torch.Tensor, runtime: Runtime
) -> dict[str, float]:
    """Mean loss over this rank's `batches`, summed over all ranks.

    token_bytes: (V,) bytes each token stands for, 0 for special tokens.
    Returns {"bpb": bits per byte over the targets that stand for bytes, "loss": nats per target
    over all of them, "tokens": targets counted, "bytes": of the text they stand for}. Raises
    UserError where there is nothing to measure: infinite and undefined results are impossible.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64)  # nats of byte tokens, bytes, nats, targets
    for batch in batches:
        nll = model.nll(batch.inputs, batch.targets, batch.doc_ids)
        nll, targets = nll.cpu().double(), batch.targets.cpu()  # not every device has float64
        valid = targets >= 0
        size = torch.where(valid, token_bytes.cpu()[targets.clamp(min=0)], 0)
        totals += torch.stack(
            [(nll * (size > 0)).sum(), size.sum().double(), nll.sum(), valid.sum().double()]
        )
    model.train(was_training)
    nats, size_sum, all_nats, count = _summed(totals, runtime)
    if size_sum == 0 or count == 0:
        raise UserError("the evaluation saw no text: the validation split is empty")
    return {
        "bpb": nats / math.log(2) / size_sum,
        "loss": all_nats / count,
        "tokens": int(count),
        "bytes": int(size_sum),
    }


def mixture_bpb(sources: Sequence[Source], results: Sequence[Mapping[str, float]]) -> float:
    """Bits per byte of text in which the sources are mixed by their weights.

    results: of `evaluate_bpb`, one for each source.
    """
    bits = size = 0.0
    for source, result in zip(sources, results, strict=True):
        passes = float(Fraction(str(source.weight)))
        targets = passes * (source.store.num_tokens - len(source.store))
        mixed = targets * result["bytes"] / result["tokens"]  # bytes of it in an epoch
        bits, size = bits + result["bpb"] * mixed, size + mixed
    return bits / size


@torch.no_grad()
def evaluate_roles(model: GPT, batches: Iterable[Batch], runtime: Runtime) -> dict[str, float]:
    """Mean loss in nats per token of rendered conversations, over all ranks.

    The batches have roles, every token is a target, and those that the assistant must not produce
    have a weight below 1. Returns {"loss_masked": over what the assistant must produce (what
    instruction tuning minimises), "loss_<role>": over the tokens of each role that occurs}.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(len(ROLE_NAMES) + 1, 2, dtype=torch.float64)  # nats, targets
    for batch in batches:
        assert batch.roles is not None
        nll = model.nll(batch.inputs, batch.targets, batch.doc_ids).cpu().double()
        roles = batch.roles.cpu()
        chosen = [roles == role for role in range(len(ROLE_NAMES))]
        for row, where in enumerate([*chosen, (batch.weights == 1).cpu() & (roles >= 0)]):
            totals[row] += torch.stack([nll[where].sum(), where.sum().double()])
    model.train(was_training)
    names = [*ROLE_NAMES, "masked"]
    sums = _summed(totals, runtime)
    means = {n: nats / count for n, (nats, count) in zip(names, sums, strict=True) if count}
    return {f"loss_{name}": means[name] for name in ["masked", *ROLE_NAMES] if name in means}


def _summed(totals: torch.Tensor, runtime: Runtime) -> Any:
    """float64 sums over all ranks; not every device has float64."""
    device = "cpu" if runtime.device.type == "mps" else runtime.device
    return runtime.all_reduce_sum(totals.to(device)).tolist()
