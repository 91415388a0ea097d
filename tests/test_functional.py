"""Normalisation and activation against PyTorch's own, and their derivatives."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from nanochat.functional import NORM_EPS, ReLUSquared, RMSNorm, norm, relu_squared


def their_norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


PAIRS = [(norm, their_norm), (relu_squared, lambda x: F.relu(x).square())]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["norm", "relu_squared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_values_and_gradients(
    ours: Callable[[torch.Tensor], torch.Tensor],
    theirs: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    scale: float,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 5, 64, generator=generator) * scale).to(dtype)
    upstream = torch.randn(3, 5, 64, generator=generator).to(dtype)
    results = []
    for function, precision in ((ours, dtype), (theirs, torch.float64)):
        leaf = x.to(precision, copy=True).requires_grad_()
        y = function(leaf)
        y.backward(upstream.to(precision))
        assert leaf.grad is not None
        results.append((y.detach().double(), leaf.grad.double()))
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine, true, rtol=rtol, atol=rtol * true.abs().max().item())


@pytest.mark.parametrize("function", [RMSNorm, ReLUSquared])
def test_gradcheck(function: type[torch.autograd.Function]) -> None:
    x = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(function.apply, (x.requires_grad_(),))


def test_a_row_of_zeros_has_finite_gradients() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
