"""Generated tasks: pure functions of their settings, splits that share nothing, right answers."""

import re
import subprocess
import sys
import zipfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat.conversation import parts
from nanochat.errors import UserError
from nanochat.tools.calculator import calculate
from tasks import sources
from tasks.arithmetic import LEVELS, Arithmetic
from tasks.common import Conversation, Task, split_of
from tasks.spellingbee import (
    COUNTING,
    SPELLING,
    TIMES_ASKED,
    SimpleSpelling,
    SpellingBee,
    corpus_words,
    load_words,
    made_up_word,
    noted_corpus,
    noted_words,
    words_of,
    write_words,
)

SPLITS = ("train", "val", "test")
WORDS = [a + b + c for a in ("ban", "wi", "str", "o") for b in ("ishe", "ther", "awbe") for c in
         ("d", "rry", "ing", "s", "ly", "er", "ment", "ful", "less", "t")]  # fmt: skip


def make(kind: str, split: str, **options: Any) -> Task:
    if kind == "arithmetic":
        return Arithmetic(split, **options)
    return {"simple": SimpleSpelling, "bee": SpellingBee}[kind](split, words=WORDS, **options)


def asked(conversation: Conversation) -> list[str]:
    return conversation["words"] if "words" in conversation else [conversation["word"]]


def said(conversation: Conversation) -> str:
    """All the assistant says, as the engine gives it back: tool outputs included."""
    return "".join(part["text"] for part in parts(conversation["messages"][-1]))


@pytest.mark.parametrize("kind", ["simple", "bee", "arithmetic"])
def test_a_row_depends_on_its_settings_and_nothing_else(kind: str):
    task = make(kind, "train", size=40)
    rows = list(task)
    assert [task[i] for i in reversed(range(40))] == rows[::-1]
    assert list(make(kind, "train", size=20)) == rows[:20]
    assert list(make(kind, "train", size=40, seed=1)) != rows
    assert list(make(kind, "train", size=40, seed=-1)) != list(make(kind, "train", size=40, seed=1))
    same = make(kind, "train", size=40)
    assert same.fingerprint() == task.fingerprint()
    others = [make(kind, "train", size=41), make(kind, "train", size=40, seed=1)]
    assert len({t.fingerprint() for t in [task, *others, make(kind, "test", size=40)]}) == 4


