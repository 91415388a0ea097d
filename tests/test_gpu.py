"""Training on a GPU: `python -m pytest -m cuda tests`; without one, traced on meta tensors.

B batch, T time
"""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_runs
import torch
import torch.distributed as dist

from benchmarks.common import words
from nanochat import loss, runtime
from nanochat.attention import Layout
from nanochat.checkpoint_manager import CheckpointManager, read_meta_once, restore
from nanochat.cli import is_out_of_memory
from nanochat.config import Learning
from nanochat.gpt import GPT, GPTConfig, config_from_depth
from nanochat.hardware import Machine
from nanochat.memory import CUDA_CONTEXT, RUNTIME, Shape, estimate_memory
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.runtime import Runtime, best_dtype
from nanochat.train import Batch, LossScale, train_step

CONFIG = config_from_depth(2, 300, aspect_ratio=64, head_dim=64, context_length=128)
B, T = 4, 128
CUDA = "cuda"


def restored(step: Path, model: Any, optimizer: Any, rank: Runtime) -> dict[str, Any]:
    """Read and restore as a stage does; the metadata."""
    meta = read_meta_once(step, rank)
    restore(step, meta, model, optimizer, rank)
    return meta


def batch(seed: int, device: str = CUDA, config: GPTConfig = CONFIG, rows: int = B) -> Batch:
    """Documents of other lengths in every batch; each token follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    length = config.context_length
    ids = (torch.arange(length + 1) * 3 + torch.arange(rows)[:, None]) % config.vocab_size
    starts = torch.randint(0, 40, (rows, length), generator=generator) == 0
    tensors = (
        ids[:, :-1].contiguous(),
        ids[:, 1:].contiguous(),
        torch.rand(rows, length, generator=generator),
        starts.cumsum(1).int(),
    )
    return Batch(*(tensor.to(device) for tensor in tensors))


def make(device: str, dtype: torch.dtype, config: GPTConfig = CONFIG) -> tuple[GPT, Optimizer]:
    model = GPT(config, dtype).init_weights(0, words(config.vocab_size)).to(device)
    rules = parameter_rules(model, Learning(), width=config.n_embd)
    return model, Optimizer(model, rules, muon_dtype=torch.float32)


def losses(device: str, dtype: torch.dtype, compiled: bool = False, steps: int = 8) -> list[float]:
    model, optimizer = make(device, dtype)
    if compiled:
        model.compile_loss()
    rank = runtime.single(device, dtype)
    scale = LossScale(2.0**10) if dtype == torch.float16 else None
    return [
        train_step(model, optimizer, [batch(i, device)], Hypers(0.3), rank, scale).loss
        for i in range(steps)
    ]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_with_varlen_attention_on_meta_tensors(recompute: bool) -> None:
    """Forward and backward of the whole loss, windows and grouped heads included."""
    config = config_from_depth(3, 300, head_dim=64, kv_heads=1, context_length=T)
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16)
        ids, ends = torch.zeros(B, T, dtype=torch.long), torch.zeros(17, dtype=torch.int32)
        layout = Layout("varlen", torch.zeros(B, T, dtype=torch.bool), {}, ends, T)
        model.recompute = recompute
        loss = model.summed_loss(ids, ids, torch.ones(B, T), layout)
        loss.backward()  # type: ignore[no-untyped-call]
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, torch.float32)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    expected, got = losses("cpu", torch.float32), losses(CUDA, dtype)
    assert expected[-1] < 0.8 * expected[0], "it learns"
    assert got == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 0.03)


@pytest.mark.cuda
def test_compiled_steps_are_the_eager_ones() -> None:
    """Generated code, documents of other lengths in every step, compiled once."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    dtype = best_dtype(torch.device(CUDA))
    eager = losses(CUDA, dtype)
    compiled = losses(CUDA, dtype, compiled=True)
    assert compiled == pytest.approx(eager, rel=0.02)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["_to_gradient_fused", "_log_probabilities"])
