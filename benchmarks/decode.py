"""Compare the engine's decoding speed with transformers' `generate` on the exported model.

python -m benchmarks.decode [--depth 6] [--dtypes bfloat16 float32] [--json out.json]
python -m benchmarks.decode --source sft --dtypes float32

Weights are random, decoding is greedy, and no token ends an answer. Two models, a portable one
(transformers' own `nanochat` type) and a full one (with its own code), are exported and loaded. The
two programs are timed in turn, A B A B, prompts included. The cases are:

- batch1, batch16: prompts of 64 tokens, 128 new tokens each; batch1 in bfloat16 also with the
  engine's weights in 8 bits.
- mixed_prompts: 32 requests with prompts of 16 to 512 tokens, 128 new tokens each. `generate` pads
  them to one batch; the engine needs no padding.
- mixed: 32 requests with such prompts and answers of 16 to 256 tokens. The padded batch runs until
  the longest answer is done; only the requested tokens count.

The results are medians of new tokens per second, and of the ratio of the two times within a round.
In float32 the tokens are compared too. This needs the extra `hf`.

With `--source` it compares something else: the engine with and without guesses (`Row.guess`), on a
trained model that answers messages of first contact, one at a time. The results are passes through
the model per token, and seconds of processor time per token, which other processes change least.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from operator import eq
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.common import publish
from nanochat.checkpoint_manager import load_model, system_style
from nanochat.export import hf
from nanochat.gpt import GPT, config_from_depth
from nanochat.hardware import tune_cpu
from nanochat.infer.decoder import Decoder
from nanochat.infer.engine import Engine
from nanochat.infer.sampling import SamplingParams
from nanochat.runtime import DTYPES, single
from nanochat.tokenizer import Tokenizer
from tasks.registry import build, corpus_options

MIXED = 32
LONGEST_PROMPT, LONGEST_ANSWER = 512, 256

Requests = list[tuple[list[int], int]]
"""Pairs (prompt, number of new tokens)."""


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """Make a tokenizer of pairs of bytes, whose meaning does not matter here."""
    ranks = [bytes([i]) for i in range(256)]
    ranks += [bytes([i // 256, i % 256]) for i in range(vocab_size - 256 - 11)]
    return Tokenizer(ranks)


def random_model(depth: int, tokenizer: Tokenizer, portable: bool, dtype: torch.dtype) -> GPT:
    config = config_from_depth(
        depth,
        tokenizer.vocab_size,
        head_dim=64,
        context_length=LONGEST_PROMPT + LONGEST_ANSWER,
        portable=portable,
    )
    model = GPT(config, dtype).init_weights(0, tokenizer.ranks)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * config.n_embd**-0.5)
        # Special tokens are never the most likely ones: no answer ends early, no tool is called.
        model.head.weight[tokenizer.bos : tokenizer.vocab_size] = 0
    return model


def cases(prompt: int, new: int, scale: float) -> dict[str, Requests]:
    """Make the requests of each case. scale: factor on the mixed cases' lengths, for a trial."""
    random = Random(0)

    def ids(length: int) -> list[int]:
        return [random.randrange(256) for _ in range(length)]

    def length(low: int, high: int) -> int:
        """Draw a length log-uniformly: many short ones, few long ones."""
        return max(1, round(scale * low * (high / low) ** random.random()))

    lengths = [length(16, LONGEST_PROMPT) for _ in range(MIXED)]
    return {
        "batch1": [(ids(prompt), new)],
        "batch16": [(ids(prompt), new) for _ in range(16)],
        "mixed_prompts": [(ids(n), new) for n in lengths],
        "mixed": [(ids(n), length(16, LONGEST_ANSWER)) for n in lengths],
    }


def run_engine(engine: Engine, requests: Requests) -> list[list[int]]:
    params = [SamplingParams(temperature=0, max_tokens=new) for _, new in requests]
    return [samples[0].ids for samples in engine.generate([p for p, _ in requests], params)]


def run_transformers(model: Any, requests: Requests, pad: int) -> list[list[int]]:
    longest = max(len(prompt) for prompt, _ in requests)
    padding = [longest - len(prompt) for prompt, _ in requests]
    ids = torch.tensor(
        [[pad] * n + prompt for n, (prompt, _) in zip(padding, requests, strict=True)]
    )
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
    new = max(new for _, new in requests)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    rows = output[:, longest:].tolist()
    return [row[:count] for row, (_, count) in zip(rows, requests, strict=True)]


def load_exported(model: GPT, tokenizer: Tokenizer, dtype: torch.dtype) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        hf.export(model, tokenizer, Path(folder) / "model")
        theirs = hf.model_class(model.config.is_portable).from_pretrained(
            Path(folder) / "model", dtype=dtype
        )
    return theirs.eval()


