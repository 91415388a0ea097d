"""The engine: sampling, stopping, streaming, tools, scheduling, bad input."""

import gc
import math
import sys
import threading
import tracemalloc
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import processes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Scripted, ToolCaller, scripted, tiny_model, tiny_tokenizer

from nanochat.data.order import make_key
from nanochat.errors import UserError
from nanochat.hardware import tune_cpu
from nanochat.infer.decoder import Decoder
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Event, Request
from nanochat.infer.rows import Row
from nanochat.infer.sampling import Sampler, SamplingParams, uniforms
from nanochat.infer.transcript import Transcript, truncate_chat
from nanochat.kv_cache import KVCache
from nanochat.tools.tool import calculator_tool

# Sampling


def sampler_of(
    params: list[SamplingParams], vocab_size: int, history: list[int] | None = None
) -> Sampler:
    keys = [1234567 * (i + 1) for i in range(len(params))]
    return Sampler(params, keys, vocab_size, torch.device("cpu"), lambda row: history or [1])


def slow_distribution(
    logits: list[float], params: SamplingParams, seen: set[int]
) -> tuple[list[float], set[int]]:
    """The sampling distribution token by token, from the definitions."""
    r = params.repetition_penalty
    x = [(v / r if v > 0 else v * r) if token in seen else v for token, v in enumerate(logits)]
    x = [v / params.temperature for v in x]
    kept = set(range(len(x)))
    ranked = sorted(kept, key=lambda token: -x[token])
    if params.top_k:
        kept = set(ranked[: params.top_k])
    total = sum(math.exp(x[token]) for token in kept)
    if params.top_p < 1:
        reached, nucleus = 0.0, set()
        for token in ranked:
            if token in kept and reached < params.top_p:
                nucleus.add(token)
                reached += math.exp(x[token]) / total
        kept = nucleus
    kept = {token for token in kept if x[token] >= max(x) + math.log(params.min_p or 1e-300)}
    total = sum(math.exp(x[token]) for token in kept)
    return [math.exp(v) / total if t in kept else 0.0 for t, v in enumerate(x)], kept


SETTINGS = [
    SamplingParams(),
    SamplingParams(top_k=3),
    SamplingParams(top_p=0.6),
    SamplingParams(min_p=0.3),
    SamplingParams(temperature=0.5, top_k=7, top_p=0.9),
    SamplingParams(temperature=2.0, top_p=0.9, min_p=0.1, repetition_penalty=1.5),
    SamplingParams(temperature=0.8, top_k=100, top_p=0.5, repetition_penalty=0.7),
    SamplingParams(top_k=1),
    SamplingParams(top_p=1e-9),
]


@pytest.mark.parametrize("mixed", [False, True])
def test_draws_follow_the_stated_distribution(mixed: bool) -> None:
    """Frequencies and reported log-probabilities, one setting at a time and all in one batch."""
    V, rows, steps, seen = 12, 400, 10, [2, 5, 7]
    logits = (torch.randn(V, generator=torch.Generator().manual_seed(3)) * 2).tolist()
    counts = np.zeros((len(SETTINGS), V))
    batches = [SETTINGS * rows] if mixed else [[params] * rows for params in SETTINGS]
    for batch in batches:
        sampler = sampler_of(batch, V, seen)
        for step in range(steps):
            drawn = sampler.draw(torch.tensor([logits] * len(batch)), [step] * len(batch))
            for params, token, logprob in zip(batch, drawn[0], drawn[1], strict=True):
                counts[SETTINGS.index(params), token] += 1
                if counts.sum() % 40 == 0:
                    expected, kept = slow_distribution(logits, params, set(seen))
                    assert token in kept
                    assert math.exp(logprob) == pytest.approx(expected[token], rel=1e-4)
    for params, count in zip(SETTINGS, counts / (rows * steps), strict=True):
        expected = np.array(slow_distribution(logits, params, set(seen))[0])
        error = np.sqrt(expected * (1 - expected) / (rows * steps))
        assert (np.abs(count - expected) <= 4.5 * error + 1e-9).all(), params


def test_greedy_takes_the_largest_and_reports_the_plain_softmax() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    greedy = SamplingParams(temperature=0.0, top_p=0.1, top_k=2, min_p=0.5)
    for params in ([greedy, greedy], [greedy, SamplingParams(top_k=4)]):
        sampler = sampler_of(params, 9)
        tokens, logprobs, _ = sampler.draw(logits, [0, 0])
        assert tokens[0] == int(logits[0].argmax())
        assert logprobs[0] == pytest.approx(float(logits[0].log_softmax(-1).max()), abs=1e-6)


