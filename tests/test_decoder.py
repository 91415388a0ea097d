"""The model's form for decoding, against the model (law 8 is in test_laws_decoding.py)."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model

from nanochat import decoder as decoding
from nanochat.decoder import Decoder, Product
from nanochat.errors import UserError
from nanochat.gpt import GPT


def logits_of(model: GPT | Decoder, rows: int = 3, T: int = 20) -> torch.Tensor:
    """After each of two chunks, for the same ids."""
    ids = torch.randint(0, 300, (rows, T), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(rows, T + 1)
    with torch.no_grad():
        first = model.next_logits(ids, cache)
        return torch.stack((first, model.next_logits(ids[:, :1], cache)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
def test_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, packed: bool) -> None:
    """Packed or not (as on processors without such kernels), for any number of rows."""
    if not packed:
        monkeypatch.setattr(decoding, "_pack", lambda weight: None)
    weight = torch.randn(48, 32).to(dtype)
    product = Product(weight)
    for shape in ((1, 1, 32), (16, 1, 32), (2, 70, 32), (5, 32)):
        x = torch.randn(shape).to(dtype)
        expected = F.linear(x.double(), weight.double())
        assert product(x).shape == expected.shape
        tolerance = 1e-4 if dtype == torch.float32 else 0.2
        torch.testing.assert_close(product(x).double(), expected, atol=tolerance, rtol=0.02)


def test_reduced_precision_stays_close_to_the_model() -> None:
    model = tiny_model(torch.bfloat16)
    exact = logits_of(tiny_model())
    difference = (logits_of(Decoder(model)) - logits_of(model)).abs()
    rounding = (logits_of(model) - exact).abs()
    assert difference.mean() <= rounding.mean()  # as close as bfloat16 is to float32


def test_int8_products() -> None:
    """The kernel and the dequantised product agree; each weight is off by half a step at most."""
    weight = torch.randn(64, 96).bfloat16()
    weight[5] = 0  # an output that is always zero
    product = Product(weight, "int8")
    x = torch.randn(40, 96).bfloat16()
    one_by_one = torch.cat([product(row[None]) for row in x])
    torch.testing.assert_close(product(x), one_by_one, atol=0.3, rtol=0.02)
    step = weight.float().abs().amax(dim=1) / 127
    bound = x.float().abs().sum(dim=1)[:, None] * step / 2 + 0.3
    assert ((product(x).float() - F.linear(x.float(), weight.float())).abs() <= bound).all()
    assert (product(x)[:, 5] == 0).all()


def test_int8_decodes_nearly_the_same() -> None:
    model = tiny_model(torch.bfloat16)
    full, small = logits_of(model).softmax(-1), logits_of(Decoder(model, "int8")).softmax(-1)
    assert 1e-4 < (full - small).abs().sum(-1).mean() < 0.15


def test_int8_is_refused_where_it_does_not_work() -> None:
    with pytest.raises(UserError, match="--dtype bfloat16"):
        Decoder(tiny_model(), "int8")
