"""Run all measurements that need a GPU, in eight minutes: `bash benchmarks/gpu.sh`.

python -m benchmarks.gpu [--only step kernels] [--json gpu.json] [--seconds 480] [--dry-run]

A measurement is called a line. Lines run in the order of the table LINES, the most important first,
each in a process of its own with a time limit. A line that fails or takes too long is recorded, and
the next one runs. The JSON file holds the results so far: run the command again to measure the
missing lines, or with `--only` to measure named lines anew. `--dry-run` tries this file with tiny
shapes on the CPU; lines that need CUDA are left out, which is recorded.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import publish, words
from nanochat import loss as head_loss
from nanochat import runtime as runtimes
from nanochat.attention import activate_flash_attention, attend, make_layout, pad_boundaries
from nanochat.checkpoint_manager import (
    CheckpointManager,
    load_weights,
    read_meta,
    restore,
)
from nanochat.config import Learning
from nanochat.fp8 import convert_to_fp8
from nanochat.gpt import GPT, GPTConfig, config_from_depth
from nanochat.hardware import Machine, peak_flops
from nanochat.infer.decoder import Decoder
from nanochat.memory import Shape, estimate_memory
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.paths import file_sha256
from nanochat.runtime import Runtime
from nanochat.train import Batch, LossScale, train_step

PROJECT = Path(__file__).parents[1]
Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Shapes of the measurements."""

    depth: int
    vocab_size: int
    context_length: int
    rows: tuple[int, ...]
    """Rows of micro-batches, the most interesting number first."""
    steps: int
    """Number of timed repetitions."""
    head_tokens: int
    decoding_rows: tuple[int, ...]
    decoding_steps: int
    cuda: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.cuda else "cpu")


REAL = Sizes(20, 65536, 2048, (16, 32, 8), 5, 65536, (1, 32, 64), 64, cuda=True)
TINY = Sizes(2, 300, 64, (2, 1), 2, 128, (1, 2), 3, cuda=False)


class NeedsCuda(Exception):
    """Raised by a measurement that cannot be tried on a CPU."""


# Shared by the lines


def start(sizes: Sizes) -> Runtime:
    return runtimes.start(sizes.device.type, "auto")


def model_config(sizes: Sizes, depth: int | None = None, **changes: Any) -> GPTConfig:
    head_dim = 128 if sizes.cuda else 16
    return config_from_depth(
        depth or sizes.depth,
        sizes.vocab_size,
        head_dim=head_dim,
        context_length=sizes.context_length,
        **({} if sizes.cuda else {"aspect_ratio": 16}),
        **changes,
    )


def make(config: GPTConfig, runtime: Runtime, compiled: bool) -> tuple[GPT, Optimizer]:
    with torch.device(runtime.device):
        model = GPT(config, runtime.dtype)
    model.init_weights(0, words(config.vocab_size))
    rules = parameter_rules(model, Learning(), width=config.n_embd)
    optimizer = Optimizer(model, rules, muon_dtype=runtime.dtype)
    if compiled and runtime.device.type == "cuda":  # compiling on a CPU would take minutes
        model.compile_loss()
    return model, optimizer


def make_batch(config: GPTConfig, rows: int, seed: int, device: torch.device) -> Batch:
    """Make random tokens in documents of about 700 tokens; each seed gives others."""
    generator = torch.Generator().manual_seed(seed)
    T = config.context_length
    ids = torch.randint(0, config.vocab_size, (rows, T + 1), generator=generator)
    doc_ids = (torch.rand(rows, T, generator=generator) < 1 / 700).int().cumsum(1).int()
    ends = make_layout(doc_ids, (rows, T), (), "varlen", torch.device("cpu")).boundaries
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return Batch(inputs, targets, torch.ones(rows, T), doc_ids, boundaries=ends).to(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    action: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 1
) -> float:
    """Measure the median time of an action in seconds, until the device has finished it."""
    times = []
    for repeat in range(repeats + warm_up):
        synchronize(device)
        began = time.perf_counter()
        action()
        synchronize(device)
        if repeat >= warm_up:
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def forget(device: torch.device) -> None:
    """Free the memory of the last measurement."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(action: Callable[[], Any]) -> Any:
    """Return the action's result or its error, so that an error of one shape hides no other."""
    try:
        return action()
    except NeedsCuda:
        return "needs CUDA"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


