"""Cross entropy of softcapped logits of a linear head, chunk by chunk.

N tokens, C channels, V vocabulary, V' its padded rows

A logit z is capped to softcap * tanh(z / softcap). With s = sigmoid(2 z / softcap), which costs
half as much as tanh, this is softcap (2 s - 1), and the derivative is 4 s (1 - s). The factor
2 / softcap is multiplied into the head's cast weight. Factors that belong to a token are applied to
its hidden state, which is shorter than its row of logits. Capped logits are so small that no
maximum has to be subtracted before their exponentials.

The matrix multiplication is fastest on chunks of many tokens. The operations after it are fastest
on data that stay in the cache, so a chunk's logits become their gradient block by block.

Both losses are operators of their own (`torch.library`), and `torch.compile` does not look inside
them. If it saw the loop over chunks, it would move all products to the front and keep the logits of
all chunks at once.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**28}
"""Logits of a chunk (tokens x vocabulary), in the compute dtype: 512 MiB on a GPU. The head's
float32 gradient is read and written once per chunk, so fewer chunks are faster."""
LOGITS_PER_BLOCK = {"cpu": 2**20, "cuda": 2**25}
"""Logits of a block, in float32, in up to four copies: 16 MiB on a CPU, 512 MiB on a GPU."""
LEAST_TOKENS, LEAST_BLOCK = 64, 16
MAX_EXPONENT = 60.0
"""Limit of 2 softcap / temperature: the sum of 2^24 exponentials of it still fits in float32."""


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Number of tokens in a chunk."""
    logits = LOGITS_PER_CHUNK.get(device_type, LOGITS_PER_CHUNK["cuda"])
    return max(LEAST_TOKENS, logits // vocab_size)


def block_tokens(vocab_size: int, device_type: str) -> int:
    """Number of tokens in a block, at most that of a chunk."""
    logits = LOGITS_PER_BLOCK.get(device_type, LOGITS_PER_BLOCK["cuda"])
    return min(chunk_tokens(vocab_size, device_type), max(LEAST_BLOCK, logits // vocab_size))


def _spans(start: int, end: int, size: int) -> Iterator[slice]:
    for first in range(start, end, size):
        yield slice(first, min(first + size, end))


def _capped(
    hidden: torch.Tensor, weight: torch.Tensor, softcap: float, vocab_size: int
) -> torch.Tensor:
    """The head's weight (V, C) in hidden's dtype, times 2 / softcap."""
    return (weight[:vocab_size] * (2 / softcap)).to(hidden.dtype)


def _gradient(probabilities: torch.Tensor, s: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute (p - one-hot) s (1 - s) in the memory of p. p and s are (t, V), targets (t, 1)."""
    minus_one = s.new_full((1, 1), -1.0).expand_as(targets)
    probabilities.scatter_add_(1, targets, minus_one)
    return torch.ops.aten.sigmoid_backward(probabilities, s)


@torch.library.custom_op("nanochat::token_losses", mutates_args=())
def softcapped_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    vocab_size: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Compute each token's loss (N,) float32 in nats; targets of -1 are ignored and give 0.

    hidden is (N, C), weight (V', C) with V' >= V rows, targets (N,). The result equals
    F.cross_entropy(softcap * tanh(hidden @ weight.T / softcap) / temperature, targets), which the
    tests compare with. The backward pass computes each chunk's logits again, so that (N, V) logits
    never exist at once.
    """
    height = softcap / temperature  # the bound of the capped logits divided by the temperature
    cast = _capped(hidden, weight, softcap, vocab_size)
    kind = hidden.device.type
    losses = []
    for rows in _spans(0, len(hidden), chunk_tokens(vocab_size, kind)):
        logits = F.linear(hidden[rows], cast)
        for part in _spans(0, len(logits), block_tokens(vocab_size, kind)):
            s = logits[part].float().sigmoid_()
            target = targets[rows][part]
            chosen = s.gather(1, target.clamp(min=0)[:, None])[:, 0]
            # log sum exp(2 height s), larger than that of the tempered logits by the height
            normalizer = s.mul_(2 * height).exp_().sum(dim=-1).log_()
            losses.append(torch.where(target >= 0, normalizer - 2 * height * chosen, 0.0))
    return torch.cat(losses)


@torch.library.custom_op("nanochat::summed_loss", mutates_args=())
def summed_softcapped_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    softcap: float,
    vocab_size: int,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of weights * softcapped_losses, a float32 scalar, and its gradients.

    weights is (N,); the other arguments are those of `softcapped_losses`. The gradients are those
    of hidden (N, C) and weight (V', C). As the forward pass computes them, a quarter of the head's
    arithmetic and half of the exponentials are saved. In return, the head's gradient is kept until
    the backward pass.
    """
    height = softcap / temperature
    cast = _capped(hidden, weight, softcap, vocab_size)
    kind = hidden.device.type
    weights = torch.where(targets >= 0, weights.float(), 0.0)[:, None]
    scale = 2 * height * weights
    scaled = (hidden * (scale * (2 / softcap))).to(hidden.dtype)
    index = targets.clamp(min=0)[:, None]
    chosen, grad_hidden = [], []
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    for rows in _spans(0, len(hidden), chunk_tokens(vocab_size, kind)):
        logits = F.linear(hidden[rows], cast)
        for part in _spans(0, len(logits), block_tokens(vocab_size, kind)):
            target = index[rows][part]
            s = logits[part].float().sigmoid_()
            p = torch.softmax(s * (2 * height), dim=-1)
            chosen.append(p.gather(1, target))
            logits[part] = _gradient(p, s, target)
        grad_hidden.append(((logits @ cast) * scale[rows]).to(hidden.dtype))
        grad_weight[:vocab_size] += logits.t() @ scaled[rows]
    total = -(weights * torch.cat(chosen).log()).sum()
    return total, torch.cat(grad_hidden), grad_weight


# Shapes of the operators' results for tracing, and their derivatives


@softcapped_losses.register_fake
def _(hidden: torch.Tensor, *rest: object) -> torch.Tensor:
    return hidden.new_empty(len(hidden), dtype=torch.float32)


@summed_softcapped_loss.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = hidden.new_empty((), dtype=torch.float32)
    return total, torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)


def _keep_for_token_losses(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.softcap, ctx.vocab_size, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _derive_token_losses(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the sum of the losses, weighted by their gradients."""
    numbers = ctx.softcap, ctx.vocab_size, ctx.temperature
    _, grad_hidden, grad_weight = summed_softcapped_loss(*ctx.saved_tensors, grad_output, *numbers)
    return grad_hidden, grad_weight.to(ctx.saved_tensors[1].dtype), *(None,) * 4


def _keep_for_summed_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _derive_summed_loss(
    ctx: Any, grad_output: torch.Tensor | None, *rest: None
) -> tuple[torch.Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 7
    grad_hidden, grad_weight = ctx.saved_tensors
    return grad_hidden * grad_output, grad_weight * grad_output, *(None,) * 5


softcapped_losses.register_autograd(_derive_token_losses, setup_context=_keep_for_token_losses)
summed_softcapped_loss.register_autograd(_derive_summed_loss, setup_context=_keep_for_summed_loss)
