"""Multiple choice: options that share their prompt's prefix, against scoring each one separately.

    python -m benchmarks.option_scoring [--hub] [--json out.json]

Two hundred questions in the manner of MMLU (made up, or with --hub real ones) and a depth-6 model
with random weights. Two ways of asking: "letters", as chat_eval does, where all options are read
off one pass over the prompt; "texts", as CORE does, where the prompt's keys and values are copied
for each option. Scored separately, each takes a pass over the prompt and itself. Both ways use the
same model and batches of 32 questions, in turn: A B A B; quoted are medians. The results must
agree. Preparing (rendering and encoding) is the same for both and timed apart.
"""

import dataclasses
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import config, runtime
from nanochat.gpt import GPT, config_from_depth
from nanochat.scoring import GPTScorer, Ids, Scored, crop, length_blocks
from nanochat.tokenizer import Tokenizer
from scripts.chat_eval import encode_options
from tasks.common import Conversation, choice_conversation
from tasks.mmlu import MMLU


@dataclass(frozen=True)
class Config:
    questions: int = 200
    """How many."""
    depth: int = 6
    """Of the model."""
    context_length: int = 2048
    """Of the model."""
    vocab_size: int = 8192
    """Of a tokenizer trained on the questions."""
    batch_size: int = 32
    """Questions scored at once."""
    repeats: int = 5
    """Times that each way is measured."""
    hub: bool = False
    """Real questions: cais/mmlu from the hub, or from NANOCHAT_HUB_DIR."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str = "auto"
    """Activation dtype: auto, float32, bfloat16 or float16."""
    json: Path | None = None
    """Write the result there, too."""


def made_up_questions(count: int) -> list[Conversation]:
    """Four options each; lengths like MMLU's: questions of 10 to 150 words, options of 1 to 20."""
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
    """Every parameter gets noise: at the initialisation's zeros all options are alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device) * 0.1)
    return model.eval()


def prepare(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, context_length: int, letters: bool
) -> tuple[list[Ids], list[Sequence[Ids]]]:
    """Prompts and options, as chat_eval makes them; without `letters` the options are texts."""
    prompts: list[Ids] = []
    options: list[Sequence[Ids]] = []
    for conversation in conversations:
        prompt = tokenizer.render_for_completion(conversation)
        choices = conversation["letters" if letters else "choices"]
        short, fitting, _ = crop(prompt, encode_options(tokenizer, choices), context_length)
        prompts.append(short)
        options.append(fitting)
    return prompts, options


def shared(
    scorer: GPTScorer, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]
) -> list[list[Scored]]:
    return scorer.score(prompts, options)


def separate(
    scorer: GPTScorer, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]
) -> list[list[Scored]]:
    """Each option with a prompt of its own."""
    flat = scorer.score(
        [prompt for prompt, choices in zip(prompts, options, strict=True) for _ in choices],
        [[choice] for choices in options for choice in choices],
    )
    scored = iter(flat)
    return [[next(scored)[0] for _ in choices] for choices in options]


def measure(
    cfg: Config, scorer: GPTScorer, prompts: list[Ids], options: list[Sequence[Ids]]
) -> dict[str, Any]:
    blocks = length_blocks([len(prompt) for prompt in prompts], cfg.batch_size)
    seconds: dict[str, list[float]] = {"shared": [], "separate": []}
    results: dict[str, list[list[Scored]]] = {}
    for repeat in range(cfg.repeats + 1):
        for name, score in (("shared", shared), ("separate", separate)):
            start = time.perf_counter()
            scored: list[list[Scored]] = []
            for block in blocks:
                scored += score(scorer, [prompts[i] for i in block], [options[i] for i in block])
            if repeat:  # the first is for warming up
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
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "seconds": medians,
        "all_seconds": seconds,
        "speedup": medians["separate"] / medians["shared"],
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
    model = randomised(GPT(shape, started.dtype).init_weights(0).to(started.device))
    scorer = GPTScorer(model)
    result: dict[str, Any] = {
        "config": dataclasses.asdict(cfg),
        "device": str(started.device),
        "dtype": str(started.dtype),
        "threads": torch.get_num_threads(),
        "questions": len(conversations),
    }
    for name in ("letters", "texts"):
        start = time.perf_counter()
        prompts, options = prepare(conversations, tokenizer, cfg.context_length, name == "letters")
        preparing = time.perf_counter() - start
        measured = measure(cfg, scorer, prompts, options)
        times = measured["seconds"]
        measured["prepare_seconds"] = preparing
        measured["speedup_with_preparing"] = (times["separate"] + preparing) / (
            times["shared"] + preparing
        )
        result[name] = measured
    started.close()
    return result


if __name__ == "__main__":
    arguments = config.parse(Config, description=__doc__)
    text = json.dumps(main(arguments), indent=2, default=str)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
