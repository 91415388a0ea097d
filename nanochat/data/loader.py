"""Resumable stream of batches that does not depend on the number of ranks.

B batch, T time (the sequence length; a row holds T + 1 tokens), W ranks

The documents of an epoch come in the order of `order.MixtureOrder`. They are cut into packing
windows, which this file calls windows: the documents of a window are packed into rows together
(`packing.pack_window`). The rows of all windows and epochs follow one another without a gap, and
each is a pure function of (seed, epoch, window, row). Of every `batch_size * world_size` rows, rank
r takes those at r, r + world_size, ... A position is therefore three integers, and a run may be
resumed with another batch size or number of ranks.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from nanochat.attention import document_boundaries, pad_boundaries, padded_documents
from nanochat.config import BaseConfig, MidConfig
from nanochat.data.order import MixtureOrder, make_key
from nanochat.data.packing import count_rows, pack_window
from nanochat.data.sources import Source
from nanochat.errors import UserError
from nanochat.paths import in_background
from nanochat.plan import Phase
from nanochat.runtime import Runtime
from nanochat.tokenizer import IGNORED, unpack_mask
from nanochat.train import Batch

# The last rows of a window stay partly empty; together that is about one row. With 256 rows or more
# per window, this is under half a percent of padding. 2^16 documents bound the time for packing.
_MIN_WINDOW, _MAX_WINDOW = 2**10, 2**16
_ROWS_PER_WINDOW = 256


@dataclass(frozen=True)
class _Position:
    """A place in the order of rows, with counts of what was read before it."""

    epoch: int = 0
    window: int = 0
    row: int = 0
    cuts: tuple[tuple[int, int], ...] = ()
    """Pairs (sequence length, rows read) of the lengths that this window was packed with before."""
    consumed: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    """Documents begun and targets read of each source, (sources, 2)."""


class _Window:
    """The packed rows of one window, and what they take from each source.

    sources, documents: source of each document of the window, and its number there. parts: (place
    in the window, start, stop) of each part of a document to pack; at first the whole documents.
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
        # The packer numbers the parts by their place in the list, and counts from their beginnings.
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
        """List [source, document, start, stop] of each piece of a row."""
        return self.pieces[self.offsets[row] : self.offsets[row + 1]].tolist()

    def rest(self, row: int) -> np.ndarray:
        """Return the parts in the rows from `row` on.

        Adjacent pieces of a document are joined; they overlap by one token.
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

    `next(loader)` gives the next micro-batch. Without `epochs` the stream never ends. With
    `epochs=E` the rows end after exactly E epochs. The last micro-batch is filled up with empty
    rows (targets -1), and every further `next` gives empty rows only, so that all ranks can
    complete a step of several micro-batches. `for batch in loader` stops at the end of the data, at
    the same micro-batch on every rank. `num_rows(E)` is the number of rows in E epochs.

    `window` is the number of documents per packing window; up to twice as many are taken, so that
    the windows of an epoch are equal. The default is 1,024, or more if the documents are so short
    that these would fill few rows.

    With `prefetch`, the default on CUDA, a thread makes the next micro-batch during training on the
    present one. Positions still refer to the micro-batches that were handed out.
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
        prefetch: bool | None = None,
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
        self._documents = 0
        """Length of a micro-batch's padded boundaries, in documents; it never shrinks."""
        self._prefetch = device.type == "cuda" if prefetch is None else prefetch
        self._ahead: Future[tuple[Batch, _Position]] | None = None
        for source in self.sources:
            source.store.verify_once(in_background=rank == 0)
        start = _Position(consumed=np.zeros((len(self.sources), 2), dtype=np.int64))
        self._at = self._settled(start)

    def _default_window(self) -> int:
        """Number of documents that fill 256 rows on average: a power of two, 1,024 to 65,536."""
        shares = [float(weight) for weight in self.order.weights]
        tokens = sum(
            share * s.store.num_tokens for share, s in zip(shares, self.sources, strict=True)
        )
        documents = sum(share * n for share, n in zip(shares, self.order.sizes, strict=True))
        needed = _ROWS_PER_WINDOW * (self.sequence_length + 1) * documents / tokens
        return int(min(_MAX_WINDOW, max(_MIN_WINDOW, 2 ** math.ceil(math.log2(needed)))))

    # The order of rows

    def _num_windows(self, epoch: int) -> int:
        """Number of equal windows of an epoch; a short one at its end would leave much padding."""
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

    def _rows_of(self, at: _Position) -> _Window:
        place = at.epoch, at.window, len(at.cuts)
        if self._packed is None or self._packed[:3] != place:
            sources, documents, lengths = self._located(at.epoch, at.window)
            key = make_key(self.seed, -2, at.epoch, at.window)
            numbers = np.arange(len(lengths))
            parts = np.stack([numbers, np.zeros_like(numbers), lengths], axis=1)

            def packed(sequence_length: int) -> _Window:
                capacity = sequence_length + 1
                return _Window(sources, documents, parts, capacity, key, len(self.sources))

            for number, (sequence_length, rows_read) in enumerate(at.cuts, start=1):
                parts = packed(sequence_length).rest(rows_read)
                key = make_key(self.seed, -2, at.epoch, at.window, number)
            self._packed = *place, packed(self.sequence_length)
        return self._packed[3]

    def _settled(self, at: _Position) -> _Position:
        """Move on to the next window while this one has no row left."""
        while not self._ends_at(at):
            if at.window >= self._num_windows(at.epoch):
                at = replace(at, epoch=at.epoch + 1, window=0)
            elif at.row >= len(self._rows_of(at)):
                at = replace(at, window=at.window + 1, row=0, cuts=())
            else:
                break
        return at

    def _ends_at(self, at: _Position) -> bool:
        return self.epochs is not None and at.epoch >= self.epochs

    @property
    def epoch(self) -> int:
        """Epoch of the next row, counted from 0."""
        return self._at.epoch

    @property
    def finished(self) -> bool:
        """True if `epochs` epochs have been read, so that only empty rows follow."""
        return self._ends_at(self._at)

    def num_rows(self, epochs: int) -> int:
        """Exact number of rows in the first `epochs` epochs, counted by packing lengths only."""
        return sum(self._count_epoch(epoch) for epoch in range(epochs))

    def _count_epoch(self, epoch: int) -> int:
        if epoch not in self._rows_of_epoch:
            self._rows_of_epoch[epoch] = sum(
                count_rows(self._located(epoch, window)[2], self.sequence_length + 1)
                for window in range(self._num_windows(epoch))
            )
        return self._rows_of_epoch[epoch]

    def set_rows(self, sequence_length: int, batch_size: int) -> None:
        """Change the length of the rows from here on, and their number in a micro-batch.

        The rest of the present window is packed anew: adjacent pieces of a document are joined and
        cut at the new length. An epoch therefore still has every target exactly once. Every rank
        must call this at the same position. Equal values change nothing.
        """
        _check(self.sources, batch_size, sequence_length, self.rank, self.world_size, None, None)
        self._drop_ahead()
        self.batch_size = batch_size
        if sequence_length == self.sequence_length:
            return
        at = self._at
        if at.row:
            at = replace(at, cuts=(*at.cuts, (self.sequence_length, at.row)), row=0)
        self.sequence_length = sequence_length
        self._packed, self._rows_of_epoch = None, {}
        self._at = self._settled(at)

    def resume(self, phase: Phase, state: dict[str, Any] | None) -> None:
        """Go to the position `state`, or to the beginning if None, with the rows of `phase`."""
        self.set_rows(phase.sequence_length, phase.device_batch_size)
        if state is not None:
            self.load_state_dict(state)

    # Batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches until `epochs` epochs are read, or without end."""
        while not self.finished:
            yield next(self)

    def __next__(self) -> Batch:
        """Return the next micro-batch of this rank; tensors (B, T) on the loader's device."""
        ahead, self._ahead = self._ahead, None
        batch, self._at = self._make(self._at) if ahead is None else ahead.result()
        if self._prefetch:
            # A run that ends or fails does not wait for a daemon.
            at = self._at
            self._ahead = in_background(lambda: self._make(at), "next batch", daemon=True)
        return batch.to(self.device)

    def _make(self, at: _Position, rows: int | None = None) -> tuple[Batch, _Position]:
        """Make the micro-batch at a position, in host memory; returns the position after it too."""
        mine, after = self._advance(at, rows)
        batch = self._gather(mine)
        return batch.pinned() if self.device.type == "cuda" else batch, after

    def _drop_ahead(self) -> None:
        """Discard the micro-batch that the thread made, since position or shape has changed."""
        if self._ahead is not None:
            self._ahead.exception()  # waits; an error of the thread is discarded too
            self._ahead = None

    def step_batches(self, rows: int, count: int) -> list[Batch]:
        """Return this rank's `count` micro-batches of a step with `rows` rows over all ranks.

        If the rows do not fill all micro-batches, the last ones get empty rows (targets -1). The
        steps are therefore the same for any number of ranks.
        """
        batches = []
        for _ in range(count):
            usual = self.batch_size * self.world_size
            if rows >= usual:
                batches.append(next(self))
            else:
                self._drop_ahead()
                batch, self._at = self._make(self._at, rows)
                batches.append(batch.to(self.device))
            rows -= min(rows, usual)
        return batches

    def peek(self) -> list[list[list[int]]]:
        """List the pieces of each row of the next micro-batch, without moving the position.

        A piece is [number of the source, document, start, stop].
        """
        self._drop_ahead()
        return self._advance(self._at)[0]

    def _advance(
        self, at: _Position, rows: int | None = None
    ) -> tuple[list[list[list[int]]], _Position]:
        """Return this rank's rows of the micro-batch at a position, and the position after it.

        Rows are lists of pieces. `rows` is the number of rows over all ranks, if it is less than a
        full micro-batch.
        """
        mine: list[list[list[int]]] = []
        needed = self.batch_size * self.world_size if rows is None else rows
        done = 0
        while done < needed and not self._ends_at(at):
            window = self._rows_of(at)
            stop = min(at.row + needed - done, len(window))
            first = at.row + (self.rank - done) % self.world_size
            mine += [window.row(row) for row in range(first, stop, self.world_size)]
            consumed = at.consumed + window.taken[stop] - window.taken[at.row]
            done += stop - at.row
            at = self._settled(replace(at, row=stop, consumed=consumed))
        return mine, at

    def _gather(self, rows: list[list[list[int]]]) -> Batch:
        """Read the tokens of `rows` and fill the batch up with empty rows."""
        shape = (self.batch_size, self.sequence_length + 1)
        tokens = np.zeros(shape, dtype=np.int64)
        documents = np.zeros(shape, dtype=np.int32)
        # Loss weight of each token as a target; 0 for the first token of a piece and for padding.
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
                    weights[b, begin + 1 : end][role == IGNORED] = 0
                    roles[b, begin + 1 : end] = role
            documents[b, end:] = len(pieces)
        self._check_ids(tokens, rows)
        weights = np.ascontiguousarray(weights[:, 1:])
        doc_ids = torch.from_numpy(np.ascontiguousarray(documents[:, :-1]))
        ends = document_boundaries(doc_ids)
        self._documents = max(self._documents, padded_documents(len(ends) - 1, doc_ids.numel()))
        return Batch(
            inputs=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
            targets=torch.from_numpy(np.where(weights > 0, tokens[:, 1:], -1)),
            weights=torch.from_numpy(weights),
            doc_ids=doc_ids,
            roles=torch.from_numpy(np.ascontiguousarray(roles[:, 1:])) if self.with_roles else None,
            boundaries=pad_boundaries(ends, self._documents),
        )

    def _check_ids(self, tokens: np.ndarray, rows: list[list[list[int]]]) -> None:
        """Raise UserError if an id is outside its store's vocabulary or the store is damaged."""
        for source in self.sources:
            source.store.check()
        if tokens.max(initial=0) < min(source.store.vocab_size for source in self.sources):
            return
        for s, document, start, stop in (piece for pieces in rows for piece in pieces):
            store = self.sources[s].store
            highest = int(store.ids(document, start, stop).max())
            if highest >= store.vocab_size:
                raise UserError(
                    f"{store.folder} has token id {highest} in document {document}, outside its "
                    f"vocabulary of {store.vocab_size}: it is damaged; delete it and build it again"
                )

    # Position

    @property
    def consumed(self) -> dict[str, dict[str, int]]:
        """Count what all ranks together have read of each source so far.

        `documents` counts documents begun, again in a second pass. `tokens` counts (input, target)
        pairs, also those with loss weight 0.
        """
        return {
            name: {"documents": int(documents), "tokens": int(tokens)}
            for name, (documents, tokens) in zip(self.names, self._at.consumed, strict=True)
        }

    def _identity(self) -> dict[str, Any]:
        """Settings that the meaning of a position depends on."""
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "window_size": self.window,
            "sources": [
                [len(source.store), source.store.num_tokens, str(weight)]
                for source, weight in zip(self.sources, self.order.weights, strict=True)
            ],
            "fingerprints": [source.store.identity for source in self.sources],
            "prompt_weights": [float(source.prompt_weight) for source in self.sources],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position for JSON; it is the same on all ranks, for any batch size."""
        return {
            "epoch": self._at.epoch,
            "window": self._at.window,
            "row": self._at.row,
            "cuts": [list(cut) for cut in self._at.cuts],
            "consumed": self._at.consumed.tolist(),
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; UserError if it was saved with other data or in another order."""
        # Older checkpoints lack some of these, and identify a store by what it was made from.
        former = [source.store.meta["fingerprint"] for source in self.sources]
        for key, here in self._identity().items():
            known = [here, former] if key == "fingerprints" else [here]
            if state.get(key, here) not in known:
                raise UserError(
                    f"the checkpoint's data position is for {key} = {state[key]}, this run has "
                    f"{here}; resume with the same data settings, or start a new run"
                )
        self._drop_ahead()
        at = _Position(
            state["epoch"],
            state["window"],
            state["row"],
            tuple((length, rows) for length, rows in state.get("cuts", [])),
            np.array(state["consumed"], dtype=np.int64),
        )
        self._at = self._settled(at)


