"""A resumable stream of batches that does not depend on the number of ranks.

The row sequence is a pure function of (seed, epoch, window, row): the documents of an epoch come in
the order of `packing.MixtureOrder`, a window of them at a time is packed into rows, and the rows of
all windows and epochs follow one another without a gap. Of every `batch_size * world_size` rows,
rank r takes those at r, r + world_size, ... So a position is three integers, and a run may go on
with another batch size or number of ranks.

B batch, T time (the sequence length; a row holds T + 1 tokens), W ranks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.data.order import MixtureOrder, make_key
from nanochat.data.packing import count_rows, pack_window
from nanochat.data.sources import Source
from nanochat.errors import UserError
from nanochat.tokenizer import unpack_mask

# The last rows of a window stay partly empty, about one row in all: with 256 rows or more in a
# window that is under half a percent of padding. 2^16 documents bound the time to pack a window.
_MIN_WINDOW, _MAX_WINDOW = 2**10, 2**16
_ROWS_PER_WINDOW = 256


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
    """(B, T) int8: the target's role (`tokenizer.ROLE_NAMES`), whatever its weight; -1 where there
    is no target or its store has no roles. Only with `with_roles=True`."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; from pinned memory and without waiting on CUDA."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        return Batch(
            inputs=move(self.inputs),
            targets=move(self.targets),
            weights=move(self.weights),
            doc_ids=move(self.doc_ids),
            roles=None if self.roles is None else move(self.roles),
        )


class _Window:
    """The packed rows of one window, and what they take from each source.

    sources, documents: what the window's documents are, by their number in it. parts: (number,
    start, stop) of each part of a document that is to be packed, at first all of each.
    """

    def __init__(
        self,
        sources: np.ndarray,
        documents: np.ndarray,
        parts: np.ndarray,
        capacity: int,
        key: int,
        num_sources: int,
    ):
        packed = pack_window(parts[:, 2] - parts[:, 1], capacity, key)
        # The packer knows parts by their place in the list, and counts from their beginnings.
        self.numbers, begin = parts[packed.documents, 0], parts[packed.documents, 1]
        self.pieces = np.stack(
            [
                sources[self.numbers],
                documents[self.numbers],
                begin + packed.starts,
                begin + packed.stops,
            ],
            axis=1,
        )
        self.offsets = packed.offsets
        row_of = np.repeat(np.arange(len(packed)), np.diff(packed.offsets))
        taken = np.zeros((len(packed) + 1, num_sources, 2), dtype=np.int64)
        np.add.at(taken[:, :, 0], (row_of + 1, self.pieces[:, 0]), self.pieces[:, 2] == 0)
        np.add.at(taken[:, :, 1], (row_of + 1, self.pieces[:, 0]), packed.stops - packed.starts - 1)
        self.taken = taken.cumsum(axis=0)  # (rows + 1, sources, 2): documents begun, targets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, row: int) -> list[list[int]]:
        """[source, document, start, stop] of each piece."""
        pieces: list[list[int]] = self.pieces[self.offsets[row] : self.offsets[row + 1]].tolist()
        return pieces

    def rest(self, row: int) -> np.ndarray:
        """The parts that the rows from `row` on hold.

        Pieces that touch are joined: where one ends the next begins with its last token.
        """
        numbers, pieces = self.numbers[self.offsets[row] :], self.pieces[self.offsets[row] :]
        order = np.lexsort((pieces[:, 2], numbers))
        numbers, starts, stops = numbers[order], pieces[order, 2], pieces[order, 3]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (numbers[1:] != numbers[:-1]) | (starts[1:] != stops[:-1] - 1)
        last = np.roll(first, -1)
        return np.stack([numbers[first], starts[first], stops[last]], axis=1)