# The lines


def cuda_tests(sizes: Sizes) -> Result:
    """Run the tests marked `cuda`."""
    # Only files with such tests are named; the imports of others may be missing on this machine.
    files = [
        str(path.relative_to(PROJECT))
        for path in sorted((PROJECT / "tests").rglob("test_*.py"))
        if "@pytest.mark.cuda" in path.read_text()
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-m", "cuda", *files]
    if not sizes.cuda:
        command.insert(4, "--collect-only")
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    said = done.stdout.strip().splitlines()
    return {"exit": done.returncode, "summary": said[-12:], "errors": done.stderr[-500:]}


def one_step(sizes: Sizes, rows: int, compiled: bool) -> Result:
    runtime = start(sizes)
    config = model_config(sizes)
    model, optimizer = make(config, runtime, compiled)
    batches = [make_batch(config, rows, seed, runtime.device) for seed in range(5)]
    began = time.perf_counter()
    train_step(model, optimizer, batches[:1], Hypers(0.01), runtime)
    first = time.perf_counter() - began
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch in batches:  # other lengths of documents must not compile again
        train_step(model, optimizer, [batch], Hypers(0.01), runtime)
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    turns = iter(range(10**6))

    def step() -> None:
        batch = batches[next(turns) % 5]
        train_step(model, optimizer, [batch], Hypers(0.01), runtime)

    took = milliseconds(step, runtime.device, sizes.steps)
    tokens = rows * config.context_length
    peak = peak_flops(runtime.device)
    machine = Machine(runtime.device.type, runtime.dtype)
    planned = estimate_memory(config, Shape(rows, config.context_length), machine, Learning())
    return {
        "milliseconds": took,
        "tokens_per_second": 1e3 * tokens / took,
        "mfu": 1e3 * tokens * model.flops_per_token() / took / peak if peak else None,
        "first_step_seconds": first,
        "compiled_again": again,
        "peak_gib": peak_gib(runtime.device),
        "planned_gib": planned["total"] / 2**30,
    }


def steps(sizes: Sizes, compiled: bool) -> Result:
    """Time a training step of one micro-batch, for several numbers of rows."""
    result = {}
    for rows in sizes.rows:
        torch._dynamo.reset()
        forget(sizes.device)
        result[f"{rows} rows"] = attempt(lambda rows=rows: one_step(sizes, rows, compiled))
        print(json.dumps(result), flush=True)  # kept if the time runs out
    return result


def kernels(sizes: Sizes) -> Result:
    """List the 25 kernels that take most of a step, and the share in which the GPU is idle."""
    from torch.profiler import ProfilerActivity, profile

    runtime, config = start(sizes), model_config(sizes)
    model, optimizer = make(config, runtime, compiled=sizes.cuda)
    batch = make_batch(config, sizes.rows[-1], 0, runtime.device)
    step = functools.partial(train_step, model, optimizer, [batch], Hypers(0.01), runtime)
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * sizes.cuda
    synchronize(runtime.device)
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(sizes.steps):
            step()
        synchronize(runtime.device)
        wall = 1e6 * (time.perf_counter() - began)

    def microseconds(event: Any) -> float:
        return float(event.self_device_time_total if sizes.cuda else event.self_cpu_time_total)

    on_device = torch.autograd.DeviceType.CUDA if sizes.cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == on_device]
    events.sort(key=microseconds, reverse=True)
    return {
        "idle_share": 1 - sum(map(microseconds, events)) / wall,
        "kernels": [
            [event.key[:90], round(microseconds(event) / wall, 4), event.count]
            for event in events[:25]
        ],
    }


