"""Contents of a batch, end of the stream, and bad settings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from stores import make_store, numbered_store

from nanochat.attention import make_layout
from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source
from nanochat.errors import UserError
from nanochat.tokenizer import IGNORED
from nanochat.train import Batch

FIELDS = ("inputs", "targets", "weights", "doc_ids", "roles")
CPU = torch.device("cpu")


def one_row(source: Source, sequence_length: int) -> Batch:
    """The only row of a source whose documents fit into one."""
    loader = DataLoader([source], batch_size=1, sequence_length=sequence_length, with_roles=True)
    assert loader.num_rows(1) == 1
    return next(loader)


def test_a_row_by_hand(tmp_path: Path) -> None:
    """Two documents and padding; packing puts the longer one first."""
    store = make_store(tmp_path / "s", [[21, 22], [11, 12, 13]])
    batch = one_row(Source(store), sequence_length=6)
    assert batch.inputs.tolist() == [[11, 12, 13, 21, 22, 0]]
    assert batch.targets.tolist() == [[12, 13, -1, 22, -1, -1]]
    assert batch.weights.tolist() == [[1, 1, 0, 1, 0, 0]]
    assert batch.doc_ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert batch.roles is not None
    assert batch.roles.tolist() == [[-1] * 6]
    kinds = [torch.int64, torch.int64, torch.float32, torch.int32, torch.int8]
    for name, kind in zip(FIELDS, kinds, strict=True):
        tensor = getattr(batch, name)
        assert tensor.dtype == kind
        assert tensor.shape == (1, 6)
        assert tensor.is_contiguous()


def test_a_row_that_is_full_has_no_padding(tmp_path: Path) -> None:
    batch = one_row(Source(make_store(tmp_path / "s", [[1, 2, 3, 4, 5]])), sequence_length=4)
    assert batch.inputs.tolist() == [[1, 2, 3, 4]]
    assert batch.targets.tolist() == [[2, 3, 4, 5]]
    assert batch.doc_ids.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("prompt_weight", "targets", "weights"),
    [
        (0.0, [-1, 13, -1, 15, -1], [0, 1, 0, 1, 0]),
        (0.25, [12, 13, 14, 15, -1], [0.25, 1, 0.25, 1, 0]),
        (1.0, [12, 13, 14, 15, -1], [1, 1, 1, 1, 0]),
    ],
)
def test_prompt_weight_and_roles(
    tmp_path: Path, prompt_weight: float, targets: list[int], weights: list[float]
) -> None:
    mask, roles = np.array([0, 0, 1, 0, 1]), np.array([0, 2, 3, 2, 3])
    store = make_store(tmp_path / "s", [[11, 12, 13, 14, 15]], [list(mask | roles << 1)])
    batch = one_row(Source(store, prompt_weight=prompt_weight), sequence_length=5)
    assert batch.inputs.tolist() == [[11, 12, 13, 14, 15]]
    assert batch.targets.tolist() == [targets]
    assert batch.weights.tolist() == [weights]
    assert batch.roles is not None
    assert batch.roles.tolist() == [[2, 3, 2, 3, -1]]  # of the target, trained on or not


def test_each_source_has_its_own_prompt_weight(tmp_path: Path) -> None:
    plain = make_store(tmp_path / "plain", [[1, 2, 3]])
    chat = make_store(tmp_path / "chat", [[4, 5, 6]], [[0, 0, 1]])
    sources = [Source(plain, prompt_weight=0.0), Source(chat, prompt_weight=0.0)]
    batch = next(DataLoader(sources, batch_size=1, sequence_length=5))
    assert sorted(batch.targets[0].tolist()) == [-1, -1, 2, 3, 6]  # text without a mask counts


@pytest.mark.parametrize("prompt_weight", [0.0, 0.5, 1.0])
def test_ignored_messages_are_no_targets_in_any_stage(tmp_path: Path, prompt_weight: float) -> None:
    mask, roles = np.array([0, 0, 0, 0, 1]), np.array([0, IGNORED, IGNORED, 2, 3])
    store = make_store(tmp_path / "s", [[11, 12, 13, 14, 15]], [list(mask | roles << 1)])
    batch = one_row(Source(store, prompt_weight=prompt_weight), sequence_length=4)
    assert batch.weights.tolist() == [[0, 0, prompt_weight, 1]]
    assert batch.targets.tolist() == [[-1, -1, 14 if prompt_weight else -1, 15]]


def test_conversations_without_targets_are_refused(tmp_path: Path) -> None:
    asked = make_store(tmp_path / "asked", [[1, 2, 3]] * 3, [[0, 2 << 1, 2 << 1]] * 3)
    ignored = make_store(tmp_path / "ignored", [[1, 2]], [[0, IGNORED << 1]])
    for source in (Source(asked, prompt_weight=0, name="asked"), Source(ignored, name="ignored")):
        with pytest.raises(UserError, match=rf"{source.name} has nothing to train on: the assist"):
            DataLoader([source], batch_size=1, sequence_length=5)
    DataLoader([Source(asked, prompt_weight=0.1)], batch_size=1, sequence_length=5)


def test_roles_only_on_request(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [[1, 2, 3]])
    assert next(DataLoader([Source(store)], batch_size=1, sequence_length=2)).roles is None


def test_to_keeps_every_field(tmp_path: Path) -> None:
    batch = one_row(Source(make_store(tmp_path / "s", [[1, 2, 3]])), sequence_length=4)
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    for name in (*FIELDS, "boundaries"):
        assert getattr(moved, name).device.type == "meta"


def test_the_end_is_filled_with_empty_rows(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "s", [5] * 7)
    loader = DataLoader([Source(store)], batch_size=2, sequence_length=4, epochs=1)
    assert loader.num_rows(1) == 7
    batches = list(loader)
    assert len(batches) == 4
    assert (batches[-1].targets[0] > 0).all()
    for empty in (batches[-1].targets[1:], next(loader).targets, next(loader).targets):
        assert (empty == -1).all()
    after = next(loader)
    assert (after.inputs == 0).all()
    assert (after.weights == 0).all()
    assert (after.doc_ids == 0).all()
    assert loader.finished
    assert list(loader) == []
    assert loader.consumed == {"s": {"documents": 7, "tokens": 28}}


def test_rows_go_on_into_the_next_epoch(tmp_path: Path) -> None:
    """Three rows an epoch in batches of two: the second batch has one row of either epoch."""
    store = numbered_store(tmp_path / "s", [5] * 3)
    loader = DataLoader([Source(store)], batch_size=2, sequence_length=4, epochs=2)
    rows = torch.cat([batch.inputs[:, 0] for batch in loader]).tolist()
    assert sorted(rows[:3]) == sorted(rows[3:]) == [1, 6, 11]
    endless = DataLoader([Source(store)], batch_size=2, sequence_length=4)
    assert torch.cat([next(endless).inputs[:, 0] for _ in range(30)]).tolist()[:6] == rows
    assert endless.epoch == 20
    assert not endless.finished


def test_windows_and_epochs_without_a_row_are_passed_over(tmp_path: Path) -> None:
    # One document in twenty has a target, and windows are of three documents.
    store = numbered_store(tmp_path / "s", ([1] * 19 + [3]) * 2)
    loader = DataLoader([Source(store)], batch_size=1, sequence_length=2, window=3, epochs=3)
    assert loader.num_rows(3) == 6
    assert sum(1 for _ in loader) == 6  # no empty batch at the end
    # A weight of 0.1 gives this source one document in every tenth epoch.
    loader = DataLoader(
        [Source(numbered_store(tmp_path / "t", [3]), weight=0.1)],
        batch_size=1,
        sequence_length=2,
        epochs=20,
    )
    assert loader.num_rows(20) == 2
    assert sum(1 for _ in loader) == 2


def test_no_rows_in_the_epochs_asked_for(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "s", [3])
    loader = DataLoader([Source(store, weight=0.1)], batch_size=1, sequence_length=2, epochs=1)
    assert loader.num_rows(1) == 0
    assert loader.finished
    assert list(loader) == []


def test_short_documents_get_larger_windows(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(10, 40, 20_000)
    store = make_store(tmp_path / "s", [[1] * n for n in lengths])
    loader = DataLoader([Source(store)], batch_size=8, sequence_length=1024, epochs=1)
    assert loader.window == 16_384
    padding = 1 - store.num_tokens / (loader.num_rows(1) * 1025)
    assert padding < 0.01
    assert DataLoader([Source(store)], batch_size=8, sequence_length=32).window == 1024


def test_peek_tells_what_comes_next(tmp_path: Path) -> None:
    sources = [
        Source(numbered_store(tmp_path / "a", [9, 4, 30])),
        Source(numbered_store(tmp_path / "b", [7, 12], first=500)),
    ]
    for rank in range(2):
        loader = DataLoader(
            sources, batch_size=2, sequence_length=10, rank=rank, world_size=2, epochs=2
        )
        while not loader.finished:
            state, rows = loader.state_dict(), loader.peek()
            assert loader.state_dict() == state
            batch = next(loader)
            for b, pieces in enumerate(rows):
                ids = [sources[s].store.ids(*span) for s, *span in pieces]
                expected = np.concatenate(ids)[:10]
                assert batch.inputs[b, : len(expected)].tolist() == expected.tolist()
                assert (batch.inputs[b, len(expected) :] == 0).all()
        assert loader.peek() == []


def test_consumed_counts_what_all_ranks_read(tmp_path: Path) -> None:
    a = numbered_store(tmp_path / "a", [3] * 40)
    b = numbered_store(tmp_path / "b", [30] * 5, first=1000)
    sources = [Source(a, name="text"), Source(b, weight=2), Source(b, weight=1)]
    loaders = [
        DataLoader(
            sources, batch_size=2, sequence_length=16, rank=rank, world_size=3, window=8, epochs=2
        )
        for rank in range(3)
    ]
    targets = torch.zeros(2, dtype=torch.int64)
    while not loaders[0].finished:
        for batch in [next(loader) for loader in loaders]:
            targets[0] += ((batch.targets > 0) & (batch.targets < 1000)).sum()
            targets[1] += (batch.targets >= 1000).sum()
        consumed = loaders[0].consumed
        assert all(loader.consumed == consumed for loader in loaders)
        assert consumed["text"]["tokens"] == targets[0]
        assert consumed["b"]["tokens"] + consumed["b (2)"]["tokens"] == targets[1]
    assert consumed == {
        "text": {"documents": 80, "tokens": 160},
        "b": {"documents": 20, "tokens": 580},
        "b (2)": {"documents": 10, "tokens": 290},
    }


def test_a_position_over_other_data_is_refused(tmp_path: Path) -> None:
    a, b = numbered_store(tmp_path / "a", [3] * 9), numbered_store(tmp_path / "b", [3] * 10)

    def loader(store: object = a, **changes: object) -> DataLoader:
        settings = {"batch_size": 1, "sequence_length": 2, "seed": 1, "window": 4}
        weight, prompts = changes.pop("weight", 1.0), changes.pop("prompt_weight", 1.0)
        source = Source(store, weight, prompts)  # type: ignore[arg-type]
        return DataLoader([source], **(settings | changes))  # type: ignore[arg-type]

    state = loader().state_dict()
    loader(batch_size=3, world_size=2, epochs=5, weight="1").load_state_dict(state)
    same_content = numbered_store(tmp_path / "same", [3] * 9)
    same_content.meta["fingerprint"] = "a corpus that was touched"
    loader(store=same_content).load_state_dict(state)
    loader().load_state_dict({**state, "fingerprints": [a.meta["fingerprint"]]})  # as once saved
    same_shape = numbered_store(tmp_path / "c", [3] * 9, first=2)
    fingerprint = a.identity
    same_shape.meta["fingerprint"] = "other text"
    older = {k: v for k, v in state.items() if k not in ("fingerprints", "prompt_weights")}
    loader(store=same_shape).load_state_dict(older)
    for other, message in (
        (
            loader(store=same_shape),
            rf"fingerprints = \['{fingerprint}'\].* \['{same_shape.identity}'\]",
        ),
        (loader(prompt_weight=0.5), r"prompt_weights = \[1.0\], this run has \[0.5\]"),
        (loader(seed=2), "seed = 1, this run has 2"),
        (loader(sequence_length=3), "sequence_length"),
        (loader(window=5), "window_size"),
        (loader(weight=2.0), "sources"),
        (loader(store=b), "sources"),
    ):
        with pytest.raises(UserError, match=message):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"sequence_length": 0}, "sequence_length 0"),
        ({"epochs": 0}, "epochs 0"),
        ({"window": 0}, "window 0"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"rank": -1}, "rank -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    source = Source(make_store(tmp_path / "s", [[1, 2]]))
    with pytest.raises(UserError, match=message):
        DataLoader([source], **({"batch_size": 1, "sequence_length": 2} | changes))  # type: ignore[arg-type]


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    good = make_store(tmp_path / "good", [[1, 2]])
    for sources, message in (
        ([], "at least one source"),
        ([Source(good), Source(make_store(tmp_path / "empty", []))], "empty holds no documents"),
        ([Source(make_store(tmp_path / "single", [[1], [2]]))], "nothing to predict"),
        ([Source(good, weight=0)], "weight 0"),
        ([Source(good, prompt_weight=-1)], "prompt_weight -1"),
    ):
        with pytest.raises(UserError, match=message):
            DataLoader(sources, batch_size=1, sequence_length=2)


# Documents as boundaries


def test_boundaries_are_those_of_the_documents(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "s", [5, 9, 3, 17, 2, 30] * 20)
    loader = DataLoader([Source(store)], batch_size=4, sequence_length=32)
    for _ in range(5):
        batch = next(loader)
        assert batch.boundaries is not None
        found = make_layout(batch.doc_ids, (4, 32), (0,), "varlen", CPU).boundaries
        assert found is not None
        assert batch.boundaries.tolist() == found.tolist()
        given = make_layout(None, (4, 32), (0,), "varlen", CPU, batch.boundaries).boundaries
        assert given is batch.boundaries


def test_boundaries_of_web_text_have_one_small_shape_that_never_shrinks(tmp_path: Path) -> None:
    store = make_store(tmp_path / "web", [[7] * 700] * 400)
    loader = DataLoader([Source(store)], batch_size=32, sequence_length=2048)
    shapes = {len(b.boundaries) for _ in range(3) if (b := next(loader)).boundaries is not None}
    assert shapes == {129}, "90 documents in 65,536 tokens"
    short = numbered_store(tmp_path / "s", [2] * 600 + [30] * 300)
    loader = DataLoader([Source(short)], batch_size=16, sequence_length=32, window=8)
    sizes = [len(b.boundaries) for _ in range(60) if (b := next(loader)).boundaries is not None]
    assert sizes == sorted(sizes)
    assert {size - 1 for size in sizes} <= {64, 128, 256, 512}


# The thread that makes the next micro-batch


def fields_of(batch: Batch) -> list[object]:
    return [getattr(batch, name).tolist() for name in ("inputs", "targets", "weights", "doc_ids")]


def test_prefetching_changes_neither_batches_nor_positions(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "s", [5, 9, 3, 17, 2, 30] * 10)
    plain, ahead = (
        DataLoader([Source(store)], batch_size=2, sequence_length=8, prefetch=prefetch, window=16)
        for prefetch in (False, True)
    )
    states = []
    for step in range(40):
        if step in (11, 25):
            for loader in (plain, ahead):
                loader.set_rows(8 if step == 25 else 16, 2)
        assert ahead.state_dict() == plain.state_dict()
        assert ahead.consumed == plain.consumed
        states.append(ahead.state_dict())
        if step % 7 == 0:
            assert ahead.peek() == plain.peek()
        assert fields_of(next(ahead)) == fields_of(next(plain))
    for loader in (plain, ahead):
        loader.load_state_dict(states[30])
    assert fields_of(next(ahead)) == fields_of(next(plain))


def test_prefetching_ends_with_the_data(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "s", [5] * 23)
    counts = [
        sum(
            1
            for _ in DataLoader(
                [Source(store)], batch_size=2, sequence_length=8, epochs=2, prefetch=prefetch
            )
        )
        for prefetch in (False, True)
    ]
    assert counts[0] == counts[1] > 2


def test_a_failure_while_prefetching_is_raised_where_the_batch_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = numbered_store(tmp_path / "s", [5] * 23)
    loader = DataLoader([Source(store)], batch_size=2, sequence_length=8, prefetch=True)
    next(loader)
    loader.peek()  # nothing is under way now

    def fail(*arguments: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(type(store), "ids", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader)
