"""AdamW (arXiv 1711.05101) as a pure function on tensors."""

import torch


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
    """Update parameter and both moments in place; all four have one shape.

    step counts from 1. Equal to torch.optim.AdamW with the same settings.
    """
    beta1, beta2 = betas
    parameter.mul_(1 - lr * weight_decay)
    first_moment.lerp_(gradient, 1 - beta1)
    second_moment.lerp_(gradient.square(), 1 - beta2)
    denominator = (second_moment / (1 - beta2**step)).sqrt_().add_(eps)
    parameter.addcdiv_(first_moment, denominator, value=-lr / (1 - beta1**step))
