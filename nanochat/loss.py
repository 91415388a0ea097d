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
all chunks at once. In a compiled model they are `fused`: what is done to a chunk's logits is a
compiled function of its own. It reads them twice and writes their gradient over them, where the
single operations read and write about fifty bytes for each.
"""

import functools
from collections.abc import Callable, Iterator
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


def block_tokens(vocab_size: int, device_type: str, fused: bool = False) -> int:
    """Number of tokens in a block, at most that of a chunk.

    A fused loss needs no blocks on a GPU. Generated code for a CPU keeps float32 copies of a block.
    """
    if fused and device_type != "cpu":
        return chunk_tokens(vocab_size, device_type)
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


# What is done to a block of logits (t, V): targets are (t, 1), `height` is softcap / temperature.


def _log_probabilities(logits: torch.Tensor, targets: torch.Tensor, height: float) -> torch.Tensor:
    """Compute the targets' log probabilities (t, 1) in float32."""
    s = logits.float().sigmoid_()
    chosen = s.gather(1, targets)
    # log sum exp(2 height s), larger than that of the tempered logits by the height
    normalizer = s.mul_(2 * height).exp_().sum(dim=-1, keepdim=True).log_()
    return 2 * height * chosen - normalizer


def _to_gradient(logits: torch.Tensor, targets: torch.Tensor, height: float) -> torch.Tensor:
    """Overwrite logits with (p - one-hot) s (1 - s); returns the targets' log probabilities."""
    s = logits.float().sigmoid_()
    p = torch.softmax(s * (2 * height), dim=-1)
    chosen = p.gather(1, targets)
    p.scatter_add_(1, targets, p.new_full((1, 1), -1.0).expand_as(targets))
    logits.copy_(torch.ops.aten.sigmoid_backward(p, s))
    return chosen.log_()


def _to_gradient_fused(logits: torch.Tensor, targets: torch.Tensor, height: float) -> torch.Tensor:
    """Do as `_to_gradient`, in operations that the compiler makes one kernel of."""
    s = torch.sigmoid(logits.float())
    chosen = s.gather(1, targets)
    p = torch.exp(2 * height * s)
    normalizer = p.sum(dim=-1, keepdim=True)
    hit = torch.arange(logits.shape[1], device=logits.device) == targets
    logits.copy_((p / normalizer - torch.where(hit, 1.0, 0.0)) * (s * (1 - s)))
    return 2 * height * chosen - normalizer.log()


@functools.cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to total, which is float32; a and b may be of a shorter dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":  # in float32, and in one pass over total
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += a @ b


@torch.library.custom_op("nanochat::token_losses", mutates_args=())
def softcapped_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    vocab_size: int,
    temperature: float = 1.0,
    fused: bool = False,
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
    index = targets.clamp(min=0)[:, None]
    function = _compiled(_log_probabilities) if fused else _log_probabilities
    chosen = []
    for rows in _spans(0, len(hidden), chunk_tokens(vocab_size, kind)):
        logits = F.linear(hidden[rows], cast)
        for part in _spans(0, len(logits), block_tokens(vocab_size, kind, fused)):
            chosen.append(function(logits[part], index[rows][part], height))
    return torch.where(targets >= 0, -torch.cat(chosen)[:, 0], 0.0)


@torch.library.custom_op("nanochat::summed_loss", mutates_args=())
def summed_softcapped_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    softcap: float,
    vocab_size: int,
    temperature: float = 1.0,
    fused: bool = False,
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
    function = _compiled(_to_gradient_fused) if fused else _to_gradient
    chosen, grad_hidden = [], []
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    for rows in _spans(0, len(hidden), chunk_tokens(vocab_size, kind)):
        logits = F.linear(hidden[rows], cast)
        for part in _spans(0, len(logits), block_tokens(vocab_size, kind, fused)):
            chosen.append(function(logits[part], index[rows][part], height))
        grad_hidden.append(((logits @ cast) * scale[rows]).to(hidden.dtype))
        _add_product(grad_weight[:vocab_size], logits.t(), scaled[rows])
    total = -(weights * torch.cat(chosen)).sum()
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
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _derive_token_losses(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the sum of the losses, weighted by their gradients."""
    _, grad_hidden, grad_weight = summed_softcapped_loss(
        *ctx.saved_tensors, grad_output, *ctx.settings
    )
    return grad_hidden, grad_weight.to(ctx.saved_tensors[1].dtype), *(None,) * 5


def _keep_for_summed_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _derive_summed_loss(
    ctx: Any, grad_output: torch.Tensor | None, *rest: None
) -> tuple[torch.Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 8
    grad_hidden, grad_weight = ctx.saved_tensors
    return grad_hidden * grad_output, grad_weight * grad_output, *(None,) * 6


softcapped_losses.register_autograd(_derive_token_losses, setup_context=_keep_for_token_losses)
summed_softcapped_loss.register_autograd(_derive_summed_loss, setup_context=_keep_for_summed_loss)
