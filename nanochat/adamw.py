"""AdamW (arXiv 1711.05101) as a pure function on tensors."""

from collections.abc import Iterator

import torch

BLOCK = 2**16
"""Elements of a block on a CPU: with gradient and both moments, a block is 1 MiB in float32."""


def adamw_update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    first_moment: torch.Tensor,
    second_moment: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float = 1e-10,
    weight_decay: float = 0.0,
) -> None:
    """Update parameter and both moments in place; all four tensors have one shape.

    step counts from 1. The result equals that of torch.optim.AdamW with the same settings.
    """
    beta1, beta2 = betas
    for p, g, first, second in _blocks(parameter, gradient, first_moment, second_moment):
        if weight_decay:
            p.mul_(1 - lr * weight_decay)
        first.lerp_(g, 1 - beta1)
        second.lerp_(g.square(), 1 - beta2)
        denominator = (second / (1 - beta2**step)).sqrt_().add_(eps)
        p.addcdiv_(first, denominator, value=-lr / (1 - beta1**step))


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the tensors; on a CPU in blocks so small that all operations stay in the cache."""
    if tensors[0].device.type != "cpu" or not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    yield from zip(*(t.view(-1).split(BLOCK) for t in tensors), strict=True)
