"""--fp8: emulated here; where it cannot be, one line says so.

B batch, T time
"""

import sys

import pytest
import torch

from benchmarks.common import words
from nanochat import runtime
from nanochat.config import Learning
from nanochat.errors import UserError
from nanochat.fp8 import check_fp8, convert_to_fp8, is_convertible
from nanochat.gpt import GPT, config_from_depth
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.train import Batch, train_step

CONFIG = config_from_depth(2, 100, aspect_ratio=16, head_dim=16, context_length=32)
B, T = 4, 32


def batch(device: str = "cpu") -> Batch:
    """Every token is followed by the next one."""
    ids = (torch.arange(T + 1) + torch.arange(B)[:, None] * 7) % 50
    zeros = torch.zeros(B, T, dtype=torch.int32)
    tensors = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), zeros + 1.0, zeros)
    return Batch(*(tensor.to(device) for tensor in tensors))


def losses(fp8: bool, device: str = "cpu", steps: int = 12) -> tuple[list[float], GPT]:
    model = GPT(CONFIG, torch.bfloat16).init_weights(0, words(CONFIG.vocab_size)).to(device)
    rules = parameter_rules(model, Learning(), width=CONFIG.n_embd)
    optimizer = Optimizer(model, rules)
    if fp8:
        # Query, key, value, out, up and down of two layers.
        assert convert_to_fp8(model, emulate=device == "cpu") == 12
    rank = runtime.single(device, torch.bfloat16)
    return [
        train_step(model, optimizer, [batch(device)], Hypers(0.3), rank).loss for _ in range(steps)
    ], model


def check_against_bfloat16(device: str) -> None:
    expected, plain = losses(False, device)
    got, model = losses(True, device)
    assert expected[-1] < 0.7 * expected[0], "it learns"
    assert got != expected, "something was rounded"
    assert got == pytest.approx(expected, rel=0.03)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    # What was trained in float8 is an ordinary model.
    plain.load_state_dict(model.state_dict())
    data = batch(device)
    with torch.no_grad():
        nll = [m.nll(data.inputs, data.targets).mean().item() for m in (plain, model)]
    assert nll[0] == pytest.approx(nll[1], rel=0.03)


def test_emulated_training_is_close_to_bfloat16() -> None:
    pytest.importorskip("torchao")
    check_against_bfloat16("cpu")


@pytest.mark.cuda
def test_training_on_a_gpu_is_close_to_bfloat16() -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products on this GPU")
    check_against_bfloat16("cuda")


def test_gates_head_and_odd_shapes_stay() -> None:
    pytest.importorskip("torchao")
    model = GPT(CONFIG).init_weights(0, words(CONFIG.vocab_size))
    convert_to_fp8(model, emulate=True)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "weight")}
    assert kinds["head"] == kinds["blocks.1.attention.value_gate"] == "Linear"
    assert kinds["blocks.1.mlp.up"] == "Float8Linear"
    square = torch.nn.Linear(32, 32)
    assert is_convertible(square, "blocks.0.mlp.up")
    assert not is_convertible(square, "blocks.0.attention.value_gate"), "whatever its shape"
    assert not is_convertible(square, "head")
    odd = GPT(config_from_depth(2, 100, aspect_ratio=12, head_dim=12, context_length=32))
    with pytest.raises(UserError, match=r"no matrix whose sides are multiples of 16 .* width of"):
        convert_to_fp8(odd, emulate=True)


def test_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    with pytest.raises(UserError, match="--fp8 needs a CUDA GPU, the device is cpu"):
        check_fp8(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"capability 8\.9 or newer, this one has 8\.0"):
        check_fp8(gpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UserError, match="replaces bfloat16, the dtype is float32"):
        check_fp8(gpu, torch.float32)
    check_fp8(gpu, torch.bfloat16)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"not installed; install it: pip install -e '\.\[fp8\]'"):
        convert_to_fp8(GPT(CONFIG))
