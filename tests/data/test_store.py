"""Stores are written whole or not at all, and never opened torn or with another tokenizer."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import Echo, make_store

from nanochat import paths
from nanochat.data import conversations
from nanochat.data import store as stores_module
from nanochat.data.conversations import conversations_store, fit_conversations
from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source
from nanochat.data.store import TokenStore, merge_stores
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer

DOCUMENTS = [[1, 2, 3], [9], [4, 5, 6, 7, 8]]
MASKS = [[0, 1, 1], [0], [0, 0, 1, 0, 1]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer([bytes([i]) for i in range(256)])


@pytest.fixture(autouse=True)
def _base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


def read(store: TokenStore) -> list[list[int]]:
    return [store.ids(i).tolist() for i in range(len(store))]


def mask_of(store: TokenStore, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    mask = store.mask(index, start, stop)
    assert mask is not None
    return mask


def bytes_of(store: TokenStore, index: int) -> np.ndarray:
    packed = store.mask_bytes(index)
    assert packed is not None
    return packed


def differing(one: TokenStore, two: TokenStore) -> set[str]:
    assert one.meta.keys() == two.meta.keys()
    return {key for key in one.meta if one.meta[key] != two.meta[key]}


def rewrite(folder: Path, **changes: Any) -> None:
    """Change meta.json as a writer would, with its digest; None removes a value."""
    meta = json.loads((folder / "meta.json").read_text()) | changes
    meta = {key: value for key, value in meta.items() if value is not None}
    if "digest" not in changes:
        meta["digest"] = paths.meta_digest(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(2**16, 2), (2**16 + 1, 4)])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    documents = [*DOCUMENTS, [vocab_size - 1, 0]]
    store = make_store(tmp_path / "s", documents, vocab_size=vocab_size)
    assert read(store) == documents
    assert (len(store), store.num_tokens, store.name) == (4, 11, "s")
    assert (store.folder / "tokens.bin").stat().st_size == 11 * itemsize
    assert store.lengths(np.array([2, 0, 0])).tolist() == [5, 3, 3]
    assert store.ids(2, 1, 3).tolist() == [5, 6]
    assert store.ids(0, 1).tolist() == [2, 3]
    assert store.ids(0, 2, 99).tolist() == [3]  # never into the next document
    assert not store.has_mask
    assert store.mask(0) is None
    assert store.mask_bytes(0) is None
    with pytest.raises(IndexError):
        store.ids(4)
    with pytest.raises(ValueError, match="read-only"):
        store.ids(0)[0] = 5


def test_mask_is_bit_0_of_its_bytes(tmp_path: Path) -> None:
    packed = [[m | role << 1 for role, m in enumerate(mask)] for mask in MASKS]
    store = make_store(tmp_path / "s", DOCUMENTS, packed)
    assert store.has_mask
    for i, mask in enumerate(MASKS):
        assert mask_of(store, i).tolist() == mask
        assert bytes_of(store, i).tolist() == packed[i]
    assert mask_of(store, 2, 2, 4).tolist() == [1, 0]


@pytest.mark.parametrize("ids", [[1, 10], [-1]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(UserError, match=r"outside the vocabulary of 10"):
        make_store(tmp_path / "s", [[1], ids], vocab_size=10)
    assert folders(tmp_path) == []


def test_wrong_use_of_the_writer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        make_store(tmp_path / "s", [[]])
    with pytest.raises(ValueError, match="mask bytes"):
        make_store(tmp_path / "s", [[1, 2]], [[1]])
    with pytest.raises(ValueError, match="with_mask"):
        make_store(tmp_path / "s", [[1, 2]], [None])  # type: ignore[list-item]


def test_a_failed_write_leaves_the_old_store(tmp_path: Path) -> None:
    make_store(tmp_path / "s", DOCUMENTS)

    def documents() -> Iterator[list[int]]:
        yield [1]
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        make_store(tmp_path / "s", documents())
    assert folders(tmp_path) == ["s"]
    assert read(TokenStore.open(tmp_path / "s")) == DOCUMENTS


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "offsets.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "grown", "missing"])
def test_a_torn_store_is_refused_by_file_name(tmp_path: Path, name: str, damage: str) -> None:
    folder = make_store(tmp_path / "s", DOCUMENTS, MASKS).folder
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(content[:-1] if damage == "truncated" else content + b"x\x00")
    if (name, damage) == ("meta.json", "truncated"):  # its last byte is only a newline
        (folder / name).write_bytes(content[: len(content) // 2])
    if (name, damage) == ("offsets.npy", "grown"):  # the array is intact, what follows is ignored
        assert len(TokenStore.open(folder)) == 3
        return
    with pytest.raises(UserError, match=name):
        TokenStore.open(folder)
    assert TokenStore.open_if_current(folder, "hash", "print") is None


def test_offsets_of_another_store_are_refused(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "s", DOCUMENTS).folder
    np.save(folder / "offsets.npy", np.array([0, 3, 4, 8]))
    with pytest.raises(UserError, match=r"offsets.npy ends at token 8, meta.json promises 9"):
        TokenStore.open(folder)


def test_other_formats_and_edited_meta_are_refused(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "s", DOCUMENTS).folder
    meta = json.loads((folder / "meta.json").read_text())
    for change, message in (
        ({"version": 99}, "format 99"),
        ({"dtype": "float8"}, "float8"),
        ({"num_tokens": "9"}, "lacks"),
    ):
        (folder / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(UserError, match=message):
            TokenStore.open(folder)


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "offsets.npy", "meta.json"])
def test_a_flipped_bit_is_found_before_the_first_batch(tmp_path: Path, name: str) -> None:
    size = (make_store(tmp_path / "s", DOCUMENTS, MASKS).folder / name).stat().st_size
    for position in range(0, size - 1, max(1, size // 12)):
        folder = make_store(tmp_path / "s", DOCUMENTS, MASKS).folder
        DataLoader([Source(TokenStore.open(folder))], batch_size=1, sequence_length=4)
        flip(folder / name, position)
        with pytest.raises(UserError, match=rf"{name}.*delete .*build it again") as error:
            DataLoader([Source(TokenStore.open(folder))], batch_size=1, sequence_length=4)
        assert "\n" not in str(error.value)


def test_contents_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_store(tmp_path / "s", DOCUMENTS).folder
    verified = []
    original = TokenStore.verify
    monkeypatch.setattr(TokenStore, "verify", lambda s: (verified.append(s.name), original(s)))
    for _ in range(2):
        TokenStore.open(folder).verify_once()
        stores_module._verifications.clear()  # as another process does
    assert verified == ["s"]
    content = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").unlink()
    (folder / "tokens.bin").write_bytes(content)
    TokenStore.open(folder).verify_once()
    assert verified == ["s", "s"]


def test_large_stores_are_verified_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores_module, "_AT_ONCE", 0)
    folder = make_store(tmp_path / "s", DOCUMENTS).folder
    flip(folder / "tokens.bin", 0)
    loader = DataLoader([Source(TokenStore.open(folder))], batch_size=1, sequence_length=4)
    for thread in threading.enumerate():
        if thread.name == "verify s":
            thread.join()
    with pytest.raises(UserError, match=r"tokens.bin is damaged"):
        next(loader)


def test_ids_are_checked_whenever_they_are_read(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "s", [[1, 2], [3, 9, 4]], vocab_size=10).folder
    loader = DataLoader([Source(TokenStore.open(folder))], batch_size=2, sequence_length=4)
    flip(folder / "tokens.bin", 6)  # 9 -> 13
    with pytest.raises(UserError, match=r"token id 13 in document 1, outside its vocabulary of 10"):
        next(loader)


def test_offsets_rise(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "s", DOCUMENTS).folder
    np.save(folder / "offsets.npy", np.array([0, 2**40, 4, 9]))
    with pytest.raises(UserError, match=r"offsets.npy gives document 1 no tokens"):
        TokenStore.open(folder)


def test_a_store_knows_its_name(tmp_path: Path) -> None:
    make_store(tmp_path / "text-val", DOCUMENTS).folder.rename(tmp_path / "text-train")
    with pytest.raises(UserError, match=r"text-train holds the store text-val"):
        TokenStore.open(tmp_path / "text-train")
    (tmp_path / "moved").mkdir()
    (tmp_path / "text-train").rename(tmp_path / "moved" / "text-val")
    assert read(TokenStore.open(tmp_path / "moved" / "text-val")) == DOCUMENTS


def test_damage_is_not_merged(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "part", DOCUMENTS).folder
    flip(folder / "tokens.bin", 0)
    with pytest.raises(UserError, match=r"part/tokens.bin is damaged"):
        merge_stores(
            tmp_path / "whole", [folder], vocab_size=9, tokenizer_hash="hash", fingerprint="print"
        )
    assert folders(tmp_path) == ["part"]


def test_stores_of_earlier_versions_load(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "s", DOCUMENTS, MASKS).folder
    rewrite(folder, name=None, vocab_size=None, files=None, digest=None)
    store = TokenStore.open(folder)
    store.verify_once()
    assert (read(store), store.identity, store.vocab_size) == (DOCUMENTS, "print", 2**16)
    assert store.num_targets == 6
    next(DataLoader([Source(store)], batch_size=1, sequence_length=4))


def test_another_tokenizer_or_source_is_not_current(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "s", DOCUMENTS).folder
    with pytest.raises(UserError, match="tokenizer"):
        TokenStore.open(folder, "other")
    assert TokenStore.open_if_current(folder, "other", "print") is None
    assert TokenStore.open_if_current(folder, "hash", "other") is None
    assert TokenStore.open_if_current(folder, "hash", "print") is not None


def test_merging_puts_slices_end_to_end(tmp_path: Path) -> None:
    for i, part in enumerate((slice(0, 1), slice(1, 1), slice(1, 3))):  # the middle one is empty
        make_store(tmp_path / f"part{i}", DOCUMENTS[part], MASKS[part])
    parts = [tmp_path / f"part{i}" for i in range(3)]
    settings: dict[str, Any] = {
        "vocab_size": 2**16,
        "tokenizer_hash": "hash",
        "fingerprint": "print",
    }
    merged = merge_stores(tmp_path / "merged", parts, **settings)
    whole = make_store(tmp_path / "whole", DOCUMENTS, MASKS)
    for name in ("tokens.bin", "mask.bin", "offsets.npy"):
        assert (merged.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert merged.identity == whole.identity
    assert differing(merged, whole) == {"name", "digest"}

    make_store(tmp_path / "plain", DOCUMENTS)
    with pytest.raises(UserError, match="does not fit"):
        merge_stores(tmp_path / "merged", [*parts, tmp_path / "plain"], **settings)
    with pytest.raises(UserError, match="no slices"):
        merge_stores(tmp_path / "merged", [], **settings)


# Conversations


def test_conversations_are_stored_as_they_are_rendered(tokenizer: Tokenizer) -> None:
    task = Echo(12)
    store = conversations_store(task, tokenizer)
    assert store.name.startswith("echo-train-")
    for i in range(12):
        ids, mask, roles = tokenizer.render_roles(task[i])
        assert store.ids(i).tolist() == ids
        assert mask_of(store, i).tolist() == mask
        assert (bytes_of(store, i) >> 1).tolist() == roles
    said = [store.ids(3)[mask_of(store, 3) == 1], store.ids(11)[mask_of(store, 11) == 1]]
    assert [tokenizer.decode(ids) for ids in said] == [
        "3!<|assistant_end|>",
        "11!<|assistant_end|>",
    ]


def test_conversations_are_rendered_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = conversations_store(Echo(3), tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "render_roles", lambda *_: pytest.fail("rendered again"))
        assert conversations_store(Echo(3), tokenizer).folder == first.folder
    other_tokenizer = Tokenizer([*tokenizer.ranks, b"ec"])
    for other in (
        conversations_store(Echo(3, text="other"), tokenizer),
        conversations_store(Echo(3), tokenizer, system="merge"),
        conversations_store(Echo(3), other_tokenizer),
    ):
        assert other.folder != first.folder


def test_a_bad_conversation_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = Echo(6, bad=[4])
    with pytest.raises(UserError, match=r"echo/train row 4: message 1 has the role 'robot'"):
        conversations_store(task, tokenizer)
    assert folders(tmp_path / "base" / "stores") == []


def test_bad_conversations_are_skipped_and_counted_on_request(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    store = conversations_store(Echo(6, bad=[0, 4]), tokenizer, bad_rows="skip")
    assert len(store) == 4
    assert store.meta["skipped"] == 2
    assert "skipped 2 of 6 rows; the first: echo/train row 0:" in capsys.readouterr().err
    # A store with rows missing is no answer to a caller who wants an error.
    with pytest.raises(UserError, match="row 0"):
        conversations_store(Echo(6, bad=[0, 4]), tokenizer)
    with pytest.raises(UserError, match="all 2 rows are bad"):
        conversations_store(Echo(2, bad=[0, 1]), tokenizer, bad_rows="skip")


def test_errors_from_rendering_name_the_row_too(tokenizer: Tokenizer) -> None:
    class Unmergeable(Echo):
        def __getitem__(self, index: int) -> dict[str, object]:
            return {"messages": [{"role": "system", "content": "alone"}]}

    with pytest.raises(UserError, match=r"echo/train row 0: a system message"):
        conversations_store(Unmergeable(1), tokenizer, system="merge")


def test_an_empty_split_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="echo/train has no rows"):
        conversations_store(Echo(0), tokenizer)


def test_long_conversations_lose_their_end_or_stay_out(tokenizer: Tokenizer) -> None:
    """Rows of 8 tokens hold 9: half of the conversations are longer, by 1 to 6 tokens."""
    documents = [list(range(100 * i, 100 * i + n)) for i, n in enumerate([9, 10, 3, 15])]
    store = make_store(paths.stores_dir() / "s", documents, [[i % 2 for i in d] for d in documents])
    same, note = fit_conversations(store, 14, "drop")
    assert (same, note) == (store, "")
    same, note = fit_conversations(store, 8, "split")
    assert same is store
    assert note == (
        "2 of 4 conversations are longer than 9 tokens: 7 tokens (18.9%) are trained on without "
        "the beginning of their conversation (--long-conversations split)"
    )
    for how, kept, share in (
        ("truncate", [d[:9] for d in documents], r"7 tokens \(18\.9%\) are cut off"),
        ("drop", [documents[0], documents[2]], r"25 tokens \(67\.6%\) are left out"),
    ):
        fitted, note = fit_conversations(store, 8, how)  # type: ignore[arg-type]
        assert re.search(share, note)
        assert [fitted.ids(i).tolist() for i in range(len(fitted))] == kept
        assert [mask_of(fitted, i).tolist() for i in range(len(fitted))] == [
            [token % 2 for token in ids] for ids in kept
        ]
        assert fitted.num_tokens == sum(map(len, kept))
        assert fitted.lengths(np.arange(len(kept))).tolist() == [len(ids) for ids in kept]
        last = len(kept) - 1
        assert fitted.ids(last, 1, 99).tolist() == kept[last][1:]
        assert fitted.ids(last, 99).tolist() == []
        with pytest.raises(IndexError):
            fitted.ids(len(kept))
    with pytest.raises(UserError, match=r"4 of 4 conversations .*none is left"):
        fit_conversations(store, 1, "drop")


def test_processes_do_not_change_the_store(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Echo(50, bad=[7, 33])
    one = conversations_store(task, tokenizer, bad_rows="skip", folder=tmp_path / "one")
    monkeypatch.setattr(conversations, "_PARALLEL_FROM", 10)
    monkeypatch.setattr(conversations, "_SLICE_ROWS", 20)
    slices = []

    def merge(folder: Path, parts: list[Path], **settings: Any) -> TokenStore:
        slices.extend(parts)
        return merge_stores(folder, parts, **settings)

    monkeypatch.setattr(conversations, "merge_stores", merge)
    two = conversations_store(
        task, tokenizer, bad_rows="skip", folder=tmp_path / "two", num_workers=2
    )
    for name in ("tokens.bin", "mask.bin", "offsets.npy"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert differing(one, two) == {"name", "digest"}
    assert len(slices) == 3
    with pytest.raises(UserError, match="row 7"):
        conversations_store(task, tokenizer, folder=tmp_path / "three", num_workers=2)
    assert folders(tmp_path) == ["one", "two"]
