"""Optimizer over several ranks: each rank updates its share of the parameters.

S matrices of one shape, R rows, C columns, W ranks

Parameters live in padded buffers. A buffer with its gradients and state is a `Unit`. Matrices of
one shape form a stack (S', R, C), with S' a multiple of W, if their rule works on stacks (Muon).
Each other large tensor is row-padded to (R', ...), with R' a multiple of W. A rank's part of a unit
is its `Share`. `parameter.data` and `parameter.grad` are views of these buffers, so gradients are
reduce-scattered and parameters all-gathered without a copy, and any number of ranks works. A rank
updates its own contiguous share only, and keeps optimizer state for it only. Other small tensors
are all-reduced, and every rank updates them.

Gradients are summed over ranks, not averaged: the loss is already divided by the global count of
targets. At world size 1 the same code runs and the collectives are skipped.

With `Learning.bf16_transfers` the tables (embeddings, value embeddings, head) travel in bfloat16.
Each rank's gradient is rounded once and sent to the owners of its rows, who add in float32. An
owner keeps its rows in float32, the `master`. Every rank gets them rounded, the owner included, so
all ranks compute with the same numbers. `masters()` puts the float32 rows back for a checkpoint.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from nanochat.adamw import adamw_update
from nanochat.config import Learning
from nanochat.lion import lion_update
from nanochat.muon import muon_update

# torch 2.13 renamed both functions.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
all_to_all = dist.all_to_all_single

SMALL = 4096
"""Largest number of elements of an unstacked tensor that every rank updates instead of a share."""


@dataclass(frozen=True)
class Rule:
    """Settings of the update of a group of parameters, before the schedule's factors."""

    kind: str
    """Name of an entry of KINDS."""
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-10
    bf16_transfers: bool = False
    """True: gradients and parameters are sent between ranks in bfloat16."""


@dataclass(frozen=True)
class Hypers:
    """Values of the schedule at one step."""

    lr_multiplier: float = 1.0
    momentum: float = 0.95


@dataclass(frozen=True)
class Kind:
    """An update rule: its state and its function. KINDS has one entry per rule."""

    stacked: bool
    """True: the rule updates matrices of one shape as a stack (S, R, C); False: tensors by rows."""
    state: dict[str, bool]
    """Names of its state tensors, all float32; True: shaped like the parameters, False: one value
    per row."""
    temporaries: float
    """Memory that the function needs besides, in float32 copies of the share."""
    update: Callable[["Share"], None]
    """Function that changes parameters and state in place."""

    def make_state(self, parameters: torch.Tensor) -> dict[str, torch.Tensor]:
        """Create the state, all zeros, of a rank's share of the parameters."""
        return {
            name: torch.zeros_like(parameters)
            if full
            else parameters.new_zeros((*parameters.shape[:-1], 1))
            for name, full in self.state.items()
        }


@dataclass(frozen=True)
class Share:
    """One rank's share of a unit in one step, without padding."""

    parameters: torch.Tensor
    gradients: torch.Tensor
    state: dict[str, torch.Tensor]
    rule: Rule
    hypers: Hypers
    step: int
    """Number of the step, counted from 1."""
    dtype: torch.dtype
    """Dtype of Muon's matrix products."""

    @property
    def lr(self) -> float:
        return self.rule.lr * self.hypers.lr_multiplier


def _muon(share: Share) -> None:
    muon_update(
        share.parameters,
        share.gradients,
        share.state["momentum"],
        share.state["second_moment"],
        lr=share.lr,
        momentum=share.hypers.momentum,
        weight_decay=share.rule.weight_decay,
        dtype=share.dtype,
    )


def _adamw(share: Share) -> None:
    adamw_update(
        share.parameters,
        share.gradients,
        share.state["first_moment"],
        share.state["second_moment"],
        step=share.step,
        lr=share.lr,
        betas=share.rule.betas,
        eps=share.rule.eps,
        weight_decay=share.rule.weight_decay,
    )


def _lion(share: Share) -> None:
    lion_update(
        share.parameters,
        share.gradients,
        share.state["momentum"],
        lr=share.lr,
        weight_decay=share.rule.weight_decay,
    )


