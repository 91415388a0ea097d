"""Measure the time that nanochat needs to be as good as another recipe after a fixed time.

python -m benchmarks.time_to_bpb --seconds 90 [--baselines llama muon] [--json out.json]

All have the same shape (width 256, 4 layers), batch, data order, dtype and held-out text (the
embedded corpus; run scripts.tok_train and scripts.tok_encode first). Baselines:

- llama: a Hugging Face Llama with torch's fused AdamW (betas 0.9 and 0.95, decay 0.1), with warm-up
  and linear decay to zero over the time, and with the best learning rate of `--rates`. This needs
  the extra `hf`.
- muon: the plain block (`--portable`: no value embeddings, token shift or spelling), Muon and
  AdamW, and the square-root rule for the rates, sqrt(batch / 2^19), down to a batch of a few
  thousand tokens.

nanochat then trains for growing shares of that time, each with a whole schedule, until it is as
good.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import publish
from nanochat.config import Learning
from nanochat.data.hub import open_corpus
from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source
from nanochat.data.store import TokenStore
from nanochat.gpt import GPT, config_from_depth
from nanochat.hardware import tune_cpu
from nanochat.optim import Optimizer, parameter_rules
from nanochat.plan import REFERENCE_BATCH, lr_multiplier, muon_momentum, scaled_lr
from nanochat.runtime import Runtime, best_dtype, single
from nanochat.tokenizer import Tokenizer
from nanochat.train import Hypers, train_step

T, ROWS, DEPTH = 256, 16, 4
RESOLUTION = 10_000
"""Number of parts into which the time is cut, as steps of the schedule."""


def loader(split: str, tokenizer: Tokenizer, epochs: int | None = None) -> DataLoader:
    store = TokenStore.open(open_corpus("bbe").store_folder(split), tokenizer.hash)  # type: ignore[arg-type]
    return DataLoader([Source(store)], batch_size=ROWS, sequence_length=T, seed=1, epochs=epochs)


@torch.no_grad()
def bits_per_byte(nll: Callable[..., torch.Tensor], tokenizer: Tokenizer) -> float:
    """Measure bits per byte over the whole held-out split."""
    sizes = torch.as_tensor(tokenizer.token_bytes())
    nats = size = 0.0
    for batch in loader("val", tokenizer, epochs=1):
        losses = nll(batch.inputs, batch.targets, batch.doc_ids)
        nats += losses.double().sum().item()
        size += torch.where(batch.targets >= 0, sizes[batch.targets.clamp(min=0)], 0).sum().item()
    return nats / math.log(2) / size


def train_for(seconds: float, step: Callable[[float], None]) -> int:
    """Call step(progress in [0, 1)) until the time is up; returns the number of steps."""
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        step(elapsed / seconds)
        count += 1
    return count


def train_llama(seconds: float, rate: float, tokenizer: Tokenizer, runtime: Runtime) -> dict:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=64 * DEPTH,
            intermediate_size=round(8 * 64 * DEPTH / 3 / 16) * 16,
            num_hidden_layers=DEPTH,
            num_attention_heads=DEPTH,
            max_position_embeddings=T,
            tie_word_embeddings=False,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batches = loader("train", tokenizer)

    def nll(inputs: torch.Tensor, targets: torch.Tensor, _: Any) -> torch.Tensor:
        with torch.autocast("cpu", runtime.dtype, enabled=runtime.dtype != torch.float32):
            logits = model(input_ids=inputs).logits
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
        )
        return losses.view_as(targets)

    def step(progress: float) -> None:
        factor = lr_multiplier(int(progress * RESOLUTION), RESOLUTION, warmup=0.04, warmdown=0.96)
        optimizer.param_groups[0]["lr"] = rate * factor
        batch = next(batches)
        losses = nll(batch.inputs, batch.targets, None)
        (losses.sum() / (batch.targets >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    steps = train_for(seconds, step)
    return {"rate": rate, "seconds": seconds, "steps": steps, "bpb": bits_per_byte(nll, tokenizer)}


def train_ours(seconds: float, tokenizer: Tokenizer, runtime: Runtime, plain: bool = False) -> dict:
    """Train this project's model with its recipe, or with that of the `plain` baseline muon."""
    config = config_from_depth(
        DEPTH,
        tokenizer.vocab_size,
        portable=plain,
        head_dim=64,
        context_length=T,
        window_pattern="L",
    )
    model = GPT(config, runtime.dtype).init_weights(0, tokenizer.ranks)
    learning = Learning()
    lr_scale = math.sqrt(T * ROWS / REFERENCE_BATCH) if plain else scaled_lr(T * ROWS)
    rules = parameter_rules(model, learning, width=config.n_embd, lr_scale=lr_scale)
    optimizer = Optimizer(model, rules, muon_dtype=runtime.dtype)
    batches = loader("train", tokenizer)
    low, high = learning.muon_momentum

    def step(progress: float) -> None:
        at = int(progress * RESOLUTION)
        hypers = Hypers(
            lr_multiplier(at, RESOLUTION, warmup=learning.warmup, warmdown=learning.warmdown),
            muon_momentum(at, RESOLUTION, low=low, high=high),
        )
        train_step(model, optimizer, [next(batches)], hypers, runtime)

    steps = train_for(seconds, step)
    return {"seconds": seconds, "steps": steps, "bpb": bits_per_byte(model.nll, tokenizer)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument(
        "--baselines", nargs="+", default=["llama", "muon"], choices=["llama", "muon"]
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0]
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tune_cpu()
    runtime = single(dtype=best_dtype(torch.device("cpu")))
    tokenizer = Tokenizer.load()
    baselines: dict[str, list[dict[str, Any]]] = {}
    if "llama" in arguments.baselines:
        baselines["llama"] = [
            train_llama(arguments.seconds, rate, tokenizer, runtime) for rate in arguments.rates
        ]
    if "muon" in arguments.baselines:
        baselines["muon"] = [train_ours(arguments.seconds, tokenizer, runtime, plain=True)]
    targets = {name: min(run["bpb"] for run in runs) for name, runs in baselines.items()}
    print(json.dumps(targets), flush=True)
    ours: list[dict[str, Any]] = []
    for share in arguments.shares:
        ours.append(train_ours(share * arguments.seconds, tokenizer, runtime))
        print("ours", json.dumps(ours[-1]), flush=True)
        if ours[-1]["bpb"] <= min(targets.values()):
            break
    ratios: dict[str, float | None] = {}
    for name, target in targets.items():
        enough = [run["seconds"] for run in ours if run["bpb"] <= target]
        ratios[name] = enough[0] / arguments.seconds if enough else None
    result = {"baselines": baselines, "ours": ours, "target_bpb": targets, "ratio": ratios}
    publish(result, arguments.json)


if __name__ == "__main__":
    main()
