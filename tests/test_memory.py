"""Estimates of the memory that training needs, and advice when there is less.

B batch, T time
"""

import errno
import os
import runpy
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_runs
import torch

from benchmarks.common import words
from nanochat import memory, runtime
from nanochat.cli import is_out_of_memory, launch
from nanochat.config import BaseConfig, Learning
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, config_from_depth
from nanochat.hardware import Machine, cpus, machine_memory
from nanochat.infer import decoder
from nanochat.memory import (
    Shape,
    estimate_memory,
    largest_batch,
    memory_advice,
    saved_for_backward,
)
from nanochat.optim import KINDS
from nanochat.runtime import Runtime

CONFIG = config_from_depth(3, 300, aspect_ratio=16, head_dim=16, context_length=64)
CPU = Machine("cpu", torch.float32)


def really_saved(
    config: GPTConfig, B: int, T: int, dtype: torch.dtype, recompute: bool = False
) -> int:
    """Bytes that autograd keeps of a step on real tensors, with several documents to a row."""
    model = GPT(config, dtype).init_weights(0, words(config.vocab_size))
    model.recompute = recompute
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, config.vocab_size, (B, T))
    documents = torch.arange(T).div(20, rounding_mode="floor").int().expand(B, T)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.weighted_loss(ids, ids, torch.ones(B, T), documents)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("portable", [False, True])
def test_what_is_kept_is_counted_exactly(portable: bool, dtype: torch.dtype) -> None:
    """Without running anything. With recompute, a block's share comes to what is kept."""
    config = config_from_depth(
        3, 300, aspect_ratio=16, head_dim=16, kv_heads=1, context_length=64, portable=portable
    )
    counted = saved_for_backward(config, Shape(2, 48), dtype, "blocked")
    # On a CPU the sums of the bytes' vectors keep an int32 for each token, and one for all. The
    # kernel for meta tensors keeps what a GPU does, which is neither.
    unseen = 0 if portable else 4 * (2 * 48 + 1)
    whole = really_saved(config, 2, 48, dtype) - unseen
    assert counted == whole
    again = saved_for_backward(config, Shape(2, 48, True), dtype, "blocked")
    kept = really_saved(config, 2, 48, dtype, recompute=True) - unseen
    assert again == kept + (whole - kept) // 3


def test_estimate() -> None:
    one, eight = (estimate_memory(CONFIG, Shape(rows, 64), CPU, Learning()) for rows in (1, 8))
    assert eight["activations"] == pytest.approx(8 * one["activations"], rel=1e-6)
    assert {k for k in one if one[k] != eight[k]} == {"activations", "total"}
    assert one["total"] == sum(one.values()) - one["total"]
    parameters = sum(p.numel() for p in memory.meta_model(CONFIG).parameters())
    assert one["weights"] == one["gradients"] == 4 * parameters
    again = estimate_memory(CONFIG, Shape(8, 64, True), CPU, Learning())
    assert again["activations"] < 0.7 * eight["activations"]
    sharded = estimate_memory(CONFIG, Shape(8, 64), replace(CPU, world_size=4), Learning())
    assert sharded["optimizer shard"] == eight["optimizer shard"] // 4
    on_gpu = estimate_memory(CONFIG, Shape(8, 64), replace(CPU, device_type="cuda"), Learning())
    assert on_gpu["checkpoint copy"] == 0, "in the host's memory"
    assert on_gpu["activations"] < eight["activations"], "no probabilities, no masks"


def test_each_rule_has_a_memory_of_its_own() -> None:
    """The option counts in the estimate, in the rows that fit, and in the advice."""
    config = config_from_depth(12, 4096, context_length=64)
    rules = {kind: Learning(matrix_optimizer=kind) for kind in KINDS}  # type: ignore[arg-type]
    needed = {kind: estimate_memory(config, Shape(4, 64), CPU, rules[kind]) for kind in KINDS}
    temporaries = {kind: parts["optimizer temporaries"] for kind, parts in needed.items()}
    assert temporaries["adamw"] == temporaries["lion"] < temporaries["muon"]
    totals = {kind: parts["total"] for kind, parts in needed.items()}
    assert totals["lion"] < min(totals["muon"], totals["adamw"])
    machine = replace(CPU, memory_limit=totals["lion"])
    fits = {kind: largest_batch(config, machine, 64, rules[kind]) for kind in KINDS}
    assert fits["lion"] == 4 > max(fits["muon"], fits["adamw"])
    advice = {
        memory_advice(config, Shape(4, 64), CPU, rule, rows_per_step=4, fits=4)
        for rule in rules.values()
    }
    assert len(advice) == len(KINDS)