def test_equal_logits_are_kept_or_dropped_together() -> None:
    """The outcome cannot depend on how a sort happens to break ties."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    sampler = sampler_of([SamplingParams(top_k=2)], 5)
    drawn = {sampler.draw(logits, [step])[0][0] for step in range(200)}
    assert drawn == {1, 2, 3}


def test_looking_at_few_candidates_changes_nothing() -> None:
    """The short cut on CPUs, with ties (bfloat16 makes many) and wide distributions among them."""
    V = 1000
    mixtures = [
        [SamplingParams(top_k=40)],
        [SamplingParams(top_p=0.8), SamplingParams(top_k=5, top_p=0.5, min_p=0.1)],
        [SamplingParams(top_k=300), SamplingParams(top_p=0.95, temperature=1.5)],
    ]
    taken = 0
    for mixture in mixtures:
        rows = mixture * 8
        sampler, whole = (sampler_of(rows, V) for _ in range(2))
        assert sampler.num_candidates
        whole.num_candidates = 0
        for step in range(30):
            generator = torch.Generator().manual_seed(step)
            logits = torch.randn(len(rows), V, generator=generator) * (1 + step % 5)
            logits = logits.bfloat16().float()
            taken += sampler._limited(logits)[1] is not None
            tokens, logprobs, _ = sampler.draw(logits, [step] * len(rows))
            expected, expected_logprobs, _ = whole.draw(logits, [step] * len(rows))
            assert tokens == expected
            assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
    assert 30 < taken < 90  # both ways were gone


def test_a_seed_keeps_its_random_numbers() -> None:
    keys = np.full(3, make_key(1337, 3, 2), dtype=np.uint64)
    assert int(keys[0]) == 4306521615492894075
    expected = [0.19608306884765625, 0.5528751015663147, 0.5558859705924988]
    assert uniforms(keys, np.arange(3)).tolist() == expected


def test_uniforms_are_uniform_and_independent() -> None:
    keys = np.repeat(np.arange(40, dtype=np.uint64), 500)
    steps = np.tile(np.arange(500), 40)
    u = uniforms(keys, steps).reshape(40, 500).astype(np.float64)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    chi2 = ((counts - 400) ** 2 / 400).sum()
    assert 20 < chi2 < 95  # 49 degrees of freedom
    for other in (u[1:], np.roll(u, 1, axis=1)):  # neighbouring streams and steps
        n = len(other)
        assert abs(np.corrcoef(u[:n].ravel(), other.ravel())[0, 1]) < 0.03


def test_top_logprobs() -> None:
    model = tiny_model()
    engine = Engine(model, tiny_tokenizer())
    params = SamplingParams(max_tokens=6, top_logprobs=3, top_k=10)
    (plain,), (asked,) = engine.generate([[5, 6], [5, 6]], [SamplingParams(max_tokens=6), params])
    assert plain.top_logprobs == []
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, *asked.ids]]))[0, 1:-1]
    for best, row in zip(asked.top_logprobs, logits, strict=True):
        values, ids = row.topk(10)
        assert [token for token, _ in best] == ids[:3].tolist()
        expected = values.log_softmax(-1)[:3].tolist()
        assert [logprob for _, logprob in best] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"max_tokens": 0},
        {"stop": "text"},
        {"stop": ("",)},
        {"top_logprobs": -1},
    ],
)
def test_impossible_parameters(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingParams(**wrong)


# Text


@given(
    st.lists(st.integers(0, 299), max_size=40),
    st.lists(st.text("e\ufffd kit", min_size=1, max_size=3), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_streamed_text_is_whole_characters_up_to_the_stop(ids: list[int], stops: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    transcript = Transcript(tokenizer, tuple(stops))
    pieces, fed = [], []
    for token in ids:
        if transcript.stopped:
            break
        transcript.feed(token)
        fed.append(token)
        pieces += [text for _, text in transcript.take()]
        so_far = "".join(pieces)
        assert not any(stop in so_far for stop in stops)
        assert tokenizer.decode(ids).startswith(so_far)  # nothing given out is taken back
    transcript.end()
    pieces += [text for _, text in transcript.take()]
    whole = tokenizer.decode(fed)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert "".join(pieces) == (whole[: min(ends)] if ends else whole)
    assert transcript.stopped == bool(ends)


def saying(items: list[int | str]) -> Engine:
    """An engine whose model writes this, whatever it reads."""
    return Engine(scripted(items), tiny_tokenizer())


def test_terminal_tokens_end_the_completion_and_belong_to_it() -> None:
    for name in ("<|assistant_end|>", "<|bos|>"):
        (completion,) = saying(["the sea", name]).generate([[0]])[0]
        assert completion.text == "the sea"
        assert completion.finish_reason == "stop"
        assert completion.ids[-1] == tiny_tokenizer().special(name)
        assert completion.mask == [1] * len(completion.ids)


def test_stop_strings() -> None:
    engine = saying(["the king and the sea", "<|assistant_end|>"])
    (completion,) = engine.generate([[0]], SamplingParams(stop=("g a", "queen")))[0]
    assert completion.text == "the kin"
    assert completion.finish_reason == "stop"
    (completion,) = engine.generate([[0]], SamplingParams(stop=("seat",)))[0]
    assert completion.text == "the king and the sea"  # held back "sea" is given out at the end


def test_length() -> None:
    engine = saying(["the king and the sea"])
    (completion,) = engine.generate([[0]], SamplingParams(max_tokens=4))[0]
    assert completion.finish_reason == "length"
    assert len(completion.ids) == 4
    context = engine.context_length
    (completion,) = saying(["a"]).generate([[0] * 90], SamplingParams(max_tokens=500))[0]
    assert completion.finish_reason == "length"
    assert len(completion.ids) == context - 90


def test_streaming_gives_the_same_text_in_whole_characters() -> None:
    text = "naïve café 東京 🙂 the sea"
    engine = saying([text, "<|assistant_end|>"])
    events = list(engine.stream([0], SamplingParams(temperature=0.0)))
    assert "".join(event.text for event in events) == text
    assert all("\ufffd" not in event.text for event in events)
    assert len(events) > 10
    assert [event.finished for event in events] == [False] * (len(events) - 1) + [True]
    assert [event.tokens for event in events] == sorted(event.tokens for event in events)
    assert events[-1].completion.text == text
    assert engine.idle


def test_closing_a_stream_frees_its_row() -> None:
    engine = saying(["the sea "])
    stream = engine.stream([0], SamplingParams(max_tokens=50))
    next(stream)
    assert engine.num_rows == 1
    stream.close()
    assert engine.idle
    assert engine.cache_bytes == 0


# Tools


def test_a_tool_turn() -> None:
    """The output is forced after the call, is no sample of the model, and decoding goes on."""
    tokenizer = tiny_tokenizer()
    forced = [
        tokenizer.special("<|output_start|>"),
        *tokenizer.encode("46"),
        tokenizer.special("<|output_end|>"),
    ]
    call = ["<|python_start|>", "12 + 34", "<|python_end|>"]
    engine = saying(["said ", *call, *forced, " word", "<|assistant_end|>"])
    events = list(engine.stream([0]))
    completion = events[-1].completion
    assert completion.parts == [
        {"type": "text", "text": "said "},
        {"type": "python", "text": "12 + 34"},
        {"type": "python_output", "text": "46"},
        {"type": "text", "text": " word"},
    ]
    assert completion.text == "said  word"
    at = completion.ids.index(forced[0])
    assert completion.ids[at : at + len(forced)] == forced
    expected = [1] * len(completion.ids)
    expected[at : at + len(forced)] = [0] * len(forced)
    assert completion.mask == expected
    assert all(completion.logprobs[i] == 0.0 for i, m in enumerate(expected) if not m)
    streamed = [(event.type, event.text) for event in events]
    for kind in ("text", "python", "python_output"):
        said = "".join(p["text"] for p in completion.parts if p["type"] == kind)
        assert "".join(text for k, text in streamed if k == kind) == said
    # What the model reads next time is what it wrote and read this time.
    rendered, _ = tokenizer.render_conversation(
        {"messages": [{"role": "assistant", "content": completion.parts}]}
    )
    assert rendered[2:] == completion.ids


def test_a_failing_tool_answers_with_a_short_text() -> None:
    assert calculator_tool("1 + 1") == "2"
    assert calculator_tool("1 / 0").startswith("error: ")
    assert calculator_tool("__import__('os')").startswith("error: ")

    def broken(source: str) -> str:
        raise RuntimeError("no disk")

    call = ["<|python_start|>", "1", "<|python_end|>", "a"]
    engine = saying([*call])
    engine._tool = broken
    (completion,) = engine.generate([[0]], SamplingParams(max_tokens=30))[0]
    assert {"type": "python_output", "text": "error: no disk"} in completion.parts


def test_tools_can_be_off_and_other_ones_plugged_in() -> None:
    tokenizer = tiny_tokenizer()
    engine = saying(["<|python_start|>", "the sea", "<|python_end|>", " a", "<|assistant_end|>"])
    engine._tool = None
    (completion,) = engine.generate([[0]])[0]
    assert [part["type"] for part in completion.parts] == ["python", "text"]
    assert 0 not in completion.mask

    asked = []
    assert engine._decoder is not None
    engine = Engine(
        engine._decoder, tokenizer, tools=lambda source: asked.append(source) or "yes" * 5000
    )
    (completion,) = engine.generate([[0]], SamplingParams(max_tokens=90))[0]
    assert asked == ["the sea"]
    assert completion.finish_reason == "length"  # the forced output was cut at the limit
    assert len(completion.ids) == 90


def test_a_slow_tool_does_not_hold_up_other_rows() -> None:
    """The sample it belongs to is the same as with a fast one."""
    model, tokenizer = ToolCaller(tiny_model()), tiny_tokenizer()
    params = SamplingParams(max_tokens=60, seed=4)
    fast = Engine(model, tokenizer, tools=lambda source: "7").generate([[1, 2], [3]], params, 2)
    assert any(0 in sample.mask for samples in fast for sample in samples)

    gate = threading.Event()
    engine = Engine(model, tokenizer, tools=lambda source: "7" if gate.wait(60) else "")
    caller = engine.submit([1, 2], params, 2, index=0)
    other = engine.submit([3], params, 2, index=1)
    quiet = engine.submit([5], SamplingParams(max_tokens=3, temperature=0.0))
    while not quiet.finished:
        engine.step()
    for _ in range(40):
        if any(row.tool is not None for row in engine._rows):
            break
        engine.step()
    before = engine.completion_tokens
    engine.step()
    assert engine.completion_tokens > before  # some wait, some go on
    assert not caller.finished
    assert engine._slots.cache is not None
    held = engine._slots.cache.lengths[: engine.num_rows].tolist()
    assert [row.position for row in engine._rows] == held
    gate.set()
    while not engine.idle:
        engine.step()
    assert [c.ids for c in caller.completions] == [c.ids for c in fast[0]]
    assert [c.ids for c in other.completions] == [c.ids for c in fast[1]]


# Guesses


class Guessing(Scripted):
    """Counts its passes; reads guesses too."""

    guesses = 4
    passes = 0

    def next_logits(self, *arguments: Any) -> torch.Tensor:
        self.passes += 1
        return super().next_logits(*arguments)

    def logits_after_each(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        start = int(cache.lengths[0]) + 1 - len(self.prompt)
        self.passes += 1
        logits = super().logits_after_each(ids, cache) * 0
        for t in range(ids.shape[1]):
            logits[0, t, self.script[min(start + t, len(self.script) - 1)]] = 100.0
        return logits


PHRASE = [5, 9, 7, 3, 8, 6, 4, 2]


def guessed(script: list[int | str], params: SamplingParams, *prompt: int) -> tuple[Any, int]:
    """Decode alone, with guesses and without; returns the completion and the passes with them."""
    found, passes = [], []
    for guesses in (0, 4):
        decoder = scripted(script, Guessing)
        decoder.guesses = guesses
        events = list(Engine(decoder, tiny_tokenizer()).stream([0, *prompt], params))
        found.append(([(e.type, e.text, e.tokens, e.finished) for e in events], events[-1]))
        passes.append(decoder.passes)
    assert found[0][0] == found[1][0]
    completion = found[1][1].completion
    assert completion == found[0][1].completion
    assert passes[0] == len(completion.ids)
    return completion, passes[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_the_row_said_before_is_read_at_once(temperature: float) -> None:
    """The first two tokens of a phrase are drawn one by one, then five in a pass."""
    end = "<|assistant_end|>"
    params = SamplingParams(temperature=temperature)
    completion, passes = guessed([*PHRASE, end], params, *PHRASE)
    assert len(completion.ids) == 9
    # The prompt's pass gives 1 token and a pass without a guess 1; then come 5, and 1 with the end.
    assert passes == 4
    completion, passes = guessed([*PHRASE[:4], 1, *PHRASE[4:], end], params, *PHRASE)
    assert completion.ids[:9] == [*PHRASE[:4], 1, *PHRASE[4:]]
    assert passes == 6


def test_a_guess_goes_no_further_than_the_answer() -> None:
    """A limit, a stop string or an end inside of what was guessed; a period; a penalty."""
    for limit in range(1, 10):
        completion, _ = guessed([*PHRASE, 1], SamplingParams(max_tokens=limit), *PHRASE)
        assert (len(completion.ids), completion.finish_reason) == (limit, "length")
    text = tiny_tokenizer().encode("the king and the sea")
    completion, passes = guessed([*text, 1], SamplingParams(stop=("g a",)), *text)
    assert (completion.text, completion.finish_reason) == ("the kin", "stop")
    assert passes < len(completion.ids)
    end = tiny_tokenizer().special("<|assistant_end|>")
    completion, _ = guessed([5, 9, 7, end], SamplingParams(), 5, 9, 7, end, 5, 9, 7, end, 5)
    assert completion.ids == [5, 9, 7, end]
    _, passes = guessed([5], SamplingParams(max_tokens=50))
    assert passes == 14  # one token again and again: the first 3 and the last 2 one by one
    _, passes = guessed([5], SamplingParams(max_tokens=50, repetition_penalty=1.5))
    assert passes == 50


def test_a_call_inside_of_a_guess() -> None:
    """Output of the tool takes the place of what it said the last time, and is read at once."""
    tokenizer = tiny_tokenizer()
    call = [tokenizer.special("<|python_start|>"), *tokenizer.encode("12 + 34")]
    call.append(tokenizer.special("<|python_end|>"))
    output = [tokenizer.special("<|output_start|>"), *tokenizer.encode("46")]
    output.append(tokenizer.special("<|output_end|>"))
    said = [tokenizer.special("<|output_start|>"), *tokenizer.encode("9")]  # a wrong one before
    script: list[int | str] = [*call, *output, *tokenizer.encode(" a"), "<|assistant_end|>"]
    completion, passes = guessed(script, SamplingParams(top_logprobs=2), *call, *said)
    assert [part["text"] for part in completion.parts] == ["12 + 34", "46", " a"]
    assert passes <= len(completion.ids) // 2


def test_only_a_row_that_is_alone_is_guessed() -> None:
    decoder = scripted([*PHRASE, *PHRASE], Guessing)
    engine = Engine(decoder, tiny_tokenizer())
    engine.generate([[0], [0]], SamplingParams(max_tokens=16))
    assert decoder.passes == 16


# Scheduling


def steps_by_shape(few: bool, max_slots: int) -> tuple[set[tuple[int, int]], list[list[int]]]:
    """Shapes (rows, slots) of steps of 64 answers of many lengths, and the greedy answers."""
    shapes: set[tuple[int, int]] = set()

    class Watched(Decoder):
        def next_logits(self, ids: torch.Tensor, cache: KVCache, *counts: Any) -> torch.Tensor:
            if ids.shape[1] == 1:
                shapes.add((len(ids), cache.keys[0].shape[2]))
            return super().next_logits(ids, cache, *counts)

    rng = Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(2, 120))] for _ in range(64)]
    params = [SamplingParams(temperature=0.0, max_tokens=rng.randint(2, 250)) for _ in prompts]
    model = tiny_model(n_layer=1, windows=(0,), context_length=512)
    engine = Engine(Watched(model), tiny_tokenizer(), max_slots=max_slots)
    engine._slots.few_shapes = few
    return shapes, [one.ids for (one,) in engine.generate(prompts, params)]


@pytest.mark.parametrize("max_slots", [64, 24])
def test_steps_on_a_gpu_have_few_shapes(max_slots: int) -> None:
    """A row count is a power of two and the cache doubles; the answers are the same."""
    many, expected = steps_by_shape(False, max_slots)
    few, got = steps_by_shape(True, max_slots)
    assert got == expected
    assert len(many) >= 3 * len(few)
    assert {rows for rows, _ in few} <= {1, 2, 4, 8, 16, 32, 64, max_slots}
    assert {slots for _, slots in few} <= {256, 520}


def test_rows_are_freed_and_refilled() -> None:
    """No more rows than slots, and never an idle slot while samples wait."""
    engine = Engine(tiny_model(), tiny_tokenizer(), max_slots=3, prefill_tokens=64)
    requests = [
        engine.submit([1 + i], SamplingParams(max_tokens=1 + 3 * i), num_samples=2)
        for i in range(5)
    ]
    seen = []
    while not engine.idle:
        engine.step()
        seen.append(engine.num_rows)
    assert max(seen) == 3
    assert all(request.finished for request in requests)
    # 80 tokens in three rows: 27 steps at best.
    assert engine.completion_tokens == sum(2 * (1 + 3 * i) for i in range(5)) == 70
    assert len(seen) <= 70 / 3 + 13 + 2


def test_a_long_prompt_is_read_between_steps() -> None:
    engine = Engine(tiny_model(), tiny_tokenizer(), prefill_tokens=8)
    short = engine.submit([1], SamplingParams(max_tokens=40))
    engine.step()
    long = engine.submit(list(range(80)), SamplingParams(max_tokens=2))
    decoded = []
    while not long.finished:
        engine.step()
        decoded.append(len(short.completions[0].ids))
    assert len(decoded) >= 10
    assert decoded == list(range(decoded[0], decoded[0] + len(decoded)))


def test_cancel() -> None:
    engine = Engine(tiny_model(), tiny_tokenizer(), max_slots=2, prefill_tokens=4)
    params = SamplingParams(max_tokens=20, seed=2)
    alone = engine.generate([[5, 6, 7]], params)[0][0]
    for steps in range(4):
        kept = engine.submit([5, 6, 7], params)
        dropped = [engine.submit(list(range(10)), params, 3), engine.submit([9], params)]
        for _ in range(steps):
            engine.step()
        for request in dropped:
            engine.cancel(request)
            engine.cancel(request)
        while not engine.idle:
            assert all(event.request is kept for event in engine.step())
        assert kept.completions[0].ids == alone.ids
        assert engine.cache_bytes == 0


def test_an_interrupted_generate_leaves_a_clean_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(), tiny_tokenizer(), max_slots=2)
    before = engine.generate([[1], [2], [3]], SamplingParams(max_tokens=5))
    original, calls = engine.step, []

    def interrupted() -> list[Event]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1], [2], [3]], SamplingParams(max_tokens=5))
    assert engine.idle
    assert engine.generate([[1], [2], [3]], SamplingParams(max_tokens=5)) == before


def test_reset_after_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())
    expected = engine.generate([[1]], SamplingParams(max_tokens=5))
    engine.submit([1, 2], SamplingParams(max_tokens=5))
    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "next_logits", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.reset()
    assert engine.idle
    assert engine.generate([[1]], SamplingParams(max_tokens=5)) == expected


def test_the_cache_follows_the_requests() -> None:
    """The cache's size follows the requests, not the context; nothing stays when idle."""
    model = tiny_model(context_length=4096)
    engine = Engine(model, tiny_tokenizer())
    per_slot = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, head dim, bytes
    engine.submit([1, 2, 3], SamplingParams(max_tokens=10))
    engine.step()
    assert engine.cache_bytes <= 16 * per_slot
    engine.submit(list(range(200)), SamplingParams(max_tokens=2000))
    engine.step()
    assert 2 * 200 * per_slot <= engine.cache_bytes <= 2 * 320 * per_slot
    engine.reset()
    assert engine.cache_bytes == 0


