"""The key/value cache: rows are independent, copies are copies, padding is harmless."""

import pytest
import torch

from nanochat.kv_cache import KVCache


def cache_of(rows: int, capacity: int) -> KVCache:
    return KVCache(2, 3, 4, rows, capacity, dtype=torch.float32, device=torch.device("cpu"))


def slots_of(cache: KVCache, T: int) -> torch.Tensor:
    counts = torch.full((cache.batch_size,), T)  # rows without room get padding
    return cache.read(T, counts, set(), torch.float32).slots


def filled(rows: int, capacity: int, lengths: list[int], seed: int = 0) -> KVCache:
    cache = cache_of(rows, capacity)
    generator = torch.Generator().manual_seed(seed)
    T = max(lengths)
    slots = slots_of(cache, T)
    for layer in range(2):
        k = torch.randn(rows, T, 3, 4, generator=generator)
        v = torch.randn(rows, T, 3, 4, generator=generator)
        cache.append(layer, slots, k, v)
    ids = torch.arange(rows * T).view(rows, T)
    cache.advance(ids, torch.tensor(lengths))
    return cache


def content(cache: KVCache, row: int) -> torch.Tensor:
    length = int(cache.lengths[row])
    return torch.stack([t[row, :, :length] for t in (*cache.keys, *cache.values)])


def test_append_writes_each_row_at_its_own_place() -> None:
    cache = filled(2, 10, [3, 5])
    before = [content(cache, row) for row in range(2)]
    k, v = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    keys, values = cache.append(1, slots_of(cache, 2), k, v)
    for row, start in enumerate((3, 5)):
        assert torch.equal(keys[row, :, start : start + 2], k[row].transpose(0, 1))
        assert torch.equal(values[row, :, start : start + 2], v[row].transpose(0, 1))
        assert torch.equal(content(cache, row), before[row])
    cache.advance(torch.zeros(2, 2, dtype=torch.int64), None)
    assert cache.lengths.tolist() == [5, 7]


def test_rows_of_one_length_are_written_as_a_column() -> None:
    cache = filled(2, 10, [3, 3])
    assert cache.read(1, None, set(), torch.float32).column is None  # known only by its bounds
    cache.shortest = cache.longest = 3
    reading = cache.read(1, None, set(), torch.float32)
    assert reading.column == 3
    k, v = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    keys, values = cache.append(0, reading.slots, k, v)
    assert torch.equal(keys[:, :, reading.column], k[:, 0])
    assert torch.equal(values[:, :, reading.column], v[:, 0])
    assert cache.read(2, None, set(), torch.float32).column is None
    counts = torch.tensor([1, 0])
    assert cache.read(1, counts, set(), torch.float32).column is None


def test_bounds_hold() -> None:
    cache = cache_of(3, 10)
    for T, counts in ((4, [4, 1, 0]), (1, None), (3, [0, 3, 3]), (2, None)):
        cache.advance(
            torch.zeros(len(cache.lengths), T, dtype=torch.int64),
            None if counts is None else torch.tensor(counts),
        )
        assert cache.shortest <= min(cache.lengths.tolist())
        assert cache.longest >= max(cache.lengths.tolist())
    assert cache.longest <= cache.capacity
    cache.reset(torch.tensor([1]))
    assert cache.lengths.tolist() == [7, 0, 6]
    assert cache.shortest == 0


def test_the_spare_slot_takes_the_padding() -> None:
    """Every capacity has a slot for it, so that full rows keep their last token."""
    for capacity in range(1, 20):
        cache = filled(1, capacity, [capacity])
        assert cache.keys[0].shape[2] > capacity
        before = content(cache, 0)
        padding = torch.full((1, 2, 3, 4), 9.0)
        cache.append(0, slots_of(cache, 2), padding, padding)
        assert torch.equal(content(cache, 0), before)


def test_copy_rows_between_caches_and_within_one() -> None:
    source, target = filled(3, 6, [2, 6, 4], seed=1), filled(4, 9, [9, 9, 9, 9], seed=2)
    untouched = content(target, 1)
    target.copy_rows(source, [2, 0, 2], [0, 2, 3], 4)
    assert target.lengths.tolist() == [4, 9, 2, 4]
    assert torch.equal(content(target, 0), content(source, 2))
    assert torch.equal(content(target, 2), content(source, 0))
    assert torch.equal(content(target, 3), content(source, 2))
    assert torch.equal(content(target, 1), untouched)
    sources = source.last_ids
    assert target.last_ids.tolist() == [sources[2], target.last_ids[1], sources[0], sources[2]]
    target.copy_rows(target, [1, 2], [0, 1], 9)  # a chain: row 1 is source and target
    assert torch.equal(content(target, 0), untouched)
    assert torch.equal(content(target, 1), content(source, 0))
    target.keys[0].zero_()
    assert source.keys[0].any()  # nothing is shared
    with pytest.raises(ValueError, match="do not fit"):
        source.copy_rows(target, [0], [0], 7)


def test_load_takes_over_what_fits() -> None:
    cache = filled(3, 10, [2, 10, 4])
    larger = filled(5, 30, [1, 2, 3, 4, 5])
    larger.load(cache)
    assert larger.lengths.tolist() == [2, 10, 4, 0, 0]
    assert larger.last_ids.tolist() == [*cache.last_ids, -1, -1]
    larger.reset(torch.tensor([1]))
    assert larger.last_ids.tolist()[:3] == [1, -1, 23]
    larger.load(cache)
    for row in range(3):
        assert torch.equal(content(larger, row), content(cache, row))
    smaller = cache_of(1, 4)
    smaller.load(cache)
    assert smaller.lengths.tolist() == [2]
    assert torch.equal(content(smaller, 0), content(cache, 0))
    assert larger.nbytes > cache.nbytes > smaller.nbytes


def test_head_shares_memory() -> None:
    cache = filled(3, 10, [2, 5, 4])
    view = cache.head(2)
    view.append(0, slots_of(view, 1), torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    view.advance(torch.zeros(len(view.lengths), 1, dtype=torch.int64), None)
    assert cache.lengths.tolist() == [3, 6, 4]
    assert cache.last_ids.tolist() == [0, 0, 13]  # of filled: rows of 5 ids, row 2 has 4 of them
    assert (cache.keys[0][1, :, 5] == 1).all()
    assert view.batch_size == 2
