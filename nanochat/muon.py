"""Muon (Jordan 2024) on stacks of matrices, as pure functions on tensors.

S matrices of one shape, R rows, C columns

The update uses Nesterov momentum, orthogonalisation by Polar Express (arXiv 2505.16932), NorMuon's
second moment per row (arXiv 2510.05491) and cautious weight decay (arXiv 2510.12402).
"""

import functools

import numpy as np
import torch

Coefficients = tuple[tuple[float, float, float], ...]


def _minimax_quintic(low: float, high: float) -> tuple[float, float, float]:
    """Coefficients of the odd quintic a x + b x^3 + c x^5 that is closest to 1 on [low, high].

    Closest means the smallest maximum error. The method is Remez exchange: the best polynomial has
    its largest error, with alternating sign, at four points: the two ends of the interval and the
    polynomial's two inner extrema.
    """
    if 1 - low / high < 1e-6:  # a very short interval: take the Taylor solution at its middle
        middle = (low + high) / 2
        return 15 / (8 * middle), -10 / (8 * middle**3), 3 / (8 * middle**5)
    inner = np.array([low + (high - low) * 0.25, low + (high - low) * 0.75])
    a = b = c = 0.0
    for _ in range(100):
        points = np.array([low, inner[0], inner[1], high])
        system = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        # Extrema: a + 3 b y + 5 c y^2 = 0 with y = x^2.
        root = np.sqrt(max((3 * b) ** 2 - 20 * a * c, 0.0))
        squares = np.sort([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)])
        moved = np.sqrt(np.clip(squares, low**2, high**2))
        if np.allclose(moved, inner, rtol=1e-12, atol=0):
            break
        inner = moved
    return float(a), float(b), float(c)


@functools.cache
def polar_express_coefficients(
    steps: int = 5, smallest: float = 1e-3, safety: float = 1.01, cushion: float = 0.024
) -> Coefficients:
    """Coefficients of Polar Express: `steps` quintics that, one after the other, map [smallest, 1]
    as close to 1 as possible.

    Each quintic is the best one for the interval that the ones before it leave; by theorem 3.1 this
    greedy choice is optimal. `safety` shrinks the argument of all quintics but the last, since bf16
    rounding can push singular values beyond the interval. `cushion` keeps an interval from becoming
    so wide that its quintic comes close to zero inside it.
    """
    low, high = smallest, 1.0
    result = []
    for step in range(steps):
        a, b, c = _minimax_quintic(max(low, cushion * high), high)

        def value(x: float, a: float = a, b: float = b, c: float = c) -> float:
            return a * x + b * x**3 + c * x**5

        if cushion * high > low:
            # Recentre: with a cushion, the ends of the true interval are not symmetric about 1.
            factor = 2 / (value(low) + value(high))
            a, b, c = a * factor, b * factor, c * factor
        if step < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        result.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    return tuple(result)


def orthogonalize(
    matrices: torch.Tensor,
    coefficients: Coefficients | None = None,
    dtype: torch.dtype = torch.bfloat16,
    safety: float = 1.01,
) -> torch.Tensor:
    """Approximate the (semi-)orthogonal matrix closest to each of matrices (S, R, C).

    For G = U diag(s) V^T the result is close to U V^T, with G's shape and dtype. A zero matrix
    stays zero. `dtype` is that of the matrix products.
    """
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(dtype) * safety + 1e-7)
    for a, b, c in coefficients or polar_express_coefficients():
        gram = x @ x.mT  # (S, r, r) with r the shorter side
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def muon_update(
    parameters: torch.Tensor,
    gradients: torch.Tensor,
    momentum_buffer: torch.Tensor,
    second_moment: torch.Tensor | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float = 0.0,
    beta2: float = 0.95,
    cautious: bool = True,
    coefficients: Coefficients | None = None,
    dtype: torch.dtype = torch.bfloat16,
    safety: float = 1.01,
) -> None:
    """Update a stack of matrices and its state in place.

    parameters, gradients and momentum_buffer are (S, R, C) float32. second_moment is (S, R, 1), or
    None for plain Muon. The learning rate is scaled by sqrt(max(1, R/C)). With second_moment None,
    cautious False and torch.optim.Muon's coefficients, the update equals torch.optim.Muon's.
    """
    R, C = parameters.shape[-2:]
    momentum_buffer.lerp_(gradients, 1 - momentum)
    update = gradients.lerp(momentum_buffer, momentum)  # Nesterov
    update = orthogonalize(update, coefficients, dtype, safety).to(parameters.dtype)
    if second_moment is not None:
        # Every row (neuron) gets the same share of the step; the length of the step stays.
        before = update.norm(dim=(-2, -1), keepdim=True)
        second_moment.lerp_(update.square().mean(dim=-1, keepdim=True), 1 - beta2)
        update = update * second_moment.clamp(min=1e-12).rsqrt()
        update = update * (before / update.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12))
    rate = lr * max(1.0, R / C) ** 0.5
    if weight_decay:
        decay = parameters * (lr * weight_decay)
        if cautious:
            decay = decay * (update * parameters > 0)  # where the update shrinks it too
        parameters.sub_(decay)
    parameters.sub_(update, alpha=rate)
