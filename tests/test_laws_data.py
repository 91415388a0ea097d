"""Laws of the data path: exact epochs, exact resume, batches that don't depend on the ranks."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_store, numbered_store

from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source
from nanochat.train import Batch

random_case = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 60), min_size=1, max_size=40).filter(
            lambda lengths: max(lengths) > 1
        ),
        "sequence_length": st.integers(1, 40),
        "batch_size": st.integers(1, 5),
        "world_size": st.integers(1, 4),
        "window": st.integers(1, 50),
        "seed": st.integers(-3, 2**63),
    }
)


@pytest.fixture
def mixture(tmp_path: Path) -> list[Source]:
    """Text, conversations at two passes an epoch, and a fraction of a third store."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 70, 30)
    masks = [rng.integers(0, 2, n).tolist() for n in lengths]
    chat = make_store(tmp_path / "chat", [range(n) for n in lengths], masks)
    return [
        Source(numbered_store(tmp_path / "text", rng.integers(1, 200, 50).tolist(), first=3000)),
        Source(chat, weight=2, prompt_weight=0.0),
        Source(numbered_store(tmp_path / "third", [9] * 10, first=20_000), weight="1/3"),
    ]


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("inputs", "targets", "weights", "doc_ids")
    )


def rows(batch: Batch) -> Iterator[tuple[Any, ...]]:
    """The rows of a batch as values that can be compared and counted."""
    tensors = (batch.inputs, batch.targets, batch.weights, batch.doc_ids)
    for row in zip(*tensors, strict=True):
        yield tuple(tuple(tensor.tolist()) for tensor in row)


# Law 6: an epoch's targets are every token but each document's first, exactly once.


