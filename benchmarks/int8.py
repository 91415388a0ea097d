"""Measure `--quantize int8`: bits per byte, and tokens a second for one answer.

python -m benchmarks.int8 [--source sft] [--corpus bbe] [--json out.json]

The decoder of chat and server runs with and without int8, in bfloat16 on the CPU. Bits per byte are
measured on the beginnings of validation documents, up to the context length. The speed is the
median over greedy answers of 128 tokens, measured in turn. --depth measures the speed of a random
model of that depth instead, to find the size from which int8 is faster.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import publish
from benchmarks.decode import made_up_tokenizer, random_model
from nanochat.checkpoint_manager import load_model
from nanochat.data.sources import open_store
from nanochat.data.store import TokenStore
from nanochat.gpt import GPT
from nanochat.hardware import tune_cpu
from nanochat.infer.decoder import Decoder
from nanochat.infer.engine import Engine
from nanochat.infer.sampling import SamplingParams
from nanochat.runtime import single
from nanochat.tokenizer import Tokenizer

ANSWER = 128


@torch.inference_mode()
def bits_per_byte(decoder: Decoder, store: TokenStore, tokenizer: Tokenizer, tokens: int) -> float:
    """Measure bits per byte on beginnings of documents, until `tokens` tokens are predicted."""
    sizes = torch.as_tensor(tokenizer.token_bytes())
    nats, size, seen = 0.0, 0, 0
    T = decoder.config.context_length
    for index in range(len(store)):
        ids = torch.from_numpy(store.ids(index, 0, T + 1).astype("int64"))
        if len(ids) < 2:
            continue
        cache = decoder.new_cache(1, len(ids) - 1)
        logits = decoder.logits(decoder.hidden(ids[None, :-1], cache, None))[0]
        targets = ids[1:]
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        size += int(sizes[targets].sum())
        seen += len(targets)
        if seen >= tokens:
            break
    return nats / math.log(2) / size


def speeds(model: GPT, tokenizer: Tokenizer, repeats: int) -> dict[str, Any]:
    """Measure medians of tokens a second, and of the ratio within a round."""
    engines = {
        "bfloat16": Engine(Decoder(model), tokenizer, max_slots=1, tools=False),
        "int8": Engine(Decoder(model, "int8"), tokenizer, max_slots=1, tools=False),
    }
    length = min(64, model.config.context_length - ANSWER)
    prompt = [tokenizer.bos, *([32] * (length - 1))]
    taken: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            start = time.perf_counter()
            ((completion,),) = engine.generate(
                [prompt], SamplingParams(temperature=0, max_tokens=ANSWER)
            )
            if repeat:  # the first round warms up
                taken[name].append((time.perf_counter() - start) / len(completion.ids))
    ratios = [a / b for a, b in zip(taken["bfloat16"], taken["int8"], strict=True)]
    return {
        "tokens_per_second": {k: 1 / statistics.median(v) for k, v in taken.items()},
        "int8_to_bfloat16": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="sft", help="stage, stage/tag or folder")
    parser.add_argument("--corpus", default="bbe")
    parser.add_argument("--tokens", type=int, default=2**16)
    parser.add_argument("--depth", type=int, help="speed of a random model of this depth")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tune_cpu()
    result: dict[str, Any] = {}
    if arguments.depth:
        tokenizer = made_up_tokenizer(8192)
        model = random_model(arguments.depth, tokenizer, False, torch.bfloat16)
    else:
        model, tokenizer, _ = load_model(arguments.source, single(dtype=torch.bfloat16))
        store = open_store(arguments.corpus, "val", tokenizer)
        bpb = {
            name: bits_per_byte(decoder, store, tokenizer, arguments.tokens)
            for name, decoder in (("bfloat16", Decoder(model)), ("int8", Decoder(model, "int8")))
        }
        result["bits_per_byte"] = bpb
        result["bits_per_byte_lost"] = bpb["int8"] - bpb["bfloat16"]
    result |= speeds(model, tokenizer, arguments.repeats)
    result["parameters"] = sum(model.num_parameters().values())
    result["settings"] = {key: str(value) for key, value in vars(arguments).items()}
    publish(result, arguments.json)


if __name__ == "__main__":
    main()