def head(sizes: Sizes) -> Result:
    """Time the head and its loss, fused or not, by the size of a chunk; and two ways to add up the
    head's gradient."""
    runtime = start(sizes)
    device, kind = runtime.device, runtime.device.type
    C, V, N = (1280 if sizes.cuda else 32), sizes.vocab_size, sizes.head_tokens
    hidden = torch.randn(N, C, device=device, dtype=runtime.dtype).requires_grad_()
    weight = (0.02 * torch.randn(V, C, device=device)).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    weights = torch.full((N,), 1 / N, device=device)
    result: Result = {}

    def run(fused: bool) -> None:
        hidden.grad = weight.grad = None
        tensors = hidden, weight, targets, weights
        head_loss.summed_softcapped_loss(*tensors, 15.0, V, fused=fused)[0].backward()

    usual = head_loss.LOGITS_PER_CHUNK[kind], head_loss.LOGITS_PER_BLOCK[kind]
    shapes = [(chunk, 25, True) for chunk in (26, 27, 28, 29) if sizes.cuda]
    shapes += [(c, b, False) for c, b in ((26, 25), (28, 24), (28, 25), (28, 26), (29, 26))]
    for chunk, block, fused in shapes:
        head_loss.LOGITS_PER_CHUNK[kind] = 2**chunk
        head_loss.LOGITS_PER_BLOCK[kind] = 2**block
        forget(device)
        took = attempt(lambda f=fused: milliseconds(lambda: run(f), device, sizes.steps))
        name = f"chunk 2^{chunk}, " + ("fused" if fused else f"block 2^{block}")
        result[name] = [took, peak_gib(device)]
        print(json.dumps(result), flush=True)  # kept if the time runs out
    head_loss.LOGITS_PER_CHUNK[kind], head_loss.LOGITS_PER_BLOCK[kind] = usual
    result["milliseconds at 400 TFLOP/s"] = 6 * N * V * C / 400e12 * 1e3
    tokens = min(N, 4096)
    gradient = torch.randn(tokens, V, device=device, dtype=runtime.dtype)
    total = torch.zeros(V, C, device=device)

    def add() -> None:
        total.add_(gradient.t() @ hidden.detach()[:tokens])

    def fused() -> None:
        if device.type != "cuda":
            raise NeedsCuda
        torch.ops.aten.addmm.dtype_out(
            total, gradient.t(), hidden.detach()[:tokens], torch.float32, out=total
        )

    for name, way in (("product, then sum", add), ("float32 sum in the product", fused)):
        result[name] = attempt(lambda way=way: milliseconds(way, device, sizes.steps))
    return result


