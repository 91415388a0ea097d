"""Keyed permutations, exact mixtures and best-fit packing."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.order import MixtureOrder, Permutation, make_key
from nanochat.data.packing import count_rows, pack_window
from nanochat.errors import UserError


def random_lengths(high: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, high, size)


# Permutations


@pytest.mark.parametrize("n", [*range(1, 300), 511, 512, 513, 4097])
def test_permutation_is_a_bijection(n: int) -> None:
    images = Permutation(n, key=n * 31).many(np.arange(n))
    assert sorted(images.tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1025, 10**9 + 7, 2**40 + 1])
def test_single_index_equals_vectorised(n: int) -> None:
    perm = Permutation(n, key=5)
    indices = np.unique(np.linspace(0, n - 1, 200, dtype=np.int64))
    images = perm.many(indices)
    assert images.tolist() == [perm[int(i)] for i in indices]
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(indices)


def test_permutation_refuses_indices_outside() -> None:
    perm = Permutation(10, key=0)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            perm[index]
        with pytest.raises(IndexError):
            perm.many(np.array([index]))
    assert Permutation(0, key=0).many(np.arange(0)).size == 0


@pytest.mark.parametrize("n", [2, 3, 5, 17, 100])
def test_every_place_is_equally_likely(n: int) -> None:
    """Chi-square over (index, image) pairs, over many keys."""
    expected = 200
    seen = np.zeros((n, n))
    for key in range(expected * n):
        seen[np.arange(n), Permutation(n, key).many(np.arange(n))] += 1
    chi_square = ((seen - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5


def test_permutation_looks_random() -> None:
    n = 20_000
    a, b = (Permutation(n, key).many(np.arange(n)) for key in (1, 2))
    for other in (np.arange(n), b, np.roll(a, 1), np.roll(a, 141), np.roll(a, 142)):
        assert abs(np.corrcoef(a, other)[0, 1]) < 5 / n**0.5
    assert (a == b).sum() < 10  # about 1 by chance


def test_keys_differ() -> None:
    parts = [(), (0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (1, -1), (-1, 1), (2**63,)]
    assert len({make_key(*part) for part in parts}) == len(parts)
    assert all(0 <= make_key(*part) < 2**64 for part in parts)


# Mixtures


def visits(order: MixtureOrder, epoch: int) -> Counter[tuple[int, int]]:
    sources, documents = order.locate_many(epoch, 0, order.epoch_length(epoch))
    return Counter(zip(sources.tolist(), documents.tolist(), strict=True))


@pytest.mark.parametrize("weights", [[1, 1], [1, 2], ["1/3", 0.1], [0.7, 2.5]])
def test_weight_is_the_exact_number_of_passes(weights: list[float | str]) -> None:
    """After k epochs a source of n documents was visited floor(k·w·n) times, evenly."""
    sizes = [20, 7]
    order = MixtureOrder(sizes, weights, seed=3)
    total: Counter[tuple[int, int]] = Counter()
    for epoch in range(30):
        total += visits(order, epoch)
        for source, size in enumerate(sizes):
            counts = [total[source, document] for document in range(size)]
            assert sum(counts) == int((epoch + 1) * Fraction(str(weights[source])) * size)
            assert max(counts) - min(counts) <= 1
    if weights == ["1/3", 0.1]:
        assert {total[0, i] for i in range(20)} == {10}  # 30 epochs of a third
        assert {total[1, i] for i in range(7)} == {3}


def test_decimal_weights_are_meant_as_written() -> None:
    # 0.1 + 0.1 + ... in floats would give 1.9999 documents after 20 epochs and lose one.
    order = MixtureOrder([1], [0.1])
    assert [order.epoch_length(e) for e in range(20)] == ([0] * 9 + [1]) * 2
    # In floats 0.29 * 100 is 28.999999999999996.
    assert MixtureOrder([100], [0.29]).epoch_length(0) == 29


def test_locate_is_one_place_of_locate_many() -> None:
    order = MixtureOrder([5, 1, 13], [2.5, "1/7", 1], seed=-4)
    for epoch in range(9):
        length = order.epoch_length(epoch)
        sources, documents = order.locate_many(epoch, 0, length)
        each = [order.locate(epoch, i) for i in range(length)]
        assert each == list(zip(sources.tolist(), documents.tolist(), strict=True))
        part = order.locate_many(epoch, 3, 9)
        assert part[0].tolist() == sources[3:9].tolist()
        assert part[1].tolist() == documents[3:9].tolist()


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return MixtureOrder([1000], [1], seed).locate_many(epoch, 0, 100)[1].tolist()

    orders = [first(0, 0), first(0, 1), first(1, 0), first(-1, 0), list(range(100))]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 10


def test_a_part_of_a_pass_is_a_random_part() -> None:
    """At weight 1/4 the documents of an epoch differ by pass and by seed."""

    def documents(seed: int, epoch: int) -> set[int]:
        order = MixtureOrder([400], ["1/4"], seed)
        return set(order.locate_many(epoch, 0, 100)[1].tolist())

    first_pass = [documents(0, epoch) for epoch in range(4)]
    assert set.union(*first_pass) == set(range(400))
    parts = [first_pass[0], documents(0, 4), documents(1, 0), set(range(100))]
    for i, a in enumerate(parts):
        for b in parts[:i]:
            assert 10 <= len(a & b) <= 40  # 25 by chance


def test_sources_are_mixed_within_an_epoch() -> None:
    sources, _ = MixtureOrder([1000, 1000], [1, 1], 0).locate_many(0, 0, 2000)
    shares = sources.reshape(20, 100).mean(axis=1)  # of source 1 in each twentieth of the epoch
    assert shares.min() > 0.25
    assert shares.max() < 0.75


def test_order_of_a_trillion_documents_needs_no_memory() -> None:
    order = MixtureOrder([10**12, 3], [1, 10**6], seed=1)
    sources, documents = order.locate_many(2, 10**12, 10**12 + 1000)
    assert documents[sources == 0].max() < 10**12
    assert order.locate(2, 10**12 + 7) == (sources[7], documents[7])


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "x", "1/0"])
def test_weights_that_make_no_sense_are_refused(weight: float | str) -> None:
    with pytest.raises(UserError, match="weight"):
        MixtureOrder([10], [weight])


def test_empty_mixtures_are_refused() -> None:
    with pytest.raises(UserError, match="source 1"):
        MixtureOrder([3, 0], [1, 1])
    with pytest.raises(UserError, match="0 sources"):
        MixtureOrder([], [])


# Packing


def slow_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """Free space of each row after best-fit decreasing, by looking at every row every time."""
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in range(len(free)) if free[row] >= size]
        if fitting:
            free[min(fitting, key=lambda row: free[row])] -= size
        else:
            free.append(capacity - size)
    return free


def cut(length: int, capacity: int) -> list[tuple[int, int]]:
    """The pieces of one document, one after the other."""
    pieces, start = [], 0
    while length - start > capacity:
        pieces.append((start, start + capacity))
        start += capacity - 1
    return [*pieces, (start, length)] if length > 1 else []


@given(
    st.lists(st.integers(0, 40), max_size=60),
    st.integers(2, 24),
    st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
@settings(max_examples=300, deadline=None, database=None)
def test_packing_against_its_slow_twin(lengths: list[int], capacity: int, key: int | None) -> None:
    rows = pack_window(lengths, capacity, key)
    pieces = [cut(length, capacity) for length in lengths]
    assert sorted(piece for row in rows for piece in row) == sorted(
        (document, start, stop) for document, spans in enumerate(pieces) for start, stop in spans
    )
    free = [capacity - sum(stop - start for _, start, stop in row) for row in rows]
    sizes = [stop - start for spans in pieces for start, stop in spans]
    assert sorted(free) == sorted(slow_best_fit(sizes, capacity))
    assert count_rows(lengths, capacity) == len(rows)


@given(st.integers(2, 5000), st.integers(2, 600))
@settings(max_examples=200, deadline=None, database=None)
def test_every_token_but_the_first_is_a_target_once(length: int, capacity: int) -> None:
    pieces = [piece for row in pack_window([length], capacity) for piece in row]
    targets = sorted(t for _, start, stop in pieces for t in range(start + 1, stop))
    assert targets == list(range(1, length))


def test_nothing_to_pack() -> None:
    for lengths in ([], [0], [1, 1, 0, 1]):
        assert len(pack_window(lengths, 8)) == 0
        assert len(pack_window(lengths, 8, key=1)) == 0
        assert count_rows(lengths, 8) == 0
    with pytest.raises(UserError, match="sequence length 0"):
        pack_window([3], 1)


def test_the_key_only_shuffles_the_rows() -> None:
    lengths = random_lengths(90, 500)
    plain, shuffled = (list(pack_window(lengths, 65, key)) for key in (None, 7))
    assert sorted(plain) == sorted(shuffled)
    assert sum(a == b for a, b in zip(plain, shuffled, strict=True)) < 12  # about 1 by chance
    # Unshuffled, long documents come first; the shuffle must undo that.
    first_lengths = [row[0][2] - row[0][1] for row in shuffled]
    correlation = np.corrcoef(np.arange(len(shuffled)), first_lengths)[0, 1]
    assert abs(correlation) < 4 / len(shuffled) ** 0.5


def test_little_space_stays_free() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 1024).astype(int) + 2
    rows = pack_window(lengths, 513)
    used = sum(stop - start for row in rows for _, start, stop in row)
    assert used / (len(rows) * 513) > 0.99
