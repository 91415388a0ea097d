"""Measure how well a model uses a long context.

Measured are the loss by position, the gain from far context, bits per byte at the first and at the
present context length, and the share of hidden words found (tasks/passkey.py) by depth and length.
Results are written to report/eval_<stage>-<tag>.json with their settings; scripts.report shows
them.

With --context-length a model can be measured beyond its context; its rotary base is not changed.

Examples:
    python -m scripts.long_eval --source mid --corpus bbe
    python -m scripts.long_eval --source base --corpus bbe --context-length 1024
"""

# B batch, T time (the context), W the short context, S targets per short row

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from nanochat.checkpoint_manager import load_model
from nanochat.cli import launch
from nanochat.config import Computing
from nanochat.data.sources import open_store
from nanochat.errors import UserError
from nanochat.eval.losses import bits_per_byte, losses_by_position, summed
from nanochat.eval.options import GPTScorer
from nanochat.eval.record import record
from nanochat.gpt import GPT, extend_context
from nanochat.infer.engine import Engine
from nanochat.infer.sampling import SamplingParams
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from tasks.common import Conversation, row_random
from tasks.passkey import FILLER, Haystack, Passkey, corpus_sentences


@dataclass(frozen=True)
class Passkeys:
    """Search for words hidden in long texts."""

    lengths: tuple[int, ...] = ()
    """Lengths of the texts in tokens; default: an eighth, a quarter, half and all of the context,
    as far as question and answer fit."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Places of the hidden word, from 0 (the beginning) to 1 (right before the question)."""
    samples: int = 20
    """Number of hidden words per length and depth; 0 leaves this measurement out."""
    distractors: int = 2
    """Number of other people's words in the text."""
    haystack: Literal["corpus", "filler"] = "corpus"
    """Text around the words: the corpus, or built-in sentences."""
    seed: int = 0
    """Seed of the hidden words."""


@dataclass(frozen=True)
class Config:
    run: Computing = field(default_factory=Computing)
    passkeys: Passkeys = field(default_factory=Passkeys)
    source: str = "mid"
    """A stage (base, mid, sft, rl), stage/tag, or a checkpoint folder."""
    step: int | None = None
    """The checkpoint's step; default: the newest."""
    corpus: str = "climbmix"
    """Corpus for the losses and for the text around the hidden words."""
    split: Literal["val", "train"] = "val"
    """Split of the corpus."""
    context_length: int | None = None
    """Tokens up to which to measure, also beyond the model's context; default: its context."""
    eval_tokens: int = 2**18
    """Largest number of tokens per measured loss; at least one row is used."""
    batch_size: int = 4
    """Rows computed at once."""


def main(cfg: Config, runtime: Runtime) -> dict[str, Any]:
    model, tokenizer, meta = load_model(cfg.source, runtime, step=cfg.step)
    trained = model.config
    if cfg.context_length is not None and cfg.context_length > trained.context_length:
        model.config = extend_context(trained, cfg.context_length, "none")
    T = cfg.context_length or trained.context_length
    store = open_store(cfg.corpus, cfg.split, tokenizer)
    first = trained.trained_context_length or trained.context_length
    result: dict[str, Any] = {
        "stage": meta["stage"],
        "tag": meta["tag"],
        "step": meta["step"],
        "context_length": T,
        "model_context_length": trained.context_length,
        "first_context_length": first,
        "rope_base": trained.rope_base,
        "bpb": {
            str(length): bits_per_byte(
                model,
                tokenizer,
                store,
                cfg.eval_tokens,
                sequence_length=length,
                batch_size=cfg.batch_size,
                runtime=runtime,
            )["bpb"]
            for length in sorted({min(first, T), T})
        },
        **losses_by_position(model, store, T, cfg.eval_tokens, cfg.batch_size, runtime),
    }
    if cfg.passkeys.samples:
        corpus = cfg.passkeys.haystack == "corpus"
        haystack = Haystack(corpus_sentences(store, tokenizer) if corpus else FILLER, tokenizer)
        result["passkey"] = passkey_grid(model, tokenizer, haystack, T, cfg.passkeys, runtime)
    if runtime.is_main:
        settings = {
            "corpus": cfg.corpus,
            "split": cfg.split,
            "digest": store.meta["fingerprint"],
            "eval_tokens": cfg.eval_tokens,
            "context_length": T,
            "passkeys": asdict(cfg.passkeys),
            "dtype": str(runtime.dtype),
        }
        record(meta, "long_context", "long context", settings, result)
        show(result, runtime)
    return result


