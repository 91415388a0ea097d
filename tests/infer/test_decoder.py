"""The model's form for decoding, against the model (law 8 is in test_laws_decoding.py)."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model, tiny_tokenizer

from nanochat.errors import UserError
from nanochat.gpt import GPT, Block
from nanochat.infer import decoder as decoding
from nanochat.infer.decoder import Decoder, Product
from nanochat.infer.engine import Engine
from nanochat.infer.sampling import SamplingParams


def logits_of(model: GPT | Decoder, rows: int = 3, T: int = 20) -> torch.Tensor:
    """Logits after each of two chunks, for the same ids."""
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


@pytest.mark.parametrize("what", ["nothing", "embedding", "key", "tiny key", "scalars"])
def test_vectors_without_length_are_normed_as_by_the_model(what: str) -> None:
    """A head, a token or a residual stream near zero: no NaN, and the epsilon counts.

    With nothing near zero, the fast kernel norms each row's last vector, which are not contiguous.
    """
    model = tiny_model()
    with torch.no_grad():
        if what == "embedding":
            model.embedding.weight[7] = -model._spelled(model.spelling[7])
        elif what == "scalars":
            model.residual_scale[1] = model.first_scale[1] = 0
        elif what != "nothing":
            weight = cast(Block, model.blocks[0]).attention.key.weight
            weight.mul_(1e-4 if what == "tiny key" else 0)
    expected = logits_of(model)
    assert expected.isfinite().all()
    torch.testing.assert_close(logits_of(Decoder(model)), expected, atol=2e-4, rtol=0)


def test_large_attention_in_reduced_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above FLOAT_ELEMENTS the products are taken in bfloat16, below in float32."""
    model = tiny_model(torch.bfloat16)
    small = logits_of(Decoder(model))
    monkeypatch.setattr(decoding, "FLOAT_ELEMENTS", 0)
    large = logits_of(Decoder(model))
    assert 0 < (small - large).abs().max() < 0.2


def test_gradients_are_not_asked_for() -> None:
    model = tiny_model()
    decoder = Decoder(model)
    logits = decoder.next_logits(torch.tensor([[1, 2]]), decoder.new_cache(1, 4))
    assert torch.is_grad_enabled()
    assert not logits.requires_grad


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


def test_what_a_device_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match="--dtype bfloat16"):
        Decoder(tiny_model(), "int8")
    with pytest.raises(UserError, match="--cuda-graphs"):
        Decoder(tiny_model(), compiled=True)


def test_a_cache_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="more than the context length 96"):
        Decoder(tiny_model()).new_cache(1, 97)


def test_decoding_follows_the_model_up_to_the_end_of_the_context() -> None:
    """The last position's cosines are in the table; padding beyond it is harmless."""
    model = tiny_model()
    decoder = Decoder(model)
    ids = torch.randint(0, 300, (2, 96), generator=torch.Generator().manual_seed(0))
    cache = decoder.new_cache(2, 96)
    with torch.no_grad():
        decoder.next_logits(ids[:, :90], cache, torch.tensor([90, 80]))
        padded = torch.cat((ids[:, 90:95], ids[:, :11]), dim=1)
        last = decoder.next_logits(padded, cache, torch.tensor([5, 3]))
        torch.testing.assert_close(last[0], model(ids[:1, :95])[0, -1], atol=2e-4, rtol=0)
        last = decoder.next_logits(ids[:, 95:], cache)
        torch.testing.assert_close(last[0], model(ids[:1])[0, -1], atol=2e-4, rtol=0)


# Compiled steps


def test_a_compiled_step_is_one_graph_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph break, no new graph as rows grow, come and go, and the same tokens as without.

    Traced down to the operations a GPU would run; the compiler's last stage is left out.
    """
    model, tokenizer = tiny_model(), tiny_tokenizer()
    compiled, graphs = Decoder(model), 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled.compile_step(backend=backend)
    prompts = [[1, 2, 3], [4], list(range(40)), [7, 8]]
    params = [SamplingParams(max_tokens=n, seed=3) for n in (30, 5, 50, 12)]
    engine = Engine(compiled, tokenizer, max_slots=3)
    addresses = set()
    step = engine.step

    def watched() -> Any:
        events = step()
        assert engine._slots.cache is not None
        addresses.add(tuple(t.data_ptr() for t in engine._slots.cache.keys))
        return events

    monkeypatch.setattr(engine, "step", watched)
    expected = Engine(model, tokenizer).generate(prompts, params, 2)
    for _ in range(2):  # the second time into the same cache
        for mine, theirs in zip(engine.generate(prompts, params, 2), expected, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert a.ids == b.ids
                assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)
    assert graphs == 1
    assert len(addresses) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_decode_like_eager_steps(dtype: torch.dtype) -> None:
    model, tokenizer = tiny_model(dtype).to("cuda"), tiny_tokenizer()
    prompts = [[1, 2, 3], [4], list(range(40)), [7, 8]]
    params = SamplingParams(max_tokens=40, temperature=0.0)
    expected = Engine(Decoder(model), tokenizer, max_slots=3).generate(prompts, params)
    engine = Engine(Decoder(model, compiled=True), tokenizer, max_slots=3)
    for _ in range(3):  # warm-up, recording, replay
        got = engine.generate(prompts, params)
        for (a,), (b,) in zip(got, expected, strict=True):
            same = 40 if dtype == torch.float32 else 4
            assert a.ids[:same] == b.ids[:same]
