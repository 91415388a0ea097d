"""Law 10: training lowers the loss on what was not trained on. And the golden loss."""

from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from stores import make_store, take

from nanochat import runtime
from nanochat.checkpoint_manager import load_model
from nanochat.config import Batching, Duration, Learning
from nanochat.data.conversations import conversations_store
from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source, open_store
from nanochat.data.store import TokenStore
from nanochat.eval.losses import evaluate_bpb
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import Machine
from nanochat.optim import Optimizer, parameter_rules
from nanochat.plan import make_plan
from nanochat.tokenizer import Tokenizer
from nanochat.train import train_step
from tasks.arithmetic import Arithmetic

CPU = torch.device("cpu")
RUNTIME = runtime.single()


@pytest.fixture(scope="module")
def trained(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages, long enough to learn something."""
    import shutil

    folder = tmp_path_factory.mktemp("loss")
    shutil.copytree(encoded, folder, dirs_exist_ok=True)
    text = tiny_runs.corpus(encoded)
    batching = {"device_batch_size": 8}
    evaluating = {"eval_every": 0}
    tasks = ("arithmetic:300:1",)
    tiny_runs.train(
        "base",
        folder,
        tiny_runs.base_config(
            text,
            batching=batching,
            evaluating=evaluating,
            duration={"num_steps": 60},
            saving={"save_every": 0},
        ),
    )
    for stage in ("mid", "sft"):
        config = tiny_runs.CONFIGS[stage](
            text,
            batching=batching,
            evaluating=evaluating,
            duration={"num_steps": 60},
            saving={"save_every": 0},
            mix=tasks,
        )
        tiny_runs.train(stage, folder, config)
    return folder


def unigram_bits_per_byte(train: TokenStore, val: TokenStore, sizes: np.ndarray) -> float:
    """Loss of a model that knows how frequent each token is, and nothing else."""
    counts = np.ones(len(sizes))
    for i in range(len(train)):
        counts += np.bincount(train.ids(i)[1:], minlength=len(sizes))
    bits = -np.log2(counts / counts.sum())
    targets = np.concatenate([val.ids(i)[1:] for i in range(len(val))])
    return float(bits[targets].sum() / sizes[targets].sum())


def held_out(stage: str, folder: Path, store: TokenStore, prompt_weight: float) -> dict[str, float]:
    with tiny_runs.base_dir(folder):
        model, tokenizer, _ = load_model(stage, runtime.single())
    loader = DataLoader(
        [Source(store, prompt_weight=prompt_weight)], batch_size=8, sequence_length=64, epochs=1
    )
    sizes = torch.as_tensor(tokenizer.token_bytes())
    return evaluate_bpb(model, loader, sizes, RUNTIME)


def test_base_beats_token_frequencies(trained: Path, encoded: Path) -> None:
    with tiny_runs.base_dir(trained):
        tokenizer = Tokenizer.load()
        train, val = (
            open_store(tiny_runs.corpus(encoded), split, tokenizer) for split in ("train", "val")
        )
    bound = unigram_bits_per_byte(train, val, tokenizer.token_bytes())
    assert 1.5 < bound < 4, "a bound that means something"
    assert held_out("base", trained, val, 1.0)["bpb"] < 0.6 * bound


def test_mid_learns_conversations(trained: Path) -> None:
    """Problems of the test split, all tokens: far below what the base model makes of them."""
    with tiny_runs.base_dir(trained):
        store = conversations_store(Arithmetic("test", size=50), Tokenizer.load())
    base, mid = (held_out(stage, trained, store, 1.0)["loss"] for stage in ("base", "mid"))
    assert mid < 0.6 * base


def test_sft_learns_what_the_assistant_says(trained: Path) -> None:
    with tiny_runs.base_dir(trained):
        store = conversations_store(Arithmetic("test", size=50), Tokenizer.load())
    mid, sft = (held_out(stage, trained, store, 0.0) for stage in ("mid", "sft"))
    assert sft["tokens"] == mid["tokens"]
    assert sft["loss"] < 0.9 * mid["loss"]


# The golden loss: a refactor reproduces it; a change of the numerics updates it and CHANGELOG.md.

GOLDEN = {
    "plain": [
        3.804342269897461,
        3.7115187644958496,
        3.669072151184082,
        3.6312170028686523,
        3.5734915733337402,
        3.556344985961914,
        3.4123435020446777,
        3.4544403553009033,
    ],
    "token shift": [3.80434, 3.71151, 3.66905, 3.63111, 3.57314, 3.55625, 3.41206, 3.45426],
    "spelled": [3.80437, 3.71254, 3.66452, 3.62278, 3.56415, 3.55319, 3.40469, 3.44842],
}
"""Losses by what the model has; one with spelled embeddings has a token shift too."""


def golden_run(folder: Path, what: str) -> list[float]:
    """Eight float32 steps of all that makes a loss: loader, masks, model, both optimizers."""
    random = np.random.default_rng(0)
    # Each token follows from the one before, with some noise.
    documents, masks = [], []
    for length in random.integers(5, 60, 80):
        steps = 7 + (random.random(length) < 0.2)
        documents.append(((random.integers(0, 90) + np.cumsum(steps)) % 90).tolist())
        masks.append((random.random(length) < 0.7).astype(int).tolist())
    config = GPTConfig(
        vocab_size=90,
        n_layer=3,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        head_dim=8,
        context_length=32,
        windows=(8, 16, 0),
        token_shift=what != "plain",
        spelling_bytes=4 if what == "spelled" else 0,
    )
    model = GPT(config).init_weights(42, [bytes([i, 89 - i][: 1 + i % 2]) for i in range(90)])
    loader = DataLoader(
        [Source(make_store(folder, documents, masks, vocab_size=90), prompt_weight=0.5)],
        batch_size=4,
        sequence_length=32,
        seed=42,
        window=32,
    )
    plan = make_plan(
        config,
        batching=Batching(device_batch_size=4, total_batch_size=256),
        duration=Duration(num_steps=8),
        learning=Learning(lr_scale=0.2, embedding_lr=0.1),
        machine=Machine("cpu", torch.float32),
    )
    rules = parameter_rules(
        model, plan.learning, width=32, lr_scale=plan.lr_scale, weight_decay=plan.weight_decay
    )
    optimizer = Optimizer(model, rules, muon_dtype=torch.float32)
    return [
        train_step(
            model, optimizer, take(loader, plan.micro_batches), plan.hypers(step), RUNTIME
        ).loss
        for step in range(plan.num_steps)
    ]


@pytest.mark.parametrize("what", GOLDEN)
def test_golden_loss(what: str, tmp_path: Path) -> None:
    losses = golden_run(tmp_path / "store", what)
    assert losses == pytest.approx(GOLDEN[what], abs=1e-4)
