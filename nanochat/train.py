"""One optimizer step, the same in every stage, and the state a run resumes from.

B batch, T time, N targets of the step over all ranks and micro-batches
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.optim import Hypers, Optimizer
from nanochat.runtime import Runtime


@dataclass
class Batch:
    """One micro-batch of one rank.

    The input at t is followed by the target at t. Documents never continue into each other: the
    last token of a piece has no target. Padding is at the end of a row, with inputs of 0.
    """

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64; -1 is ignored: padding, document ends, targets of weight 0
    weights: Tensor  # (B, T) float32; 0 where the target is -1
    doc_ids: Tensor  # (B, T) int32: 0, 1, 2.. within a row; padding is its last document
    roles: Tensor | None = None
    """(B, T) int8: the target's role (`tokenizer.ROLE_NAMES`, `IGNORED`), whatever its weight; -1
    where there is no target or its store has no roles. Only with `with_roles=True`."""
    boundaries: Tensor | None = None
    """(N,) int32: `attention.document_boundaries` of doc_ids; nobody has to ask a GPU for them."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; from pinned memory and without waiting on CUDA."""
        if device.type == "cpu":
            return self
        if device.type == "cuda":
            pinned = self.pinned()
            return pinned._each(lambda tensor: tensor.to(device, non_blocking=True))
        return self._each(lambda tensor: tensor.to(device))

    def pinned(self) -> "Batch":
        """The batch in memory that a GPU reads from without a wait."""
        return self._each(lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


class NonFiniteLoss(UserError):
    """The loss, or a gradient, is infinite or not a number; nothing was updated."""


class NonFiniteWeights(UserError):
    """A weight or an optimizer state is infinite or not a number; nothing was saved."""


class ReplicaDivergence(UserError):
    """Parameters differ between ranks."""


@dataclass
class TrainState:
    """What, beside parameters, optimizer and loader, a run resumes from."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """In steps."""
    elapsed_seconds: float = 0.0
    """In all: reading data, evaluating, sampling and waiting for saves included."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The latest evaluation."""
    loss_scale: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StepStats:
    """What one step did."""

    loss: float
    """sum(w nll) / N over all ranks and micro-batches."""
    targets: int
    """N."""
    tokens: int
    """Input positions of the step, padding included."""
    seconds: float
    skipped: bool = False
    """A float16 step whose gradients overflowed: the loss scale was halved instead."""


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al., arXiv 1710.03740)."""

    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000):
        self.scale, self.growth_interval, self.good_steps = scale, growth_interval, 0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": float(self.good_steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if state:
            self.scale, self.good_steps = state["scale"], int(state["good_steps"])

    def update(self, finite: bool) -> None:
        if not finite:
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0


def due(step: int, every: int, last: bool) -> bool:
    """Whether something done every so many steps (0: only at the end) is due now."""
    return last or (every > 0 and step % every == 0)


def take(loader: Iterator[Batch], count: int) -> list[Batch]:
    """The next `count` micro-batches."""
    return [next(loader) for _ in range(count)]


def train_step(
    model: GPT,
    optimizer: Optimizer,
    batches: list[Batch],
    hypers: Hypers,
    runtime: Runtime,
    loss_scale: LossScale | None = None,
    *,
    temperature: float = 1.0,
    divisor: int | None = None,
    step: int | None = None,
    tokens: int | None = None,
) -> StepStats:
    """Minimise sum(w nll) / N over this rank's micro-batches; every rank calls it.

    N counts the valid targets of all ranks and micro-batches, so neither accumulation nor the
    number of ranks changes the result, and a micro-batch without targets is harmless. `divisor`
    takes the place of N where what is trained on stands for more than its own targets (samples
    without an advantage, pairs), `temperature` is that of the distribution nll is under. Raises
    NonFiniteLoss on every rank, before anything is updated; it names `step`, the number under which
    this step would be logged (by default one more than the updates before it). `tokens` are the
    step's input positions over all ranks, where micro-batches are filled up with empty rows.
    """
    start = time.perf_counter()
    number = optimizer.steps + 1 if step is None else step
    valid = sum((batch.targets >= 0).sum() for batch in batches)
    counts = torch.stack([torch.as_tensor(valid).cpu(), torch.tensor(int(runtime.stop_signal))]).to(
        runtime.device
    )
    targets, stop = runtime.all_reduce_sum(counts).tolist()
    runtime.stop_requested = stop > 0
    scale = loss_scale.scale if loss_scale else 1.0

    total = torch.zeros((), device=runtime.device)
    # The scale goes into the weights: half of the loss's gradient is computed along with it.
    divisor = max(targets if divisor is None else divisor, 1)
    for batch in batches:
        weights = batch.weights / (divisor / scale)
        loss = model.weighted_loss(
            batch.inputs, batch.targets, weights, batch.doc_ids, temperature, batch.boundaries
        )
        loss.backward()
        total += loss.detach() / scale

    # One pass over the gradients, and no transfer of its own: a sum is finite if all of them are.
    checksum = torch.stack([unit.gradients.sum() for unit in optimizer.units]).sum()
    losses, checksums = runtime.all_gather(torch.stack([total, checksum])).T.tolist()
    for rank, value in enumerate(losses):
        if not math.isfinite(value):
            raise NonFiniteLoss(_stopped(number, f"the loss of rank {rank} is {value}"))
    finite = [math.isfinite(value) for value in checksums]
    if loss_scale is not None:
        loss_scale.update(all(finite))
    elif not all(finite):
        raise NonFiniteLoss(
            _stopped(number, f"rank {finite.index(False)} has gradients that are not finite")
        )
    skipped = not all(finite)
    if not skipped:
        if loss_scale is not None:
            optimizer.scale_gradients(torch.tensor(1 / scale, device=runtime.device))
        optimizer.step(hypers)
    optimizer.zero_grad()
    runtime.synchronize()
    return StepStats(
        loss=sum(losses),
        targets=targets,
        tokens=sum(batch.inputs.numel() for batch in batches) * runtime.world_size
        if tokens is None
        else tokens,
        seconds=time.perf_counter() - start,
        skipped=skipped,
    )


def _stopped(step: int, reason: str) -> str:
    return (
        f"step {step}: {reason}; nothing was updated. "
        "Lower the learning rates (--lr-scale) or resume from an earlier checkpoint"
    )


def check_finite(optimizer: Optimizer, runtime: Runtime, step: int) -> None:
    """Raise NonFiniteWeights on every rank where any has a weight or a state that is not finite."""
    tensors = [t for unit in optimizer.units for t in (unit.parameters, *unit.state.values())]
    sums = torch.stack([tensor.sum().float() for tensor in tensors])
    wrong = runtime.all_reduce_sum((~sums.isfinite()).sum())
    if wrong.item():
        raise NonFiniteWeights(
            f"after step {step} {wrong.item()} tensors of weights and optimizer state are not "
            "finite; this step is not saved. Lower the learning rates (--lr-scale) and resume from "
            "the checkpoint before"
        )


def check_replicas(model: GPT, runtime: Runtime) -> None:
    """Compare every parameter's bits across ranks; ReplicaDivergence names the first that differs.

    The fingerprint is a position-weighted sum of the raw bits modulo 2^63, so a swap or a single
    flipped bit shows.
    """
    if runtime.world_size == 1:
        return
    names, prints = [], []
    for name, parameter in model.named_parameters():
        bits = parameter.detach().contiguous().view(torch.int32).flatten().to(torch.int64)
        places = torch.arange(1, bits.numel() + 1, device=bits.device, dtype=torch.int64)
        names.append(name)
        prints.append((bits * (places * 2654435761 | 1)).sum())
    gathered = runtime.all_gather(torch.stack(prints))  # (W, parameters)
    different = (gathered != gathered[:1]).any(dim=0).tolist()
    if any(different):
        first = different.index(True)
        ranks = (gathered[:, first] != gathered[0, first]).nonzero().flatten().tolist()
        raise ReplicaDivergence(
            f"parameter {names[first]} differs from rank 0 on ranks {ranks} "
            f"({sum(different)} parameters differ in all); resume from the last checkpoint"
        )
