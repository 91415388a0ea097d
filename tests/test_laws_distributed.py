"""Laws 2, 3 and 5: the number of ranks changes nothing, on gloo ranks of the CPU.

Two conversation stores with ragged masks are trained on by the real loader, model and optimizer.
"""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from safetensors.torch import load_file
from stores import make_store, take

from benchmarks.common import words
from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import (
    CheckpointManager,
    latest,
    list_steps,
    load_weights,
    read_meta_once,
    restore,
)
from nanochat.config import Learning
from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source
from nanochat.data.store import TokenStore
from nanochat.errors import UserError
from nanochat.eval.losses import evaluate_bpb
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.runtime import Runtime
from nanochat.train import Batch, ReplicaDivergence, check_replicas, train_step

# Three layers: no stack of matrices divides by 2 or 4 ranks. 320 rows of 24: the tables are sharded
# and don't divide by 3. The scalars and the gate are replicated.
CONFIG = GPTConfig(
    vocab_size=300,
    n_layer=3,
    n_head=3,
    n_kv_head=1,
    n_embd=24,
    head_dim=8,
    context_length=20,
    windows=(7, 0, 0),
)
WORLD_SIZES = (1, 2, 3, 4)
ROWS = 12
"""Rows of a step, over all ranks and micro-batches."""


def restored(step: Path, model: Any, optimizer: Any, rank: Runtime) -> dict[str, Any]:
    """Read and restore as a stage does; the metadata."""
    meta = read_meta_once(step, rank)
    restore(step, meta, model, optimizer, rank)
    return meta


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    random = np.random.default_rng(0)
    for name, longest in (("short", 15), ("long", 90)):
        documents = [random.integers(0, 300, n) for n in random.integers(2, longest, 60)]
        masks = [random.integers(0, 2, len(d)).tolist() for d in documents]
        masks[::7] = [[0] * len(m) for m in masks[::7]]  # some without any target
        make_store(folder / name, [d.tolist() for d in documents], masks)
    return folder


# AdamW divides a gradient by its own size, so one that is mostly rounding moves a weight by a good
# part of the rate, and rates for so narrow a model are large: hence smaller ones.
LEARNING = Learning(embedding_lr=0.01, scalar_lr=0.02)


def make(runtime: Runtime, learning: Learning = LEARNING) -> tuple[GPT, Optimizer]:
    model = GPT(CONFIG).init_weights(0, words(CONFIG.vocab_size))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # every parameter gets a gradient from the first step
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    rules = parameter_rules(model, learning, width=24, weight_decay=0.1)
    return model, Optimizer(
        model,
        rules,
        rank=runtime.rank,
        world_size=runtime.world_size,
        muon_dtype=torch.float32,
    )


def make_loader(runtime: Runtime, stores: Path, micro_batches: int) -> DataLoader:
    return DataLoader(
        [
            Source(TokenStore.open(stores / "short"), weight=2, prompt_weight=0.0),
            Source(TokenStore.open(stores / "long"), prompt_weight=0.3),
        ],
        batch_size=ROWS // runtime.world_size // micro_batches,
        sequence_length=20,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=5,
        window=16,
    )


def fingerprint(model: GPT) -> str:
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().numpy().tobytes())
    return digest.hexdigest()