@given(random_case)
@settings(max_examples=100, deadline=None, database=None)
def test_an_epoch_is_exact(case: dict[str, Any]) -> None:
    """For any lengths, T, ranks, batch size and window, over two epochs."""
    lengths, world_size = case.pop("lengths"), case.pop("world_size")
    with tempfile.TemporaryDirectory() as folder:
        source = Source(numbered_store(Path(folder) / "s", lengths))
        loaders = [
            DataLoader([source], **case, rank=rank, world_size=world_size, epochs=2)
            for rank in range(world_size)
        ]
        seen: Counter[int] = Counter()
        micro_batches = 0
        while not loaders[0].finished:
            micro_batches += 1
            for loader in loaders:
                batch = next(loader)
                valid = batch.targets >= 0
                # Every token is the number after the one before it in its document.
                assert (batch.targets[valid] == batch.inputs[valid] + 1).all()
                assert torch.equal(batch.weights, valid.float())
                seen.update(batch.targets[valid].tolist())
        assert all(loader.finished for loader in loaders)
        starts = 1 + np.cumsum([0, *lengths])[:-1]
        expected = set(range(1, 1 + sum(lengths))) - set(starts.tolist())
        assert seen == dict.fromkeys(expected, 2)
        per_step = case["batch_size"] * world_size
        assert micro_batches == -(-loaders[0].num_rows(2) // per_step)


def test_documents_never_run_into_each_other(mixture: list[Source]) -> None:
    """The position after a target belongs to the same document."""
    loader = DataLoader(mixture, batch_size=4, sequence_length=32, window=16, epochs=2)
    for batch in loader:
        boundary = batch.doc_ids[:, 1:] != batch.doc_ids[:, :-1]
        assert (batch.targets[:, :-1][boundary] == -1).all()
        steps = batch.doc_ids[:, 1:] - batch.doc_ids[:, :-1]
        assert ((steps == 0) | (steps == 1)).all()
        assert (batch.doc_ids[:, 0] == 0).all()
        assert ((batch.targets >= 0) == (batch.weights > 0)).all()


def test_a_document_longer_than_a_row_is_read_whole(tmp_path: Path) -> None:
    source = Source(numbered_store(tmp_path / "s", [1000]))
    loader = DataLoader([source], batch_size=3, sequence_length=16, epochs=1)
    targets = [t for batch in loader for t in batch.targets[batch.targets >= 0].tolist()]
    assert sorted(targets) == list(range(2, 1001))


# Law 4, the data's part: resumed = uninterrupted, bit for bit.


@pytest.mark.parametrize("epochs", [None, 3])
def test_resuming_anywhere_changes_nothing(mixture: list[Source], epochs: int | None) -> None:
    def loader() -> DataLoader:
        return DataLoader(
            mixture, batch_size=3, sequence_length=24, window=16, seed=5, epochs=epochs
        )

    uninterrupted = loader()
    states, batches, consumed = [], [], []
    for _ in range(uninterrupted.num_rows(3) // 3 + 3):
        states.append(uninterrupted.state_dict())
        consumed.append(uninterrupted.consumed)
        batches.append(next(uninterrupted))
    assert uninterrupted.finished == (epochs is not None)
    for start, state in enumerate(states):
        resumed = loader()
        resumed.load_state_dict(state)
        assert resumed.consumed == consumed[start]
        for batch in batches[start : start + 3]:
            assert same(next(resumed), batch)
        if start + 3 < len(states):
            assert resumed.state_dict() == states[start + 3]


@given(random_case, st.data())
@settings(max_examples=60, deadline=None, database=None)
def test_resuming_with_other_ranks_goes_on_at_the_same_row(
    case: dict[str, Any], data: st.DataObject
) -> None:
    """Saved by W ranks with one batch size, resumed by W' with another: no row lost or repeated."""
    lengths = case.pop("lengths")
    changed = {
        "batch_size": data.draw(st.integers(1, 5)),
        "world_size": data.draw(st.integers(1, 4)),
    }
    with tempfile.TemporaryDirectory() as folder:
        source = Source(numbered_store(Path(folder) / "s", lengths))
        expected = Counter(row for row in all_rows(source, case | {"batch_size": 1}, 1))
        half = data.draw(st.integers(0, sum(expected.values())))
        seen: Counter[Any] = Counter()
        state = None
        for settings_, limit in ((case, half), (case | changed, None)):
            world = settings_["world_size"]
            loaders = [DataLoader([source], **settings_, rank=r, epochs=1) for r in range(world)]
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(state)
            while not loaders[0].finished and (limit is None or sum(seen.values()) < limit):
                for loader in loaders:
                    seen.update(row for row in rows(next(loader)) if max(row[1]) >= 0)
            state = loaders[-1].state_dict()
            assert all(loader.state_dict() == state for loader in loaders)
        assert seen == expected


def all_rows(source: Source, case: dict[str, Any], epochs: int) -> Iterator[tuple[Any, ...]]:
    for batch in DataLoader([source], **(case | {"world_size": 1}), epochs=epochs):
        yield from rows(batch)


# Law 2, the data's part: the batches don't depend on the number of ranks.


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_the_rows_of_a_step(mixture: list[Source], world_size: int) -> None:
    """12 rows a step as W ranks x B rows x A micro-batches: the same rows, in rank-major order."""
    common: dict[str, Any] = {"sequence_length": 24, "window": 16, "seed": 5, "epochs": 2}
    reference = DataLoader(mixture, batch_size=12, **common)
    steps = [list(rows(batch)) for batch in reference]
    for batch_size in {1, 12 // world_size}:
        micro_batches = 12 // world_size // batch_size
        loaders = [
            DataLoader(mixture, batch_size=batch_size, rank=r, world_size=world_size, **common)
            for r in range(world_size)
        ]
        for step in steps:
            parts = [
                [row for _ in range(micro_batches) for row in rows(next(loader))]
                for loader in loaders
            ]
            for rank, part in enumerate(parts):
                assert part == step[rank::world_size]
        # The states agree wherever the micro-batches end with the step.
        assert all(loader.finished for loader in loaders)
        assert {str(loader.state_dict()) for loader in loaders} == {str(reference.state_dict())}


# Mixtures, through the loader.


def test_mixture_weights_are_exact(mixture: list[Source]) -> None:
    """Three epochs: text three times, chat six times, a third of the last store three times."""
    loader = DataLoader(mixture, batch_size=4, sequence_length=40, window=32, epochs=3)
    for _ in loader:
        pass
    for source, name, passes in zip(mixture, ("text", "chat", "third"), (3, 6, 1), strict=True):
        lengths = source.store.lengths(np.arange(len(source.store)))
        assert loader.consumed[name] == {
            "documents": passes * int((lengths > 1).sum()),
            "tokens": passes * int((lengths - 1).sum()),
        }


def test_epochs_differ_and_seeds_differ(mixture: list[Source]) -> None:
    def epoch(seed: int, number: int) -> list[Any]:
        loader = DataLoader(mixture[:1], batch_size=1, sequence_length=24, seed=seed)
        for _ in range(number * loader.num_rows(1)):
            next(loader)
        assert loader.epoch == number
        return [row for _ in range(20) for row in rows(next(loader))]

    orders = [epoch(0, 0), epoch(1, 0), epoch(-1, 0), epoch(0, 1)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 10
    assert epoch(0, 0) == orders[0]
