"""Samples during training: continuations of a few texts, and answers to a few questions."""

from nanochat.gpt import GPT
from nanochat.infer.engine import Engine
from nanochat.infer.sampling import SamplingParams
from nanochat.tokenizer import SystemStyle, Tokenizer

BEGINNINGS = ("In the beginning", "The king said to his men,", "And it came about that", "")
QUESTIONS = ("Who are you?", "What is 17 + 25?", "Spell the word stone.")
LENGTH = 48
"""Largest number of tokens of a sample."""


def sample_texts(
    model: GPT, tokenizer: Tokenizer, temperature: float = 0.8, seed: int = 0
) -> list[tuple[str, str]]:
    """Continue a few texts; returns (beginning, continuation) of those that fit the context."""
    prompts = {text: [tokenizer.bos, *tokenizer.encode(text)] for text in BEGINNINGS}
    return _continued(model, tokenizer, prompts, temperature, seed)


def sample_answers(
    model: GPT, tokenizer: Tokenizer, system: SystemStyle = "tokens", seed: int = 0
) -> list[tuple[str, str]]:
    """Answer a few questions; returns (question, answer) of those that fit the context."""
    prompts = {}
    for question in QUESTIONS:
        conversation = {"messages": [{"role": "user", "content": question}]}
        prompts[question] = tokenizer.render_for_completion(conversation, system)
    found = _continued(model, tokenizer, prompts, 0.8, seed)
    return [(question, "\n" + answer) for question, answer in found]


def _continued(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: dict[str, list[int]],
    temperature: float,
    seed: int,
) -> list[tuple[str, str]]:
    context = model.config.context_length
    fitting = {text: ids for text, ids in prompts.items() if len(ids) < context}
    if not fitting:
        return []
    room = context - max(map(len, fitting.values()))
    params = SamplingParams(
        temperature=temperature, top_k=50, max_tokens=min(LENGTH, room), seed=seed
    )
    answers = Engine(model, tokenizer).generate(list(fitting.values()), params)
    return [(text, samples[0].text) for text, samples in zip(fitting, answers, strict=True)]