def test_the_cache_is_in_the_compute_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(tiny_model(dtype), tiny_tokenizer())
        engine.submit([1, 2, 3], SamplingParams(max_tokens=10))
        engine.step()
        cache = engine._slots.cache
        assert cache is not None
        assert {t.dtype for t in (*cache.keys, *cache.values)} == {dtype}
        engine.reset()


def test_a_thousand_requests_leave_nothing_behind() -> None:
    engine = Engine(tiny_model(n_layer=1, windows=()), tiny_tokenizer(), max_slots=8)

    def serve(count: int) -> None:
        for i in range(0, count, 10):
            for j in range(10):
                engine.submit([1 + j] * (1 + (i + j) % 30), SamplingParams(max_tokens=2, seed=i))
            while not engine.idle:
                engine.step()

    serve(100)
    gc.collect()
    tracemalloc.start()
    try:
        held = []
        for count in (100, 1000, 1000):
            serve(count)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # Free lists fill up once, then nothing grows.
    assert min(held[1] - held[0], held[2] - held[1]) < 100_000
    assert not [o for o in gc.get_objects() if type(o) in (KVCache, Row, Request)]


def resident_after(counts: list[int], pipe: Connection) -> None:
    """Bytes this process holds after so many requests of ever new lengths."""
    import resource

    tune_cpu()
    model = tiny_model(torch.bfloat16, n_layer=1, windows=(), context_length=512)
    engine, random, done = Engine(model, tiny_tokenizer(), max_slots=8), Random(0), 0
    held = []
    for count in counts:
        while done < count:
            for _ in range(5):
                prompt = [1] * random.randint(1, 400)
                engine.submit(prompt, SamplingParams(max_tokens=random.randint(1, 4), seed=done))
                done += 1
            while not engine.idle:
                engine.step()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append(pages * resource.getpagesize())
    pipe.send(held)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_ever_new_lengths_leave_nothing_behind() -> None:
    """Libraries keep kernels for shapes they have met; their number is bounded."""
    receiver, sender = processes.context.Pipe(duplex=False)
    assert processes.finish(processes.start(resident_after, [200, 500], sender)) == 0
    early, late = receiver.recv()
    # 7 to 25 MiB were seen; kernels of 300 more lengths would take 180.
    assert late - early < 64 * 2**20


