"""Cross entropy of softcapped logits of a linear head, chunk by chunk.

N tokens, C channels, V vocabulary, V' its padded rows

With s = sigmoid(2 z / softcap), which costs half of tanh, the capped logit of z is
softcap (2 s - 1) and its derivative 4 s (1 - s). The factor 2 / softcap goes into the head's cast
weight, other factors of a row are applied where rows are short: to the hidden states. Capped logits
are so small that their exponentials need no maximum subtracted.

A matrix multiplication likes chunks of many tokens, what follows it likes data that stay in the
cache: a chunk's logits are turned into their gradient block by block.

Both losses are operators of their own (`torch.library`), which `torch.compile` leaves whole. A
compiler that sees the loop over chunks moves all its products to the front and keeps the logits of
all chunks at once.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**28}
"""Logits (tokens x vocabulary) that exist at once, in the compute dtype: 512 MiB on a GPU. The
head's float32 gradient is read and written once for each chunk, so fewer chunks are faster."""
LOGITS_PER_BLOCK = {"cpu": 2**20, "cuda": 2**25}
"""Those of them that are in float32 at once, up to four times: 16 MiB on a CPU, 512 on a GPU."""
LEAST_TOKENS, LEAST_BLOCK = 64, 16
MAX_EXPONENT = 60.0
"""Exponentials reach exp(2 softcap / temperature); a sum of 2^24 such still fits."""


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens of a chunk."""
    logits = LOGITS_PER_CHUNK.get(device_type, LOGITS_PER_CHUNK["cuda"])
    return max(LEAST_TOKENS, logits // vocab_size)


def block_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens of a block, at most those of a chunk."""
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
    """(p - one-hot) s (1 - s), overwriting p. p and s (t, V), targets (t, 1)."""
    minus_one = s.new_full((1, 1), -1.0).expand_as(targets)
    probabilities.scatter_add_(1, targets, minus_one)
    result: torch.Tensor = torch.ops.aten.sigmoid_backward(probabilities, s)
    return result


def _token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    vocab_size: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (N,) and the logarithms of the softmax's denominators (N,), both float32."""
    height = softcap / temperature  # what the capped and tempered logits stay below
    cast = _capped(hidden, weight, softcap, vocab_size)
    kind = hidden.device.type
    losses, normalizers = [], []
    for rows in _spans(0, len(hidden), chunk_tokens(vocab_size, kind)):
        logits = F.linear(hidden[rows], cast)
        for part in _spans(0, len(logits), block_tokens(vocab_size, kind)):
            s = logits[part].float().sigmoid_()
            target = targets[rows][part]
            chosen = s.gather(1, target.clamp(min=0)[:, None])[:, 0]
            # log sum exp(2 height s), larger than that of the tempered logits by the height
            normalizer = s.mul_(2 * height).exp_().sum(dim=-1).log_()
            losses.append(torch.where(target >= 0, normalizer - 2 * height * chosen, 0.0))
            normalizers.append(normalizer)
    return torch.cat(losses), torch.cat(normalizers)


def _token_losses_backward(
    grad_output: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    normalizers: torch.Tensor,
    softcap: float,
    vocab_size: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden (N, C) and weight (V', C), each in its dtype."""
    height = softcap / temperature
    cast = _capped(hidden, weight, softcap, vocab_size)
    kind = hidden.device.type
    grad_hidden = []
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    scale = 2 * height * torch.where(targets >= 0, grad_output, 0.0)[:, None]
    scaled = (hidden * (scale * (2 / softcap))).to(hidden.dtype)
    index = targets.clamp(min=0)[:, None]
    for rows in _spans(0, len(hidden), chunk_tokens(vocab_size, kind)):
        logits = F.linear(hidden[rows], cast)
        for part in _spans(0, len(logits), block_tokens(vocab_size, kind)):
            s = logits[part].float().sigmoid_()
            p = torch.add(-normalizers[rows][part, None], s, alpha=2 * height).exp_()
            logits[part] = _gradient(p, s, index[rows][part])
        grad_hidden.append(((logits @ cast) * scale[rows]).to(hidden.dtype))
        grad_weight[:vocab_size] += logits.t() @ scaled[rows]
    return torch.cat(grad_hidden), grad_weight.to(weight.dtype)


def _summed_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    softcap: float,
    vocab_size: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, a float32 scalar, and its gradients: hidden's (N, C), weight's (V', C) float32."""
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


# The operators, and the shapes of their results for tracing.

_token_losses_op = torch.library.custom_op("nanochat::token_losses", mutates_args=())(_token_losses)
_token_losses_backward_op = torch.library.custom_op(
    "nanochat::token_losses_backward", mutates_args=()
)(_token_losses_backward)
_summed_loss_op = torch.library.custom_op("nanochat::summed_loss", mutates_args=())(_summed_loss)


@_token_losses_op.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor]:
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    return losses, torch.empty_like(losses)


@_token_losses_backward_op.register_fake
def _(
    grad_output: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)


@_summed_loss_op.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = hidden.new_empty((), dtype=torch.float32)
    return total, torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)


def _keep_for_token_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, targets, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, targets, output[1])


def _derive_token_losses(
    ctx: Any, grad_output: torch.Tensor | None, grad_normalizers: None
) -> tuple[torch.Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 6
    grads = _token_losses_backward_op(grad_output, *ctx.saved_tensors, *ctx.numbers)
    return *grads, *(None,) * 4


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


_token_losses_op.register_autograd(_derive_token_losses, setup_context=_keep_for_token_losses)
_summed_loss_op.register_autograd(_derive_summed_loss, setup_context=_keep_for_summed_loss)


def softcapped_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    vocab_size: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """hidden (N, C), weight (V', C) with V' >= V rows, targets (N,) with -1 ignored -> (N,).

    Equal to F.cross_entropy(softcap * tanh(hidden @ weight.T / softcap) / temperature), the test's
    slow twin. The backward pass computes each chunk's logits again, so that (N, V) logits never
    exist at once.
    """
    losses: torch.Tensor = _token_losses_op(
        hidden, weight, targets, softcap, vocab_size, temperature
    )[0]
    return losses


def summed_softcapped_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    softcap: float,
    vocab_size: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """sum(weights * softcapped_losses), a scalar, whose gradient is computed in the forward pass.

    weights (N,); the others as in `softcapped_losses`. Saves a quarter of the head's arithmetic and
    half of the exponentials; the price is to keep the head's gradient, (V', C), until the backward
    pass.
    """
    total: torch.Tensor = _summed_loss_op(
        hidden, weight, targets, weights, softcap, vocab_size, temperature
    )[0]
    return total
