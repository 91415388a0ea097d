"""The optimizer on one rank: groups, buffers, and the step against the rules one by one.

What several ranks do is in test_laws_distributed.py.
"""

from typing import Any

import pytest
import torch

from benchmarks.common import words
from nanochat.adamw import adamw_update
from nanochat.config import Learning
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import muon_update
from nanochat.optim import Hypers, Optimizer, parameter_rules

CONFIG = GPTConfig(
    vocab_size=300, n_layer=3, n_head=2, n_kv_head=1, n_embd=16, head_dim=8, context_length=16
)


TOKENS = [bytes([i % 256]) * (1 + i % 3) for i in range(300)]


def make(**settings: Any) -> tuple[GPT, Optimizer]:
    model = GPT(CONFIG).init_weights(0, TOKENS)
    rules = parameter_rules(model, Learning(), width=CONFIG.n_embd, weight_decay=0.1)
    return model, Optimizer(model, rules, muon_dtype=torch.float32, **settings)


def backward(model: GPT, seed: int = 0) -> None:
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(seed))
    model.nll(ids, ids.roll(-1, 1)).mean().backward()


def test_every_parameter_has_its_rule() -> None:
    model, optimizer = make()
    rules = parameter_rules(model, Learning(), width=768, lr_scale=0.5, weight_decay=0.1)
    assert list(rules) == [name for name, _ in model.named_parameters()]
    for name, rule in rules.items():
        matrix = name.startswith("blocks.") and "value_gate" not in name
        assert rule.kind == ("muon" if matrix else "adamw"), name
        assert rule.weight_decay == (0.1 if matrix else 0.0)
    learning = Learning()
    assert rules["blocks.0.mlp.up.weight"].lr == learning.matrix_lr / 2
    assert rules["embedding.weight"].lr == learning.embedding_lr / 2
    assert rules["byte_embedding.weight"].lr == learning.embedding_lr / 2
    assert rules["value_embeddings.0.weight"].lr == learning.embedding_lr / 2
    assert rules["head.weight"].lr == learning.head_lr / 2
    assert rules["blocks.0.attention.value_gate.weight"].lr == learning.gate_lr / 2
    assert rules["shift_scale"].lr == learning.gate_lr / 2
    assert rules["residual_scale"].lr == learning.scalar_lr / 2
    halved = parameter_rules(model, Learning(bf16_transfers=True), width=768)
    tables = [name for name, rule in halved.items() if rule.bf16_transfers]
    assert tables == [n for n in rules if "embedding" in n or n == "head.weight"]
    in_units = [name for unit in optimizer.units for name in unit.names]
    assert sorted(in_units) == sorted(rules), "each in one unit, none left out"


def test_width_scales_adamw_only() -> None:
    model, _ = make()
    narrow = parameter_rules(model, Learning(), width=192)
    wide = parameter_rules(model, Learning(), width=768)
    for name in ("head.weight", "embedding.weight"):
        assert narrow[name].lr == pytest.approx(2 * wide[name].lr)
    for name in ("blocks.0.mlp.up.weight", "residual_scale"):
        assert narrow[name].lr == wide[name].lr


def test_moving_into_buffers_changes_no_value() -> None:
    fresh = GPT(CONFIG).init_weights(0, words(CONFIG.vocab_size))
    model, _ = make()
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_gradients_and_parameters_stay_views_of_the_buffers() -> None:
    """Backward passes, steps and zero_grad keep them; else a step would read stale memory."""
    model, optimizer = make()
    for seed in range(3):
        backward(model, seed)
        backward(model, seed + 10)  # accumulation
        optimizer.step(Hypers())
        optimizer.zero_grad()
        for unit in optimizer.units:
            for i, name in enumerate(unit.names):
                p = model.get_parameter(name)
                data = unit.parameters[i] if unit.rule.kind == "muon" else unit.parameters
                grad = unit.gradients[i] if unit.rule.kind == "muon" else unit.gradients
                assert p.data_ptr() == data.data_ptr(), name
                assert p.grad is not None
                assert p.grad.data_ptr() == grad.data_ptr(), name
                assert (p.grad == 0).all()


