"""tok_train, tok_encode and tok_eval: reuse what is there, resume what was interrupted."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import paths, runtime
from nanochat.checkpoint_manager import tokenizer_of
from nanochat.data import encode as encoding
from nanochat.data import files, hub
from nanochat.data import store as stores
from nanochat.data.corpus import Split
from nanochat.data.hub import NamedSource, open_corpus
from nanochat.data.sources import open_store
from nanochat.data.store import TokenStore
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from scripts import tok_encode, tok_eval, tok_train
from tasks import passages

RUNTIME = runtime.single()


def text(shard: int, row: int) -> str:
    return f"In shard {shard} there is row {row}, and it says: " + "la " * (row % 7 + 1)


@pytest.fixture(autouse=True)
def corpus_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The named corpus `tiny` with two of its training shards."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_HUB_DIR", raising=False)
    monkeypatch.setitem(hub.NAMED, "tiny", NamedSource("tiny", "org/tiny", 5, "CC0"))
    folder = tmp_path / "base" / "corpora" / "tiny"
    folder.mkdir(parents=True)
    for shard in (0, 1, 5):
        add_shard(folder, shard)
    return folder


def add_shard(folder: Path, shard: int) -> None:
    rows = [text(shard, row) for row in range(30)]
    pq.write_table(pa.table({"text": rows}), folder / f"shard_{shard:05d}.parquet")


def train(vocab_size: int = 300, corpus: str = "tiny", **settings: Any) -> Tokenizer:
    config = tok_train.Config(corpus=corpus, vocab_size=vocab_size, **settings)
    tokenizer = tok_train.main(config, RUNTIME)
    assert tokenizer is not None
    return tokenizer


def encode(corpus: str = "tiny", workers: int = 1, **settings: Any) -> dict[Split, TokenStore]:
    return tok_encode.main(tok_encode.Config(corpus, workers=workers, **settings), RUNTIME)


def contents(store: TokenStore) -> list[list[int]]:
    return [store.ids(i).tolist() for i in range(len(store))]


@pytest.fixture
def encoded_shards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that this process encodes from now on."""
    seen: list[str] = []
    original = encoding._encode_shard

    def watched(corpus: Any, split: Any, shard: Any, *rest: Any) -> None:
        seen.append(shard.name)
        original(corpus, split, shard, *rest)

    monkeypatch.setattr(encoding, "_encode_shard", watched)
    return seen


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start some for the smallest corpus, too."""
    monkeypatch.setattr(encoding, "_PROCESS_BYTES", 1)


# tok_train


def test_trains_on_the_training_split_only(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    is_val = [files._split_hash("a.jsonl", row) % 20 == 0 for row in range(100)]
    lines = (json.dumps({"text": "zzzz " * 99 if val else "a row "}) for val in is_val)
    (folder / "a.jsonl").write_text("\n".join(lines))
    tokenizer = train(corpus=str(folder))
    assert not any(b"zz" in token for token in tokenizer.ranks)
    assert any(b"row" in token for token in tokenizer.ranks)
    assert Tokenizer.load().hash == tokenizer.hash
    assert tokenizer.training["documents"] == is_val.count(False) < 100


def test_same_settings_keep_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus_folder: Path
) -> None:
    first = train()
    forbidden = pytest.fail
    original = Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda *_: forbidden("trained again"))
    assert train().hash == first.hash
    assert "kept" in capsys.readouterr().out
    add_shard(corpus_folder, 2)  # a download that goes on changes nothing
    assert train().hash == first.hash
    monkeypatch.setattr(Tokenizer, "train", original)
    assert train(force=True).training["documents"] == 90
    assert train(vocab_size=290).vocab_size == 290
    assert Tokenizer.load().vocab_size == 290


def test_changed_text_is_trained_again(corpus_folder: Path) -> None:
    first = train()
    pq.write_table(pa.table({"text": ["other words " * 50]}), corpus_folder / "shard_00000.parquet")
    assert train().hash != first.hash


def test_limits_on_the_text() -> None:
    tokenizer = train(max_chars=100, doc_cap=20)
    assert tokenizer.training["chars"] == 100
    assert tokenizer.training["documents"] == 5
    assert [name for name, _ in tokenizer.training["shards"]] == ["shard_00000"]
    for name in ("max_chars", "doc_cap"):
        with pytest.raises(UserError, match=f"{name} 0 must be at least 1"):
            train(**{name: 0})


def test_training_reads_only_as_much_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming: no list of all documents, no file opened after the limit."""
    opened: list[str] = []
    original = hub.read_parquet

    def watched(path: Path, column: str) -> Any:
        opened.append(path.name)
        return original(path, column)

    monkeypatch.setattr(hub, "read_parquet", watched)
    train(max_chars=100)
    assert opened == ["shard_00000.parquet"]