KINDS = {
    # Muon keeps the update, its cast, and the polynomial's terms.
    "muon": Kind(True, {"momentum": True, "second_moment": False}, 2.5, _muon),
    "adamw": Kind(False, {"first_moment": True, "second_moment": True}, 1, _adamw),
    "lion": Kind(False, {"momentum": True}, 1, _lion),
}


@dataclass
class Unit:
    """One buffer of parameters with its gradients and optimizer state."""

    rule: Rule
    names: list[str]
    parameters: torch.Tensor
    """Padded parameters: (S', R, C) for a stack, else (R', ...)."""
    gradients: torch.Tensor
    rows: int
    """Number of entries along dimension 0 without padding: S or R."""
    sharded: bool
    own: slice
    """Indices of this rank's share of dimension 0, padding included."""
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    master: torch.Tensor | None = None
    """This rank's share in float32 of a unit that travels in bfloat16; `parameters` is rounded."""
    reduced: torch.Tensor | None = None
    sent: torch.Tensor | None = None
    """Buffer in bfloat16, shaped like the parameters, for gradients sent and then rows gathered."""


def parameter_rules(
    model: nn.Module,
    learning: Learning,
    *,
    width: int,
    lr_scale: float = 1.0,
    weight_decay: float = 0.0,
) -> dict[str, Rule]:
    """Rules by parameter name: the chosen rule for block matrices, AdamW for everything else.

    AdamW's learning rates are multiplied by (width / 768)^-1/2. Weight decay applies to block
    matrices.
    """
    adam_scale = lr_scale * (width / 768) ** -0.5
    betas = learning.adam_betas
    rules = {}
    for name, _ in model.named_parameters():
        if name.startswith("blocks.") and not name.endswith("value_gate.weight"):
            kind, lr = learning.matrix_optimizer, learning.matrix_lr * lr_scale
            rules[name] = Rule(kind, lr, weight_decay, betas)
        elif name.startswith("head."):
            lr = learning.head_lr * adam_scale
            rules[name] = Rule("adamw", lr, betas=betas, bf16_transfers=learning.bf16_transfers)
        elif name.startswith(("embedding.", "byte_embedding.", "value_embeddings.")):
            lr = learning.embedding_lr * adam_scale
            rules[name] = Rule("adamw", lr, betas=betas, bf16_transfers=learning.bf16_transfers)
        elif name.endswith("value_gate.weight") or name == "shift_scale":
            rules[name] = Rule("adamw", learning.gate_lr * adam_scale, betas=betas)
        else:
            # Scalars act on the whole residual stream, so they get a longer memory, and no scaling
            # by width. At the first step the final norm undoes whatever they do: their gradient is
            # rounding only (1e-10 in float32, 5e-7 in bfloat16; 1e-3 later). The large eps keeps
            # that from becoming a full step.
            rules[name] = Rule("adamw", learning.scalar_lr * lr_scale, betas=(0.95, 0.99), eps=1e-5)
    return rules