# Bad input


def test_bad_prompts() -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())
    for prompt, message in (
        ([], "empty"),
        ([-1], "ids outside"),
        ([100000], "ids outside"),
        ([0] * 96, r"leaves no room .* context of 96; .* mid_train --context-length"),
        ([0] * 5000, "leaves no room"),
    ):
        with pytest.raises(UserError, match=message):
            engine.generate([prompt])
    assert engine.idle
    with pytest.raises(UserError, match="num_samples"):
        engine.generate([[1]], num_samples=0)
    assert engine.generate([]) == []
    assert len(engine.generate([[0] * 95])[0][0].ids) == 1
    with pytest.raises(UserError, match="the tokenizer has"):
        Engine(tiny_model(vocab_size=500), tiny_tokenizer())


# Long chats


def chat(*texts: str, system: str | None = None) -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    for i, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    return {"messages": messages}


def test_truncate_chat() -> None:
    tokenizer = tiny_tokenizer()
    turns = [f"word {i} and the sea" for i in range(41)]
    conversation = chat(*turns, system="the king")
    whole = len(tokenizer.render_for_completion(conversation))
    assert truncate_chat(conversation, tokenizer, whole) == (conversation, "")
    for limit in (whole - 1, whole // 2, 100, 60):
        cut, notice = truncate_chat(conversation, tokenizer, limit)
        kept = cut["messages"]
        size = len(tokenizer.render_for_completion(cut))
        assert size <= limit
        assert kept[0] == conversation["messages"][0]  # the system message
        assert kept[1]["role"] == "user"
        assert kept[1:] == conversation["messages"][-len(kept) + 1 :]  # the newest turns
        assert str(len(turns) + 1 - len(kept)) in notice
        # One turn pair more would not have fitted.
        more = {"messages": kept[:1] + conversation["messages"][-len(kept) - 1 :]}
        assert len(tokenizer.render_for_completion(more)) > limit


@pytest.mark.parametrize("system", [None, "short", "long " * 200])
def test_truncate_chat_cuts_a_message_that_is_too_long_itself(system: str | None) -> None:
    tokenizer = tiny_tokenizer()
    text = "東京 🙂 the sea " * 50 + "END"
    conversation = chat("one", "two", text, system=system)
    for limit in (8, 20, 60):
        cut, notice = truncate_chat(conversation, tokenizer, limit)
        assert len(tokenizer.render_for_completion(cut)) <= limit
        assert cut["messages"][-1]["content"].endswith("END"[-(limit - 6) :])
        assert notice
    with pytest.raises(UserError, match="allow more"):
        truncate_chat(conversation, tokenizer, 4)


def test_truncate_chat_without_users_or_with_an_answer() -> None:
    tokenizer = tiny_tokenizer()
    cut, _ = truncate_chat(chat("the sea", "a word"), tokenizer, 500)
    assert [m["role"] for m in cut["messages"]] == ["user"]
    lonely = {"messages": [{"role": "system", "content": "the sea " * 100}]}
    cut, notice = truncate_chat(lonely, tokenizer, 30)
    assert len(tokenizer.render_for_completion(cut)) <= 30
    assert notice
