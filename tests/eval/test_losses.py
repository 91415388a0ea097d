"""Losses on held-out text: which rows are read, and how sure their mean is."""

import dataclasses
from pathlib import Path
from random import Random

import pytest
import torch
from stores import make_store
from tiny_models import tiny_model

from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source
from nanochat.data.store import TokenStore
from nanochat.eval.losses import evaluate_bpb, held_out_batches
from nanochat.runtime import single

T = 16


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    random = Random(0)
    documents = [
        [random.randrange(1, 300) for _ in range(random.randint(2, 50))] for _ in range(60)
    ]
    return make_store(tmp_path / "store", documents)


def rows_read(store: TokenStore, tokens: int, batch_size: int, world_size: int) -> list[list[int]]:
    """The targets of every row with any, over all ranks, sorted."""
    rows, counts = [], set()
    for rank in range(world_size):
        runtime = dataclasses.replace(single(), rank=rank, world_size=world_size)
        batches = list(
            held_out_batches(
                [Source(store)],
                tokens,
                sequence_length=T,
                batch_size=batch_size,
                runtime=runtime,
                with_roles=True,
            )
        )
        counts.add(len(batches))
        for batch in batches:
            assert batch.inputs.shape == (batch_size, T)
            assert batch.roles is not None
            assert (batch.weights == (batch.targets >= 0)).all()
            assert (batch.roles[(batch.targets < 0).all(1)] == -1).all()
            rows += [row for row in batch.targets.tolist() if max(row) >= 0]
    assert len(counts) == 1, "ranks that wait for each other take the same number of batches"
    return sorted(rows)


@pytest.mark.parametrize("tokens", [1, 16, 100, 320, 500, 10**6])
def test_rows_are_chosen_by_the_budget_alone(store: TokenStore, tokens: int) -> None:
    loader = DataLoader([Source(store)], batch_size=1, sequence_length=T, epochs=1)
    available = loader.num_rows(1)
    expected = rows_read(store, tokens, 1, 1)
    assert len(expected) == max(1, min(tokens // T, available))
    if tokens < 10**6:
        assert len(expected) < available
    for batch_size, world_size in ((4, 1), (7, 1), (64, 1), (1, 3), (4, 2), (5, 3)):
        assert rows_read(store, tokens, batch_size, world_size) == expected


def test_bits_per_byte_do_not_depend_on_the_batch_size(store: TokenStore) -> None:
    model, sizes = tiny_model(), torch.arange(400) % 5

    def measured(batch_size: int) -> dict[str, float]:
        batches = held_out_batches(
            [Source(store)], 200, sequence_length=T, batch_size=batch_size, runtime=single()
        )
        return evaluate_bpb(model, batches, sizes, single())

    expected = measured(1)
    assert expected["rows"] == 200 // T
    for batch_size in (5, 32):
        result = measured(batch_size)
        assert result["bpb"] == pytest.approx(expected["bpb"], rel=1e-6)
        assert result["ci"] == pytest.approx(expected["ci"], rel=1e-4)
        assert [result[key] for key in ("tokens", "bytes", "rows")] == [
            expected[key] for key in ("tokens", "bytes", "rows")
        ]


def test_the_interval_holds_the_whole_text_nine_times_in_ten(store: TokenStore) -> None:
    """Random halves of the rows, each with its interval, against all rows (none of one row)."""
    model, sizes = tiny_model(), 1 + torch.arange(400) % 5
    loader = DataLoader([Source(store)], batch_size=1, sequence_length=T, epochs=1)
    rows = list(loader)
    whole = evaluate_bpb(model, rows, sizes, single())["bpb"]
    random, hits = Random(0), 0
    for _ in range(40):
        result = evaluate_bpb(model, random.choices(rows, k=30), sizes, single())
        low, high = result["ci"]
        assert low < result["bpb"] < high
        hits += low <= whole <= high
    assert 32 <= hits <= 40  # 36 are expected, with a standard deviation of 2
    assert evaluate_bpb(model, rows[:1], sizes, single())["ci"] is None
