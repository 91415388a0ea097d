"""Rows of packed samples, on which a policy gradient or DPO step trains.

B rows, T time, S samples of a step
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from nanochat.attention import document_boundaries, pad_boundaries, padded_documents
from nanochat.data.packing import pack_window
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.train import Batch


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer as one document."""

    ids: Sequence[int]
    mask: Sequence[int]
    """Mask of `ids`: 1 for tokens that are targets."""
    logprobs: Sequence[float] | None = None
    """Log-probability of each token when it was sampled."""


@dataclass(frozen=True)
class Rows:
    """A micro-batch of packed samples; loss weights are added by `weighted`."""

    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64; -1 is ignored
    doc_ids: torch.Tensor  # (B, T) int32
    owner: torch.Tensor
    """Number of the sample that a target belongs to, (B, T) int64; -1 where there is no target."""
    drawn_nll: torch.Tensor
    """Values of -log p of the targets when they were sampled, (B, T) float32; 0 if not known."""
    tokens: int
    """Number of input positions without padding."""
    boundaries: torch.Tensor | None = None
    """`attention.document_boundaries` of doc_ids, int32, found on the CPU."""

    def weighted(self, per_sample: torch.Tensor, factor: torch.Tensor | None = None) -> Batch:
        """Make a batch with loss weights per_sample (S,), times `factor` (B, T) by token."""
        per_sample = per_sample.to(self.owner.device, torch.float32)
        weights = torch.where(self.owner >= 0, per_sample[self.owner.clamp(min=0)], 0.0)
        weights = weights if factor is None else weights * factor
        return Batch(self.inputs, self.targets, weights, self.doc_ids, boundaries=self.boundaries)

    def sum_by_sample(self, values: torch.Tensor, sums: torch.Tensor) -> None:
        """Add values (B, T) of targets to sums (S,) float64 on the CPU, in a fixed order."""
        owner = self.owner.cpu().flatten()
        sums.index_add_(0, owner[owner >= 0], values.cpu().double().flatten()[owner >= 0])


