"""Parameter groups, and the sharded step over Muon and AdamW.

S matrices of one shape, R rows, C columns, W ranks

Parameters live in padded buffers, one per unit of communication: all Muon matrices of one shape
form a stack (S', R, C) with S' a multiple of W, each large AdamW tensor a row-padded (R', ...) with
R' a multiple of W. `parameter.data` and `parameter.grad` are views of these buffers, so gradients
are reduce-scattered and parameters all-gathered without a copy, and nothing has to divide the
number of ranks. A rank updates, and keeps optimizer state for, its own contiguous share only. Small
AdamW tensors are all-reduced and updated on every rank alike.

Gradients are summed over ranks, not averaged: the loss is already divided by the global count of
targets. At world size 1 the same code runs and the collectives are skipped.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from nanochat.adamw import adamw_update
from nanochat.config import Learning
from nanochat.muon import muon_update

# torch 2.13 renamed both.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

SMALL = 4096
"""Elements up to which an AdamW tensor is replicated instead of sharded."""


@dataclass(frozen=True)
class Rule:
    """How a group of parameters is updated, before the schedule's factors."""

    kind: str
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-10


@dataclass(frozen=True)
class Hypers:
    """What the schedule says about one step."""

    lr_multiplier: float = 1.0
    momentum: float = 0.95


@dataclass
class Unit:
    """One buffer of parameters and what belongs to it."""

    rule: Rule
    names: list[str]
    parameters: torch.Tensor
    """(S', R, C) for Muon, (R', ...) for AdamW."""
    gradients: torch.Tensor
    rows: int
    """Entries along dimension 0 that are real: S or R."""
    sharded: bool
    own: slice
    """This rank's share of dimension 0, padding included."""
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    reduced: torch.Tensor | None = None


def parameter_rules(
    model: nn.Module,
    learning: Learning,
    *,
    width: int,
    lr_scale: float = 1.0,
    weight_decay: float = 0.0,
) -> dict[str, Rule]:
    """Which rule each parameter gets. Block matrices go to Muon, everything else to AdamW.

    AdamW's rates scale with (width / 768)^-1/2.
    """
    adam_scale = lr_scale * (width / 768) ** -0.5
    betas = learning.adam_betas
    rules = {}
    for name, _ in model.named_parameters():
        if name.startswith("blocks.") and not name.endswith("value_gate.weight"):
            rules[name] = Rule("muon", learning.matrix_lr * lr_scale, weight_decay)
        elif name.startswith("head."):
            rules[name] = Rule("adamw", learning.head_lr * adam_scale, betas=betas)
        elif name.startswith(("embedding.", "value_embeddings.")):
            rules[name] = Rule("adamw", learning.embedding_lr * adam_scale, betas=betas)
        elif name.endswith("value_gate.weight"):
            rules[name] = Rule("adamw", learning.gate_lr * adam_scale, betas=betas)
        else:
            # Scalars act on the whole stream: a longer memory, and no scaling by width. At the
            # first step the final norm undoes whatever they do, so their gradient is rounding
            # (1e-10 in float32, 5e-7 in bfloat16; 1e-3 later) and must not become a full step.
            rules[name] = Rule("adamw", learning.scalar_lr * lr_scale, betas=(0.95, 0.99), eps=1e-5)
    return rules