def test_accumulated_gradients_are_the_sum() -> None:
    model, _ = make()
    alone = []
    for seed in (1, 2):
        other, _ = make()
        backward(other, seed)
        alone.append([p.grad for p in other.parameters()])
        backward(model, seed)
    for p, a, b in zip(model.parameters(), *alone, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(p.grad, a + b)


def test_step_equals_the_rules_applied_one_by_one() -> None:
    """Stacking and sharding are bookkeeping: every tensor moves as if it were alone."""
    model, optimizer = make()
    rules = parameter_rules(model, Learning(), width=CONFIG.n_embd, weight_decay=0.1)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    state: dict[str, list[torch.Tensor]] = {}
    for step, hypers in enumerate((Hypers(0.5, 0.85), Hypers(1.0, 0.9), Hypers(0.1, 0.95)), 1):
        backward(model, step)
        for name, p in model.named_parameters():
            rule, value, g = rules[name], expected[name], p.grad
            assert g is not None
            lr = rule.lr * hypers.lr_multiplier
            if rule.kind == "muon":
                buffers = state.setdefault(
                    name, [torch.zeros(1, *p.shape), torch.zeros(1, p.shape[0], 1)]
                )
                muon_update(
                    value[None],
                    g[None],
                    *buffers,
                    lr=lr,
                    momentum=hypers.momentum,
                    weight_decay=0.1,
                    dtype=torch.float32,
                )
            else:
                buffers = state.setdefault(name, [torch.zeros_like(p), torch.zeros_like(p)])
                adamw_update(value, g, *buffers, step=step, lr=lr, betas=rule.betas, eps=rule.eps)
        optimizer.step(hypers)
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-6)
    assert all(
        (expected[name] != q).any()
        for name, q in GPT(CONFIG).init_weights(0, TOKENS).named_parameters()
        if name not in ("first_scale",)
    ), "everything moved"


def test_vocabulary_padding_rows_never_move() -> None:
    model, optimizer = make()
    before = {
        name: p.detach()[300:].clone() for name, p in model.named_parameters() if len(p) == 320
    }
    assert len(before) == 4, "embedding, head, two value embeddings"
    for seed in range(3):
        backward(model, seed)
        optimizer.step(Hypers())
        optimizer.zero_grad()
    for name, rows in before.items():
        assert torch.equal(model.get_parameter(name).detach()[300:], rows), name


def test_state_is_keyed_by_parameter_and_loads_back() -> None:
    model, optimizer = make()
    backward(model)
    optimizer.step(Hypers())
    saved = optimizer.state_dict(host_copy=True)
    expected_keys = {
        f"{name}.{key}"
        for name, rule in parameter_rules(model, Learning(), width=16).items()
        for key in (
            ("momentum", "second_moment")
            if rule.kind == "muon"
            else ("first_moment", "second_moment")
        )
    }
    assert set(saved) == expected_keys
    assert all(
        saved[f"{n}.momentum"].shape == p.shape
        for n, p in model.named_parameters()
        if f"{n}.momentum" in saved
    )
    backward(model, 1)
    optimizer.step(Hypers())
    assert any((saved[k] != v).any() for k, v in optimizer.state_dict().items()), "a copy"
    _, other = make()
    other.load_state_dict(saved)
    for key, value in other.state_dict().items():
        assert torch.equal(value, saved[key]), key


def test_one_rank_communicates_nothing() -> None:
    _, optimizer = make()
    assert optimizer.bytes_communicated() == 0
    # Muon keeps one buffer of the matrix's size (and a number per row), AdamW two.
    matrices = sum(u.parameters.numel() for u in optimizer.units if u.rule.kind == "muon")
    rows = sum(
        len(u.names) * u.parameters.shape[1] for u in optimizer.units if u.rule.kind == "muon"
    )
    others = sum(u.parameters.numel() for u in optimizer.units if u.rule.kind == "adamw")
    assert optimizer.state_bytes() == 4 * (matrices + rows + 2 * others)
    assert sum(row["elements"] for row in optimizer.describe()) == matrices + others