def use(tokenizer: Tokenizer) -> None:
    """A checkpoint, as far as its tokenizer goes."""
    folder = hub.paths.checkpoints_dir("base", "default") / "step_000001"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"tokenizer_hash": tokenizer.hash}))


def test_a_tokenizer_in_use_is_not_replaced_unasked(encoded_shards: list[str]) -> None:
    first = train()
    use(first)
    kept = contents(encode()["train"])
    assert train().hash == first.hash
    with pytest.raises(UserError, match=r"base/default were trained with it.*--name.*--force"):
        train(vocab_size=280)
    assert Tokenizer.load().hash == first.hash
    second = train(vocab_size=280, name="small")
    assert Tokenizer.load().hash == first.hash
    assert Tokenizer.named("small").hash == second.hash
    # Its stores stand beside those that the checkpoint was trained on, and are found again.
    for _ in range(2):
        store = encode(tokenizer="small")["train"]
        assert store.folder.name == f"tiny-train-{second.hash[:8]}"
        assert store.meta["tokenizer_hash"] == second.hash
    assert len(encoded_shards) == 6
    assert open_store("tiny", "train", second).folder == store.folder
    assert contents(open_store("tiny", "train", first)) == kept
    with pytest.raises(UserError, match=r"the tokenizer's name '\.\./x'"):
        train(name="../x")


def test_passages_are_decoded_with_the_tokenizer_of_their_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(name="other")
    encode(tokenizer="other")
    train(vocab_size=280)
    monkeypatch.setattr(passages, "noted_corpus", lambda tokenizer_hash: "tiny")
    passages.known_texts.cache_clear()
    assert passages.known_texts("abc")[0] == text(0, 0)
    passages.known_texts.cache_clear()


def test_forced_replacement_leaves_the_former_one_to_be_found() -> None:
    first = train()
    use(first)
    shutil.rmtree(hub.paths.tokenizers_dir())  # as earlier versions left it
    second = train(vocab_size=280, force=True)
    assert Tokenizer.load().hash == second.hash
    assert tokenizer_of({"tokenizer_hash": first.hash}, Path("step_1")).hash == first.hash
    shutil.rmtree(hub.paths.tokenizer_dir())
    assert Tokenizer.find(second.hash).hash == second.hash
    with pytest.raises(UserError, match="no tokenizer abc"):
        Tokenizer.find("abc")


def test_torn_tokenizer_is_replaced() -> None:
    first = train()
    (Path(hub.paths.tokenizer_dir()) / "tokenizer.tiktoken").write_bytes(b"")
    assert train().hash == first.hash
    assert Tokenizer.load().hash == first.hash


# tok_encode


def test_stores_hold_the_documents_in_order() -> None:
    tokenizer = train()
    stores = encode()
    for split, shards in (("train", (0, 1)), ("val", (5,))):
        store = stores[split]  # type: ignore[index]
        expected = [
            [tokenizer.bos, *tokenizer.encode(text(shard, row))]
            for shard in shards
            for row in range(30)
        ]
        assert contents(store) == expected
        assert store.folder == open_corpus("tiny").store_folder(split)  # type: ignore[arg-type]
        assert not store.has_mask
        assert len(TokenStore.open(store.folder, tokenizer.hash)) == len(expected)