def parameters(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


HYPERS = (Hypers(0.3, 0.85), Hypers(1.0, 0.9), Hypers(0.6, 0.95))


# Laws 2 and 3


def train(
    runtime: Runtime, stores: Path, micro_batches: int, learning: Learning = LEARNING
) -> dict[str, Any]:
    model, optimizer = make(runtime, learning)
    loader = make_loader(runtime, stores, micro_batches)
    losses, prints, targets = [], [], []
    for hypers in HYPERS:
        stats = train_step(model, optimizer, take(loader, micro_batches), hypers, runtime)
        losses.append(stats.loss)
        targets.append(stats.targets)
        prints.append(fingerprint(model))
        check_replicas(model, runtime)
    sizes = torch.arange(300) % 5
    held_out = make_loader(runtime, stores, micro_batches)
    bpb = evaluate_bpb(model, take(held_out, micro_batches), sizes, runtime)
    return {
        "losses": losses,
        "targets": targets,
        "tokens": stats.tokens,
        "prints": prints,
        "parameters": parameters(model),
        "bpb": {name: value for name, value in bpb.items() if name != "ci"},
    }


# (ranks, micro-batches): 12 rows a step in every case.
SHAPES = [(1, 4), (1, 1), (2, 2), (2, 3), (3, 2), (3, 1), (4, 1)]


@pytest.fixture(scope="module")
def results(stores: Path) -> dict[tuple[int, int], list[dict[str, Any]]]:
    return {shape: processes.run_ranks(train, shape[0], stores, shape[1]) for shape in SHAPES}


@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda s: f"{s[0]}x{s[1]}")
def test_ranks_and_micro_batches_do_not_change_the_result(
    shape: tuple[int, int], results: dict[tuple[int, int], list[dict[str, Any]]]
) -> None:
    expected, got = results[1, 4][0], results[shape][0]
    assert got["targets"] == expected["targets"]
    assert got["tokens"] == expected["tokens"] == ROWS * 20
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert got["bpb"] == pytest.approx(expected["bpb"], rel=1e-5)
    for name, value in expected["parameters"].items():
        # A step moves entries by 0.02; orthogonalisation magnifies small gradients' rounding.
        torch.testing.assert_close(
            got["parameters"][name], value, rtol=1e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 1], ids=lambda s: f"{s[0]}x{s[1]}")
def test_all_ranks_are_identical_after_every_step(
    shape: tuple[int, int], results: dict[tuple[int, int], list[dict[str, Any]]]
) -> None:
    first, *others = results[shape]
    assert len(set(first["prints"])) == len(HYPERS), "every step changed something"
    for other in others:
        assert other["prints"] == first["prints"]
        assert other["losses"] == first["losses"], "all ranks report the loss of the whole step"
        assert other["bpb"] == first["bpb"]


def test_lion_is_sharded_like_the_other_rules(stores: Path) -> None:
    """Lion moves by signs, so an entry whose gradient is mostly rounding may go the other way."""
    lion = dataclasses.replace(LEARNING, matrix_optimizer="lion", matrix_lr=0.003)
    (alone,) = processes.run_ranks(train, 1, stores, 4, lion)
    first, *others = processes.run_ranks(train, 3, stores, 2, lion)
    assert len(set(first["prints"])) == len(HYPERS)
    assert all(other["prints"] == first["prints"] for other in others)
    for name, value in alone["parameters"].items():
        near = torch.isclose(first["parameters"][name], value, rtol=1e-4, atol=2e-4)
        assert near.float().mean() > 0.98, name


# Tables that travel in bfloat16

HALVED = dataclasses.replace(LEARNING, bf16_transfers=True)
TABLES = ("embedding.weight", "byte_embedding.weight", "head.weight")
"""Value embeddings are so small here that every rank updates them."""


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bf16_transfers_keep_ranks_identical_and_losses_close(
    world_size: int, stores: Path, results: dict[tuple[int, int], list[dict[str, Any]]]
) -> None:
    first, *others = processes.run_ranks(train, world_size, stores, 1, HALVED)
    exact = results[1, 1][0]
    assert first["losses"] == pytest.approx(exact["losses"], rel=1e-3)
    assert first["losses"] != pytest.approx(exact["losses"], rel=1e-6), "something was rounded"
    for other in others:
        assert other["prints"] == first["prints"]
        assert other["losses"] == first["losses"]
    for name, value in first["parameters"].items():
        table = name in TABLES
        assert torch.equal(value, value.bfloat16().float()) == table, name


def masters_fingerprint(model: GPT, optimizer: Optimizer) -> str:
    with optimizer.masters():
        return fingerprint(model)