def test_the_fused_head_keeps_nothing_of_the_size_of_logits(name: str) -> None:
    """The logits are read twice at most, and the gradient is written over them."""
    from torch._inductor.utils import run_and_get_code

    t, V = 256, 32768
    logits = torch.randn(t, V, device=CUDA, dtype=torch.bfloat16)
    targets = torch.randint(0, V, (t, 1), device=CUDA)
    twin = logits.clone()
    chosen, (code,) = run_and_get_code(loss._compiled(getattr(loss, name)), logits, targets, 15.0)
    eager = getattr(loss, name.removesuffix("_fused"))
    torch.testing.assert_close(chosen, eager(twin, targets, 15.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, twin)
    kernels = re.findall(r"triton_\w+\.run\(", code)
    assert len(kernels) == (2 if name == "_to_gradient_fused" else 1), "sums, then gradients"
    assert f"empty_strided_cuda(({t}, {V})" not in code


@pytest.mark.cuda
def test_the_head_adds_up_its_gradient_in_float32() -> None:
    """Products of bfloat16 added to a float32 sum, in place."""
    a, b = (torch.randn(512, 256, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    total = torch.randn(512, 512, device=CUDA)
    expected = total.double() + a.double() @ b.double().t()
    at = total.data_ptr()
    loss._add_product(total, a, b.t())
    assert total.data_ptr() == at
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.cuda
def test_recomputing_takes_less_memory_and_changes_nothing() -> None:
    config = config_from_depth(4, 300, head_dim=64, context_length=256)
    peaks, gradients = [], []
    for recompute in (False, True):
        model, optimizer = make(CUDA, torch.bfloat16, config)
        model.recompute = recompute
        data = batch(0, config=config, rows=16)
        torch.cuda.reset_peak_memory_stats()
        model.weighted_loss(data.inputs, data.targets, data.weights, data.doc_ids).backward()  # type: ignore[no-untyped-call]
        peaks.append(torch.cuda.max_memory_allocated())
        gradients.append(torch.cat([u.gradients.flatten() for u in optimizer.units]))
    assert peaks[1] < peaks[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=1e-3)


@pytest.mark.cuda
def test_the_memory_estimate() -> None:
    config = config_from_depth(8, 8192, head_dim=64, context_length=1024)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, optimizer = make(CUDA, torch.bfloat16, config)
    rank = runtime.single(CUDA, torch.bfloat16)
    for step in range(2):
        data = batch(step, config=config, rows=16)
        train_step(model, optimizer, [data], Hypers(0.1), rank)
    measured = torch.cuda.max_memory_allocated() - before
    estimate = estimate_memory(config, Shape(16, 1024), Machine("cuda", torch.bfloat16), Learning())
    outside = RUNTIME["cuda"] + CUDA_CONTEXT + estimate["gradients of a compiled pass"]
    assert estimate["total"] - outside == pytest.approx(measured, rel=0.2)


@pytest.mark.cuda
def test_running_out_of_memory_is_recognised() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device=CUDA)
    assert is_out_of_memory(caught.value)


@pytest.mark.cuda
def test_a_checkpoint_moves_between_gpu_and_cpu(tmp_path: Path) -> None:
    rank = runtime.single(CUDA, torch.bfloat16)
    model, optimizer = make(CUDA, torch.bfloat16)
    train_step(model, optimizer, [batch(0)], Hypers(0.1), rank)
    manager = CheckpointManager(tmp_path, rank)
    manager.save(1, model, optimizer, {"tokenizer_hash": ""})
    manager.wait()
    for device in ("cpu", CUDA):
        other, state = make(device, torch.float32)
        restored(tmp_path / "step_000001", other, state, runtime.single(device))
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.cpu(), b.cpu())
        theirs = optimizer.state_dict()
        assert all(torch.equal(theirs[k].cpu(), v.cpu()) for k, v in state.state_dict().items())


@pytest.mark.cuda
def test_the_stages_run_and_resume(encoded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoded, tmp_path / "run"))
    rank = runtime.start("cuda", "auto")
    for stage in ("base", "mid", "sft"):
        for steps in (2, 4):
            config = tiny_runs.CONFIGS[stage](
                tiny_runs.corpus(encoded),
                run={"device": "cuda", "dtype": "auto", "resume": steps == 4},
                duration={"num_steps": steps, "epochs": None},
            )
            assert tiny_runs.train(stage, folder, config, replace(rank)).finished
        assert sorted(tiny_runs.losses(folder, stage)) == [1, 2, 3, 4]


def steps_over_nccl(rank: Runtime, bf16_transfers: bool) -> list[float]:
    """The gloo group of the test's processes is replaced."""
    dist.destroy_process_group()
    device = torch.device("cuda", rank.rank)
    torch.cuda.set_device(device)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    dist.init_process_group("nccl", rank=rank.rank, world_size=rank.world_size, device_id=device)
    model = GPT(CONFIG, torch.bfloat16).init_weights(0, words(CONFIG.vocab_size)).to(device)
    learning = Learning(bf16_transfers=bf16_transfers)
    rules: Any = parameter_rules(model, learning, width=CONFIG.n_embd)
    optimizer = Optimizer(
        model, rules, rank=rank.rank, world_size=rank.world_size, muon_dtype=torch.float32
    )
    on_gpu = replace(rank, device=device, dtype=torch.bfloat16)
    found = []
    for step in range(4):
        data = batch(step, str(device))
        mine = slice(rank.rank, None, rank.world_size)
        fields = ("inputs", "targets", "weights", "doc_ids")
        part = Batch(**{name: getattr(data, name)[mine].contiguous() for name in fields})
        found.append(train_step(model, optimizer, [part], Hypers(0.3), on_gpu).loss)
    return found


@pytest.mark.cuda
@pytest.mark.parametrize("bf16_transfers", [False, True])
def test_two_gpus_take_the_steps_of_one(bf16_transfers: bool) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = processes.run_ranks(steps_over_nccl, 2, bf16_transfers)
    assert first == second
    assert first == pytest.approx(losses(CUDA, torch.bfloat16, steps=4), rel=0.02)