def test_second_run_encodes_nothing(encoded_shards: list[str]) -> None:
    train()
    folder = encode()["train"].folder
    assert encoded_shards == ["shard_00005", "shard_00000", "shard_00001"]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    encode()
    assert len(encoded_shards) == 3
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_new_shards_are_appended(corpus_folder: Path, encoded_shards: list[str]) -> None:
    train()
    before = contents(encode()["train"])
    encoded_shards.clear()
    add_shard(corpus_folder, 2)
    add_shard(corpus_folder, 3)
    appended = encode()["train"]
    assert encoded_shards == ["shard_00002", "shard_00003"]
    assert contents(appended)[:60] == before
    assert len(appended) == 120

    files = {path.name: path.read_bytes() for path in appended.folder.iterdir()}
    for path in appended.folder.iterdir():
        path.unlink()
    fresh = encode()["train"]
    assert {path.name: path.read_bytes() for path in fresh.folder.iterdir()} == files


def test_appending_keeps_the_notes_of_decontamination(
    corpus_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    path = encode()["train"].folder / "meta.json"
    note = {"ngram": 13, "tasks": ["quiz"], "dropped": 0}
    meta = json.loads(path.read_text()) | {"decontaminated": [note]}
    path.write_text(json.dumps({**meta, "digest": paths.meta_digest(meta)}))
    assert encode()["train"].meta["decontaminated"] == [note]
    assert "decontaminate" not in capsys.readouterr().out
    for shard in (2, 3):  # how far the note reaches does not grow
        add_shard(corpus_folder, shard)
        assert encode()["train"].meta["decontaminated"] == [{"shards": 2, **note}]
        said = " ".join(capsys.readouterr().out.split())
        assert "the first 2 shards were decontaminated" in said


def test_interrupted_run_goes_on_with_the_next_shard(
    monkeypatch: pytest.MonkeyPatch, encoded_shards: list[str]
) -> None:
    train()
    original = hub.NamedCorpus.read

    def broken(self: Any, split: Any, shard: str) -> Any:
        for i, item in enumerate(original(self, split, shard)):
            if shard == "shard_00001" and i == 20:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(hub.NamedCorpus, "read", broken)
    with pytest.raises(KeyboardInterrupt):
        encode()
    folder = open_corpus("tiny").store_folder("train")
    with pytest.raises(UserError):
        TokenStore.open(folder)
    assert encoded_shards == ["shard_00005", "shard_00000", "shard_00001"]
    monkeypatch.setattr(hub.NamedCorpus, "read", original)
    encoded_shards.clear()
    assert len(encode()["train"]) == 60
    assert encoded_shards == ["shard_00001"]
    names = sorted(path.name for path in folder.parent.iterdir())
    assert names == ["tiny-train", "tiny-val"]  # no slices and no temporary folders left


def test_other_tokenizer_encodes_again(encoded_shards: list[str]) -> None:
    train()
    first = contents(encode()["val"])
    other = train(vocab_size=280)
    encoded_shards.clear()
    store = encode()["val"]
    assert len(encoded_shards) == 3
    assert store.meta["tokenizer_hash"] == other.hash
    assert contents(store) != first


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("a", "b"):
        lines = (json.dumps({"text": f"{name} {row} " * 3}) for row in range(50))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def test_content_decides_and_not_time(books: Path, encoded_shards: list[str]) -> None:
    first = train(corpus=str(books))
    use(first)
    store = encode(str(books))["train"]
    encoded_shards.clear()
    os.utime(books / "a.jsonl", (1, 1))
    shutil.copy(books / "b.jsonl", books / "c")
    (books / "c").replace(books / "b.jsonl")
    assert train(corpus=str(books)).hash == first.hash
    assert encode(str(books))["train"].meta == store.meta
    assert encoded_shards == []
    # An edit that keeps size and time is seen.
    changed = (books / "a.jsonl").read_text().replace("a 7", "q 7")
    (books / "a.jsonl").write_text(changed)
    os.utime(books / "a.jsonl", (1, 1))
    assert encode(str(books))["train"].identity != store.identity
    assert "a.jsonl" in encoded_shards


def test_what_earlier_versions_made_stays_current(
    books: Path, encoded_shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = files.FolderCorpus.shards
    with monkeypatch.context() as patch:  # they took times for the content
        patch.setattr(
            files.FolderCorpus,
            "shards",
            lambda self, split: [s._replace(fingerprint=s.former) for s in original(self, split)],
        )
        first = train(corpus=str(books))
        folder = encode(str(books))["train"].folder
    use(first)
    encoded_shards.clear()
    assert train(corpus=str(books)).hash == first.hash
    assert encode(str(books))["train"].folder == folder
    assert encoded_shards == []


@pytest.mark.parametrize("what", ["write", "replace", "save", "sync"])
def test_a_full_disk_is_got_over_by_the_next_run(
    what: str, books: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(corpus=str(books))
    whole = encode(str(books))
    expected = {split: (contents(store), store.identity) for split, store in whole.items()}
    module, name = {
        "write": (stores.StoreWriter, "_write"),
        "replace": (os, "replace"),
        "save": (np, "save"),
        "sync": (hub.paths, "sync_path"),
    }[what]
    original = getattr(module, name)
    for number in (1, 2, 3, 5, 8, 13):
        for store in whole.values():
            shutil.rmtree(store.folder)
        calls = 0

        def fails(*args: Any, number: int = number, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= number:
                raise OSError(28, "No space left on device")
            return original(*args, **settings)

        monkeypatch.setattr(module, name, fails)
        with suppress(OSError):  # later than the last call there is no fault
            encode(str(books))
        monkeypatch.setattr(module, name, original)
        again = encode(str(books))
        found = {split: (contents(store), store.identity) for split, store in again.items()}
        assert found == expected
        left = sorted(path.name for path in whole["train"].folder.parent.iterdir())
        assert left == sorted(store.folder.name for store in whole.values())


def test_changed_shard_encodes_again(corpus_folder: Path) -> None:
    train()
    encode()
    pq.write_table(pa.table({"text": ["changed"] * 3}), corpus_folder / "shard_00000.parquet")
    store = encode()["train"]
    assert len(store) == 33
    assert Tokenizer.load().decode(store.ids(0)) == "<|bos|>changed"


@pytest.mark.usefixtures("processes")
def test_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("a", "b", "c"):
        lines = (json.dumps({"text": f"{name} {row} " * 3}) for row in range(50))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    train(corpus=str(folder))
    serial = {split: contents(store) for split, store in encode(str(folder)).items()}
    for store_folder in (tmp_path / "base" / "stores").iterdir():
        for path in store_folder.iterdir():
            path.unlink()
    parallel = {split: contents(store) for split, store in encode(str(folder), workers=2).items()}
    assert parallel == serial
    assert sum(map(len, serial.values())) == 150


def test_small_corpora_take_one_process_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    train()
    monkeypatch.setattr(encoding, "in_processes", pytest.fail)
    monkeypatch.setattr(encoding, "_BATCH_CHARS", 50)
    tokenizer = Tokenizer.load()
    expected = [
        [tokenizer.bos, *tokenizer.encode(text(shard, row))]
        for shard in (0, 1)
        for row in range(30)
    ]
    assert contents(encode(workers=3)["train"]) == expected


@pytest.mark.usefixtures("processes")
def test_error_in_a_process_names_the_row(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"text": "x"})] * 40 + ['{"text": 3}']
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    train(corpus=str(folder), bad_rows="skip")
    with pytest.raises(UserError, match=r"[ab]\.jsonl line 41: the field 'text' is a number"):
        encode(str(folder), workers=2)


class Deadly:
    """Work that ends the process which receives it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


@pytest.mark.usefixtures("processes")
def test_death_of_a_process_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text("\n".join([json.dumps({"text": "x"})] * 40))
    train(corpus=str(folder))
    monkeypatch.setattr(encoding, "_encode_job", Deadly())
    with pytest.raises(UserError, match=r"a process died.*fewer --workers"):
        encode(str(folder), workers=2)


def test_skipped_rows_are_counted_and_not_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    rows = [{"text": "x"}, {"text": None}] * 60
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(corpus=str(folder), bad_rows="skip")
    stores = encode(str(folder), bad_rows="skip")
    assert sum(len(store) for store in stores.values()) == 60
    assert sum(store.meta["skipped"] for store in stores.values()) == 60
    assert "bad rows skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="is null"):
        encode(str(folder))


def test_empty_split(corpus_folder: Path) -> None:
    train()
    pq.write_table(pa.table({"text": [" ", ""]}), corpus_folder / "shard_00005.parquet")
    with pytest.raises(UserError, match="the val split of tiny has no documents"):
        encode()


def test_large_vocabularies_take_four_bytes(corpus_folder: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 9))) for _ in range(20_000)]
    pq.write_table(pa.table({"text": [" ".join(words)]}), corpus_folder / "shard_00000.parquet")
    tokenizer = train(vocab_size=70_000, doc_cap=10**9)
    assert tokenizer.vocab_size > 2**16
    store = encode()["train"]
    assert store.meta["dtype"] == "uint32"
    assert tokenizer.decode(store.ids(0)) == "<|bos|>" + " ".join(words)


def test_needs_a_tokenizer() -> None:
    with pytest.raises(UserError, match="tok_train"):
        encode()


# tok_eval


def test_eval_without_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    tok_eval.tiktoken.registry.ENCODINGS.pop("gpt2", None)
    tok_eval.tiktoken.registry.ENCODINGS.pop("cl100k_base", None)
    tokenizer = train()
    result = tok_eval.main(tok_eval.Config("tiny"), RUNTIME)
    assert result is not None
    saved = json.loads((tmp_path / "base" / "report" / "tok_eval.json").read_text())
    assert saved == result
    assert result["unavailable"] == ["gpt-2", "gpt-4"]
    assert "not compared with gpt-2 and gpt-4" in capsys.readouterr().out
    rows = {row["text"]: row for row in result["rows"]}
    assert set(rows) == {"tiny val", "english", "code", "numbers", "other scripts"}
    texts = [text(5, row) for row in range(30)]
    assert rows["tiny val"]["bytes"] == sum(len(t.encode()) for t in texts)
    assert rows["tiny val"]["tokens"]["nanochat"] == sum(len(tokenizer.encode(t)) for t in texts)
    for row in rows.values():
        assert row["bytes_per_token"]["nanochat"] == row["bytes"] / row["tokens"]["nanochat"]


def test_every_named_tokenizer_has_its_evaluation(tmp_path: Path) -> None:
    train()
    train(name="other", vocab_size=280)
    saved = {}
    for name, file in (("default", "tok_eval.json"), ("other", "tok_eval-other.json")):
        tok_eval.main(tok_eval.Config("tiny", tokenizer=name, max_chars=500), RUNTIME)
        saved[name] = tmp_path / "base" / "report" / file
    hashes = {name: json.loads(path.read_text())["tokenizer_hash"] for name, path in saved.items()}
    assert hashes == {name: Tokenizer.named(name).hash for name in hashes}
    assert len(set(hashes.values())) == 2


def test_eval_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train()
    monkeypatch.setattr(tok_eval.tiktoken, "get_encoding", lambda name: tokenizer._encoding)
    result = tok_eval.main(tok_eval.Config("tiny", max_chars=500), RUNTIME)
    assert result is not None
    assert result["unavailable"] == []
    assert result["rows"][0]["bytes"] == 500
    for row in result["rows"]:
        assert set(row["tokens"]) == {"nanochat", "gpt-2", "gpt-4"}
        assert len(set(row["tokens"].values())) == 1
    assert "not compared" not in capsys.readouterr().out


def test_eval_never_waits_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[str] = []

    def get_encoding(name: str) -> None:
        reached.append(name)
        tok_eval.tiktoken.load.read_file("https://example.invalid/x")

    requests = pytest.importorskip("requests")
    timeouts: list[float] = []

    def get(url: str, timeout: float) -> None:
        timeouts.append(timeout)
        raise OSError("no network")

    monkeypatch.setattr(tok_eval.tiktoken, "get_encoding", get_encoding)
    monkeypatch.setattr(requests, "get", get)
    original = tok_eval.tiktoken.load.read_file
    assert tok_eval._load("gpt2", online=False) is None
    assert timeouts == []  # not even asked
    assert tok_eval._load("gpt2", online=True) is None
    assert timeouts == [tok_eval._DOWNLOAD_SECONDS]
    assert reached == ["gpt2", "gpt2"]
    assert tok_eval.tiktoken.load.read_file is original


def test_round_trip_check_notices_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train()
    tok_eval.check_round_trip(tokenizer, ["fine"])
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "lossy")
    with pytest.raises(RuntimeError, match="do not return the text"):
        tok_eval.check_round_trip(tokenizer, ["fine"])