def resume_halved(runtime: Runtime, stores: Path, folder: Path) -> dict[str, Any]:
    """Save after two steps, take the third, and take it again from the checkpoint."""
    model, optimizer = make(runtime, HALVED)
    loader = make_loader(runtime, stores, 1)
    for hypers in HYPERS[:2]:
        train_step(model, optimizer, take(loader, 1), hypers, runtime)
    manager = CheckpointManager(folder, runtime)
    manager.save(2, model, optimizer, {"loader_state": loader.state_dict()})
    manager.wait()
    rounded = parameters(model)
    third = []
    for again in (False, True):
        if again:
            model, optimizer = make(runtime, HALVED)
            meta = restored(folder / "step_000002", model, optimizer, runtime)
            loader = make_loader(runtime, stores, 1)
            loader.load_state_dict(meta["loader_state"])
            for name, value in parameters(model).items():
                assert torch.equal(value, rounded[name]), name
        stats = train_step(model, optimizer, take(loader, 1), HYPERS[2], runtime)
        check_replicas(model, runtime)
        third.append((stats.loss, fingerprint(model), masters_fingerprint(model, optimizer)))
    assert third[0] == third[1]
    assert third[0][1] != third[0][2], "masters are more precise"
    return rounded


@pytest.mark.parametrize("world_size", [2, 4])
def test_bf16_transfers_save_float32_and_resume_bit_for_bit(
    world_size: int, stores: Path, tmp_path: Path
) -> None:
    rounded = processes.run_ranks(resume_halved, world_size, stores, tmp_path)[0]
    saved = load_file(tmp_path / "step_000002" / "model.safetensors")
    for name, value in rounded.items():
        table = name in TABLES
        assert torch.equal(saved[name], value) != table, name
        if table:
            assert torch.equal(saved[name].bfloat16().float(), value), name


def diverge(runtime: Runtime) -> tuple[str, str] | None:
    """Flip the lowest bit of one element on the last rank."""
    model, _ = make(runtime)
    check_replicas(model, runtime)
    if runtime.rank == runtime.world_size - 1:
        bits = model.blocks[1].mlp.up.weight.detach().view(torch.int32)
        bits[5, 3] ^= 1
    try:
        check_replicas(model, runtime)
    except ReplicaDivergence as error:
        return type(error).__name__, str(error)
    return None


def swap(runtime: Runtime) -> str | None:
    """The same values in another order."""
    model, _ = make(runtime)
    if runtime.rank == 1:
        with torch.no_grad():
            model.head.weight[[3, 4]] = model.head.weight[[4, 3]]
    try:
        check_replicas(model, runtime)
    except ReplicaDivergence as error:
        return str(error)
    return None


def test_a_divergence_is_caught_on_every_rank() -> None:
    for found in processes.run_ranks(diverge, 3):
        assert found is not None
        assert "parameter blocks.1.mlp.up.weight differs from rank 0 on ranks [2]" in found[1]
        assert "(1 parameters differ" in found[1]
    for message in processes.run_ranks(swap, 2):
        assert message is not None
        assert "head.weight" in message


# Law 5


def local_state(optimizer: Optimizer) -> dict[str, tuple[bool, torch.Tensor]]:
    """This rank's share of the state: key -> (is it a slice of rows?, values)."""
    return {
        key: (hasattr(value, "_local_tensor"), getattr(value, "_local_tensor", value).clone())
        for key, value in optimizer.state_dict().items()
    }