def test_advice_names_what_to_set() -> None:
    def advice(fits: int, limit: int | None, rows: int = 16, recompute: bool = False) -> str:
        machine, shape = replace(CPU, memory_limit=limit), Shape(rows, 64, recompute)
        return memory_advice(CONFIG, shape, machine, Learning(), rows_per_step=48, fits=fits)

    limit = estimate_memory(CONFIG, Shape(8, 64), CPU, Learning())["total"]
    assert largest_batch(CONFIG, replace(CPU, memory_limit=limit), 64, Learning()) == 8
    text = advice(8, limit)
    for part in (
        "--device-batch-size 16 with rows of 64 tokens was planned to need",
        "8 rows fit",
        "set --device-batch-size 8 (",
        "or --recompute (",
    ):
        assert part in text
    # What fits by the plan and failed nevertheless is not proposed again; only divisors are.
    assert "set --device-batch-size 12 (" in advice(64, 2**40)
    assert "set --device-batch-size 12 (" in advice(4096, None)
    assert "set a smaller model or shorter rows" in advice(8, limit, 1, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_decoder_holds(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model, whose tensors it may share. What oneDNN lays out is as large as a copy."""
    monkeypatch.setattr(decoder, "_pack", torch.clone)
    model = GPT(CONFIG, dtype).init_weights(0, words(CONFIG.vocab_size))
    shared = {p.untyped_storage().data_ptr() for p in model.parameters()}
    made = decoder.Decoder(model)
    tensors = [made.embedding]
    products = [made.head]
    for layer in made.layers:
        products += [layer.inputs, layer.out, layer.up, layer.down]
        if layer.value_embedding is not None:
            tensors.append(layer.value_embedding)
    tensors += [p.packed for p in products if p.packed is not None]
    assert len(tensors) > len(products)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    held = sum(size for key, size in storages.items() if key not in shared)
    planned = memory.decoder_memory(CONFIG, dtype)
    assert held <= planned < 1.1 * held

    cache = made.new_cache(3, CONFIG.context_length)
    one = memory.cache_memory(CONFIG, dtype)
    assert 3 * one <= cache.nbytes < 1.2 * 3 * one, "and room for padding"


# When it happens


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memo"
                     "ry: you tried to allocate 8 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)  # fmt: skip
def test_every_kind_ends_with_the_advice(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["base_train", "--run.device", "cpu"][:1])
    monkeypatch.delenv("NANOCHAT_TRACEBACK", raising=False)

    def main(cfg: BaseConfig, rank: Runtime) -> None:
        rank.memory_advice = "set --device-batch-size 8"
        raise error

    with pytest.raises(SystemExit) as caught:
        launch(main, BaseConfig, None)
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: set --device-batch-size 8 (")
    assert said.count("\n") == 1


def test_other_errors_are_not_about_memory() -> None:
    for error in (RuntimeError("shape mismatch"), OSError(28, "No space left"), UserError("x")):
        assert not is_out_of_memory(error)


def limit_memory_in_the_first_step() -> None:
    """The address space may grow by 24 MiB once training begins."""
    import resource

    from nanochat.data.loader import DataLoader

    step_batches = DataLoader.step_batches

    def limited(loader: Any, *arguments: Any) -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + 24 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        return step_batches(loader, *arguments)

    DataLoader.step_batches = limited  # type: ignore[method-assign]


def run_out(folder: Path, corpus: str) -> None:
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    os.environ.pop("NANOCHAT_TRACEBACK", None)
    sys.stdout = sys.stderr = (folder / "output").open("w")
    limit_memory_in_the_first_step()
    sys.argv = (
        f"base_train --device cpu --dtype float32 --corpus {corpus} --depth 2 --aspect-ratio 64 "
        "--head-dim 16 --context-length 64 --device-batch-size 256 --total-batch-size 32768 "
        "--num-steps 2 --eval-tokens 64 --eval-every 0"
    ).split()
    runpy.run_module("scripts.base_train", run_name="__main__", alter_sys=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_a_training_script_says_what_to_set(encoded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoded, tmp_path / "run"))
    process = processes.start(run_out, folder, tiny_runs.corpus(encoded))
    assert processes.finish(process) == 1
    said = (folder / "output").read_text().splitlines()[-1]
    assert said.startswith("error: out of memory: --device-batch-size 256 with rows of 64 tokens")
    assert "set --device-batch-size 128" in said
    assert "--recompute" in said


# The limit


def test_the_smallest_limit_of_all_control_groups_counts(tmp_path: Path) -> None:
    whole = machine_memory()
    if whole is None:
        pytest.skip("this system does not tell how much memory it has")
    assert machine_memory(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    assert machine_memory(tmp_path) == machine_memory(tmp_path / "none")
    write("sys/fs/cgroup/a/memory.max", "3000000\n")
    assert machine_memory(tmp_path) == 3_000_000, "of the group around ours"
    # Version 1; in a container the group's path is that of the host, and only the top is there.
    write("proc/self/cgroup", "5:cpu:/x\n4:memory:/docker/123\n0::/\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n")
    assert machine_memory(tmp_path) == 2_000_000


def test_processors_follow_affinity_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control groups of both versions; the smallest limit of ours and those around it holds."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    def count(groups: str, **files: str) -> int:
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        for name, text in {"proc/self/cgroup": groups, **files}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return cpus(root)

    top = "sys/fs/cgroup"
    assert count("") == 16
    assert count("0::/a/b\n", **{f"{top}/a/b/cpu.max": "max 100000\n"}) == 16
    around = {f"{top}/a/b/cpu.max": "400000 100000\n", f"{top}/a/cpu.max": "250000 100000\n"}
    assert count("0::/a/b\n", **around) == 3, "2.5 processors of the group around ours"
    assert count("0::/\n", **{f"{top}/cpu.max": "50000 100000\n"}) == 1
    first = {f"{top}/cpu/cpu.cfs_quota_us": "-1\n", f"{top}/cpu/cpu.cfs_period_us": "100000\n"}
    assert count("4:memory:/x\n3:cpu,cpuacct:/docker/1\n", **first) == 16
    first[f"{top}/cpu/cpu.cfs_quota_us"] = "600000\n"
    assert count("3:cpu,cpuacct:/docker/1\n0::/\n", **first) == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert count("3:cpu,cpuacct:/docker/1\n", **first) == 2


def planned(rank: Runtime) -> int | None:
    runtime.machine_memory = lambda: (rank.rank + 1) * 10**9
    return replace(rank, local_world_size=2).memory_limit()


def test_ranks_plan_with_the_same_share() -> None:
    """The machines' memory differs: the least of it, over the ranks that share it."""
    assert processes.run_ranks(planned, 3) == [4 * 10**8] * 3
