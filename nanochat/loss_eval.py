"""Bits per byte: a loss that does not depend on the tokenizer.

B batch, T time, V vocabulary
"""

import math
from collections.abc import Iterable

import torch

from nanochat.dataloader import Batch
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.runtime import Runtime


@torch.no_grad()
def evaluate_bpb(
    model: GPT, batches: Iterable[Batch], token_bytes: torch.Tensor, runtime: Runtime
) -> dict[str, float]:
    """Mean loss over this rank's `batches`, summed over all ranks.

    token_bytes: (V,) bytes each token stands for, 0 for special tokens.
    Returns {"bpb": bits per byte over the targets that stand for bytes, "loss": nats per target
    over all of them, "tokens": targets counted}. Raises UserError where there is nothing to
    measure: infinite and undefined results are impossible.
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
    totals = runtime.all_reduce_sum(totals.to(runtime.device if _has_float64(runtime) else "cpu"))
    nats, size_sum, all_nats, count = totals.tolist()
    if size_sum == 0 or count == 0:
        raise UserError("the evaluation saw no text: the validation split is empty")
    return {
        "bpb": nats / math.log(2) / size_sum,
        "loss": all_nats / count,
        "tokens": int(count),
    }


def _has_float64(runtime: Runtime) -> bool:
    return runtime.device.type != "mps"
