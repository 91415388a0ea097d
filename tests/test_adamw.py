"""AdamW against torch's own."""

import pytest
import torch

from nanochat.adamw import adamw_update


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.9)])
def test_equals_torch_adamw(betas: tuple[float, float], weight_decay: float) -> None:
    """Over steps with changing learning rates, as a schedule gives them."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    oracle = torch.optim.AdamW([theirs], betas=betas, eps=1e-8, weight_decay=weight_decay)
    ours, first, second = start.clone(), torch.zeros(7, 5), torch.zeros(7, 5)
    for step in range(1, 9):
        gradient = torch.randn(7, 5, generator=generator) * 10.0**-step
        lr = 0.01 * step
        theirs.grad = gradient.clone()
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
        adamw_update(
            ours,
            gradient,
            first,
            second,
            step=step,
            lr=lr,
            betas=betas,
            eps=1e-8,
            weight_decay=weight_decay,
        )
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    state = oracle.state[theirs]
    torch.testing.assert_close(first, state["exp_avg"])
    torch.testing.assert_close(second, state["exp_avg_sq"])


def test_first_step_is_the_sign_times_the_rate() -> None:
    """Both bias corrections together: whatever the size of the gradient."""
    for scale in (1e-4, 1.0, 1e4):
        p, g = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5]) * scale
        adamw_update(p, g, torch.zeros(3), torch.zeros(3), step=1, lr=0.1, betas=(0.8, 0.95))
        torch.testing.assert_close(p, -0.1 * g.sign())


def test_rows_without_a_gradient_stay() -> None:
    """The padding rows of the vocabulary: 0/0 must not come up."""
    p, g = torch.ones(2, 3), torch.zeros(2, 3)
    first, second = torch.zeros(2, 3), torch.zeros(2, 3)
    for step in (1, 2):
        adamw_update(p, g, first, second, step=step, lr=0.1, betas=(0.8, 0.95))
    assert (p == 1).all()