def test_a_row_is_the_same_in_every_process():
    """Hash randomisation and the state of the global generator play no part."""
    code = (
        "from tasks.arithmetic import Arithmetic as A; print(A('test')[5], A('test').fingerprint())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("kind", ["simple", "bee", "arithmetic"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_reference_answer_is_right_and_another_is_not(kind: str, split: str):
    task = make(kind, split, size=60)
    for conversation in task:
        answer = said(conversation)
        assert task.reward(conversation, answer) == 1.0
        assert not task.evaluate(conversation, answer + "1")
        assert not task.evaluate(conversation, "")
        assert not task.evaluate(conversation, conversation["messages"][0]["content"])


@pytest.mark.parametrize(
    ("kind", "wrong", "unreadable"),
    [
        ("simple", "b a n", "ban"),
        ("bee", "b a n\n#### 77", "b a n: 77"),
        ("arithmetic", "#### 123456", "It is 123456."),
    ],
)
def test_a_well_formed_answer_can_be_judged(kind: str, wrong: str, unreadable: str):
    """A wrong answer may have the format bonus, an unreadable one not."""
    task = make(kind, "test", size=20)
    for conversation in task:
        assert task.well_formed(conversation, said(conversation))
        assert task.well_formed(conversation, wrong)
        assert not task.evaluate(conversation, wrong)
        assert not task.well_formed(conversation, unreadable)


@pytest.mark.parametrize("kind", ["bee", "arithmetic"])
def test_tool_outputs_are_what_the_calculator_says(kind: str):
    """Training shows the model just what the engine will insert."""
    calls = 0
    for conversation in make(kind, "train", size=200):
        content = parts(conversation["messages"][-1])
        for call, output in pairwise(content):
            if call["type"] == "python":
                assert (output["type"], output["text"]) == (
                    "python_output",
                    calculate(call["text"]),
                )
                calls += 1
    assert calls >= 200


# Spelling


@pytest.mark.parametrize("kind", ["simple", "bee"])
def test_no_word_is_in_two_splits_whatever_seed_and_task(kind: str):
    seen = {
        split: {
            word
            for seed in (0, 1, -1)
            for conversation in make(kind, split, size=400, seed=seed)
            for word in asked(conversation)
        }
        for split in SPLITS
    }
    assert all(seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["test"] & seen["val"]
    # Held-out words are real ones, training words are also made up.
    assert seen["test"] | seen["val"] <= set(WORDS)
    assert seen["train"] - set(WORDS)
    assert seen["train"] >= set(words_of(WORDS, "train"))


def test_a_held_out_word_comes_once_before_any_comes_again():
    words = sorted(words_of(WORDS, "test"))
    once = SimpleSpelling("test", size=len(words), words=WORDS)
    assert sorted(asked(conversation) for conversation in once) == [[word] for word in words]
    task = SimpleSpelling("test", words=WORDS)
    asked_words = Counter(asked(conversation)[0] for conversation in task)
    assert asked_words == dict.fromkeys(words, TIMES_ASKED)
    messages = {conversation["messages"][0]["content"] for conversation in task}
    assert len(messages) > 0.9 * len(task), "in other words each time"


@pytest.mark.parametrize(
    ("kind", "ways"), [("simple", SPELLING.held_out), ("bee", COUNTING.held_out)]
)
def test_every_prompt_names_its_word_and_most_quote_it(kind: str, ways: tuple[str, ...]):
    prompts = [
        (row["messages"][0]["content"].lower(), asked(row)[0])
        for row in make(kind, "test", size=600)
        if len(asked(row)) == 1
    ]
    assert all(word in prompt for prompt, word in prompts)
    quoted = sum(re.search(f"[\"'“]{word}[\"'”]", prompt) is not None for prompt, word in prompts)
    assert 0.85 < quoted / len(prompts) < 0.97
    shapes = {prompt.replace(word, "W").replace("'W'", '"W"') for prompt, word in prompts}
    assert len(shapes) >= 3 * len(ways)


def test_training_asks_for_several_words_too_and_tests_for_one():
    rows = list(make("simple", "train", size=300))
    counts = Counter(len(asked(row)) for row in rows)
    assert set(counts) == {1, 2, 3, 4, 5, 6, 7, 8}
    assert 80 < counts[1] < 160
    for row in rows:
        prompt, reply = row["messages"][0]["content"], row["messages"][1]["content"]
        assert reply == "\n".join(" ".join(word) for word in row["words"])
        assert re.search(".*".join(row["words"]), prompt.lower(), re.DOTALL), "not in this order"
    assert {len(asked(row)) for split in ("val", "test") for row in make("simple", split)} == {1}


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("b a n i s h e d", True),
        ("B A N I S H E D", True),
        ("b-a-n-i-s-h-e-d.", True),
        ("b, a, n, i, s, h, e, d\n", True),
        ("banished", False),
        ("b an ished", False),
        ("b a n i s h e", False),
        ("b a n i s h e d d", False),
        ("The letters are b a n i s h e d", False),
        ("", False),
    ],
)
def test_spelling_is_letters_one_by_one(completion: str, right: bool):
    task = SimpleSpelling("train", words=WORDS)
    assert task.evaluate({"words": ["banished"]}, completion) is right
    two = {"words": ["ox", "banished"]}
    assert task.evaluate(two, f"o x\n{completion}") is right
    assert not task.evaluate(two, completion)


def test_counting():
    task = SpellingBee("train", 500, WORDS)
    counts = Counter()
    for conversation in task:
        word, letter = conversation["word"], conversation["letter"]
        count = sum(character == letter for character in word)
        assert said(conversation).endswith(f"#### {count}")
        assert said(conversation).startswith(" ".join(word) + "\n")
        assert conversation["answer"] == str(count)
        counts[count] += 1
    # No guess is right half of the time.
    assert counts[0] > 20
    assert counts[2] > 100
    assert max(counts.values()) < 250
    row = {"word": "sees", "letter": "s", "answer": "2"}
    assert task.evaluate(row, "s e e s\nPython says 2.\n#### 2.0")
    for wrong in (
        "#### 2",
        "s e e s\nPython says 2.",
        "s e a s\nPython says 2.\n#### 2",
        "s e e s\nPython says 2.\n#### 3",
    ):
        assert not task.evaluate(row, wrong), wrong