def training_loader(
    sources: Sequence[Source],
    cfg: BaseConfig | MidConfig,
    sequence_length: int,
    runtime: Runtime,
) -> DataLoader:
    """Build the loader that a stage trains on; its batch size is set later, from the plan."""
    return DataLoader(
        sources,
        batch_size=1,
        sequence_length=sequence_length,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=cfg.run.seed,
        window=cfg.batching.window,
        epochs=cfg.duration.epochs if cfg.duration.counts_epochs else None,
        device=runtime.device,
    )


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
        if not _has_targets(source):
            raise UserError(
                f"{source.name or source.store.name} has nothing to train on: the assistant says "
                f"nothing in the rows of {sequence_length} tokens (or only with weight 0); add "
                "conversations, leave it out, choose a longer context, or train on every token "
                "with --prompt-weight 1"
            )
    # Documents of one token have no target, and an endless loader would look for a row forever.
    if all(source.store.num_targets == 0 for source in sources):
        raise UserError(
            "no document has more than one token, so there is nothing to predict; "
            f"check the text behind {sources[0].store.folder}"
        )


def _has_targets(source: Source) -> bool:
    """True if any token of the conversations is trained on; always True for text."""
    for document in range(len(source.store)):
        packed = source.store.mask_bytes(document, 1)
        if packed is None:
            return True
        mask, role = unpack_mask(packed)
        if mask.any() or (source.prompt_weight > 0 and (role != IGNORED).any()):
            return True
    return False


def _unique_names(sources: Sequence[Source]) -> list[str]:
    """List the sources' names, with a number added to a name that occurs again."""
    names: list[str] = []
    for source in sources:
        name = base = source.name or source.store.name
        number = 1
        while name in names:
            number += 1
            name = f"{base} ({number})"
        names.append(name)
    return names