def compare(kind: str, dtype_name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    dtype = DTYPES[dtype_name]
    tokenizer = made_up_tokenizer(arguments.vocab_size)
    model = random_model(arguments.depth, tokenizer, kind == "portable", dtype)
    theirs = load_exported(model, tokenizer, dtype)
    # Only the decoder is kept, in the compute dtype, as chat and server do.
    engine = Engine(Decoder(model.to(dtype)), tokenizer, max_slots=MIXED)
    runs: dict[str, Callable[[Requests], list[list[int]]]] = {
        "ours": lambda requests: run_engine(engine, requests),
        "transformers": lambda requests: run_transformers(theirs, requests, tokenizer.bos),
    }
    results = []
    chosen = cases(arguments.prompt, arguments.new, arguments.scale)
    for name, requests in chosen.items():
        if arguments.cases and name not in arguments.cases:
            continue
        arms = dict(runs)
        if name == "batch1" and dtype == torch.bfloat16:
            small = Engine(Decoder(model, "int8"), tokenizer, max_slots=1)
            arms["int8"] = partial(run_engine, small)
        times: dict[str, list[float]] = {who: [] for who in arms}
        outputs: dict[str, list[list[int]]] = {}
        for repeat in range(arguments.repeats + 1):
            for who, run in arms.items():
                start = time.perf_counter()
                outputs[who] = run(requests)
                if repeat:  # the first round warms up
                    times[who].append(time.perf_counter() - start)
        wanted = sum(new for _, new in requests)
        lengths = {who: sum(map(len, rows)) for who, rows in outputs.items()}
        if set(lengths.values()) != {wanted}:
            raise RuntimeError(f"{name}: {wanted} tokens were asked for, there are {lengths}")
        ratios = [b / a for a, b in zip(times["ours"], times["transformers"], strict=True)]
        results.append(
            {
                "model": kind,
                "dtype": dtype_name,
                "case": name,
                "requests": len(requests),
                "new_tokens": wanted,
                "tokens_per_second": {
                    who: wanted / statistics.median(values) for who, values in times.items()
                },
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "int8_to_ours": statistics.median(
                    a / b for a, b in zip(times["ours"], times["int8"], strict=True)
                )
                if "int8" in times
                else None,
                "equal_answers": sum(
                    a == b for a, b in zip(outputs["ours"], outputs["transformers"], strict=True)
                ),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    return results


class Counting(Decoder):
    """Counts its passes, prompts included."""

    passes = 0

    def hidden(self, *arguments: Any) -> torch.Tensor:
        self.passes += 1
        return super().hidden(*arguments)


def compare_guesses(dtype_name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Answer messages with and without guesses, as `chat_cli` samples and greedily."""
    model, tokenizer, meta = load_model(arguments.source, single(dtype=DTYPES[dtype_name]))
    task = build("first_contact", "test", **corpus_options(["first_contact"], tokenizer))
    step = max(1, len(task) // arguments.messages)
    prompts = [
        tokenizer.render_for_completion(task[i], system_style(meta))
        for i in range(0, len(task), step)
    ]
    decoder = Counting(model)
    engine, results = Engine(decoder, tokenizer, max_slots=1), []
    for params in (SamplingParams(temperature=0.6, top_k=50), SamplingParams(temperature=0)):
        arms = {"without": 0, "with": Decoder.guesses}
        times: dict[str, list[float]] = {name: [] for name in arms}
        passes = dict.fromkeys(arms, 0)
        answers: dict[str, list[list[int]]] = {name: [] for name in arms}
        for repeat in range(arguments.repeats + 1):
            seconds = dict.fromkeys(arms, 0.0)
            for i, prompt in enumerate(prompts):
                for name, decoder.guesses in arms.items():
                    decoder.passes, start = 0, time.process_time()
                    ((completion,),) = engine.generate([prompt], params, indices=[i])
                    seconds[name] += time.process_time() - start
                    if not repeat:  # the first round warms up
                        passes[name] += decoder.passes
                        answers[name].append(completion.ids)
            if repeat:
                for name, one in seconds.items():
                    times[name].append(one)
        tokens = sum(map(len, answers["with"]))
        ratios = [a / b for a, b in zip(times["without"], times["with"], strict=True)]
        results.append(
            {
                "dtype": dtype_name,
                "temperature": params.temperature,
                "messages": len(prompts),
                "tokens": tokens,
                "passes_per_token": {name: passes[name] / tokens for name in arms},
                "cpu_seconds_per_token": {
                    name: statistics.median(values) / tokens for name, values in times.items()
                },
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "equal_answers": sum(map(eq, answers["without"], answers["with"])),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--scale", type=float, default=1.0, help="of lengths in mixed cases")
    parser.add_argument("--models", nargs="+", default=["portable", "full"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--source", help="trained model: compare with and without guesses")
    parser.add_argument("--messages", type=int, default=100, help="number, with --source")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tune_cpu()
    results = []
    for dtype in arguments.dtypes:
        if arguments.source:
            results += compare_guesses(dtype, arguments)
            continue
        for kind in arguments.models:
            results += compare(kind, dtype, arguments)
    if arguments.json:
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        report = {
            "settings": {**vars(arguments), "json": None},
            "threads": torch.get_num_threads(),
            "versions": versions,
            "results": results,
        }
        publish(report, arguments.json, quiet=True)


if __name__ == "__main__":
    main()