class DataLoader:
    """The stream of micro-batches of one rank.

    `next(loader)` gives the next micro-batch. Without `epochs` it never ends. With `epochs=E` the
    rows end after E epochs exactly; the last micro-batch is filled up with empty rows (targets -1),
    and every further `next` gives empty rows only, so that a step of several micro-batches can be
    completed on all ranks alike. `for batch in loader` stops at the end of the data, at the same
    micro-batch on every rank. `num_rows(E)` tells in advance how many rows there are.

    `window` is the number of documents packed together, up to twice that many so that an epoch
    divides evenly; by default 1,024, or more where documents are so short that these would fill
    few rows.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_size: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        window: int | None = None,
        epochs: int | None = None,
        device: torch.device = torch.device("cpu"),
        with_roles: bool = False,
    ):
        _check(sources, batch_size, sequence_length, rank, world_size, window, epochs)
        self.sources = list(sources)
        self.names = _unique_names(self.sources)
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epochs = epochs
        self.device = device
        self.with_roles = with_roles
        self.order = MixtureOrder(
            [len(source.store) for source in self.sources],
            [source.weight for source in self.sources],
            seed,
        )
        self.window = window or self._default_window()
        self._rows_of_epoch: dict[int, int] = {}
        self._packed: tuple[int, int, int, _Window] | None = None
        self._epoch = self._window = self._row = 0
        self._cuts: list[list[int]] = []
        """[sequence length, rows read] of each length the present window had before this one."""
        self._consumed = np.zeros((len(self.sources), 2), dtype=np.int64)
        self._settle()

    def _default_window(self) -> int:
        """Documents that fill 256 rows on average, a power of two from 1,024 to 65,536."""
        shares = [float(weight) for weight in self.order.weights]
        tokens = sum(
            share * s.store.num_tokens for share, s in zip(shares, self.sources, strict=True)
        )
        documents = sum(share * n for share, n in zip(shares, self.order.sizes, strict=True))
        needed = _ROWS_PER_WINDOW * (self.sequence_length + 1) * documents / tokens
        return int(min(_MAX_WINDOW, max(_MIN_WINDOW, 2 ** math.ceil(math.log2(needed)))))

    # The order of rows

    def _num_windows(self, epoch: int) -> int:
        """An epoch is cut into equal windows: a short one at its end would pack badly."""
        length = self.order.epoch_length(epoch)
        return max(1, length // self.window) if length else 0

    def _located(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sources, documents and lengths of a window's documents."""
        length, windows = self.order.epoch_length(epoch), self._num_windows(epoch)
        start, stop = window * length // windows, (window + 1) * length // windows
        sources, documents = self.order.locate_many(epoch, start, stop)
        lengths = np.empty_like(documents)
        for i, source in enumerate(self.sources):
            chosen = sources == i
            lengths[chosen] = source.store.lengths(documents[chosen])
        return sources, documents, lengths

    def _current(self) -> _Window:
        place = self._epoch, self._window, len(self._cuts)
        if self._packed is None or self._packed[:3] != place:
            sources, documents, lengths = self._located(self._epoch, self._window)
            key = make_key(self.seed, -2, self._epoch, self._window)
            numbers = np.arange(len(lengths))
            parts = np.stack([numbers, np.zeros_like(numbers), lengths], axis=1)

            def packed(sequence_length: int) -> _Window:
                capacity = sequence_length + 1
                return _Window(sources, documents, parts, capacity, key, len(self.sources))

            for number, (sequence_length, rows_read) in enumerate(self._cuts, start=1):
                parts = packed(sequence_length).rest(rows_read)
                key = make_key(self.seed, -2, self._epoch, self._window, number)
            self._packed = *place, packed(self.sequence_length)
        return self._packed[3]

    def _settle(self) -> None:
        """Go on to the next window while there is no row left in this one."""
        while not self.finished:
            if self._window >= self._num_windows(self._epoch):
                self._epoch, self._window = self._epoch + 1, 0
            elif self._row >= len(self._current()):
                self._window, self._row, self._cuts = self._window + 1, 0, []
            else:
                return

    @property
    def epoch(self) -> int:
        """The epoch of the next row, from 0."""
        return self._epoch

    @property
    def finished(self) -> bool:
        """Whether `epochs` epochs have been read: only empty rows follow."""
        return self.epochs is not None and self._epoch >= self.epochs

    def num_rows(self, epochs: int) -> int:
        """Rows of the first `epochs` epochs, exact. Packs lengths only; cached for each epoch."""
        return sum(self._count_epoch(epoch) for epoch in range(epochs))

    def _count_epoch(self, epoch: int) -> int:
        if epoch not in self._rows_of_epoch:
            self._rows_of_epoch[epoch] = sum(
                count_rows(self._located(epoch, window)[2], self.sequence_length + 1)
                for window in range(self._num_windows(epoch))
            )
        return self._rows_of_epoch[epoch]

    def set_rows(self, sequence_length: int, batch_size: int) -> None:
        """Rows of another length from here on, and another number of them in a micro-batch.

        What is left of the present window is packed anew: pieces of a document that touch are
        joined and cut at the new length. So an epoch is still every document once, and each of its
        targets exactly once, whatever the lengths of the rows. Every rank calls it at the same
        place; nothing happens where both are as they were.
        """
        _check(self.sources, batch_size, sequence_length, self.rank, self.world_size, None, None)
        self.batch_size = batch_size
        if sequence_length == self.sequence_length:
            return
        if self._row:
            self._cuts.append([self.sequence_length, self._row])
        self.sequence_length, self._row = sequence_length, 0
        self._packed, self._rows_of_epoch = None, {}
        self._settle()

    # Batches

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches until the data ends (after `epochs`; else never)."""
        while not self.finished:
            yield next(self)

    def __next__(self) -> Batch:
        """The next micro-batch of this rank."""
        return self._gather(self._advance()).to(self.device)

    def peek(self) -> list[list[list[int]]]:
        """What the next micro-batch is made of; the position stays.

        For each row its pieces: [number of the source, document, start, stop].
        """
        state = self.state_dict()
        rows = self._advance()
        self.load_state_dict(state)
        return rows

    def _advance(self) -> list[list[list[int]]]:
        """Go on by one micro-batch of all ranks; this rank's rows of it, as pieces."""
        mine: list[list[list[int]]] = []
        needed = self.batch_size * self.world_size
        done = 0
        while done < needed and not self.finished:
            window = self._current()
            stop = min(self._row + needed - done, len(window))
            first = self._row + (self.rank - done) % self.world_size
            mine += [window.row(row) for row in range(first, stop, self.world_size)]
            self._consumed += window.taken[stop] - window.taken[self._row]
            done += stop - self._row
            self._row = stop
            self._settle()
        return mine

    def _gather(self, rows: list[list[list[int]]]) -> Batch:
        """Read the tokens of `rows` and fill up with empty rows."""
        shape = (self.batch_size, self.sequence_length + 1)
        tokens = np.zeros(shape, dtype=np.int64)
        documents = np.zeros(shape, dtype=np.int32)
        # By token: its weight as a target. The first token of a piece is no target, nor is padding.
        weights = np.zeros(shape, dtype=np.float32)
        roles = np.full(shape, -1, dtype=np.int8)
        for b, pieces in enumerate(rows):
            end = 0
            for number, (s, document, start, stop) in enumerate(pieces):
                source = self.sources[s]
                begin, end = end, end + stop - start
                tokens[b, begin:end] = source.store.ids(document, start, stop)
                documents[b, begin:end] = number
                weights[b, begin + 1 : end] = 1
                packed = source.store.mask_bytes(document, start + 1, stop)
                if packed is not None:
                    mask, role = unpack_mask(packed)
                    if source.prompt_weight != 1:
                        weights[b, begin + 1 : end] = np.where(mask, 1, source.prompt_weight)
                    roles[b, begin + 1 : end] = role
            documents[b, end:] = len(pieces)
        weights = np.ascontiguousarray(weights[:, 1:])
        return Batch(
            inputs=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
            targets=torch.from_numpy(np.where(weights > 0, tokens[:, 1:], -1)),
            weights=torch.from_numpy(weights),
            doc_ids=torch.from_numpy(np.ascontiguousarray(documents[:, :-1])),
            roles=torch.from_numpy(np.ascontiguousarray(roles[:, 1:])) if self.with_roles else None,
        )

    # Position

    @property
    def consumed(self) -> dict[str, dict[str, int]]:
        """What all ranks together have read of each source so far.

        `documents` counts documents begun (a second pass counts again), `tokens` their (input,
        target) pairs, trained on or not.
        """
        return {
            name: {"documents": int(documents), "tokens": int(tokens)}
            for name, (documents, tokens) in zip(self.names, self._consumed, strict=True)
        }

    def _identity(self) -> dict[str, Any]:
        """What the meaning of a position depends on."""
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "window_size": self.window,
            "sources": [
                [len(source.store), source.store.num_tokens, str(weight)]
                for source, weight in zip(self.sources, self.order.weights, strict=True)
            ],
            "fingerprints": [source.store.meta["fingerprint"] for source in self.sources],
            "prompt_weights": [float(source.prompt_weight) for source in self.sources],
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able and the same on all ranks; independent of batch and ranks."""
        return {
            "epoch": self._epoch,
            "window": self._window,
            "row": self._row,
            "cuts": [list(cut) for cut in self._cuts],
            "consumed": self._consumed.tolist(),
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; `UserError` if it was saved over other data or another order."""
        for key, here in self._identity().items():
            if state.get(key, here) != here:  # older checkpoints do not say it all
                raise UserError(
                    f"the checkpoint's data position is for {key} = {state[key]}, this run has "
                    f"{here}; resume with the same data settings, or start a new run"
                )
        self._epoch, self._window, self._row = state["epoch"], state["window"], state["row"]
        self._cuts = [list(cut) for cut in state.get("cuts", [])]
        self._consumed = np.array(state["consumed"], dtype=np.int64)
        self._settle()