class Optimizer:
    """Updates a model's parameters by their rules, over the ranks of a process group.

    The model must be initialised and on its device; the constructor moves its parameters into the
    buffers. Clear gradients with this class's `zero_grad()`: `model.zero_grad()` would drop the
    views.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: dict[str, Rule],
        *,
        rank: int = 0,
        world_size: int = 1,
        muon_dtype: torch.dtype = torch.bfloat16,
    ):
        self.rank, self.world_size, self.muon_dtype = rank, world_size, muon_dtype
        self.steps = 0
        self._meshes: dict[str, Any] = {}
        self.parameters = dict(model.named_parameters())
        stacks: dict[tuple[Rule, torch.Size], list[str]] = {}
        self.units: list[Unit] = []
        for name, parameter in self.parameters.items():
            if KINDS[rules[name].kind].stacked:
                stacks.setdefault((rules[name], parameter.shape), []).append(name)
            else:
                self.units.append(self._tensor_unit(rules[name], name, parameter))
        stack_units = [self._stack_unit(rule, names) for (rule, _), names in stacks.items()]
        # Large transfers come first; later transfers then run during the updates of the first ones.
        self.units = sorted(
            stack_units + self.units, key=lambda unit: unit.parameters.numel(), reverse=True
        )
        self.take_masters()

    def _padded(self, count: int) -> int:
        return -(-count // self.world_size) * self.world_size

    def _own(self, padded: int) -> slice:
        share = padded // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def _adopt(self, name: str, data: torch.Tensor, gradient: torch.Tensor) -> None:
        parameter = self.parameters[name]
        data.copy_(parameter.detach())
        parameter.data = data
        parameter.grad = gradient

    def _stack_unit(self, rule: Rule, names: list[str]) -> Unit:
        first = self.parameters[names[0]]
        padded = self._padded(len(names))
        parameters = first.new_zeros((padded, *first.shape)).detach()
        gradients = torch.zeros_like(parameters)
        for i, name in enumerate(names):
            self._adopt(name, parameters[i], gradients[i])
        own = self._own(padded)
        state = KINDS[rule.kind].make_state(parameters[own])
        return Unit(rule, names, parameters, gradients, len(names), True, own, state)

    def _tensor_unit(self, rule: Rule, name: str, parameter: nn.Parameter) -> Unit:
        rows = parameter.shape[0]
        sharded = parameter.numel() > SMALL
        padded = self._padded(rows) if sharded else rows
        parameters = parameter.new_zeros((padded, *parameter.shape[1:])).detach()
        gradients = torch.zeros_like(parameters)
        self._adopt(name, parameters[:rows], gradients[:rows])
        own = self._own(padded) if sharded else slice(0, rows)
        state = KINDS[rule.kind].make_state(parameters[own])
        return Unit(rule, [name], parameters, gradients, rows, sharded, own, state)

    @torch.no_grad()
    def take_masters(self) -> None:
        """Take the model's float32 parameters as masters, and round them where they are rounded in
        training; called whenever the parameters were set from outside."""
        for unit in self.units:
            if unit.rule.bf16_transfers and unit.sharded and self.world_size > 1:
                unit.master = unit.parameters[unit.own].clone()
                unit.parameters.copy_(unit.parameters.bfloat16())

    @contextmanager
    @torch.no_grad()
    def masters(self) -> Iterator[None]:
        """Put the float32 masters of all ranks into the parameters for a while; a collective."""
        rounded = [unit for unit in self.units if unit.master is not None]
        for unit in rounded:
            all_gather(unit.parameters, unit.master)
        try:
            yield
        finally:
            for unit in rounded:
                unit.parameters.copy_(unit.parameters.bfloat16())

    def zero_grad(self) -> None:
        for unit in self.units:
            unit.gradients.zero_()

    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Multiply every gradient of this rank by factor (training in float16 undoes its loss
        scale)."""
        for unit in self.units:
            unit.gradients.mul_(factor)

    @torch.no_grad()
    def step(self, hypers: Hypers) -> None:
        """Reduce gradients, update this rank's shares, gather parameters.

        These are three passes over the units, so that later units are transferred while earlier
        ones are updated. Buffers and handles are attributes of the units, so they live until their
        transfer has been waited for.
        """
        self.steps += 1
        reducing = [self._reduce(unit) for unit in self.units]
        gathering = []
        for unit, handle in zip(self.units, reducing, strict=True):
            if handle is not None:
                handle.wait()
            self._update(unit, hypers)
            gathering.append(self._gather(unit))
        for unit, handle in zip(self.units, gathering, strict=True):
            if handle is not None:
                handle.wait()
            if unit.sent is not None:
                unit.parameters.copy_(unit.sent)
            unit.reduced = unit.sent = None

    def _reduce(self, unit: Unit) -> Any:
        if self.world_size == 1:
            unit.reduced = unit.gradients[unit.own]
            return None
        if not unit.sharded:
            unit.reduced = unit.gradients
            return dist.all_reduce(unit.gradients, async_op=True)
        if unit.master is not None:
            unit.sent = unit.gradients.bfloat16()
            # What comes takes half of the gradients' memory: they are in the buffer now.
            memory = unit.gradients.view(-1).view(torch.bfloat16)[: unit.gradients.numel()]
            unit.reduced = memory.view(self.world_size, -1, *unit.gradients.shape[1:])
            return all_to_all(unit.reduced.flatten(0, 1), unit.sent, async_op=True)
        unit.reduced = torch.empty_like(unit.gradients[unit.own])
        return reduce_scatter(unit.reduced, unit.gradients, async_op=True)

    def _update(self, unit: Unit, hypers: Hypers) -> None:
        real = self._real_rows(unit) if unit.sharded else unit.rows
        if unit.reduced is None or real == 0:
            return
        parameters, gradients = unit.parameters[unit.own], unit.reduced
        if unit.master is not None:  # one share from each rank
            parameters, gradients = unit.master, unit.reduced.sum(0, dtype=torch.float32)
        share = Share(
            parameters[:real],
            gradients[:real],
            {name: tensor[:real] for name, tensor in unit.state.items()},
            unit.rule,
            hypers,
            self.steps,
            self.muon_dtype,
        )
        KINDS[unit.rule.kind].update(share)

    def _gather(self, unit: Unit) -> Any:
        if self.world_size == 1 or not unit.sharded:
            return None
        if unit.master is not None:
            unit.reduced = unit.master.bfloat16()
            return all_gather(unit.sent, unit.reduced, async_op=True)
        # The input is a copy, because some backends cannot gather from a view of the output.
        unit.reduced = unit.parameters[unit.own].clone()
        return all_gather(unit.parameters, unit.reduced, async_op=True)

    def bytes_communicated(self) -> int:
        """Bytes a rank sends per step with ring collectives: (W-1)/W of each buffer moved."""
        share = (self.world_size - 1) / self.world_size
        total = sum(
            unit.parameters.numel() * (4 if unit.master is None else 2) for unit in self.units
        )
        return int(2 * share * total)

    def state_bytes(self) -> int:
        """Bytes of this rank's optimizer state."""
        return sum(t.numel() * t.element_size() for u in self.units for t in u.state.values())

    def state_dict(self, host_copy: bool = False) -> dict[str, torch.Tensor]:
        """Return this rank's state, keyed `<parameter name>.<state name>`.

        torch.distributed.checkpoint can reshard this form. The state of a stacked matrix is a plain
        tensor on its owner. That of a row-sharded tensor is a DTensor over all ranks (a plain
        tensor at world size 1). That of a small tensor is a plain tensor on every rank. Without
        `host_copy` the tensors share memory with the optimizer.
        """
        result: dict[str, torch.Tensor] = {}
        for unit in self.units:
            real = self._real_rows(unit)
            for key, value in unit.state.items():
                if host_copy:
                    value = value.to("cpu", copy=True)
                if KINDS[unit.rule.kind].stacked:
                    for i, name in enumerate(unit.names[unit.own]):
                        result[f"{name}.{key}"] = value[i]
                elif unit.sharded and self.world_size > 1:
                    result[f"{unit.names[0]}.{key}"] = self._as_dtensor(unit, value[:real])
                else:
                    result[f"{unit.names[0]}.{key}"] = value[: unit.rows]
        return result

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy in the result of `state_dict(host_copy=True)` of the same model and world size."""
        with torch.no_grad():
            for name, mine in self.state_dict().items():
                local = getattr(state[name], "_local_tensor", state[name])
                getattr(mine, "_local_tensor", mine).copy_(local)

    def _real_rows(self, unit: Unit) -> int:
        """Number of entries in this rank's share, without padding."""
        return max(0, min(unit.own.stop, unit.rows) - unit.own.start)

    def _as_dtensor(self, unit: Unit, local: torch.Tensor) -> torch.Tensor:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        kind = local.device.type
        if kind not in self._meshes:  # making one is a collective
            self._meshes[kind] = init_device_mesh(kind, (self.world_size,))
        shape = torch.Size((unit.rows, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self._meshes[kind], [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    def describe(self) -> list[dict[str, Any]]:
        """List one row per unit for logs: rule, tensors, elements, learning rate."""
        return [
            {
                **dataclasses.asdict(unit.rule),
                "tensors": len(unit.names),
                "elements": sum(self.parameters[n].numel() for n in unit.names),
                "example": unit.names[0],
            }
            for unit in self.units
        ]
