"""The model: causality, isolation, its loss against plain cross entropy, its initialisation.

B batch, T time, C channels, V vocabulary
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from benchmarks.common import words
from nanochat import loss as head_loss
from nanochat.errors import UserError
from nanochat.functional import NORM_EPS
from nanochat.gpt import GPT, GPTConfig, config_from_depth
from nanochat.loss import softcapped_losses

TINY = GPTConfig(
    vocab_size=100,
    n_layer=3,
    n_head=4,
    n_kv_head=2,
    n_embd=32,
    head_dim=8,
    context_length=48,
    windows=(7, 0, 5),
)
PORTABLE = dataclasses.replace(
    TINY,
    windows=(),
    value_embeddings=False,
    residual_scalars=False,
    token_shift=False,
    spelling_bytes=0,
)
TOKENS = [b" word", b"word", b"Word", b" w" * 12, b" ", *(bytes([i, 99 - i]) for i in range(85))]
"""The last ids have no spelling, like special tokens."""
VARIANTS = {
    "full": TINY,
    "portable": PORTABLE,
    "one kv head": dataclasses.replace(TINY, n_kv_head=1),
}


def random_model(config: GPTConfig = TINY, dtype: torch.dtype = torch.float32) -> GPT:
    """Every parameter random: the initialisation's zeros would switch half of the model off."""
    model = GPT(config, dtype).init_weights(0, TOKENS[: config.vocab_size])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def random_ids(*shape: int, seed: int = 0, vocab_size: int = 100) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# Law 1


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_causality(variant: str, backend: str) -> None:
    """Changing token t changes no output before t, and does change the one at t."""
    model = random_model(VARIANTS[variant])
    model.backend = backend
    ids = random_ids(1, 40)
    with torch.no_grad():
        before = model(ids)
        for t in (0, 1, 13, 39):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % 100
            after = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t], before[:, t])


def test_causality_of_gradients() -> None:
    """The loss at t has no gradient through the embedding of a later token."""
    model = random_model()
    ids = torch.arange(40)[None]  # every token another row of the embedding
    for t in (0, 12, 38):
        model.zero_grad(set_to_none=True)
        model.nll(ids, ids.roll(-1, 1))[0, t].backward()
        for table in (model.embedding, *model.value_embeddings.values()):
            assert table.weight.grad is not None
            touched = table.weight.grad.abs().sum(1).nonzero().flatten()
            assert touched.max() <= t


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_do_not_see_each_other(variant: str, backend: str) -> None:
    """Outputs of document B do not depend on A's tokens, nor have gradients through them."""
    model = random_model(VARIANTS[variant])
    model.backend = backend
    ids = random_ids(1, 40)
    doc_ids = torch.tensor([[0] * 15 + [1] * 20 + [2] * 5])
    with torch.no_grad():
        before = model(ids, doc_ids)
        changed = ids.clone()
        changed[0, :15] = random_ids(15, seed=5)
        changed[0, 35:] = random_ids(5, seed=6)
        after = model(changed, doc_ids)
        # B alone, with the same positions: rotary products see distances only, so up to rounding.
        alone = model(ids[:, 15:35])
    assert torch.equal(after[:, 15:35], before[:, 15:35])
    assert not torch.equal(after[:, :15], before[:, :15])
    torch.testing.assert_close(before[:, 15:35], alone, rtol=1e-4, atol=1e-4)

    unique = torch.arange(40)[None]
    nll = model.nll(unique, unique.roll(-1, 1), doc_ids)
    nll[0, 15:35].sum().backward()
    for table in (model.embedding, *model.value_embeddings.values()):
        assert table.weight.grad is not None
        touched = table.weight.grad.abs().sum(1).nonzero().flatten().tolist()
        assert touched == list(range(15, 35))


def test_rows_are_independent() -> None:
    model = random_model()
    ids = random_ids(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[1:2], model(ids[1:2]), rtol=1e-5, atol=1e-5)


