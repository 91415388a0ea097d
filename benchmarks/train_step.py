"""Training throughput against a Hugging Face Llama of the same shape with torch's AdamW.

python -m benchmarks.train_step --depths 4 6 --dtypes bfloat16 float32 [--compile] [--json out.json]

Both train on the same random tokens, one optimizer step per batch, in turn: A B A B. Quoted are the
medians. The Llama's MLP is as wide as gives it our number of parameters. In bfloat16 it is trained
in the way that corresponds to ours, float32 weights under autocast as in transformers' `Trainer`
(`llama`), and also with bfloat16 weights (`llama_bf16_weights`), which is faster and loses small
updates. MFU is against this machine's own matmul peak in the same dtype, measured in the same run
on matrices of 2048.
Needs the extra `hf`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat.config import Learning
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, config_from_depth
from nanochat.log import peak_memory_bytes
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.runtime import DTYPES, best_dtype, single, tune_cpu
from nanochat.train import train_step

VOCAB, T, ROWS = 8192, 512, 8


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a square matmul, the best of several."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    a @ b
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def batch(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (ROWS, T + 1), generator=generator)


def ours(depth: int, dtype: torch.dtype, compiled: bool) -> tuple[Callable[[int], None], GPT]:
    config = config_from_depth(depth, VOCAB, head_dim=64, context_length=T, window_pattern="L")
    model = GPT(config, dtype).init_weights(0)
    rules = parameter_rules(model, Learning(), width=config.n_embd)
    # As the training scripts do: orthogonalisation in the fastest native dtype.
    optimizer = Optimizer(model, rules, muon_dtype=best_dtype(torch.device("cpu")))
    if compiled:
        model.compile_loss()
    runtime = single(dtype=dtype)

    def step(seed: int) -> None:
        ids = batch(seed)
        targets = ids[:, 1:].contiguous()
        rows = Batch(
            inputs=ids[:, :-1].contiguous(),
            targets=targets,
            weights=torch.ones(ROWS, T),
            doc_ids=torch.zeros(ROWS, T, dtype=torch.int32),
        )
        train_step(model, optimizer, [rows], Hypers(0.01), runtime)

    return step, model


def llama(
    depth: int, dtype: torch.dtype, compiled: bool, weights: torch.dtype
) -> tuple[Callable[[int], None], Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 64 * depth
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=round(8 * width / 3 / 16) * 16,
            num_hidden_layers=depth,
            num_attention_heads=depth,
            max_position_embeddings=T,
            tie_word_embeddings=False,
        )
    ).to(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model

    def step(seed: int) -> None:
        ids = batch(seed)[:, :T]
        with torch.autocast("cpu", dtype, enabled=dtype != weights):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step, model


def compare(depth: int, dtype_name: str, compiled: bool, repeats: int) -> dict[str, Any]:
    dtype = DTYPES[dtype_name]
    our_step, our_model = ours(depth, dtype, compiled)
    llama_step, llama_model = llama(depth, dtype, compiled, torch.float32)
    steps = {"ours": our_step, "llama": llama_step}
    if dtype == torch.bfloat16:
        steps["llama_bf16_weights"], _ = llama(depth, dtype, compiled, dtype)
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = []
    for repeat in range(repeats + 2):
        peaks.append(matmul_peak(dtype))
        for name, step in steps.items():
            start = time.perf_counter()
            step(repeat)
            if repeat >= 2:  # the first two warm up (and compile)
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        name: [other / mine for mine, other in zip(times["ours"], times[name], strict=True)]
        for name in steps
        if name != "ours"
    }
    peak = statistics.median(peaks)
    flops = our_model.flops_per_token(T) * ROWS * T
    return {
        "depth": depth,
        "dtype": dtype_name,
        "compiled": compiled,
        "parameters": {
            "ours": sum(p.numel() for p in our_model.parameters()),
            "llama": sum(p.numel() for p in llama_model.parameters()),
        },
        "tokens_per_second": {name: ROWS * T / value for name, value in seconds.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_range": {name: [min(values), max(values)] for name, values in ratios.items()},
        "matmul_peak_gflops": peak / 1e9,
        "mfu": flops / seconds["ours"] / peak,
        "peak_rss_bytes": peak_memory_bytes(torch.device("cpu")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 6])
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"]
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tune_cpu()
    results = []
    for depth in arguments.depths:
        for dtype in arguments.dtypes:
            result = compare(depth, dtype, arguments.compile, arguments.repeats)
            results.append(result)
            print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
