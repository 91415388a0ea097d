"""Law 8: decoding with a key/value cache computes what reading everything anew computes.

And the engine's own law: a sample depends on nothing but its prompt, its parameters and the name of
its random stream.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import ToolCaller, likes_tools, tiny_model, tiny_tokenizer

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.infer.decoder import Decoder
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Completion
from nanochat.infer.sampling import SamplingParams
from nanochat.infer.transcript import truncate_chat

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "portable": {
        "windows": (),
        "value_embeddings": False,
        "residual_scalars": False,
        "token_shift": False,
        "spelling_bytes": 0,
        "n_kv_head": 4,
    },
    "one kv head, other rotary bases": {
        "n_kv_head": 1,
        "rope_base": 60000.0,
        "windowed_rope_base": 9000.0,
    },
    "no windows": {"windows": ()},
}


def random_ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 300, (length,), generator=generator).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_cached_equals_full_for_ragged_chunks(variant: str, seed: int) -> None:
    """Rows of different lengths, fed in random chunks with random padding."""
    model = tiny_model(**VARIANTS[variant])
    generator = torch.Generator().manual_seed(seed)
    lengths = [37, 1, 20, 52]
    rows = [random_ids(n, seed * 10 + i) for i, n in enumerate(lengths)]
    decoder = Decoder(model)
    cache, twin = (m.new_cache(len(rows), max(lengths)) for m in (model, decoder))
    done = [0] * len(rows)
    got: list[list[torch.Tensor]] = [[] for _ in rows]
    with torch.no_grad():
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            T = int(torch.randint(1, 12, (), generator=generator))
            counts = [
                min(n - d, int(torch.randint(0, T + 1, (), generator=generator)))
                for d, n in zip(done, lengths, strict=True)
            ]
            ids = torch.full((len(rows), T), 7)
            for i, (d, c) in enumerate(zip(done, counts, strict=True)):
                ids[i, :c] = torch.tensor(rows[i][d : d + c], dtype=torch.int64)
            logits = model(ids, cache=cache, counts=torch.tensor(counts))
            last = decoder.next_logits(ids, twin, torch.tensor(counts))
            for i, c in enumerate(counts):
                got[i].append(logits[i, :c])
                done[i] += c
                if c:
                    torch.testing.assert_close(last[i], logits[i, c - 1], atol=2e-4, rtol=0)
        assert cache.lengths.tolist() == twin.lengths.tolist() == lengths
        for i, row in enumerate(rows):
            torch.testing.assert_close(
                torch.cat(got[i]), model(torch.tensor([row]))[0], atol=2e-4, rtol=0
            )


def recomputed(
    model: GPT,
    prompt: list[int],
    completion: Completion,
    change: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
) -> torch.Tensor:
    """Log-probabilities (len(completion.ids),) from one pass over everything."""
    with torch.no_grad():
        logp = change(model(torch.tensor([prompt + completion.ids]))).log_softmax(dim=-1)[0]
    return logp[len(prompt) - 1 : -1].gather(1, torch.tensor(completion.ids)[:, None])[:, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_equals_full_recomputation(variant: str) -> None:
    """Prompts of any length, chunked prefill, shared prompts, rows that come and go, tool turns."""
    model = tiny_model(**VARIANTS[variant])
    engine = Engine(ToolCaller(model), tiny_tokenizer(), max_slots=5, prefill_tokens=16)
    prompts = [random_ids(n, n) for n in (3, 50, 17, 1, 16, 33, 70)]
    params = [SamplingParams(max_tokens=n, seed=1) for n in (40, 9, 25, 30, 1, 60, 90)]
    calls = 0
    for prompt, samples in zip(prompts, engine.generate(prompts, params, 2), strict=True):
        for completion in samples:
            sampled = torch.tensor(completion.mask, dtype=torch.bool)
            expected = recomputed(model, prompt, completion, likes_tools).masked_fill(~sampled, 0.0)
            torch.testing.assert_close(
                torch.tensor(completion.logprobs), expected, atol=2e-4, rtol=0
            )
            calls += sum(part["type"] == "python_output" for part in completion.parts)
            forced = [t for t, m in zip(completion.ids, completion.mask, strict=True) if not m]
            assert bool(forced) == ("python_output" in {p["type"] for p in completion.parts})
            assert len(prompt) + len(completion.ids) <= model.config.context_length
    assert calls >= 10  # the model did use its tool


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_does_not_depend_on_its_company(temperature: float) -> None:
    """The tokens are the same alone, among others, in any slot, batch size and chunking."""
    model = ToolCaller(tiny_model())
    tokenizer = tiny_tokenizer()
    prompts = [random_ids(n, n) for n in (5, 40, 12, 1, 30, 8)]
    company = [
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"top_k": 50, "top_p": 0.9, "temperature": 0.7},
        {},
    ]
    params = [
        SamplingParams(max_tokens=10 + 6 * i, seed=9, **{"temperature": temperature, **settings})
        for i, settings in enumerate(company)
    ]
    together = Engine(model, tokenizer, max_slots=32).generate(prompts, params, 3)
    for slots, chunk in ((1, 512), (2, 7), (4, 16)):
        assert Engine(model, tokenizer, max_slots=slots, prefill_tokens=chunk).generate(
            prompts, params, 3
        ) == Nearly(together)
    alone = [
        Engine(model, tokenizer).generate([prompt], p, 3, indices=[i])[0]
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
    ]
    assert alone == Nearly(together)
    if temperature:
        firsts = {sample.ids[0] for samples in together[5:] for sample in samples}
        assert len(firsts) > 1  # samples of a prompt do not share their first token


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_guesses_change_no_answer(variant: str, temperature: float) -> None:
    """Rows that are alone in the engine give the same tokens in fewer passes."""
    model = tiny_model(**VARIANTS[variant])
    prompts = [random_ids(n, n) for n in (3, 40, 1, 70)]
    kinds: list[dict[str, Any]] = [{}, {"top_k": 8}, {"top_logprobs": 2}, {"stop": ("1",)}]
    params = [
        SamplingParams(max_tokens=n, seed=5, temperature=temperature, **kind)
        for n, kind in zip((80, 33, 95, 90), kinds, strict=True)
    ]
    found, passes = {}, {}
    for guesses in (0, 4):
        decoder = CountingCaller(model)
        decoder.guesses = guesses
        engine = Engine(decoder, tiny_tokenizer(), max_slots=1)
        found[guesses] = engine.generate(prompts, params, 2)
        passes[guesses] = decoder.passes
    assert found[4] == Nearly(found[0])
    best = {
        guesses: [
            [[token for token, _ in top] for top in sample.top_logprobs]
            for samples in answers
            for sample in samples
        ]
        for guesses, answers in found.items()
    }
    assert best[4] == best[0]
    assert passes[4] < 0.85 * passes[0]


class CountingCaller(ToolCaller):
    passes = 0

    def hidden(self, *arguments: Any) -> torch.Tensor:
        self.passes += 1
        return super().hidden(*arguments)


class Nearly:
    """Completions are equal up to the rounding of their log-probabilities."""

    def __init__(self, expected: list[list[Completion]]):
        self.expected = expected

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, list)
        for mine, theirs in zip(self.expected, other, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert (a.ids, a.mask, a.finish_reason, a.parts) == (
                    b.ids,
                    b.mask,
                    b.finish_reason,
                    b.parts,
                )
                assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)
        return True


def test_reduced_precision_decodes_like_its_model() -> None:
    """bfloat16: the decoding copy's weights are those the model casts to anyway."""
    model = tiny_model(torch.bfloat16)
    prompts = [random_ids(n, n) for n in (4, 21)]
    engine = Engine(model, tiny_tokenizer())
    for prompt, (completion,) in zip(
        prompts, engine.generate(prompts, SamplingParams(max_tokens=20)), strict=True
    ):
        expected = recomputed(model, prompt, completion)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=0.15, rtol=0)


