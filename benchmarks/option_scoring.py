"""Compare scoring of options that share their prompt with scoring each option separately.

    python -m benchmarks.option_scoring [--hub] [--json out.json]

There are two hundred questions like MMLU's (made up, or real ones with --hub) and a depth-6 model
with random weights. "chat_eval" is that script's whole evaluation of the task, which reads the
letters' log-probabilities from one pass over the prompt. "texts" is the scoring of options that are
texts, as in CORE: the prompt's keys and values are copied for each option. Scored separately, each
option takes a pass over prompt and option. Both ways use the same model and batches of 32
questions, in turn, A B A B. The results are medians, and the scores must agree.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import publish
from nanochat import runtime
from nanochat.cli import parse
from nanochat.eval.options import GPTScorer, Ids, Scored, crop, length_blocks
from nanochat.gpt import GPT, config_from_depth
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from scripts import chat_eval
from scripts.chat_eval import encode_options
from tasks.common import Conversation, Task, choice_conversation
from tasks.mmlu import MMLU


@dataclass(frozen=True)
class Config:
    questions: int = 200
    """Number of questions."""
    depth: int = 6
    """Number of layers of the model."""
    context_length: int = 2048
    """Context length of the model, in tokens."""
    vocab_size: int = 8192
    """Vocabulary size of the tokenizer, which is trained on the questions."""
    batch_size: int = 32
    """Questions scored at once."""
    repeats: int = 5
    """Number of measurements of each way."""
    hub: bool = False
    """Use real questions: cais/mmlu from the hub, or from NANOCHAT_HUB_DIR."""
    device: str = "auto"
    """Device: auto, cpu, cuda or mps."""
    dtype: str = "auto"
    """Activation dtype: auto, float32, bfloat16 or float16."""
    json: Path | None = None
    """File for the result, which is also printed."""


def made_up_questions(count: int) -> list[Conversation]:
    """Make questions with four options: 10 to 150 words, and 1 to 20 per option, as in MMLU."""
    chance = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    lexicon = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(3000)]

    def text(low: int, high: int) -> str:
        # Log-uniform: most are short.
        words = round(low * (high / low) ** chance.random())
        return " ".join(chance.choices(lexicon, k=words))

    return [
        choice_conversation(
            f"{text(10, 150)}?", [text(1, 20) for _ in range(4)], chance.randrange(4), f"row {i}"
        )
        for i in range(count)
    ]


def real_questions(count: int) -> list[Conversation]:
    task = MMLU("test")
    count = min(count, len(task))
    return [task[i * len(task) // count] for i in range(count)]


def randomised(model: GPT) -> GPT:
    """Add noise to every parameter; with the zeros of initialisation all options score alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device) * 0.1)
    return model


class Questions(Task):
    """A task of given conversations."""

    eval_type = "categorical"

    def __init__(self, conversations: Sequence[Conversation]):
        super().__init__("mmlu", "test")
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def row(self, index: int) -> Conversation:
        return self.conversations[index]

    def settings(self) -> dict[str, Any]:
        return {}


class SeparateScorer(GPTScorer):
    """Scores each option with a prompt of its own."""

    def score(self, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]) -> list[list[Scored]]:
        flat = super().score(
            [prompt for prompt, choices in zip(prompts, options, strict=True) for _ in choices],
            [[choice] for choices in options for choice in choices],
        )
        scored = iter(flat)
        return [[next(scored)[0] for _ in choices] for choices in options]


SIDES = {"shared": GPTScorer, "separate": SeparateScorer}


def measure_chat_eval(
    cfg: Config,
    model: GPT,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    started: Runtime,
) -> dict[str, Any]:
    """Measure the whole evaluation: rendering, encoding, scoring, judging."""
    task, settings = Questions(conversations), chat_eval.Config(batch_size=cfg.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    right = {}
    for repeat in range(cfg.repeats + 1):
        for name, scorer in SIDES.items():
            with patch.object(chat_eval, "GPTScorer", scorer):
                start = time.perf_counter()
                asked = chat_eval.Asked(task, (), tokenizer, "tokens", settings, started)
                result, _ = asked.measure(model, task.name)
            if repeat:  # the first is for warming up
                seconds[name].append(time.perf_counter() - start)
            right[name] = result["correct"]
    return {**summary(seconds), "right": right}


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "seconds": medians,
        "all_seconds": seconds,
        "speedup": medians["separate"] / medians["shared"],
    }


def measure_texts(
    cfg: Config, model: GPT, tokenizer: Tokenizer, conversations: Sequence[Conversation]
) -> dict[str, Any]:
    """Measure scoring alone, with the answers' texts as options."""
    prompts: list[Ids] = []
    options: list[Sequence[Ids]] = []
    for conversation in conversations:
        choices = encode_options(tokenizer, conversation["choices"])
        prompt = tokenizer.render_for_completion(conversation)
        short, fitting, _ = crop(prompt, choices, cfg.context_length)
        prompts.append(short)
        options.append(fitting)
    blocks = length_blocks([len(prompt) for prompt in prompts], cfg.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    results: dict[str, list[list[Scored]]] = {}
    for repeat in range(cfg.repeats + 1):
        for name, kind in SIDES.items():
            scorer = kind(model)
            start = time.perf_counter()
            scored: list[list[Scored]] = []
            for block in blocks:
                scored += scorer.score([prompts[i] for i in block], [options[i] for i in block])
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            results[name] = scored
    values = {
        name: [[option.logprob for option in row] for row in rows] for name, rows in results.items()
    }
    chosen = {name: [row.index(max(row)) for row in rows] for name, rows in values.items()}
    difference = max(
        abs(a - b)
        for mine, theirs in zip(values["shared"], values["separate"], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
    return {
        **summary(seconds),
        "same_choice": sum(a == b for a, b in zip(*chosen.values(), strict=True)),
        "largest_difference_nats": difference,
        "prompt_tokens": sum(map(len, prompts)),
        "option_tokens": sum(len(choice) for choices in options for choice in choices),
    }


def main(cfg: Config) -> dict[str, Any]:
    started = runtime.start(cfg.device, cfg.dtype)
    conversations = (real_questions if cfg.hub else made_up_questions)(cfg.questions)
    texts = [message["content"] for row in conversations for message in row["messages"]]
    tokenizer = Tokenizer.train(texts, cfg.vocab_size)
    shape = config_from_depth(
        cfg.depth, tokenizer.vocab_size, head_dim=64, context_length=cfg.context_length
    )
    drawn = GPT(shape, started.dtype).init_weights(0, tokenizer.ranks)
    model = randomised(drawn.to(started.device))
    result = {
        "config": dataclasses.asdict(cfg),
        "device": str(started.device),
        "dtype": str(started.dtype),
        "threads": torch.get_num_threads(),
        "questions": len(conversations),
        "chat_eval": measure_chat_eval(cfg, model, tokenizer, conversations, started),
        "texts": measure_texts(cfg, model, tokenizer, conversations),
    }
    started.close()
    publish(result, cfg.json)
    return result


if __name__ == "__main__":
    main(parse(Config, description=__doc__))
