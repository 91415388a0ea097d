"""One training step: the objective, what stops it, loss scaling, replica checks."""

import dataclasses
import itertools
import math
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import words
from nanochat import runtime
from nanochat.attention import make_layout
from nanochat.config import Learning
from nanochat.errors import UserError
from nanochat.eval.losses import evaluate_bpb
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.train import Batch, LossScale, NonFiniteLoss, TrainState, due, train_step

CONFIG = GPTConfig(
    vocab_size=60, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, head_dim=8, context_length=12
)
RUNTIME = runtime.single()


def make(dtype: torch.dtype = torch.float32) -> tuple[GPT, Optimizer]:
    model = GPT(CONFIG, dtype).init_weights(0, words(CONFIG.vocab_size))
    with torch.no_grad():  # so that every parameter has a gradient from the first step
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    rules = parameter_rules(model, Learning(), width=16)
    return model, Optimizer(model, rules, muon_dtype=torch.float32)


def batch(rows: int, seed: int = 0, weights: Sequence[float] = (0.0, 0.3, 1.0)) -> Batch:
    """Ragged masks: a weight of 0 is no target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (rows, 13), generator=generator)
    choice = torch.randint(0, len(weights), (rows, 12), generator=generator)
    weight = torch.tensor(weights)[choice]
    return Batch(
        inputs=ids[:, :-1].contiguous(),
        targets=torch.where(weight > 0, ids[:, 1:], -1),
        weights=weight,
        doc_ids=(torch.arange(12) >= 5).int().expand(rows, 12).contiguous(),
    )


def rows_of(whole: Batch, start: int, stop: int) -> Batch:
    fields = ("inputs", "targets", "weights", "doc_ids")
    return Batch(**{name: getattr(whole, name)[start:stop] for name in fields})


class Waits(TorchDispatchMode):
    """Counts, by file, the places where a host would wait for a GPU to know a value."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.places: Counter[str] = Counter()
        self.operators = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
            self._watch(name, monkeypatch)

    def _watch(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            self._count(name)
            return original(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def _count(self, name: str) -> None:
        frames = [f.filename for f in traceback.extract_stack() if "/nanochat/" in f.filename]
        self.places[f"{Path(frames[-1]).name}: {name}" if frames else name] += 1

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        name = operator.overloadpacket.__name__
        masks = arguments[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.operators or any(m is not None and m.dtype == torch.bool for m in masks):
            self._count(name)
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_waits_once_for_the_device(scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To decide on the update; a CPU's attention looks at the documents besides."""
    model, optimizer = make(torch.float16 if scaled else torch.float32)
    model.backend = "sdpa"
    scale = LossScale(2.0**10) if scaled else None
    batches = [batch(2, seed) for seed in range(3)]
    with monkeypatch.context() as patch, Waits(patch) as waits:
        train_step(model, optimizer, batches, Hypers(), RUNTIME, scale)
    assert waits.places == {
        "attention.py: __bool__": 3,
        "attention.py: _local_scalar_dense": 3,
        "train.py: tolist": 1,
    }


def test_on_a_gpu_masks_are_made_without_asking_it() -> None:
    """A meta tensor has no values to ask for."""
    doc_ids = torch.zeros(2, 8, dtype=torch.int32, device="meta")
    layout = make_layout(doc_ids, (2, 8), (0, 4), "sdpa", torch.device("meta"))
    assert all(mask is not None and mask.shape == (2, 1, 8, 8) for mask in layout.masks.values())


def empty(rows: int = 2) -> Batch:
    zeros = torch.zeros(rows, 12)
    return Batch(zeros.long(), zeros.long() - 1, zeros, zeros.int())


def parameters(model: GPT) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_loss_is_the_weighted_sum_over_all_targets() -> None:
    model, optimizer = make()
    data = batch(4)
    with torch.no_grad():
        nll = model.nll(data.inputs, data.targets, data.doc_ids)
        expected = (nll * data.weights).sum() / (data.targets >= 0).sum()
    stats = train_step(model, optimizer, [data], Hypers(), RUNTIME)
    assert stats.loss == pytest.approx(expected.item(), rel=1e-6)
    assert stats.targets == (data.targets >= 0).sum()
    assert stats.tokens == 48
    assert not stats.skipped


@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 1, 2, 8), (0, 7, 8)])
def test_accumulation_does_not_change_the_step(cuts: tuple[int, ...]) -> None:
    """Law 2 on one rank, with micro-batches of different numbers of rows and targets."""
    whole = batch(8)
    split = [rows_of(whole, a, b) for a, b in itertools.pairwise(cuts)]
    results = []
    for batches in ([whole], split):
        model, optimizer = make()
        stats = train_step(model, optimizer, batches, Hypers(), RUNTIME)
        results.append((stats.loss, stats.targets, parameters(model)))
    (loss, targets, after), (loss_split, targets_split, after_split) = results
    assert targets == targets_split
    assert loss_split == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(after_split, after, rtol=1e-4, atol=1e-5)


def test_accumulation_does_not_change_the_first_steps() -> None:
    """From the real initialisation, where some gradients are zero but for rounding."""
    scalars = []
    for cuts in ((0, 8), (0, 1, 2, 8)):
        model = GPT(CONFIG).init_weights(0, words(CONFIG.vocab_size))
        rules = parameter_rules(model, Learning(), width=16)
        optimizer = Optimizer(model, rules, muon_dtype=torch.float32)
        for seed in range(3):
            whole = batch(8, seed)
            split = [rows_of(whole, a, b) for a, b in itertools.pairwise(cuts)]
            train_step(model, optimizer, split, Hypers(), RUNTIME)
        scalars.append(torch.cat([model.residual_scale, model.first_scale]).detach())
    assert (scalars[0] - torch.tensor([1.0, 1.0, 0.0, 0.0])).abs().max() > 0.1, "they move"
    torch.testing.assert_close(scalars[1], scalars[0], rtol=0, atol=1e-3)


def test_a_micro_batch_without_targets_is_harmless() -> None:
    results = []
    for batches in ([batch(4)], [empty(), batch(4), empty(4)]):
        model, optimizer = make()
        stats = train_step(model, optimizer, batches, Hypers(), RUNTIME)
        results.append((stats.loss, parameters(model)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_a_step_without_any_target_is_harmless() -> None:
    model, optimizer = make()
    before = parameters(model)
    stats = train_step(model, optimizer, [empty()], Hypers(), RUNTIME)
    assert (stats.loss, stats.targets) == (0.0, 0)
    assert torch.equal(parameters(model), before), "the first step has no momentum"


def test_weights_scale_the_gradient_but_not_the_count() -> None:
    full, half = batch(4, weights=(0.0, 1.0)), batch(4, weights=(0.0, 0.5))
    losses = []
    for data in (full, half):
        model, optimizer = make()
        losses.append(train_step(model, optimizer, [data], Hypers(), RUNTIME))
    assert losses[0].targets == losses[1].targets
    assert losses[1].loss == pytest.approx(losses[0].loss / 2, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_update(bad: float) -> None:
    model, optimizer = make()
    train_step(model, optimizer, [batch(4)], Hypers(), RUNTIME)
    before, state = parameters(model), optimizer.state_dict(host_copy=True)
    data = batch(4)
    data.weights[2, 3] = bad
    data.targets[2, 3] = 5
    with pytest.raises(NonFiniteLoss, match=r"step 2: the loss of rank 0 is (nan|inf)"):
        train_step(model, optimizer, [batch(2), data], Hypers(), RUNTIME)
    assert torch.equal(parameters(model), before)
    assert optimizer.steps == 1
    for key, value in optimizer.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_stops_before_the_update(bad: float) -> None:
    """The loss may be finite: the gradient would be in the weights, and in the next checkpoint."""
    model, optimizer = make()
    train_step(model, optimizer, [batch(4)], Hypers(), RUNTIME)
    before, state = parameters(model), optimizer.state_dict(host_copy=True)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[0, 3] = bad
        return gradient

    handle = model.blocks[1].mlp.up.weight.register_hook(spoil)  # type: ignore[union-attr]
    with pytest.raises(NonFiniteLoss, match=r"step 2: rank 0 has gradients that are not finite"):
        train_step(model, optimizer, [batch(4)], Hypers(), RUNTIME)
    handle.remove()
    assert torch.equal(parameters(model), before)
    assert optimizer.steps == 1
    for key, value in optimizer.state_dict().items():
        assert torch.equal(value, state[key])


def test_gradients_start_from_zero_at_every_step() -> None:
    model, optimizer = make()
    train_step(model, optimizer, [batch(4)], Hypers(), RUNTIME)
    assert all((p.grad == 0).all() for p in model.parameters())


def test_stop_signal_is_agreed_on_in_the_step() -> None:
    model, optimizer = make()
    rank = runtime.single()
    train_step(model, optimizer, [batch(2)], Hypers(), rank)
    assert not rank.stop_requested
    rank.stop_signal = True
    train_step(model, optimizer, [batch(2)], Hypers(), rank)
    assert rank.stop_requested


# float16


def test_loss_scale_does_not_change_the_update() -> None:
    results = []
    for scale in (None, LossScale(2.0**10)):
        model, optimizer = make()
        for seed in range(3):
            stats = train_step(model, optimizer, [batch(4, seed)], Hypers(), RUNTIME, scale)
        results.append((stats.loss, parameters(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-7)


def test_float16_trains_on_the_cpu() -> None:
    model, optimizer = make(torch.float16)
    scale = LossScale()
    losses = [
        train_step(model, optimizer, [batch(4)], Hypers(0.3), RUNTIME, scale).loss for _ in range(6)
    ]
    assert losses[-1] < losses[0] - 0.05


def test_overflow_skips_the_update_and_halves_the_scale() -> None:
    model, optimizer = make(torch.float16)
    before = parameters(model)
    scale = LossScale(2.0**30)
    stats = train_step(model, optimizer, [batch(4)], Hypers(), RUNTIME, scale)
    assert stats.skipped
    assert math.isfinite(stats.loss)
    assert scale.scale == 2.0**29
    assert torch.equal(parameters(model), before)
    assert optimizer.steps == 0
    assert all((p.grad == 0).all() for p in model.parameters())
    for _ in range(30):
        stats = train_step(model, optimizer, [batch(4)], Hypers(), RUNTIME, scale)
    assert not stats.skipped, "it finds a scale that works"


def test_loss_scale_grows_after_good_steps_and_is_saved() -> None:
    scale = LossScale(8.0, growth_interval=3)
    for _ in range(2):
        scale.update(True)
    again = LossScale(growth_interval=3)
    again.load_state_dict(scale.state_dict())
    again.update(True)
    assert (again.scale, again.good_steps) == (16.0, 0)
    again.update(False)
    assert again.scale == 8.0
    for _ in range(20):
        again.update(False)
    assert again.scale == 1.0


# Around the step


def test_due() -> None:
    assert [due(s, 3, False) for s in range(7)] == [True, False, False, True, False, False, True]
    assert not any(due(s, 0, False) for s in range(7))
    assert due(5, 0, True)
    assert due(5, 3, True)


def test_state() -> None:
    state = TrainState(step=3, tokens=5, metrics={"bpb": 1.5})
    assert TrainState(**dataclasses.asdict(state)) == state
    copy = dataclasses.asdict(state)
    state.metrics["bpb"] = 2.0
    assert copy["metrics"] == {"bpb": 1.5}, "what is being saved does not change any more"
    assert dataclasses.is_dataclass(state)


# Bits per byte


def test_bits_per_byte_from_first_principles() -> None:
    model, _ = make()
    data = [batch(3, seed) for seed in range(2)]
    sizes = torch.arange(60) % 4  # some tokens stand for no byte
    nats = size = loss = count = 0.0
    with torch.no_grad():
        for part in data:
            log_p = model(part.inputs, part.doc_ids).double().log_softmax(-1)
            for b, t in (part.targets >= 0).nonzero().tolist():
                target = int(part.targets[b, t])
                value = -log_p[b, t, target].item()
                loss, count = loss + value, count + 1
                if sizes[target] > 0:
                    nats, size = nats + value, size + int(sizes[target])
    result = evaluate_bpb(model, data, sizes, RUNTIME)
    assert result["bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert result["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert result["tokens"] == count
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_nothing_to_evaluate_is_an_error_not_infinity() -> None:
    model, _ = make()
    with pytest.raises(UserError, match="no text"):
        evaluate_bpb(model, [empty()], torch.ones(60), RUNTIME)
    with pytest.raises(UserError, match="no text"):
        evaluate_bpb(model, [], torch.ones(60), RUNTIME)
    with pytest.raises(UserError, match="no text"):
        evaluate_bpb(model, [batch(2)], torch.zeros(60), RUNTIME)
