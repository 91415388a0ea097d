"""Rotary position embedding (RoFormer, arXiv 2104.09864) and its long-context base.

B batch, T time, H heads, D head dim
"""

import math

import torch


def inverse_frequencies(
    head_dim: int, base: float, device: torch.device | None = None
) -> torch.Tensor:
    """Radians per position of each rotated pair, (D/2,) float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return base**-exponents


def rope_table(
    positions: torch.Tensor, head_dim: int, base: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotation angles, each positions.shape + (D/2,), float32."""
    angles = positions.float()[..., None] * inverse_frequencies(head_dim, base, positions.device)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + D/2) of each head by -angle; returns (B, T, H, D).

    x is (B, T, H, D); cos and sin broadcast to (B, T, 1, D/2) and have x's dtype. The sign is that
    of transformers' `nanochat` model type.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def extended_base(base: float, head_dim: int, old_length: int, new_length: int) -> float:
    """The rotary base for a longer context: base * (L'/L)^(D/(D-2)), ABF (arXiv 2309.16039).

    With it the slowest pair turns as far over L' positions as it did over L. L' = L changes
    nothing.

    >>> extended_base(10000.0, 64, 512, 512)
    10000.0
    """
    return base * math.pow(new_length / old_length, head_dim / (head_dim - 2))