def pack_samples(
    samples: Sequence[Sample],
    T: int,
    rows_per_batch: int,
    device: torch.device,
    *,
    fill_up: bool = False,
) -> list[Rows]:
    """Pack samples of at most T + 1 tokens into rows, and the rows into micro-batches.

    A micro-batch has at most `rows_per_batch` * T positions. The length of the rows is chosen for
    the least padding: in rows of T, samples a little longer than T / 2 would leave half of each row
    free. With `fill_up`, micro-batches have one of few shapes, since a compiled loss is compiled
    again for every other one: rows of T, T / 2 or T / 4, and as many of them as fill the whole, a
    half or a quarter of the positions. Raises UserError for a longer sample.
    """
    lengths = [len(sample.ids) for sample in samples]
    if not lengths:
        return []
    longest = max(lengths)
    if longest > T + 1:
        raise UserError(f"a sample of {longest} tokens does not fit into a row of {T + 1}")
    most = rows_per_batch * T
    if fill_up:
        capacities = [T // part + 1 for part in FILLED_PARTS if T // part + 1 >= longest]
        divide = _filled_batches
    else:
        capacities = [*range(T + 1, longest, -max(1, T // 16)), longest]
        divide = _equal_batches
    candidates = [divide(list(pack_window(lengths, c)), c, most) for c in capacities]
    batches = min(candidates, key=_positions)
    result = []
    for rows, *shape in batches:
        ids = np.zeros(shape, dtype=np.int64)
        owner = np.full(shape, -1, dtype=np.int64)
        drawn = np.zeros(shape, dtype=np.float32)
        documents = np.zeros(shape, dtype=np.int32)
        for b, pieces in enumerate(rows):
            end = 0
            for number, (s, _, length) in enumerate(pieces):
                sample = samples[s]
                begin, end = end, end + length
                ids[b, begin:end] = sample.ids
                # The first token of a document is not a target.
                owner[b, begin + 1 : end] = np.where(np.asarray(sample.mask[1:]) > 0, s, -1)
                if sample.logprobs is not None:
                    drawn[b, begin:end] = np.negative(sample.logprobs)
                documents[b, begin:end] = number
            documents[b, end:] = len(pieces)
        targets = np.where(owner >= 0, ids, -1)
        doc_ids = torch.from_numpy(np.ascontiguousarray(documents[:, :-1]))
        ends = document_boundaries(doc_ids)
        ends = pad_boundaries(ends, padded_documents(len(ends) - 1, doc_ids.numel()))
        result.append(
            Rows(
                _tensor(ids[:, :-1], device),
                _tensor(targets[:, 1:], device),
                doc_ids.to(device),
                _tensor(owner[:, 1:], device),
                _tensor(drawn[:, 1:], device),
                sum(length - 1 for pieces in rows for _, _, length in pieces),
                ends.to(device),
            )
        )
    return result


Pieces: TypeAlias = list[tuple[int, int, int]]
"""Row of pieces: (sample, start, stop) of each."""


def _width(rows: Sequence[Pieces]) -> int:
    return max(sum(length for _, _, length in pieces) for pieces in rows)


class MicroBatch(NamedTuple):
    rows: list[Pieces]
    num_rows: int
    """Number of rows, empty ones included."""
    capacity: int
    """Tokens of a row, its last target included."""


FILLED_PARTS = (1, 2, 4)
"""Parts of a row's length, and of a micro-batch's positions, to which `fill_up` fills up."""


def _equal_batches(packed: list[Pieces], capacity: int, positions: int) -> list[MicroBatch]:
    """Divide rows into micro-batches with equally many rows, which are about equally full."""
    rows = sorted(packed, key=lambda pieces: _width([pieces]), reverse=True)
    most = max(1, positions // (_width(rows) - 1))
    size = -(-len(rows) // -(-len(rows) // most))
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [MicroBatch(part, len(part), _width(part)) for part in parts]


def _filled_batches(packed: list[Pieces], capacity: int, positions: int) -> list[MicroBatch]:
    """Divide rows into full micro-batches, and a last one of the smallest part that holds it."""
    most = max(1, positions // (capacity - 1))
    batches = []
    for i in range(0, len(packed), most):
        rows = packed[i : i + most]
        size = min(n for part in FILLED_PARTS if (n := max(1, most // part)) >= len(rows))
        batches.append(MicroBatch(rows, size, capacity))
    return batches


def _positions(batches: list[MicroBatch]) -> int:
    return sum(batch.num_rows * (batch.capacity - 1) for batch in batches)


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


@torch.no_grad()
def score(model: GPT, rows: Sequence[Rows], temperature: float = 1.0) -> list[torch.Tensor]:
    """Compute -log p (B, T) float32 of each micro-batch's targets with the present weights."""
    return [
        model.nll(r.inputs, r.targets, r.doc_ids, temperature, boundaries=r.boundaries)
        for r in rows
    ]


def policy_batches(
    model: GPT,
    rows: Sequence[Rows],
    advantages: torch.Tensor,
    *,
    temperature: float,
    max_importance: float | None = None,
) -> tuple[list[Batch], float]:
    """Make micro-batches with advantages (S,) as loss weights; also counts clipped targets.

    `max_importance` is for weights that have changed since the samples were drawn. CISPO then
    multiplies each token's loss weight by its importance ratio p_now / p_drawn, which is clipped
    from above and has no gradient. Unlike in PPO, a token with a clipped ratio is still trained on.
    """
    if max_importance is None:
        return [r.weighted(advantages) for r in rows], 0.0
    batches, clipped = [], 0.0
    for r, nll in zip(rows, score(model, rows, temperature), strict=True):
        importance = torch.exp(r.drawn_nll - nll)
        clipped += ((importance > max_importance) & (r.owner >= 0)).sum().item()
        batches.append(r.weighted(advantages, importance.clamp(max=max_importance)))
    return batches, clipped


def mean_kl(
    model: GPT, reference: GPT, rows: Sequence[Rows], temperature: float
) -> tuple[float, int]:
    """Estimate KL(model || reference): its sum over targets, and the number of targets.

    The samples must be the model's own. The estimate is r - 1 - log r with r = p_reference /
    p_model. Its mean is that of -log r, since r has the mean 1. Unlike -log r it is never negative,
    and it varies less.
    """
    total, count = 0.0, 0
    nll = score(model, rows, temperature), score(reference, rows, temperature)
    for r, ours, theirs in zip(rows, *nll, strict=True):
        log_ratio = (ours - theirs)[r.owner >= 0].cpu().double()
        total += (log_ratio.exp() - 1 - log_ratio).sum().item()
        count += len(log_ratio)
    return total, count
