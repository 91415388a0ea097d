"""The optimizer step that every stage uses, and the state that a run resumes from.

B batch, T time, N targets of the step over all ranks and micro-batches
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.optim import Hypers, Optimizer
from nanochat.runtime import Runtime


@dataclass
class Batch:
    """One micro-batch of one rank.

    The target at t is the token after the input at t. The last token of a document has no target
    (-1), so no document predicts the next one. Padding is at the end of a row and has inputs of 0.
    """

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64; -1 is ignored: padding, document ends, targets of weight 0
    weights: Tensor  # (B, T) float32; 0 where the target is -1
    doc_ids: Tensor  # (B, T) int32: 0, 1, 2.. within a row; padding is its last document
    roles: Tensor | None = None
    """Roles (B, T) int8 of the targets (`tokenizer.ROLE_NAMES`, `IGNORED`), also those with loss
    weight 0; -1 where there is no target or the store has no roles. None unless the loader was
    asked for roles (`with_roles=True`)."""
    boundaries: Tensor | None = None
    """`attention.document_boundaries` of doc_ids, int32, found on the CPU, so that no caller has to
    wait for a GPU."""

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to `device`; to a GPU from pinned memory and without waiting."""
        if device.type == "cpu":
            return self
        if device.type == "cuda":
            pinned = self.pinned()
            return pinned._each(lambda tensor: tensor.to(device, non_blocking=True))
        return self._each(lambda tensor: tensor.to(device))

    def pinned(self) -> "Batch":
        """Copy the batch to pinned memory, from which a GPU copies without waiting."""
        return self._each(lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


class NonFiniteLoss(UserError):
    """Error for a loss or gradient that is infinite or not a number; nothing was updated."""


class NonFiniteWeights(UserError):
    """Error for weights or optimizer state that are infinite or not a number; nothing was saved."""


class ReplicaDivergence(UserError):
    """Error for parameters that differ between ranks."""


@dataclass
class TrainState:
    """Counters that a run resumes from, beside parameters, optimizer state and loader position."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Seconds spent inside optimizer steps."""
    elapsed_seconds: float = 0.0
    """Seconds spent in the loop: steps, reading data, evaluating, sampling, waiting for saves."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Results of the latest evaluation."""
    loss_scale: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepStats:
    """Measurements of one step."""

    loss: float
    """Loss of the step: sum(w nll) / N over all ranks and micro-batches."""
    targets: int
    """N: targets that are not -1, over all ranks and micro-batches."""
    tokens: int
    """Input positions of the step over all ranks, padding included."""
    seconds: float
    """Time of the step on the host; a GPU does the update while the next step is launched."""
    skipped: bool = False
    """True if float16 gradients overflowed: the loss scale was halved and nothing updated."""


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
    """True if an action is due now that happens every `every` steps (0: only at the end)."""
    return last or (every > 0 and step % every == 0)


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
    """Take one optimizer step on sum(w nll) / N; every rank must call this with its micro-batches.

    N counts the targets that are not -1, over all ranks and micro-batches. Neither gradient
    accumulation nor the number of ranks therefore changes the result, and a micro-batch without
    targets is harmless.

    divisor: takes the place of N in reinforcement learning and DPO, where targets left out of the
    batches count too. temperature: that of the distribution of nll. step: the number of this step
    in errors (default: one more than the updates before it). tokens: the step's input positions
    over all ranks, if empty rows fill up micro-batches. Raises NonFiniteLoss on every rank before
    anything is updated.
    """
    start = time.perf_counter()
    number = optimizer.steps + 1 if step is None else step
    counts = torch.full((2,), int(runtime.stop_signal), device=runtime.device)
    counts[0] = sum((batch.targets >= 0).sum() for batch in batches)
    runtime.all_reduce_sum(counts)
    scale = loss_scale.scale if loss_scale else 1.0

    total = torch.zeros((), device=runtime.device)
    # The loss scale is multiplied into the weights, since the forward pass computes part of the
    # gradient.
    divided_by = counts[0].clamp(min=1) if divisor is None else max(divisor, 1)
    for batch in batches:
        weights = batch.weights / (divided_by / scale)
        loss = model.weighted_loss(
            batch.inputs, batch.targets, weights, batch.doc_ids, temperature, batch.boundaries
        )
        loss.backward()
        total += loss.detach() / scale

    # A sum is finite if all its terms are: one pass over the gradients, and no transfer of them.
    checksum = torch.stack([unit.gradients.sum() for unit in optimizer.units]).sum()
    # The only wait for a GPU: whether the update may be made. Until it is known the GPU has the
    # backward pass to do, and then the update while the next step is being launched.
    values = torch.cat([torch.stack([total, checksum]), counts.to(total.dtype)])
    losses, checksums, counted, stops = runtime.all_gather(values).T.tolist()
    targets, runtime.stop_requested = int(counted[0]), stops[0] > 0
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
            optimizer.scale_gradients(torch.full((), 1 / scale, device=runtime.device))
        optimizer.step(hypers)
    optimizer.zero_grad()
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
    """Raise NonFiniteWeights on every rank if weights or state of any rank are not finite."""
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

    The fingerprint of a parameter is the sum of its raw bits, each multiplied by its position,
    modulo 2^63. It changes when two values are swapped or a single bit flips.
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
