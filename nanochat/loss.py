"""Cross entropy of softcapped logits of a linear head, chunk by chunk.

N tokens, C channels, V vocabulary, V' its padded rows

With s = sigmoid(2 z / softcap), which costs half of tanh, the capped logit of z is
softcap (2 s - 1) and its derivative 4 s (1 - s). The factor 2 / softcap goes into the head's cast
weight, other factors of a row are applied where rows are short: to the hidden states. Capped logits
are so small that their exponentials need no maximum subtracted.

A matrix multiplication likes chunks of many tokens, what follows it likes data that stay in the
cache: a chunk's logits are turned into their gradient block by block.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**26}
"""Logits (tokens x vocabulary) that exist at once, in the compute dtype."""
LOGITS_PER_BLOCK = 2**20
"""Those of them that are in float32 at once on a CPU, twice: 8 MiB."""
LEAST_TOKENS, LEAST_BLOCK = 64, 16
MAX_EXPONENT = 60.0
"""Exponentials reach exp(2 softcap / temperature); a sum of 2^24 such still fits."""


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens of a chunk."""
    logits = LOGITS_PER_CHUNK.get(device_type, LOGITS_PER_CHUNK["cuda"])
    return max(LEAST_TOKENS, logits // vocab_size)


def block_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens of a block; compiled, or on any other device than a CPU, a chunk is one block."""
    chunk = chunk_tokens(vocab_size, device_type)
    if device_type != "cpu" or torch.compiler.is_compiling():
        return chunk
    return min(chunk, max(LEAST_BLOCK, LOGITS_PER_BLOCK // vocab_size))


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


class SoftcappedLoss(torch.autograd.Function):
    """hidden (N, C), weight (V', C) with V' >= V rows, targets (N,) with -1 ignored -> (N,).

    Equal to F.cross_entropy(softcap * tanh(hidden @ weight.T / softcap) / temperature), the test's
    slow twin. The backward pass computes each chunk's logits again, so that (N, V) logits never
    exist at once.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        softcap: float,
        vocab_size: int,
        temperature: float = 1.0,
    ) -> torch.Tensor:
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
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalizers))
        ctx.softcap, ctx.vocab_size = softcap, vocab_size  # type: ignore[attr-defined]
        ctx.temperature = temperature  # type: ignore[attr-defined]
        return torch.cat(losses)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors  # type: ignore[attr-defined]
        softcap, vocab_size = ctx.softcap, ctx.vocab_size  # type: ignore[attr-defined]
        height = softcap / ctx.temperature  # type: ignore[attr-defined]
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
        return torch.cat(grad_hidden), grad_weight.to(weight.dtype), None, None, None, None


class SummedLoss(torch.autograd.Function):
    """sum(weights * SoftcappedLoss), a scalar, whose gradient is computed in the forward pass.

    weights (N,); the others as in SoftcappedLoss. Saves a quarter of the head's arithmetic and half
    of the exponentials; the price is to keep the head's gradient, (V', C), until the backward pass.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        softcap: float,
        vocab_size: int,
        temperature: float = 1.0,
    ) -> torch.Tensor:
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
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight)
        return total

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden * grad_output, grad_weight * grad_output, *(None,) * 5
