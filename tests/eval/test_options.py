"""Option likelihoods: sharing the prompt changes nothing; intervals and records are right."""

import random

import pytest
import torch

from benchmarks.common import words
from nanochat.eval import options as scoring
from nanochat.eval import results
from nanochat.eval.options import GPTScorer, LogitsScorer, crop, length_blocks
from nanochat.eval.results import wilson_interval
from nanochat.gpt import GPT, GPTConfig

V, CONTEXT = 50, 40


@pytest.fixture(scope="module")
def model() -> GPT:
    config = GPTConfig(
        vocab_size=V,
        n_layer=3,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        head_dim=8,
        context_length=CONTEXT,
        windows=(5, 0, 7),
    )
    model = GPT(config).init_weights(0, words(config.vocab_size))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # the initial output projections are zero
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def reference(model: GPT, prompt: list[int], option: list[int]) -> tuple[float, bool]:
    """One row, one forward pass, no batch, no cache."""
    row = torch.tensor([prompt + option])
    logits = model(row[:, :-1])[0, len(prompt) - 1 :]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(option)[:, None]).sum().item()
    return chosen, bool((logits.argmax(-1) == torch.tensor(option)).all())


def problems(seed: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Ragged prompts and options of all three kinds, some filling the context exactly."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(V) for _ in range(n)]

    prompts, options = [], []
    for kind in ("single tokens", "one option", "ragged") * 4:
        lengths = {
            "single tokens": [1] * rng.randint(2, 5),
            "one option": [rng.randint(1, 6)],
            "ragged": [1, *(rng.randint(1, 6) for _ in range(rng.randint(1, 4)))],
        }[kind]
        room = CONTEXT + 1 - max(lengths)
        prompts.append(ids(room if rng.random() < 0.3 else rng.randint(1, room)))
        options.append([ids(n) for n in lengths])
    return prompts, options


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("small_batches", [False, True])
def test_shared_prompt_scores_like_separate_rows(
    model: GPT, seed: int, small_batches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_batches:
        monkeypatch.setattr(scoring, "BATCH_SLOTS", 200)
        monkeypatch.setattr(scoring, "BATCH_LOGITS", 7 * V)
    prompts, options = problems(seed)
    shared = GPTScorer(model).score(prompts, options)
    separate = LogitsScorer(model, CONTEXT, V).score(prompts, options)
    for prompt, choices, ours, others in zip(prompts, options, shared, separate, strict=True):
        assert len(ours) == len(others) == len(choices)
        for choice, one, other in zip(choices, ours, others, strict=True):
            logprob, greedy = reference(model, prompt, choice)
            assert one.logprob == pytest.approx(logprob, abs=2e-5)
            assert other.logprob == pytest.approx(logprob, abs=2e-5)
            assert one.greedy == other.greedy == greedy
            assert one.num_tokens == other.num_tokens == len(choice)


def test_greedy_options_are_recognised(model: GPT) -> None:
    """Random options are never the most likely ones: build some that are, and spoil the last."""
    prompt, option = [3, 1, 4, 1, 5], []
    for _ in range(4):
        option.append(int(model(torch.tensor([prompt + option]))[0, -1].argmax()))
    spoilt = [*option[:-1], (option[-1] + 1) % V]
    for scorer in (GPTScorer(model), LogitsScorer(model, CONTEXT, V)):
        both, alone = scorer.score([prompt, prompt], [[option, spoilt], [option]])
        assert [scored.greedy for scored in both] == [True, False]
        assert alone[0].greedy


def test_crop_keeps_the_end_and_the_same_context_for_all_options() -> None:
    prompt, options = list(range(10)), [[1, 2, 3], [4]]
    assert crop(prompt, options, 12) == (prompt, options, False)
    short, same, cut = crop(prompt, options, 8)  # 6 + 3 - 1 tokens are read
    assert (list(short), same, cut) == ([4, 5, 6, 7, 8, 9], options, True)
    short, same, cut = crop(prompt, [[1, 2, 3, 4, 5], [6]], 4)
    assert (list(short), [list(o) for o in same], cut) == ([9], [[2, 3, 4, 5], [6]], True)


def test_blocks_cover_everything_once_longest_first() -> None:
    lengths = [3, 9, 1, 9, 5]
    assert length_blocks(lengths, 2) == [[1, 3], [4, 0], [2]]


def test_wilson_interval_known_values() -> None:
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
    for correct, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_task_result_is_centred() -> None:
    result = results.task_result(62.5, 100, 0.25, note="x")
    assert result["accuracy"] == 0.625
    assert result["centered"] == pytest.approx(0.5)
    assert result["note"] == "x"
