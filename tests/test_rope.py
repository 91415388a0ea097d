"""Rotary embedding: it is a rotation, it sees distances only, and a longer base keeps the angle."""

import cmath

import pytest
import torch

from nanochat.rope import apply_rope, extended_base, inverse_frequencies, rope_table

BASE, D = 10000.0, 16


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, D) at positions (T,)."""
    cos, sin = rope_table(positions, x.shape[-1], BASE)
    return apply_rope(x, cos[:, None], sin[:, None])


def test_pairs_turn_as_complex_numbers() -> None:
    """Pair i of a head is the complex number x[i] + j x[i + D/2], times exp(-j position theta)."""
    x = torch.randn(1, 3, 1, D, generator=torch.Generator().manual_seed(0))
    out = rotated(x, torch.tensor([0, 1, 50]))
    for t, position in enumerate((0, 1, 50)):
        for i in range(D // 2):
            theta = BASE ** (-2 * i / D)
            turned = complex(x[0, t, 0, i], x[0, t, 0, i + D // 2]) * cmath.exp(
                -1j * position * theta
            )
            assert out[0, t, 0, i].item() == pytest.approx(turned.real, abs=1e-4)
            assert out[0, t, 0, i + D // 2].item() == pytest.approx(turned.imag, abs=1e-4)


def test_lengths_stay_and_position_zero_is_the_identity() -> None:
    x = torch.randn(2, 40, 3, D)
    out = rotated(x, torch.arange(40))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(out[:, 0], x[:, 0])


def test_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, D, generator=torch.Generator().manual_seed(1))

    def product(query: int, key: int) -> float:
        turned = rotated(q, torch.tensor([query])) * rotated(k, torch.tensor([key]))
        return float(turned.sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)
    assert product(9, 4) != pytest.approx(product(4, 9), abs=1e-3), "the direction counts"


def test_positions_may_differ_by_row() -> None:
    x = torch.randn(2, 5, 1, D)
    positions = torch.stack([torch.arange(5), torch.arange(7, 12)])
    cos, sin = rope_table(positions, D, BASE)
    assert cos.shape == (2, 5, D // 2)
    out = apply_rope(x, cos[..., None, :], sin[..., None, :])
    torch.testing.assert_close(out[1:], rotated(x[1:], torch.arange(7, 12)))


def test_extended_base() -> None:
    assert extended_base(BASE, 64, 512, 512) == BASE
    longer = extended_base(BASE, 64, 512, 2048)
    # The slowest pair turns over 2048 positions as far as it did over 512.
    before = 512 * inverse_frequencies(64, BASE)[-1]
    after = 2048 * inverse_frequencies(64, longer)[-1]
    torch.testing.assert_close(after, before)
    assert inverse_frequencies(64, longer)[0] == 1, "the fastest pair is untouched"
