"""Compare training throughput with a Hugging Face Llama of the same shape with torch's AdamW.

python -m benchmarks.train_step --depths 4 6 --dtypes bfloat16 float32 [--compile] [--json out.json]

Both train on the same random tokens, one optimizer step per batch, in turn, A B A B, each in a
process of its own. The results are medians. The Llama has the same width, depth, heads and
vocabulary, and an MLP with as many parameters.

- `llama`: a process with default settings. In bfloat16 it has float32 weights and autocast, like
  transformers' `Trainer`; this corresponds to nanochat's way.
- `llama_tuned`: the same with nanochat's settings of the memory allocator (`hardware.tune_cpu`).
- `llama_bf16_weights`: weights in bfloat16, which is faster but loses small updates.

MFU is relative to this machine's own matmul peak in the same dtype, measured in the same run on
matrices of 2048. This needs the extra `hf`.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import publish, words
from nanochat.config import Learning
from nanochat.gpt import GPT, config_from_depth
from nanochat.hardware import peak_memory_bytes, physical_cores, tune_cpu
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.runtime import DTYPES, best_dtype, single
from nanochat.train import Batch, train_step

VOCAB, T, ROWS = 8192, 512, 8


def matmul_peak(dtype: torch.dtype) -> float:
    """Measure FLOP/s of a square matmul, the best of several."""
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
    model = GPT(config, dtype).init_weights(0, words(VOCAB))
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


def contestant(name: str, depth: int, dtype_name: str, compiled: bool, pipe: Connection) -> None:
    """Run a process: it sends its number of parameters, then runs a step for every seed."""
    dtype = DTYPES[dtype_name]
    if name in ("ours", "llama_tuned"):
        tune_cpu()
    else:
        torch.set_num_threads(physical_cores())
    if name == "ours":
        step, model = ours(depth, dtype, compiled)
    else:
        weights = dtype if name == "llama_bf16_weights" else torch.float32
        step, model = llama(depth, dtype, compiled, weights)
    pipe.send(sum(p.numel() for p in model.parameters()))
    while (seed := pipe.recv()) is not None:
        start = time.perf_counter()
        step(seed)
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_memory_bytes(torch.device("cpu")))


def compare(depth: int, dtype_name: str, compiled: bool, repeats: int) -> dict[str, Any]:
    names = ["ours", "llama", "llama_tuned"]
    if dtype_name == "bfloat16":
        names.append("llama_bf16_weights")
    context = multiprocessing.get_context("spawn")
    pipes, processes, parameters = {}, [], {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        process = context.Process(
            target=contestant, args=(name, depth, dtype_name, compiled, theirs), daemon=True
        )
        process.start()
        theirs.close()  # so that the end of the process is noticed
        processes.append(process)
        parameters[name] = pipes[name].recv()
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks = []
    for repeat in range(repeats + 2):
        peaks.append(matmul_peak(DTYPES[dtype_name]))
        for name in names:
            pipes[name].send(repeat)
            seconds = pipes[name].recv()
            if repeat >= 2:  # the first two warm up (and compile)
                times[name].append(seconds)
    memory = {}
    for name, process in zip(names, processes, strict=True):
        pipes[name].send(None)
        memory[name] = pipes[name].recv()
        process.join()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        name: [other / mine for mine, other in zip(times["ours"], times[name], strict=True)]
        for name in names
        if name != "ours"
    }
    peak = statistics.median(peaks)
    config = config_from_depth(depth, VOCAB, head_dim=64, context_length=T, window_pattern="L")
    with torch.device("meta"):
        flops = GPT(config).flops_per_token(T) * ROWS * T
    return {
        "depth": depth,
        "dtype": dtype_name,
        "compiled": compiled,
        "parameters": parameters,
        "tokens_per_second": {name: ROWS * T / value for name, value in medians.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_range": {name: [min(values), max(values)] for name, values in ratios.items()},
        "matmul_peak_gflops": peak / 1e9,
        "mfu": flops / medians["ours"] / peak,
        "peak_rss_bytes": memory,
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
    torch.set_num_threads(physical_cores())
    results = []
    for depth in arguments.depths:
        for dtype in arguments.dtypes:
            result = compare(depth, dtype, arguments.compile, arguments.repeats)
            results.append(result)
            print(json.dumps(result), flush=True)
    publish(results, arguments.json, quiet=True)


if __name__ == "__main__":
    main()
