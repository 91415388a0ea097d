"""Muon: its polynomials, orthogonalisation against SVD, its update against torch's own.

S matrices of one shape, R rows, C columns
"""

import math

import numpy as np
import pytest
import torch

from nanochat.muon import (
    _minimax_quintic,
    muon_update,
    orthogonalize,
    polar_express_coefficients,
)

SHAPES = [(3, 16, 16), (2, 8, 24), (2, 24, 8), (1, 1, 5), (1, 5, 1)]


def composed(x: np.ndarray, coefficients: tuple[tuple[float, float, float], ...]) -> np.ndarray:
    for a, b, c in coefficients:
        x = a * x + b * x**3 + c * x**5
    return x


def matrix(R: int, C: int, singular_values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = min(R, C)
    u, _ = torch.linalg.qr(torch.randn(R, n, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(C, n, generator=generator))
    return u @ torch.diag(singular_values) @ v.mT


def polar(g: torch.Tensor) -> torch.Tensor:
    """The slow twin: U V^T."""
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    return (u @ vh).to(g.dtype)


# Polar Express


@pytest.mark.parametrize("interval", [(1e-3, 1.0), (0.1, 1.0), (0.9, 1.1)])
def test_minimax_quintic_equioscillates(interval: tuple[float, float]) -> None:
    """The theorem that makes it the best one: the error is extreme, with both signs, four times."""
    low, high = interval
    a, b, c = _minimax_quintic(low, high)
    x = np.linspace(low, high, 200_001)
    error = a * x + b * x**3 + c * x**5 - 1
    extreme = np.abs(error).max()
    signs = np.sign(error[np.abs(error) > extreme * (1 - 1e-4)])
    assert 1 + np.count_nonzero(np.diff(signs)) == 4


def test_polynomials_of_a_short_interval_are_newton_schulz() -> None:
    a, b, c = _minimax_quintic(1 - 1e-8, 1.0)
    assert (a, b, c) == pytest.approx((15 / 8, -10 / 8, 3 / 8), rel=1e-6)


def test_coefficients_are_those_of_the_paper() -> None:
    """Listing 1 of arXiv 2505.16932, to the digits in which its cushion agrees with ours."""
    published = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ]
    ours = polar_express_coefficients(5, safety=1.0)
    for mine, theirs in zip(ours, published, strict=True):
        assert mine == pytest.approx(theirs, rel=5e-4)


def test_more_polynomials_come_closer_to_one() -> None:
    x = np.geomspace(1e-3, 1, 10_000)
    worst = [
        np.abs(composed(x, polar_express_coefficients(n, safety=1.0)) - 1).max()
        for n in (1, 3, 5, 7, 9)
    ]
    assert worst == sorted(worst, reverse=True)
    assert worst[-1] < 1e-6


def test_safety_keeps_values_that_rounding_pushed_beyond_the_interval() -> None:
    """1 % above 1 the polynomials still give something near 1; unprotected ones run away."""
    x = np.linspace(0.9, 1.01, 1000)
    assert np.abs(composed(x, polar_express_coefficients(5)) - 1).max() < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_orthogonalize_against_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    spread = torch.logspace(0, -2, min(shape))
    for scale in (1e-3, 1.0, 1e4):
        g = matrix(*shape, spread * scale)
        got = orthogonalize(g[None], dtype=dtype)[0].float()
        values = torch.linalg.svdvals(got)
        assert values.min() > 0.8
        assert values.max() < 1.2
        assert (got - polar(g)).norm() / polar(g).norm() < 0.12


def test_enough_polynomials_give_the_svd_answer() -> None:
    g = matrix(20, 12, torch.logspace(0, -2, 12))
    exact = orthogonalize(
        g[None], polar_express_coefficients(10, safety=1.0), torch.float32, safety=1.0
    )
    torch.testing.assert_close(exact[0], polar(g), rtol=0, atol=1e-4)


def test_matrices_of_a_stack_do_not_meet_and_zero_stays_zero() -> None:
    g = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    g[1] = 0
    together = orthogonalize(g, dtype=torch.float32)
    for i in range(3):
        torch.testing.assert_close(together[i], orthogonalize(g[i : i + 1], dtype=torch.float32)[0])
    assert (together[1] == 0).all()


# The update


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_muon_with_matched_settings(
    shape: tuple[int, int, int], weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several steps. torch's orthogonalisation, bfloat16 by itself, is made to run in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    settings = {"lr": 0.05, "weight_decay": weight_decay, "momentum": 0.9}
    oracle = torch.optim.Muon(theirs, nesterov=True, **settings)
    newton_schulz = ((3.4445, -4.7750, 2.0315),) * 5

    ours, buffer = start.clone(), torch.zeros(shape)
    for _ in range(4):
        gradients = torch.randn(shape, generator=generator)
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.clone()
        oracle.step()
        muon_update(
            ours,
            gradients,
            buffer,
            None,
            cautious=False,
            coefficients=newton_schulz,
            dtype=torch.float32,
            safety=1.0,
            **settings,
        )
    torch.testing.assert_close(
        ours, torch.stack([p.detach() for p in theirs]), rtol=1e-4, atol=1e-4
    )
    assert (ours - start).abs().max() > 0.01


def update(
    gradient: torch.Tensor, parameter: torch.Tensor | None = None, **settings: float
) -> torch.Tensor:
    """Difference that one step subtracts from the parameter."""
    parameter = torch.zeros_like(gradient) if parameter is None else parameter
    after = parameter.clone()
    S, R = gradient.shape[:2]
    muon_update(
        after,
        gradient,
        torch.zeros_like(gradient),
        torch.zeros(S, R, 1),
        momentum=0.9,
        dtype=torch.float32,
        **{"lr": 1.0, **settings},
    )
    return parameter - after


def test_second_moment_gives_every_row_the_same_share() -> None:
    g = torch.randn(1, 32, 8, generator=torch.Generator().manual_seed(0))
    g[0, :4] *= 30  # a few neurons take most of a plain orthogonal step
    plain = orthogonalize(g, dtype=torch.float32)
    step = update(g) / math.sqrt(32 / 8)
    rows = step.norm(dim=-1).flatten()
    assert rows.max() / rows.min() == pytest.approx(1, abs=1e-3)
    assert plain.norm(dim=-1).max() / plain.norm(dim=-1).min() > 1.5
    assert step.norm().item() == pytest.approx(plain.norm().item(), rel=1e-4)


def test_second_moment_remembers() -> None:
    """A row that moved a lot before moves less now than one that did not."""
    generator = torch.Generator().manual_seed(0)
    parameter, buffer, second = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), torch.zeros(1, 8, 1)
    for _ in range(3):
        g = torch.randn(1, 8, 8, generator=generator)
        g[0, 4:] = 0
        muon_update(
            parameter, g, buffer, second, lr=1.0, momentum=0.0, beta2=0.9, dtype=torch.float32
        )
    before = parameter.clone()
    muon_update(
        parameter,
        torch.eye(8)[None],
        buffer,
        second,
        lr=1.0,
        momentum=0.0,
        beta2=0.9,
        dtype=torch.float32,
    )
    rows = (parameter - before).norm(dim=-1).flatten()
    assert rows[4:].min() > 1.5 * rows[:4].max()


def test_cautious_decay_only_where_the_update_shrinks_too() -> None:
    generator = torch.Generator().manual_seed(0)
    g, p = torch.randn(2, 1, 6, 6, generator=generator)
    step = update(g, p)
    decay = update(g, p, weight_decay=0.01) - step
    agree = step * p > 0
    assert agree.any()
    assert not agree.all()
    torch.testing.assert_close(decay, torch.where(agree, 0.01 * p, 0.0), rtol=1e-3, atol=1e-6)


def test_tall_matrices_get_a_larger_rate() -> None:
    assert update(torch.randn(1, 32, 8)).norm().item() == pytest.approx(
        2 * update(torch.randn(1, 8, 32)).norm().item(), rel=0.1
    )


def test_zero_gradients_change_nothing_and_give_no_nan() -> None:
    p = torch.randn(2, 4, 6)
    assert (update(torch.zeros(2, 4, 6), p) == 0).all()
