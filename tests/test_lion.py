"""Lion's update, against its definition, element by element."""

import torch

from nanochat.config import Learning
from nanochat.gpt import GPT, config_from_depth
from nanochat.hardware import Machine
from nanochat.lion import lion_update
from nanochat.memory import Shape, estimate_memory
from nanochat.optim import Hypers, Optimizer, parameter_rules


def test_lion_is_the_papers_algorithm() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter, momentum = torch.randn(5, 7, generator=generator), torch.zeros(5, 7)
    expected, m = parameter.double().tolist(), [[0.0] * 7 for _ in range(5)]
    lr, (b1, b2), decay = 0.01, (0.9, 0.99), 0.1
    for _ in range(3):
        gradient = torch.randn(5, 7, generator=generator)
        lion_update(parameter, gradient, momentum, lr=lr, betas=(b1, b2), weight_decay=decay)
        for r in range(5):
            for c in range(7):
                g = gradient[r, c].item()
                mixed = b1 * m[r][c] + (1 - b1) * g
                sign = (mixed > 0) - (mixed < 0)
                expected[r][c] = expected[r][c] * (1 - lr * decay) - lr * sign
                m[r][c] = b2 * m[r][c] + (1 - b2) * g
    torch.testing.assert_close(parameter, torch.tensor(expected))
    torch.testing.assert_close(momentum, torch.tensor(m))


def test_matrices_may_have_any_rule_and_the_loss_falls() -> None:
    config = config_from_depth(2, 64, aspect_ratio=16, head_dim=16, context_length=32)
    ids = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    states = {}
    for kind, lr in (("muon", 0.02), ("adamw", 0.003), ("lion", 0.0003)):
        model = GPT(config).init_weights(0)
        learning = Learning(matrix_optimizer=kind, matrix_lr=lr)  # type: ignore[arg-type]
        rules = parameter_rules(model, learning, width=config.n_embd)
        optimizer = Optimizer(model, rules, muon_dtype=torch.float32)
        losses = []
        for _ in range(12):
            loss = model.nll(inputs, targets).mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step(Hypers())
            optimizer.zero_grad()
        assert losses[-1] < losses[0] - 0.5, kind
        states[kind] = optimizer.state_bytes()
    assert states["lion"] < states["adamw"]
    planned = {
        kind: estimate_memory(config, Shape(1, 32), Machine("cpu", torch.float32), kind)
        for kind in states
    }
    assert planned["lion"]["optimizer shard"] < planned["adamw"]["optimizer shard"]