# The loss


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 64 tokens, in blocks of 16."""
    monkeypatch.setitem(head_loss.LOGITS_PER_CHUNK, "cpu", 1)
    monkeypatch.setitem(head_loss.LOGITS_PER_BLOCK, "cpu", 1)


def plain_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    V: int,
    temperature: float,
) -> torch.Tensor:
    """The slow twin: all logits at once."""
    logits = softcap * torch.tanh(F.linear(hidden, weight[:V]) / softcap)
    return F.cross_entropy(logits / temperature, targets, ignore_index=-1, reduction="none")


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("scale", [0.3, 30.0], ids=["small logits", "capped logits"])
def test_softcapped_loss_equals_cross_entropy(
    tokens: int, scale: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch)
    V, C = 50, 16
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, C, generator=generator)
    weight = torch.randn(64, C, generator=generator) * scale
    targets = torch.randint(-1, V, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    results = []
    for function, dtype in ((softcapped_losses, torch.float32), (plain_nll, torch.float64)):
        h = hidden.to(dtype, copy=True).requires_grad_()
        w = weight.to(dtype, copy=True).requires_grad_()
        loss = function(h, w, targets, 15.0, V, temperature)
        loss.backward(upstream.to(loss.dtype))
        results.append((loss.detach(), h.grad, w.grad))
    for ours, slow in zip(*results, strict=True):
        # Gradients grow with the weights; a twin in float32 is off by as much as ours.
        torch.testing.assert_close(
            ours,
            slow,
            rtol=1e-4,
            atol=1e-5 * max(1.0, scale / 6) / min(1.0, temperature),
            check_dtype=False,
        )
    loss, grad_hidden, grad_weight = results[0]
    assert (loss[targets == -1] == 0).all()
    assert grad_hidden is not None
    assert (grad_hidden[targets == -1] == 0).all()
    assert grad_weight is not None
    assert (grad_weight[V:] == 0).all(), "rows that pad the vocabulary learn nothing"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_weighted_loss_equals_the_weighted_sum(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss that computes its gradient in the forward pass, against the one that does not."""
    small_chunks(monkeypatch)
    model = random_model()
    ids, targets = random_ids(3, 40), random_ids(3, 40, seed=1)
    targets[0, :7] = -1
    weights = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))  # advantages: any sign
    results = []
    for function in (
        lambda: model.weighted_loss(ids, targets, weights, temperature=temperature),
        lambda: (weights * model.nll(ids, targets, temperature=temperature)).sum(),
    ):
        model.zero_grad()
        loss = function()
        (3 * loss).backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, slow in zip(*results, strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient:UserWarning")
def test_softcapped_loss_gradcheck() -> None:
    """Against finite differences, as far as float32 allows."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=generator).requires_grad_()
    weight = torch.randn(7, 4, generator=generator).requires_grad_()
    targets = torch.tensor([0, 6, -1, 3, 2])
    torch.autograd.gradcheck(
        lambda h, w: softcapped_losses(h, w, targets, 2.0, 7, 0.8),
        (hidden, weight),
        eps=1e-2,
        atol=2e-3,
        rtol=1e-2,
    )


def test_nll_is_the_logits_loss_and_ignores_padding_of_the_vocabulary() -> None:
    model = random_model()
    ids, targets = random_ids(2, 30), random_ids(2, 30, seed=9)
    targets[0, 5:9] = -1
    logits = model(ids)
    assert logits.shape == (2, 30, 100)
    assert logits.abs().max() <= 15
    assert model.head.weight.shape == (128, 32)
    expected = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
    ).view(2, 30)
    nll = model.nll(ids, targets)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.head.weight[100:] = 1e3
    torch.testing.assert_close(model.nll(ids, targets), nll)


def test_nll_under_a_temperature() -> None:
    model = random_model()
    ids, targets = random_ids(2, 30), random_ids(2, 30, seed=9)
    logits = model(ids) / 0.7
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    nll = model.nll(ids, targets, temperature=0.7)
    torch.testing.assert_close(nll.flatten(), expected, rtol=1e-4, atol=1e-5)
    for bad in (0.0, 0.49, math.inf, math.nan):
        with pytest.raises(UserError, match=r"temperature .* must be at least 0\.5"):
            model.nll(ids, targets, temperature=bad)


def test_loss_in_bfloat16_is_close() -> None:
    ids, targets = random_ids(2, 40), random_ids(2, 40, seed=9)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(dtype=dtype)
        loss = model.nll(ids, targets).mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        gradients.append((loss.item(), flat))
    (exact, g32), (low, g16) = gradients
    assert low == pytest.approx(exact, rel=0.02)
    assert F.cosine_similarity(g32, g16, dim=0) > 0.98


@pytest.mark.parametrize("variant", ["full", "portable"])
def test_recompute_gives_equal_gradients(variant: str) -> None:
    ids, targets = random_ids(2, 40), random_ids(2, 40, seed=9)
    gradients = []
    for recompute in (False, True):
        model = random_model(VARIANTS[variant])
        model.recompute = recompute
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        model.blocks[0].register_forward_pre_hook(count)
        model.nll(ids, targets).sum().backward()
        assert calls == (2 if recompute else 1)
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_loss_equals_eager_and_does_not_recompile_for_other_documents() -> None:
    torch._dynamo.reset()
    config = GPTConfig(
        vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, head_dim=8, context_length=16
    )
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = random_model(config)
    eager = random_model(config)
    model.token_losses = torch.compile(
        model._token_losses, fullgraph=True, dynamic=False, backend=counter
    )
    for seed in range(4):
        ids = random_ids(2, 16, seed=seed, vocab_size=64)
        cut = 3 + 2 * seed
        doc_ids = (torch.arange(16) >= cut).int().expand(2, 16)
        for m in (model, eager):
            m.zero_grad(set_to_none=True)
            m.nll(ids, ids.roll(-1, 1), doc_ids).sum().backward()
        for a, b in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# Initialisation


def test_init_statistics() -> None:
    config = GPTConfig(
        vocab_size=1000,
        n_layer=4,
        n_head=4,
        n_kv_head=2,
        n_embd=256,
        head_dim=64,
        context_length=64,
    )
    model = GPT(config).init_weights(7, words(config.vocab_size))
    bound = math.sqrt(3 / 256)
    for name, p in model.named_parameters():
        if name == "embedding.weight":
            assert p.std().item() == pytest.approx(0.8, rel=0.02)
        elif name == "byte_embedding.weight":
            assert p.std().item() == pytest.approx(0.3, rel=0.02)
        elif name == "head.weight":
            assert p.std().item() == pytest.approx(0.001, rel=0.02)
        elif name == "residual_scale":
            assert (p == 1).all()
        elif name in ("first_scale", "shift_scale") or name.endswith(
            ("out.weight", "down.weight", "gate.weight")
        ):
            assert (p == 0).all(), name
        else:
            assert p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(1 / 16, rel=0.03), name
            assert abs(p.mean().item()) < 0.002, name


def test_init_is_a_function_of_the_seed() -> None:
    a, b, c = (GPT(TINY).init_weights(seed, words(TINY.vocab_size)) for seed in (3, 3, 4))
    torch.manual_seed(0)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embedding.weight, c.embedding.weight)


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    model = GPT(TINY).init_weights(0, words(TINY.vocab_size))
    nll = model.nll(random_ids(2, 40), random_ids(2, 40, seed=1))
    assert nll.mean().item() == pytest.approx(math.log(100), abs=0.02)


def test_built_on_meta_every_parameter_is_initialised() -> None:
    with torch.device("meta"):
        model = GPT(TINY)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
        model.spelling.fill_(10**6)
    model.init_weights(3, TOKENS)
    expected = GPT(TINY).init_weights(3, TOKENS).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# Spelled embeddings


def test_an_embedding_is_in_part_the_sum_of_its_bytes_vectors() -> None:
    model = random_model()
    at = model.byte_embedding.weight.view(16, 256, -1)  # by position and byte
    for token, text in ((0, b"word"), (2, b"Word"), (3, b"w w w w w w w w "), (4, b""), (99, b"")):
        expected = model.embedding.weight[token].clone()
        for position, byte in enumerate(text):
            expected += at[position, byte]
        got = model._embedded(torch.tensor([token]))[0]
        torch.testing.assert_close(got, F.rms_norm(expected, (32,), eps=NORM_EPS))
    spelled = model.spelling
    assert torch.equal(spelled[0], spelled[1]), "the space before a word does not count"
    model.nll(torch.tensor([[3, 4]]), torch.tensor([[4, 3]])).sum().backward()
    moved = model.byte_embedding.weight.grad
    assert moved is not None
    assert moved.any(dim=1).nonzero().flatten().tolist() == sorted(spelled[3].tolist())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plain_model_is_the_same_function(variant: str) -> None:
    model = random_model(VARIANTS[variant])
    plain = model.plain()
    ids = random_ids(2, 30)
    assert torch.equal(plain(ids), model(ids))
    assert plain.config.spelling_bytes == 0
    assert plain.head.weight.data_ptr() == model.head.weight.data_ptr(), "no copy"
    assert (plain is model) == (variant == "portable")


# Shapes, counts, errors


def test_parameter_counts_and_flops() -> None:
    model = GPT(TINY)
    counts = model.num_parameters()
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["head"] == 128 * 32
    assert counts["embedding"] == (128 + 16 * 256) * 32
    plain = dataclasses.replace(TINY, windows=(), n_layer=1)
    single = GPT(plain)
    matrices = single.num_parameters()["block_matrices"] + single.num_parameters()["head"]
    # A causal query at t of 48 sees t + 1 keys: 24.5 on average.
    assert single.flops_per_token() == 6 * matrices + int(12 * 4 * 8 * 24.5)
    windowed = dataclasses.replace(TINY, windows=(2,), n_layer=1)
    seen = (1 + 2 * 47) / 48
    assert GPT(windowed).flops_per_token() == 6 * matrices + int(12 * 4 * 8 * seen)


def test_config_from_depth() -> None:
    config = config_from_depth(20, 65536)
    assert (config.n_embd, config.n_head, config.n_layer) == (1280, 10, 20)
    assert config.windows[:4] == (1024, 1024, 1024, 0)
    assert config.windows[-1] == 0
    assert config_from_depth(5, 100, head_dim=64).n_embd == 320
    assert config_from_depth(5, 100).n_embd == 384, "rounded up to whole heads"
    assert config_from_depth(2, 100, window_pattern="S").windows == (1024, 0), "the last sees all"
    portable = config_from_depth(4, 100, portable=True)
    assert portable.is_portable
    assert portable.windows == ()
    assert not config.is_portable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth 0"),
        ({"window_pattern": "SX"}, "SX"),
        ({"window_pattern": ""}, "may hold only S and L"),
        ({"kv_heads": 3}, "n_kv_head 3 must divide n_head 4"),
        ({"kv_heads": 0}, "0"),
        ({"kv_heads": -1}, "-1"),
        ({"head_dim": 3}, "head_dim 3"),
        ({"head_dim": 0}, "head-dim 0"),
        ({"head_dim": -2}, "head-dim -2"),
        ({"context_length": 0}, "context-length 0"),
        ({"aspect_ratio": 0}, "aspect-ratio 0"),
    ],
)
def test_impossible_shapes_are_user_errors(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"depth": 8, "vocab_size": 100, **change}
    with pytest.raises(UserError, match=message):
        config_from_depth(**settings)


def test_too_long_a_row_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"49 tokens .* context length 48"):
        random_model()(random_ids(1, 49))
    with pytest.raises(UserError, match="49 tokens"):
        random_model().nll(random_ids(1, 49), random_ids(1, 49))


def test_names_of_a_checkpoint() -> None:
    """The parameters' and the spelling's, no `_orig_mod.`: compiling does not rename anything."""
    model = GPT(TINY)
    names = [name for name, _ in model.named_parameters()]
    model.compile_loss()
    assert set(model.state_dict()) == {*names, "spelling"}
    assert [name for name, _ in model.named_parameters()] == names


def test_portable_model_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NanoChatConfig"):
        pytest.skip("this transformers has no nanochat model")
    config = dataclasses.replace(PORTABLE, n_embd=32)
    assert config.is_portable
    ours = random_model(config).eval()
    theirs_config = transformers.NanoChatConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=4 * config.n_embd,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=NORM_EPS,
        rope_theta=config.rope_base,
        final_logit_softcapping=config.softcap,
        attn_implementation="eager",
    )
    theirs = transformers.NanoChatForCausalLM(theirs_config).eval()
    state = {
        "model.embed_tokens.weight": ours.embedding.weight[: config.vocab_size],
        "lm_head.weight": ours.head.weight[: config.vocab_size],
    }
    names = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    }
    for i in range(config.n_layer):
        for mine, other in names.items():
            weight = ours.get_parameter(f"blocks.{i}.{mine}.weight")
            state[f"model.layers.{i}.{other}.weight"] = weight
    theirs.load_state_dict(state, strict=True)
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        got = ours(ids)
    assert expected.std() > 0.5, "logits that say something"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