def _check(
    sources: Sequence[Source],
    batch_size: int,
    sequence_length: int,
    rank: int,
    world_size: int,
    window: int | None,
    epochs: int | None,
) -> None:
    for name, value in (
        ("batch_size", batch_size),
        ("sequence_length", sequence_length),
        ("world_size", world_size),
        ("window", window),
        ("epochs", epochs),
    ):
        if value is not None and value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} must be below world_size {world_size}")
    if not sources:
        raise UserError("there is nothing to train on; give at least one source")
    for source in sources:
        if len(source.store) == 0:
            raise UserError(f"{source.store.folder} holds no documents; build it from some text")
        if not (source.prompt_weight >= 0 and math.isfinite(source.prompt_weight)):
            raise UserError(
                f"prompt_weight {source.prompt_weight} must be a finite number from 0 up"
            )
    # Documents of one token have no target: an endless loader would look for a row forever.
    if all(source.store.num_tokens == len(source.store) for source in sources):
        raise UserError(
            "no document has more than one token, so there is nothing to predict; "
            f"check the text behind {sources[0].store.folder}"
        )


def _unique_names(sources: Sequence[Source]) -> list[str]:
    """Each source's name, with a number where it occurs again."""
    names: list[str] = []
    for source in sources:
        name = base = source.name or source.store.name
        number = 1
        while name in names:
            number += 1
            name = f"{base} ({number})"
        names.append(name)
    return names