def test_decoding_follows_the_weights() -> None:
    """A training step between two calls (RL) is seen, also where weights are copied."""
    model = tiny_model(torch.bfloat16)
    engine = Engine(model, tiny_tokenizer())
    before = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=30))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    after = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=30))
    fresh = Engine(model, tiny_tokenizer()).generate([[1, 2, 3]], SamplingParams(max_tokens=30))
    assert after == fresh != before


def test_a_prompt_is_read_once_for_all_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    read = 0
    original = Decoder.next_logits

    def counting(self: Decoder, ids: torch.Tensor, cache: Any, counts: Any = None) -> torch.Tensor:
        nonlocal read
        if ids.shape[1] > 1:
            read += ids.numel()
        return original(self, ids, cache, counts)

    monkeypatch.setattr(Decoder, "next_logits", counting)
    engine = Engine(model, tiny_tokenizer(), max_slots=3)
    engine.generate([random_ids(40, 0)], SamplingParams(max_tokens=3), num_samples=8)
    assert read == 40
    assert engine.prompt_tokens == 40


def test_beyond_the_training_length() -> None:
    """Too long a prompt is refused, a cut chat is answered within the context, never past it."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    engine = Engine(model, tokenizer)
    context = model.config.context_length
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": f"word {i} and the sea"}
        for i in range(31)
    ]
    whole = tokenizer.render_for_completion({"messages": turns})
    assert len(whole) > context
    with pytest.raises(UserError, match=f"the context of {context}"):
        engine.generate([whole])
    cut, notice = truncate_chat({"messages": turns}, tokenizer, context - 20)
    assert "left out" in notice
    prompt = tokenizer.render_for_completion(cut)
    (completion,) = engine.generate([prompt], SamplingParams(max_tokens=500, seed=1))[0]
    assert len(prompt) + len(completion.ids) <= context
    expected = recomputed(model, prompt, completion)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-4, rtol=0)