def test_every_letter_is_a_token_of_its_own(corpus_tokenizer: Any):
    """Letters are tokens in answer and call, whatever merges the tokenizer has learned."""
    encode, decode = corpus_tokenizer.encode, corpus_tokenizer.decode
    assert len(encode("banished")) < 5, "the tokenizer merges letters"
    for word in ("banished", "strawberry", "tester", "mother", "dream", "less"):
        for text in (" ".join(word), f'"{" ".join(word)}".count("e")'):
            assert all(len(decode([i]).strip()) <= 1 or "count" in text for i in encode(text))
        spelled = encode(" ".join(word))
        call = encode(f'"{" ".join(word)}".count("e")')
        assert call[1 : 1 + len(spelled)] == spelled


def test_in_quotes_a_word_has_the_pieces_of_the_bare_word(corpus_tokenizer: Any):
    encode = corpus_tokenizer.encode
    assert len(encode(" mother")) < len(encode("mother")), (
        "the tokenizer has words with their space"
    )
    for word in ("banished", "strawberry", "tester", "mother", "dream", "less"):
        pieces = encode(word)
        for prompt in (f'Spell "{word}".', f"Spell '{word}'.", f"Spell:\n{word}"):
            ids = encode(prompt)
            assert any(ids[i : i + len(pieces)] == pieces for i in range(len(ids)))


@pytest.fixture(scope="module")
def corpus_tokenizer() -> Any:
    from nanochat.tokenizer import Tokenizer

    return Tokenizer.train([" mother" * 400 + " ".join(WORDS)], vocab_size=400)


def test_made_up_words_are_none_of_those_held_out():
    from random import Random

    made = {made_up_word(WORDS[:60], (), Random(i)) for i in range(300)}
    assert len(made) > 200
    assert all(3 <= len(word) <= 15 for word in made)
    held_out = sorted(made)[::2]
    others = {made_up_word(WORDS[:60], held_out, Random(i)) for i in range(300)}
    assert len(others) > 100
    assert others.isdisjoint(held_out)


@pytest.mark.parametrize("number", [120, 400, 2500])
def test_lists_of_any_length_have_words_for_every_split(number: int):
    words = [f"word{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10 % 10]}{n // 100 * 'u'}" for n in
             range(number)]  # fmt: skip
    counts = [len(words_of(words, split)) for split in SPLITS]
    assert min(counts) > 0
    assert sum(counts) == number
    assert counts[0] / number > (0.95 if number > 2000 else 0.8)


# Word lists


def test_words_of_a_corpus_are_lower_case_and_come_twice():
    texts = ["over lamb, Nazareth; under", "Lamb over lamb. Nazareth ox ox 12 x2y x2y Under"]
    assert corpus_words(texts) == ["lamb", "over"]
    assert corpus_words(["don't don't o'clock o'clock"]) == []
    assert corpus_words(["über über", "one one"], max_characters=5) == ["über"]


class Lambs:
    name = "lambs"

    def documents(self, split: str) -> list[str]:
        assert split == "train"
        return ["lamb over lamb", "over under"]


class Sheep:
    name = "sheep"

    def documents(self, split: str) -> list[str]:
        return ["sheep sheep"]


def test_every_tokenizer_has_the_words_of_its_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    path = write_words(Lambs(), "a" * 64)  # type: ignore[arg-type]
    before = path.read_text()
    assert before.endswith("\nlamb\nover\n")
    assert noted_words("a" * 64) == path
    assert load_words(path) == ("lamb", "over")
    assert noted_corpus("a" * 64) == "lambs"
    assert noted_words("b" * 64) is None
    assert noted_corpus("b" * 64) is None
    other = write_words(Sheep(), "b" * 64)  # type: ignore[arg-type]
    assert (load_words(other), noted_corpus("b" * 64)) == (("sheep",), "sheep")
    assert path.read_text() == before
    assert len(load_words(None)) > 1000, "of the embedded corpus"


def test_a_changed_byte_of_a_word_list_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    path = write_words(Lambs(), "a" * 64)  # type: ignore[arg-type]
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        for read in (lambda: load_words(path), lambda: noted_corpus("a" * 64)):
            with pytest.raises(UserError, match=r"a+\.txt was changed after it was written"):
                read()


def test_a_stage_notes_the_words_once_and_writes_a_damaged_list_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(sources, "open_corpus", lambda name: {"a": Lambs(), "b": Sheep()}[name])
    tokenizer: Any = SimpleNamespace(hash="a" * 64)

    def note(corpus: str) -> tuple[str, ...]:
        cfg: Any = SimpleNamespace(corpus=(corpus,), mix=("simplespelling:50:1",))
        sources.note_words(cfg, tokenizer)
        return load_words(noted_words(tokenizer.hash))

    assert note("a") == ("lamb", "over")
    assert note("b") == ("lamb", "over")
    path = noted_words(tokenizer.hash)
    assert path is not None
    path.write_text(path.read_text().replace("lamb", "limb"))
    assert note("a") == ("lamb", "over")