def passkey_grid(
    model: GPT, tokenizer: Tokenizer, haystack: Haystack, T: int, cfg: Passkeys, runtime: Runtime
) -> dict[str, Any]:
    """Measure the shares of hidden words that are found, by depth and length.

    A word is found "forced" if each of its tokens is the most likely one after text, question and
    the true answer up to it. It is found "generated" if the model's greedy answer ends with it.
    """
    least = haystack.least(1, cfg.distractors)
    lengths = list(cfg.lengths) or [T // k for k in (8, 4, 2) if T // k >= least] + [T]
    if max(lengths) > T:
        raise UserError(
            f"--lengths {max(lengths)} is beyond the context of {T}; shorten it, ask the model as "
            f"it is with --context-length {max(lengths)}, or extend it with mid_train "
            "--context-length"
        )
    scorer, engine = GPTScorer(model), Engine(model, tokenizer, tools=False)
    judge = Passkey("test", 1)
    found = torch.zeros(2, len(cfg.depths), len(lengths), dtype=torch.float64)
    for n, length in enumerate(lengths):
        column = [(d, i) for d in range(len(cfg.depths)) for i in range(cfg.samples)]
        mine = column[runtime.rank :: runtime.world_size]
        rows = []
        for d, i in mine:
            random = row_random("long_eval", cfg.seed, length, d, i)
            rows.append(haystack.conversation(random, length, [cfg.depths[d]], cfg.distractors))
        split = [split_at_answer(tokenizer, row) for row in rows]
        scored = scorer.score([before for before, _ in split], [[word] for _, word in split])
        prompts = [tokenizer.render_for_completion(row) for row in rows]
        params = [
            SamplingParams(temperature=0, max_tokens=length - len(prompt)) for prompt in prompts
        ]
        written = engine.generate(prompts, params)
        for (d, _), row, [option], [completion] in zip(mine, rows, scored, written, strict=True):
            found[0, d, n] += option.greedy
            found[1, d, n] += judge.evaluate(row, completion.text)
    forced, generated = (summed(found, runtime) / cfg.samples).tolist()
    return {
        "lengths": lengths,
        "depths": list(cfg.depths),
        "samples": cfg.samples,
        "distractors": cfg.distractors,
        "forced": forced,
        "generated": generated,
    }


def split_at_answer(tokenizer: Tokenizer, row: Conversation) -> tuple[list[int], list[int]]:
    """Split tokens into (everything before the hidden word of the answer, tokens of the word)."""
    answer = row["messages"][-1]["content"]
    ids = tokenizer.encode(answer)
    ends = np.cumsum(tokenizer.token_bytes()[ids])
    begin = len(answer[: answer.rindex(row["answer"])].encode())
    end = begin + len(row["answer"].encode())
    first = int(np.searchsorted(ends, begin, side="right"))
    last = int(np.searchsorted(ends, end, side="left"))
    return tokenizer.render_for_completion(row) + ids[:first], ids[first : last + 1]


# What is printed


def show(result: dict[str, Any], runtime: Runtime) -> None:
    name = f"{result['stage']}/{result['tag']} step {result['step']}"
    runtime.print(
        f"{name}: context {result['model_context_length']}, first trained at "
        f"{result['first_context_length']}, rotary base {result['rope_base']:,.0f}"
    )
    for length, bpb in result["bpb"].items():
        runtime.print(f"rows of {length}: {bpb:.4f} bits per byte")
    table = Table(title="loss by tokens of context (nats per token)")
    for bucket in result["loss_by_position"]:
        table.add_column(f"{bucket['from']}–{bucket['to']}", justify="right")
    table.add_row(*(f"{bucket['loss']:.3f}" for bucket in result["loss_by_position"]))
    runtime.console.print(table)
    if "context_gain" in result:
        gain = result["context_gain"]
        runtime.print(
            f"context gain {gain['gain']:.4f} nats: {gain['loss_last']:.4f} with the last "
            f"{gain['last_tokens']} tokens, {gain['loss_all']:.4f} with all"
        )
    if "passkey" in result:
        for how in ("forced", "generated"):
            show_grid(result["passkey"], how, runtime)


def show_grid(grid: dict[str, Any], how: str, runtime: Runtime) -> None:
    table = Table(title=f"hidden words found, {how} ({grid['samples']} per cell)")
    table.add_column("depth", justify="right")
    for length in grid["lengths"]:
        table.add_column(str(length), justify="right")
    for depth, row in zip(grid["depths"], grid[how], strict=True):
        table.add_row(f"{depth:g}", *(f"{value:.2f}" for value in row))
    runtime.console.print(table)


if __name__ == "__main__":
    launch(main, Config, __doc__)