def whole_state(shares: list[dict[str, tuple[bool, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Put together by hand what the ranks have."""
    whole: dict[str, torch.Tensor] = {}
    for key in sorted({key for share in shares for key in share}):
        parts = [share[key] for share in shares if key in share]
        if parts[0][0]:
            whole[key] = torch.cat([value for _, value in parts])
        else:
            whole[key] = parts[0][1]
            assert all(torch.equal(value, whole[key]) for _, value in parts), key
    return whole


def rows_of(batches: list[Batch]) -> list[list[int]]:
    return [
        row.tolist() for batch in batches for row in torch.cat([batch.inputs, batch.targets], 1)
    ]


def global_rows(by_rank: list[list[list[int]]]) -> list[list[int]]:
    """Row g is the next one of rank g mod W."""
    return [row for rows in zip(*by_rank, strict=True) for row in rows]


def save(runtime: Runtime, stores: Path, folder: Path) -> dict[str, Any]:
    model, optimizer = make(runtime)
    loader = make_loader(runtime, stores, 1)
    for hypers in HYPERS[:2]:
        train_step(model, optimizer, take(loader, 1), hypers, runtime)
    manager = CheckpointManager(folder, runtime)
    manager.save(2, model, optimizer, {"loader_state": loader.state_dict()})
    state = local_state(optimizer)
    manager.wait()
    return {"parameters": parameters(model), "state": state, "rows": rows_of(take(loader, 1))}


def load(runtime: Runtime, stores: Path, folders: list[Path]) -> list[dict[str, Any]]:
    results = []
    for folder in folders:
        model, optimizer = make(runtime)
        for p in model.parameters():
            torch.nn.init.normal_(p)
        meta = restored(folder / "step_000002", model, optimizer, runtime)
        loader = make_loader(runtime, stores, 1)
        loader.load_state_dict(json.loads(json.dumps(meta["loader_state"])))
        result = {
            "parameters": parameters(model),
            "state": local_state(optimizer),
            "steps": optimizer.steps,
            "rows": rows_of(take(loader, 1)),
        }
        loader = make_loader(runtime, stores, 1)
        loader.load_state_dict(meta["loader_state"])
        stats = train_step(model, optimizer, take(loader, 1), HYPERS[2], runtime)
        check_replicas(model, runtime)
        results.append({**result, "loss": stats.loss, "after": parameters(model)})
    return results


@pytest.fixture(scope="module")
def saved(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("elastic")
    return {
        W: (folder / str(W), processes.run_ranks(save, W, stores, folder / str(W)))
        for W in WORLD_SIZES
    }


@pytest.mark.parametrize("loading", WORLD_SIZES)
def test_saved_on_any_number_of_ranks_loads_on_any_other(
    loading: int, saved: dict[int, Any], stores: Path
) -> None:
    folders = [folder for folder, _ in saved.values()]
    by_rank = processes.run_ranks(load, loading, stores, folders)
    after = []
    for i, (W, (_, savers)) in enumerate(saved.items()):
        where = f"saved on {W}, loaded on {loading}"
        loaders = [results[i] for results in by_rank]
        for result in loaders:
            assert result["steps"] == 2
            for name, value in savers[0]["parameters"].items():
                assert torch.equal(result["parameters"][name], value), f"{where}: {name}"
        expected = whole_state([s["state"] for s in savers])
        got = whole_state([r["state"] for r in loaders])
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(got[key], value), f"{where}: {key}"
            assert key.startswith("residual") or value.abs().max() > 0, f"{key} says nothing"
        rows = global_rows([r["rows"] for r in loaders])
        assert rows == global_rows([s["rows"] for s in savers]), where
        after.append(loaders[0])
    for other in after[1:]:
        assert other["loss"] == pytest.approx(after[0]["loss"], rel=1e-4)


# Only what is read is hashed, once per machine


def hashed_bytes(runtime: Runtime, step: Path, ranks_per_machine: int) -> dict[str, int]:
    """Bytes that this rank hashes to load the weights, and to resume."""
    runtime.local_rank = runtime.rank % ranks_per_machine
    sizes: list[int] = []
    sha256 = checkpoint_manager.file_sha256

    def counted(path: Path) -> str:
        sizes.append(path.stat().st_size)
        return sha256(path)

    checkpoint_manager.file_sha256 = counted
    model, optimizer = make(runtime)
    meta = read_meta_once(step, runtime)
    load_weights(step, meta, model, runtime)
    weights = sum(sizes)
    sizes.clear()
    restored(step, model, optimizer, runtime)
    checkpoint_manager.file_sha256 = sha256
    return {"weights": weights, "all": sum(sizes)}


@pytest.mark.parametrize("ranks_per_machine", [4, 2])
def test_each_byte_is_hashed_once_per_machine(
    ranks_per_machine: int, saved: dict[int, Any]
) -> None:
    step = saved[2][0] / "step_000002"
    sizes = {path: path.stat().st_size for path in step.rglob("*.safetensors")}
    assert len(sizes) == 3, "the weights, and two ranks' optimizer state"
    expected = {"weights": sizes[step / "model.safetensors"], "all": sum(sizes.values())}
    counts = processes.run_ranks(hashed_bytes, 4, step, ranks_per_machine)
    for rank, counted in enumerate(counts):
        assert counted == (expected if rank % ranks_per_machine == 0 else {"weights": 0, "all": 0})


def load_damaged(runtime: Runtime, step: Path) -> str:
    """Every rank sees a file of its own; rank 2 is the first of the second machine."""
    runtime.local_rank = runtime.rank % 2
    meta = read_meta_once(step, runtime)
    if runtime.rank == 2:
        checkpoint_manager.file_sha256 = lambda path: "another"
    try:
        load_weights(step, meta, make(runtime)[0], runtime)
    except UserError as error:
        return str(error)
    return "it was not noticed"


def test_damage_on_one_machine_is_everybodys_error(saved: dict[int, Any]) -> None:
    for message in processes.run_ranks(load_damaged, 4, saved[1][0] / "step_000002"):
        assert "model.safetensors is damaged" in message


# A save that fails on one rank fails on all of them, at once


def fail_to_save(runtime: Runtime, folder: Path, failing: int, what: str) -> str:
    model, optimizer = make(runtime)
    manager = CheckpointManager(folder, runtime)
    manager.save(1, model, optimizer, {})
    manager.wait()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    original = getattr(checkpoint_manager, what)
    if runtime.rank == failing:
        if what == "save_optimizer_state":  # inside it: it is a collective
            from torch.distributed.checkpoint.filesystem import FileSystemWriter

            write = FileSystemWriter._write_data
            FileSystemWriter._write_data = full  # type: ignore[method-assign]
        else:
            setattr(checkpoint_manager, what, full)
    manager.save(2, model, optimizer, {})
    try:
        manager.wait()
        message = "it did not fail"
    except OSError as error:
        message = str(error)
    if runtime.rank == failing:
        setattr(checkpoint_manager, what, original)
        if what == "save_optimizer_state":
            FileSystemWriter._write_data = write  # type: ignore[method-assign]
    runtime.barrier()
    assert list_steps(folder) == [1]
    runtime.barrier()
    manager.save(3, model, optimizer, {})
    manager.wait()
    restored(folder / "step_000003", model, optimizer, runtime)
    return message


@pytest.mark.parametrize(
    ("what", "failing"),
    [
        ("save_file", 0),
        ("save_optimizer_state", 0),
        ("save_optimizer_state", 1),
        ("meta_digest", 0),
    ],
)
def test_a_failed_save_fails_on_every_rank_and_the_next_one_works(
    what: str, failing: int, tmp_path: Path
) -> None:
    for message in processes.run_ranks(fail_to_save, 2, tmp_path, failing, what):
        assert f"failed on rank {failing}: OSError: [Errno 28] No space left" in message
    assert latest(tmp_path) == tmp_path / "step_000003"


# What the laws rest on


def collectives(runtime: Runtime) -> str:
    ranks = list(range(runtime.world_size))
    mine = torch.tensor([runtime.rank, 10 * runtime.rank])
    assert runtime.all_gather(mine).tolist() == [[r, 10 * r] for r in ranks]
    assert runtime.all_reduce_sum(mine) is mine
    assert mine.tolist() == [sum(ranks), 10 * sum(ranks)]
    runtime.barrier()
    assert runtime.on_main(lambda: runtime.rank) == 0
    try:
        read_meta_once(Path("nowhere"), runtime)
    except UserError as error:
        return f"{runtime.broadcast_object(runtime.rank)}: {error}"
    return "the mistake is rank 0's alone"


def test_collectives() -> None:
    """Rank 0's result counts for all, and so does its mistake."""
    (said,) = set(processes.run_ranks(collectives, 3))
    assert said.startswith("0: nowhere is gone")


def test_shapes_cover_what_they_should() -> None:
    """The test's own premises: padding in stacks and tables, and replicated tensors."""
    kinds = set()
    for W, rank in itertools.product((2, 3, 4), (0, 1)):
        runtime = Runtime(torch.device("cpu"), torch.float32, rank, rank, W)
        _, optimizer = make(runtime)
        for unit in optimizer.units:
            padded = len(unit.parameters) > unit.rows
            kinds.add((unit.rule.kind, unit.sharded, padded))
    assert kinds >= {
        ("muon", True, True),
        ("muon", True, False),
        ("adamw", True, True),
        ("adamw", True, False),
        ("adamw", False, False),
    }