def test_word_lists_from_files(tmp_path: Path):
    text = "zebra\n  apple \n\nNot\nit's\nab\nabcdefghijklmnop\nüber\napple\n"
    (tmp_path / "words.txt").write_text(text, encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "words.zip", "w") as archive:
        archive.writestr("words.txt", text)
    assert load_words(tmp_path / "words.txt") == ("apple", "zebra", "über")
    assert load_words(str(tmp_path / "words.zip")) == ("apple", "zebra", "über")
    assert load_words(["b", "cat"]) == ("cat",)
    (tmp_path / "words.txt").write_text("changed\n")
    assert load_words(tmp_path / "words.txt") == ("changed",)


def test_word_lists_that_are_none(tmp_path: Path):
    with pytest.raises(UserError, match="is not a file"):
        load_words(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("A\n1\n")
    with pytest.raises(UserError, match=r"empty\.txt has no usable word"):
        load_words(tmp_path / "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no word list"):
        load_words(tmp_path / "bytes.txt")
    (tmp_path / "words.zip").write_bytes(b"PK no")
    with pytest.raises(UserError, match="is no word list"):
        load_words(tmp_path / "words.zip")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.txt", "apple")
        archive.writestr("b.txt", "apple")
    with pytest.raises(UserError, match="holds 2"):
        load_words(tmp_path / "two.zip")
    held_out = words_of(WORDS, "test")[0]
    with pytest.raises(UserError, match="none of 1 words belongs to the split train"):
        SimpleSpelling("train", words=[held_out])


# Arithmetic


@pytest.mark.parametrize("level", LEVELS)
def test_no_problem_is_in_two_splits(level: int):
    seen = {
        split: {row["skeleton"] for seed in (0, -1) for row in Arithmetic(split, 150, level, seed)}
        for split in SPLITS
    }
    for split, skeletons in seen.items():
        assert {split_of(skeleton) for skeleton in skeletons} == {split}


def test_a_skeleton_has_every_number_of_its_problem():
    """Else two problems with other numbers could pass for one, or one for two."""
    for level in LEVELS:
        for row in Arithmetic("train", 200, level):
            told = sorted(re.findall(r"\d+", row["messages"][0]["content"]))
            assert told == sorted(re.findall(r"\d+", row["skeleton"]))


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level: int):
    limits = LEVELS[level]
    rows = list(Arithmetic("train", 600, level))
    steps = Counter(said_calls(row) for row in rows)
    assert set(steps) == set(range(limits.steps[0], limits.steps[1] + 1))
    assert min(steps.values()) > 600 / len(steps) / 2
    operations = Counter(sign for row in rows for sign in "+-*/" if sign in "".join(calls(row)))
    assert min(operations[sign] for sign in "+-*/") > 30
    for row in rows:
        told = [int(n) for n in re.findall(r"\d+", row["messages"][0]["content"])]
        assert all(2 <= n <= limits.largest for n in told)
        assert int(row["answer"]) >= 2
        assert row["messages"][0]["content"].count("?") == 1
        # Every number told is used once, but for the one that does not matter.
        unused = len(told) - 1 - said_calls(row)
        assert unused in ((0, 1) if limits.distractor else (0,))


def calls(row: Conversation) -> list[str]:
    return [part["text"] for part in parts(row["messages"][-1]) if part["type"] == "python"]


def said_calls(row: Conversation) -> int:
    return len(calls(row))


def test_each_step_goes_on_from_the_last_result():
    for row in Arithmetic("train", 300, level=3):
        result = ""
        for call in calls(row):
            assert call.startswith(result)
            result = calculate(call)
        assert result == row["answer"]


def test_answers_compare_as_numbers():
    task = Arithmetic("test", 1)
    row = {"answer": "1200"}
    assert task.evaluate(row, "so\n#### 1,200.0")
    assert not task.evaluate(row, "so\n#### 120")
    assert not task.evaluate(row, "1200")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "no split 'dev', only train, val and test"),
        ({"split": "test", "size": 0}, "size 0 must be at least 1"),
        ({"split": "test", "level": 4}, "no level 4, only 0 to 3"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        Arithmetic(**options)