def attention(sizes: Sizes) -> Result:
    """Time a layer's attention, forward and backward, by room for documents, window and kernel."""
    runtime = start(sizes)
    device = runtime.device
    backend = "varlen" if sizes.cuda else "blocked"
    B, T, H, D = (32, 2048, 10, 128) if sizes.cuda else (2, 64, 2, 16)
    documents = make_batch(model_config(sizes), B, 0, torch.device("cpu"))
    heads = [
        torch.randn(B, T, H, D, device=device, dtype=runtime.dtype).requires_grad_()
        for _ in range(3)
    ]
    ends = documents.boundaries
    assert ends is not None
    ends = ends[: int((ends < B * T).sum()) + 1]
    result: Result = {"documents": len(ends) - 1}

    def measure(window: int, room: int) -> float:
        boundaries = pad_boundaries(ends, max(room, len(ends) - 1)).to(device)
        layout = make_layout(
            documents.doc_ids.to(device), (B, T), (window,), backend, device, boundaries
        )

        def run() -> None:
            attend(*heads, layout, window).sum().backward()

        return milliseconds(run, device, sizes.steps)

    for kernel in ("FA2", "newer"):
        if kernel == "FA2":
            getattr(torch.nn.attention, "restore_flash_attention_impl", lambda: None)()
        else:
            result["newer"] = activate_flash_attention(device) if sizes.cuda else None
            if result["newer"] is None:
                break
        for window, room in ((0, 128), (0, 256), (0, 1024), (T // 2, 128), (T // 4, 128)):
            name = f"{kernel}, window {window}, {room} documents"
            result[name] = attempt(lambda w=window, r=room: measure(w, r))
    return result


def masked_sdpa(sizes: Sizes) -> Result:
    """Time attention over a cache in 20 shapes, by backend: the first call of each and the next.

    Single tokens and prompts are measured apart: attend_cached keeps cuDNN from prompts, which
    come in very many shapes, and leaves it to single tokens, which come in few.
    """
    runtime = start(sizes)
    device = runtime.device
    H, D = (10, 128) if sizes.cuda else (2, 16)
    shapes = [(rows, 64 * length) for rows in (1, 7, 16, 33, 64) for length in (3, 5, 9, 17)]
    if not sizes.cuda:
        shapes = shapes[:3]
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    result: Result = {}
    ways = (("cuDNN", [SDPBackend.CUDNN_ATTENTION, *backends]), ("no cuDNN", backends))
    for tokens, (name, chosen) in itertools.product((1, 96 if sizes.cuda else 2), ways):
        first, later = [], []
        for rows, slots in shapes:
            q = torch.randn(rows, H, tokens, D, device=device, dtype=runtime.dtype)
            k = torch.randn(rows, H, slots, D, device=device, dtype=runtime.dtype)
            bias = torch.zeros(rows, 1, tokens, slots, device=device, dtype=runtime.dtype)
            bias[..., slots // 2 :] = float("-inf")
            run = functools.partial(F.scaled_dot_product_attention, q, k, k, attn_mask=bias)
            with sdpa_kernel(chosen, set_priority=True):
                first.append(milliseconds(run, device, 1, warm_up=0))
                later.append(milliseconds(run, device, 5))
        result[f"{name}, {tokens} tokens"] = {"first": first, "later": later}
    return result


def waits(sizes: Sizes) -> Result:
    """Find where a training step waits for the GPU, by torch's own debug mode."""
    runtime, config = start(sizes), model_config(sizes)
    model, optimizer = make(config, runtime, compiled=False)
    batches = [make_batch(config, sizes.rows[-1], seed, runtime.device) for seed in range(2)]
    train_step(model, optimizer, batches, Hypers(0.01), runtime)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if sizes.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        train_step(model, optimizer, batches, Hypers(0.01), runtime)
        if sizes.cuda:
            torch.cuda.set_sync_debug_mode("default")
    places: dict[str, int] = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{Path(warning.filename).name}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
    return {"micro_batches": 2, "waits": sum(places.values()), "places": places}


def decoding(sizes: Sizes) -> Result:
    """Measure decoding in tokens per second, by rows: eager, and with CUDA graphs."""
    runtime = start(sizes)
    with torch.device(runtime.device):
        model = GPT(model_config(sizes), runtime.dtype)
    model.init_weights(0, words(model.config.vocab_size))
    slots = min(512, sizes.context_length)
    result: Result = {}

    def measure(decoder: Decoder, rows: int, pinned: bool) -> float:
        cache = decoder.new_cache(rows, slots)
        cache.pinned = pinned
        ids = torch.zeros(rows, 1, dtype=torch.long, device=runtime.device)

        def run() -> None:
            for _ in range(sizes.decoding_steps):
                decoder.next_logits(ids, cache)

        took = milliseconds(run, runtime.device, 2)
        return 1e3 * rows * sizes.decoding_steps / took

    def compiled(**options: Any) -> Decoder:
        if runtime.device.type != "cuda":
            raise NeedsCuda
        decoder = Decoder(model, compiled=True)
        decoder.compile_step(**options)
        return decoder

    ways: dict[str, Callable[[], Decoder]] = {
        "eager": lambda: Decoder(model),
        "CUDA graphs": lambda: compiled(),
        "compiled": lambda: compiled(mode="default"),
    }
    for name, make_decoder in ways.items():
        for rows in sizes.decoding_rows:
            result[f"{name}, {rows} rows"] = attempt(
                lambda m=make_decoder, r=rows, p=name != "eager": measure(m(), r, p)
            )
    return result


def precisions(sizes: Sizes) -> Result:
    """Compare the losses of the same 12 steps in different precisions and with other kernels."""
    config = model_config(sizes, depth=4 if sizes.cuda else 1)

    def train(dtype: str, change: Callable[[GPT], Any] | None = None) -> list[float]:
        runtime = runtimes.start(sizes.device.type, dtype)
        model, optimizer = make(config, runtime, compiled=False)
        if change is not None:
            change(model)
        scale = LossScale() if runtime.dtype == torch.float16 else None
        batches = [make_batch(config, sizes.rows[-1], s % 3, runtime.device) for s in range(12)]
        return [
            train_step(model, optimizer, [batch], Hypers(0.3), runtime, scale).loss
            for batch in batches
        ]

    def fp8(model: GPT) -> None:
        if not sizes.cuda:
            raise NeedsCuda
        convert_to_fp8(model)

    def run(dtype: str, **values: Any) -> list[float]:
        return train(dtype, lambda model: [setattr(model, k, v) for k, v in values.items()])

    ways: dict[str, Callable[[], list[float]]] = {
        "bfloat16": lambda: run("bfloat16"),
        "float32": lambda: run("float32"),
        "float16": lambda: run("float16"),
        "sdpa": lambda: run("bfloat16", backend="sdpa"),
        "recompute": lambda: run("bfloat16", recompute=True),
        "fp8": lambda: train("bfloat16", fp8),
    }
    return {name: attempt(way) for name, way in ways.items()}


def transfers(sizes: Sizes) -> Result:
    """Time the optimizer's step on all GPUs, with tables sent in float32 and in bfloat16."""
    ranks = torch.cuda.device_count() if sizes.cuda else 2
    if ranks < 2:
        return {"skipped": f"needs two GPUs or more, this machine has {ranks}"}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(updates, (ranks, folder, sizes), nprocs=ranks)
        result: Result = json.loads((Path(folder) / "result").read_text())
    return result


def updates(rank: int, world_size: int, folder: str, sizes: Sizes) -> None:
    """Run one rank of `transfers`; rank 0 writes the result."""
    device = torch.device("cuda", rank) if sizes.cuda else torch.device("cpu")
    if sizes.cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if sizes.cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
    )
    config = model_config(sizes)
    result: Result = {"ranks": world_size}
    for name, halved in (("float32", False), ("bfloat16", True)):
        forget(device)
        with torch.device(device):
            model = GPT(config)
        for parameter in model.parameters():
            parameter.data.zero_()
        rules = parameter_rules(model, Learning(bf16_transfers=halved), width=config.n_embd)
        optimizer = Optimizer(model, rules, rank=rank, world_size=world_size)

        def step(optimizer: Optimizer = optimizer) -> None:
            optimizer.step(Hypers(1e-6))
            optimizer.zero_grad()

        result[name] = {
            "milliseconds": milliseconds(step, device, sizes.steps),
            "gigabytes_sent": optimizer.bytes_communicated() / 1e9,
            "peak_gib": peak_gib(device),
        }
        del model, optimizer, step, parameter
    if rank == 0:
        (Path(folder) / "result").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def checkpoints(sizes: Sizes) -> Result:
    """Measure the seconds that a save stops training, that it takes, and that loading takes."""
    runtime, config = start(sizes), model_config(sizes, depth=12 if sizes.cuda else 1)
    model, optimizer = make(config, runtime, compiled=False)
    result: Result = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        synchronize(runtime.device)
        began = time.perf_counter()
        yield
        synchronize(runtime.device)
        result[name] = time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        manager = CheckpointManager(Path(folder), runtime)
        with timed("pause"):
            manager.save(1, model, optimizer, {"tokenizer_hash": ""})
        with timed("write"):
            manager.wait()
        step = Path(folder) / "step_000001"
        files = [path for path in step.rglob("*") if path.is_file()]
        result["gigabytes"] = sum(path.stat().st_size for path in files) / 1e9
        with timed("hash"):
            for path in files:
                file_sha256(path)
        with timed("load weights"):
            load_weights(step, read_meta(step), model, runtime)
        with timed("resume"):
            restore(step, read_meta(step), model, optimizer, runtime)
    return result


@contextmanager
def base_folder() -> Iterator[dict[str, str]]:
    """Make an environment for scripts, with a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield {**os.environ, "NANOCHAT_BASE_DIR": folder, "WANDB_MODE": "disabled"}


def script(
    line: str, environment: dict[str, str], stop_when: Callable[[], bool] | None = None
) -> Result:
    """Run `python -m scripts.LINE`; send SIGTERM as soon as `stop_when()` is true."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(f"scripts.{line}")],
        cwd=PROJECT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if stop_when is not None:
        threading.Thread(target=stop, args=(process, stop_when), daemon=True).start()
    said = process.communicate()[0].strip().splitlines()
    return {
        "exit": process.returncode,
        "seconds": time.perf_counter() - began,
        "said": said[-3:] if process.returncode == 0 else said[-12:],
    }


def stop(process: subprocess.Popen[str], when: Callable[[], bool]) -> None:
    while process.poll() is None:
        if when():
            process.send_signal(signal.SIGTERM)
            return
        time.sleep(0.001)


def saving(environment: dict[str, str]) -> bool:
    """True while a base model's checkpoint is being written."""
    folder = Path(environment["NANOCHAT_BASE_DIR"]) / "checkpoints" / "base"
    return any(folder.glob("*/.step_*.tmp"))


def small_run(sizes: Sizes) -> str:
    """List the flags of a small base model on the embedded corpus."""
    if sizes.cuda:
        return "--device cuda --depth 4 --context-length 512 --head-dim 64 --corpus bbe"
    return "--device cpu --depth 1 --context-length 64 --head-dim 64 --corpus bbe"


def pipeline(sizes: Sizes) -> Result:
    """Run all stages at a small size; base gets a SIGTERM while it saves, and is resumed."""
    device = f"--device {sizes.device.type}"
    steps, every = (300, 20) if sizes.cuda else (20, 1)
    few = "--num-steps 40" if sizes.cuda else "--num-steps 2"
    chat = f"{device} --corpus bbe --total-batch-size {16384 if sizes.cuda else 512}"
    quick = f"{few} --eval-every 0 --eval-tokens 1024 --mix simplespelling:50:1 --replay 0"
    base = (
        f"{small_run(sizes)} --total-batch-size {16384 if sizes.cuda else 512} "
        f"--num-steps {steps} --save-every {every} --eval-every 0 --eval-tokens 1024 --resume"
    )
    commands = {
        "tokenizer": f"tok_train --corpus bbe --vocab-size {4096 if sizes.cuda else 512}",
        "encode": "tok_encode --corpus bbe",
        "base, stopped": f"base_train {base}",
        "base, resumed": f"base_train {base}",
        "mid": f"mid_train {chat} {quick} --resume",
        "sft": f"chat_sft {chat} {quick} --resume",
        "rl": f"chat_rl {device} --mix simplespelling:50:1 --num-steps 2 --prompts-per-step 2 "
        "--group-size 4 --max-tokens 8 --eval-problems 4 --resume",
        "evaluation": f"chat_eval {device} --source rl --task simplespelling --max-problems 8",
    }
    result: Result = {}
    with base_folder() as environment:
        for name, line in commands.items():
            in_a_save = functools.partial(saving, environment)
            result[name] = script(line, environment, in_a_save if "stopped" in name else None)
            print(json.dumps(result), flush=True)
    return result


def learning(sizes: Sizes) -> Result:
    """Train a depth-12 model for two minutes on the embedded corpus: bits per byte by time."""
    depth, hours = (12, 2 / 60) if sizes.cuda else (1, 3 / 3600)
    with base_folder() as environment:
        for line in ("tok_train --corpus bbe --vocab-size 4096", "tok_encode --corpus bbe"):
            script(line, environment)
        flags = small_run(sizes).replace(f"--depth {4 if sizes.cuda else 1}", f"--depth {depth}")
        trained = script(
            f"base_train {flags} --num-steps 2000 --max-hours {hours} --eval-every "
            f"{100 if sizes.cuda else 1} --eval-tokens 4096 --save-every 0",
            environment,
        )
        found = Path(environment["NANOCHAT_BASE_DIR"]).glob("runs/base-*/metrics.jsonl")
        lines = [json.loads(text) for path in found for text in path.read_text().splitlines()]
    return {
        "run": trained,
        "metrics": [line for line in lines if "bpb" in line or "bpb" in line.get("metrics", {})][
            -40:
        ],
    }


def llama(sizes: Sizes) -> Result:
    """Time transformers' Llama of the same shape: SDPA, compiled, bf16 autocast, fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    runtime, ours = start(sizes), model_config(sizes)
    C, rows = ours.n_embd, sizes.rows[-1]
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=C,
        intermediate_size=round(8 * C / 3 / 64) * 64,
        num_hidden_layers=ours.n_layer,
        num_attention_heads=ours.n_head,
        max_position_embeddings=ours.context_length,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.device(runtime.device):
        model: Any = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if sizes.cuda else model
    ids = make_batch(ours, rows, 0, runtime.device).inputs
    half = runtime.dtype != torch.float32

    def step() -> None:
        context = torch.autocast(runtime.device.type, runtime.dtype) if half else nullcontext()
        with context:
            value = forward(input_ids=ids, labels=ids).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    took = milliseconds(step, runtime.device, sizes.steps, warm_up=2)
    return {"rows": rows, "milliseconds": took, "tokens_per_second": 1e3 * ids.numel() / took}


LINES: dict[str, tuple[Callable[[Sizes], Result], float]] = {
    "step": (functools.partial(steps, compiled=True), 150),
    "tests": (cuda_tests, 120),
    "kernels": (kernels, 90),
    "waits": (waits, 30),
    "head": (head, 60),
    "attention": (attention, 30),
    "sdpa": (masked_sdpa, 45),
    "decoding": (decoding, 90),
    "eager": (functools.partial(steps, compiled=False), 45),
    "transfers": (transfers, 60),
    "precisions": (precisions, 60),
    "checkpoints": (checkpoints, 60),
    "pipeline": (pipeline, 200),
    "llama": (llama, 90),
    "learning": (learning, 200),
}
"""Measurement and time limit in seconds, by name."""


# Running them


def facts(sizes: Sizes) -> Result:
    """Describe the machine and the versions."""
    result: Result = {"torch": torch.__version__, "cuda": torch.version.cuda, "dry": not sizes.cuda}
    if sizes.cuda:
        properties = torch.cuda.get_device_properties(0)
        result |= {"gpu": properties.name, "gigabytes": properties.total_memory / 1e9}
        result["gpus"] = torch.cuda.device_count()
    return result


def measure_here(name: str, sizes: Sizes) -> Result:
    began = time.perf_counter()
    try:
        outcome: Result = {"result": LINES[name][0](sizes)}
    except NeedsCuda:
        outcome = {"failed": "needs CUDA"}
    except Exception as error:
        outcome = {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    return {**outcome, "seconds": time.perf_counter() - began}


def measure_apart(name: str, limit: float) -> Result:
    """Run a line in a process of its own, which is ended with its children at the time limit."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        log = Path(folder) / "log"
        with log.open("w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu", "--line", name, "--json", str(path)],
                cwd=PROJECT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(limit)
                late = False
            except subprocess.TimeoutExpired:
                late = True
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = log.read_text(errors="replace")
        if path.exists():
            outcome: Result = json.loads(path.read_text())
            return outcome
    reason = f"more than {limit:.0f} s" if late else f"exit status {process.returncode}"
    partial = [line for line in text.splitlines() if line.startswith("{")]
    return {
        "failed": reason,
        "so_far": json.loads(partial[-1]) if partial else None,
        "said": text[-2000:],
        "seconds": time.perf_counter() - began,
    }


def in_short(value: Any) -> Any:
    """Format a result for the table: numbers with four digits; of scripts, status and seconds."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [in_short(item) for item in value]
    if isinstance(value, dict):
        if "said" in value and value["exit"] in (0, 75, 143):
            value = {key: item for key, item in value.items() if key != "said"}
        return {key: in_short(item) for key, item in value.items()}
    return value


def show(report: Result, console: Console) -> None:
    table = Table(title=", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for column in ("line", "seconds", "result"):
        table.add_column(column)
    for name, outcome in report["lines"].items():
        value = outcome.get("result", {"failed": outcome.get("failed")})
        table.add_row(name, f"{outcome['seconds']:.0f}", json.dumps(in_short(value))[:600])
    console.print(table, markup=False)


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=LINES, metavar="LINE", help=", ".join(LINES))
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="results")
    parser.add_argument("--seconds", type=float, default=480, help="for everything together")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--line", choices=LINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    sizes = TINY if arguments.dry_run else REAL
    if arguments.line:
        outcome = measure_here(arguments.line, sizes)
        publish(outcome, arguments.json, quiet=True)
        return outcome
    if sizes.cuda and not torch.cuda.is_available():
        parser.exit(1, "error: no CUDA device is visible; --dry-run tries this file on a CPU\n")
    began, machine = time.perf_counter(), facts(sizes)
    report: Result = {"machine": machine, "lines": {}}
    if arguments.json.exists():
        earlier = json.loads(arguments.json.read_text())
        if earlier["machine"] == machine:
            report = earlier
    console = Console(width=160)
    for name, (_, limit) in LINES.items():
        left = arguments.seconds - (time.perf_counter() - began)
        done = "result" in report["lines"].get(name, {})
        if name not in (arguments.only or LINES) or (done and not arguments.only) or left < 5:
            continue
        console.print(f"{name}: up to {min(limit, left):.0f} s")
        report["lines"][name] = (
            measure_apart(name, min(limit, left)) if sizes.cuda else measure_here(name, sizes)
        )
        publish(report, arguments.json, quiet=True)
    show(report, console)
    return report


if __name__ == "__main__":
    main()