class Optimizer:
    """Muon and AdamW over the ranks of a process group.

    The model must be initialised and on its device; its parameters move into the buffers here.
    Keep gradients with `zero_grad()` of this class: `model.zero_grad()` would drop the views.
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
            if rules[name].kind == "muon":
                stacks.setdefault((rules[name], parameter.shape), []).append(name)
            else:
                self.units.append(self._adamw_unit(rules[name], name, parameter))
        muon_units = [self._muon_unit(rule, names) for (rule, _), names in stacks.items()]
        # Large transfers first: the updates of the early ones then hide the later transfers.
        self.units = sorted(
            muon_units + self.units, key=lambda unit: unit.parameters.numel(), reverse=True
        )

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

    def _muon_unit(self, rule: Rule, names: list[str]) -> Unit:
        first = self.parameters[names[0]]
        padded = self._padded(len(names))
        parameters = first.new_zeros((padded, *first.shape)).detach()
        gradients = torch.zeros_like(parameters)
        for i, name in enumerate(names):
            self._adopt(name, parameters[i], gradients[i])
        own = self._own(padded)
        mine = parameters[own]
        state = {
            "momentum": torch.zeros_like(mine),
            "second_moment": mine.new_zeros((*mine.shape[:2], 1)),
        }
        return Unit(rule, names, parameters, gradients, len(names), True, own, state)

    def _adamw_unit(self, rule: Rule, name: str, parameter: nn.Parameter) -> Unit:
        rows = parameter.shape[0]
        sharded = parameter.numel() > SMALL
        padded = self._padded(rows) if sharded else rows
        parameters = parameter.new_zeros((padded, *parameter.shape[1:])).detach()
        gradients = torch.zeros_like(parameters)
        self._adopt(name, parameters[:rows], gradients[:rows])
        own = self._own(padded) if sharded else slice(0, rows)
        state = {
            "first_moment": torch.zeros_like(parameters[own]),
            "second_moment": torch.zeros_like(parameters[own]),
        }
        return Unit(rule, [name], parameters, gradients, rows, sharded, own, state)

    def zero_grad(self) -> None:
        for unit in self.units:
            unit.gradients.zero_()

    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Multiply every gradient of this rank (the float16 path undoes its loss scale)."""
        for unit in self.units:
            unit.gradients.mul_(factor)

    @torch.no_grad()
    def step(self, hypers: Hypers) -> None:
        """Reduce gradients, update the own shares, gather parameters: three passes over the units,

        so that the transfers of later units run while earlier ones are updated. Buffers and handles
        are attributes of the units, alive until their transfer has been waited for.
        """
        self.steps += 1
        reducing = [self._reduce(unit) for unit in self.units]
        gathering = []
        for unit, handle in zip(self.units, reducing, strict=True):
            if handle is not None:
                handle.wait()
            self._update(unit, hypers)
            gathering.append(self._gather(unit))
        for handle in gathering:
            if handle is not None:
                handle.wait()
        for unit in self.units:
            unit.reduced = None

    def _reduce(self, unit: Unit) -> Any:
        if self.world_size == 1:
            unit.reduced = unit.gradients[unit.own]
            return None
        if not unit.sharded:
            unit.reduced = unit.gradients
            return dist.all_reduce(unit.gradients, async_op=True)
        unit.reduced = torch.empty_like(unit.gradients[unit.own])
        return reduce_scatter(unit.reduced, unit.gradients, async_op=True)

    def _update(self, unit: Unit, hypers: Hypers) -> None:
        gradients, parameters = unit.reduced, unit.parameters[unit.own]
        rule, lr = unit.rule, unit.rule.lr * hypers.lr_multiplier
        if gradients is None or parameters.numel() == 0:
            return
        if rule.kind == "muon":
            real = self._real_rows(unit)
            if real == 0:
                return
            muon_update(
                parameters[:real],
                gradients[:real],
                unit.state["momentum"][:real],
                unit.state["second_moment"][:real],
                lr=lr,
                momentum=hypers.momentum,
                weight_decay=rule.weight_decay,
                dtype=self.muon_dtype,
            )
        else:
            adamw_update(
                parameters,
                gradients,
                unit.state["first_moment"],
                unit.state["second_moment"],
                step=self.steps,
                lr=lr,
                betas=rule.betas,
                eps=rule.eps,
                weight_decay=rule.weight_decay,
            )

    def _gather(self, unit: Unit) -> Any:
        if self.world_size == 1 or not unit.sharded:
            return None
        # The input is a copy: gathering from a view of the output is not allowed everywhere.
        unit.reduced = unit.parameters[unit.own].clone()
        return all_gather(unit.parameters, unit.reduced, async_op=True)

    def bytes_communicated(self) -> int:
        """Bytes a rank sends per step with ring collectives: (W-1)/W of what each one moves."""
        share = (self.world_size - 1) / self.world_size
        total = sum(unit.parameters.numel() * unit.parameters.element_size() for unit in self.units)
        return int(2 * share * total)

    def state_bytes(self) -> int:
        """Bytes of this rank's optimizer state."""
        return sum(t.numel() * t.element_size() for u in self.units for t in u.state.values())

    def state_dict(self, host_copy: bool = False) -> dict[str, torch.Tensor]:
        """This rank's state, keyed `<parameter name>.<state name>`, in the form that
        torch.distributed.checkpoint reshards.

        A Muon matrix's state is a plain tensor on its owner, a row-sharded one's a DTensor over all
        ranks (a plain tensor at world size 1), a replicated one's a plain tensor. Without
        `host_copy` the tensors share memory with the optimizer.
        """
        result: dict[str, torch.Tensor] = {}
        for unit in self.units:
            real = self._real_rows(unit)
            for key, value in unit.state.items():
                if host_copy:
                    value = value.to("cpu", copy=True)
                if unit.rule.kind == "muon":
                    for i, name in enumerate(unit.names[unit.own]):
                        result[f"{name}.{key}"] = value[i]
                elif unit.sharded and self.world_size > 1:
                    result[f"{unit.names[0]}.{key}"] = self._as_dtensor(unit, value[:real])
                else:
                    result[f"{unit.names[0]}.{key}"] = value[: unit.rows]
        return result

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy in what `state_dict(host_copy=True)` of the same model and world size gave."""
        with torch.no_grad():
            for name, mine in self.state_dict().items():
                local = getattr(state[name], "_local_tensor", state[name])
                getattr(mine, "_local_tensor", mine).copy_(local)

    def _real_rows(self, unit: Unit) -> int:
        """Entries of this rank's share that are not padding."""
        real: int = max(0, min(unit.own.stop, unit.rows) - unit.own.start)
        return real

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
        """One row per unit for logs: rule, tensors, elements, rate."""
        return [
            {
                **dataclasses.asdict(unit.rule),
                "tensors": len(unit.names),
                "elements": sum(self.parameters[n].numel() for n in unit.names),
                "example": unit.names[0],
            }
            for unit in self.units
        ]
