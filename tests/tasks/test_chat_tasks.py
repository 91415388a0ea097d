"""Tasks of a first chat: passages of any corpus, honest ignorance, identity, follow-ups."""

import json
from collections import Counter
from pathlib import Path

import pytest

from nanochat.conversation import parts
from nanochat.errors import UserError
from tasks.asking import FIRST_CONTACT, normal, reserved
from tasks.common import Task, split_of
from tasks.customjson import CustomJSON
from tasks.first_contact import FirstContact
from tasks.followups import FollowUps
from tasks.identity import Identity, read_intents
from tasks.ignorance import Ignorance
from tasks.passages import Passages, index_of, subjects
from tasks.registry import build

NAMES = ("Anna", "Boris", "Carla", "Dimitri")
NOUNS = ("fox", "river", "castle", "letter")
TEXTS = tuple(
    f"In the year {i} the old {noun} was near the house of {name}. {name} saw the {noun} at dawn, "
    f"and the {noun} was as quiet as ever it had been. Then came the night of day {i}, and "
    f"{name} went home to the {noun}. Nobody in France knew of it."
    for i in range(20)
    for name in NAMES
    for noun in NOUNS
)
WORDS = [
    a + b
    for a in ("ban", "wi", "str", "o", "fa", "gro", "le", "mo", "pla", "ri")
    for b in ("ished", "ther", "ing", "er", "ly", "ness", "ted", "sten", "wn", "nd")
]


def make(kind: str, split: str, size: int = 60, seed: int = 0) -> Task:
    if kind == "passages":
        return Passages(split, size, TEXTS, seed)
    if kind == "identity":
        return Identity(split, size, seed=seed)
    kinds = {"ignorance": Ignorance, "followups": FollowUps}
    return kinds[kind](split, size, TEXTS, WORDS, seed=seed)


def said(message: dict) -> str:
    return "".join(part["text"] for part in parts(message) if part["type"] == "text")


KINDS = ("passages", "identity", "ignorance", "followups")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_rows_are_functions_of_their_settings_and_answered_rightly(kind: str, split: str):
    task = make(kind, split)
    rows = list(task)
    assert [task[i] for i in reversed(range(60))] == rows[::-1]
    assert list(make(kind, split, 30)) == rows[:30]
    assert list(make(kind, split, seed=1)) != rows
    assert make(kind, split).fingerprint() == task.fingerprint()
    assert make(kind, split, seed=1).fingerprint() != task.fingerprint()
    wrong = sum(not task.evaluate(row, said(row["messages"][-1])) for row in rows)
    assert wrong <= 1
    assert not any(task.evaluate(row, "qwrt zxcv bnmp lkjh") for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_of_the_test_are_not_those_of_training(kind: str):
    trained = {normal(said(m)) for row in make(kind, "train", 600) for m in row["messages"][::2]}
    tested = {normal(said(row["messages"][0])) for row in make(kind, "test", 200)}
    assert len(trained) > 250
    assert len(tested & trained) == 0


def test_subjects_are_found_by_counting():
    names, nouns = subjects(TEXTS)
    assert set(NAMES) <= set(names)
    assert set(NOUNS) <= set(nouns)
    assert "quiet" not in nouns
    assert "Then" not in names


def test_answers_are_sentences_of_the_documents_of_their_split():
    kinds: Counter[str] = Counter()
    for split in ("train", "test"):
        documents = [text for text in TEXTS if split_of(text) == split]
        assert index_of(TEXTS, split).texts == documents
        for row in make("passages", split, 200):
            answer = said(row["messages"][-1])
            assert any(answer in text for text in documents), answer
            (kind,) = row["check"]
            kinds[kind] += 1
            if kind == "about":
                assert row["check"]["about"] in answer
            else:
                opening = row["check"]["continue"]
                assert opening in said(row["messages"][0])
                assert any(f"{opening} {answer}" in text for text in documents)
    assert min(kinds.values()) > 40


def test_texts_that_are_too_short_say_so():
    with pytest.raises(UserError, match="no sentence of 8 to 30 words"):
        Passages("train", corpus_texts=["Short."])


def test_a_few_long_documents_are_cut_and_a_page_is_all_trained_on():
    """A corpus of three books must not be a corpus without a train split."""
    books = [" ".join(TEXTS[i::3]) for i in range(3)]
    pieces = {split: index_of(tuple(books), split).texts for split in ("train", "test")}
    assert len(pieces["train"]) > 5 * len(pieces["test"]) > 0
    assert not set(pieces["train"]) & set(pieces["test"])
    assert len(index_of((TEXTS[0],), "train").openings) > 0


@pytest.mark.parametrize("text", ["\u8bcd\u6c47" * 400, "lorem ipsum " * 300])
def test_text_without_sentences_is_gone_on_with(text: str):
    task = Passages("train", 20, [text])
    assert all("continue" in row["check"] for row in task)
    assert len(FirstContact("test", [text])) > 200
    assert len(list(FollowUps("train", 30, [text], WORDS))) == 30
    assert len(list(Ignorance("train", 30, [text], WORDS))) == 30


def test_what_the_corpus_holds_is_no_unknown():
    task = Ignorance("train", 2000, TEXTS, WORDS)
    assert "France" not in task.subjects["place"]
    assert "Germany" in task.subjects["place"]
    answers = {said(row["messages"][-1]) for row in task}
    assert len(answers) > 50


def test_a_follow_up_is_about_what_came_before():
    again = 0
    for row in make("followups", "train", 900):
        messages = row["messages"]
        assert 4 <= len(messages) <= 8
        for before, question, answer in zip(
            messages[1::2], messages[2::2], messages[3::2], strict=False
        ):
            if normal(said(question)) in (
                "spell it",
                "now spell it",
                "spell that",
            ) and "Python" in said(before):
                assert said(before).split("\n")[0] == said(answer)
                again += 1
    assert again > 2


def test_an_identity_of_ones_own(tmp_path: Path):
    file = tmp_path / "me.json"
    file.write_text(json.dumps({"name": "Marvin", "maker": "the people at Example"}))
    answers = {said(row["messages"][-1]) for row in Identity("train", 600, file)}
    assert "My name is Marvin." in answers
    assert "The people at Example made me. I am Marvin, a small language model." in answers
    assert not any("nanochat" in answer for answer in answers)
    file.write_text(
        json.dumps(
            {
                "name": "Marvin",
                "intents": {"who": {"ask": ["?who are you"], "answer": ["I am {name}."]}},
            }
        )
    )
    assert {said(r["messages"][-1]) for r in build(f"identity:9:path={file}", "test")} == {
        "I am Marvin."
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "me.json: not valid JSON"),
        ('{"name": "Ren\xe9"}', "me.json: byte 0xe9 at offset 13 is not UTF-8"),
        ("[]", "needs a 'name'"),
        ('{"name": "A", "intents": {"x": {"ask": ["?a"]}}}', "intent 'x' needs 'answer'"),
        ('{"name": "A", "intents": {"x": {"ask": "?a", "answer": ["b"]}}}', "needs 'ask', a list"),
        ('{"name": "A", "intents": {"x": {"ask": ["?a"], "answer": ["{b}"]}}}', "has braces"),
    ],
)
def test_identity_files_that_are_none(tmp_path: Path, text: str, message: str):
    (tmp_path / "me.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read_intents(tmp_path / "me.json")
    with pytest.raises(UserError, match="is not a file"):
        read_intents(tmp_path / "none.json")


def test_first_contact_asks_hundreds_of_messages_of_every_kind():
    task = FirstContact("test", TEXTS)
    kinds = Counter(row["kind"] for row in task)
    assert len(task) >= 300
    assert min(kinds.values()) >= 30
    assert len(kinds) == 8
    for row in task:
        check = row["check"]
        assert not any("{" in said(message) for message in row["messages"])
        if {"spell", "count", "sum"} & check.keys():
            assert task.evaluate(row, said(row["messages"][-1]))
        assert not task.evaluate(row, "qwrt zxcv")
    with pytest.raises(UserError, match="only a test split"):
        FirstContact("train", TEXTS)


def test_nothing_of_first_contact_is_trained_on():
    messages = [
        json.loads(line)["turns"][0]["user"] for line in FIRST_CONTACT.open(encoding="utf-8")
    ]
    assert len({normal(message) for message in messages}) > 290
    specs = ("simplespelling:800", "spellingbee:800", "arithmetic:800:level=0", "arithmetic:200")
    tasks = [build(spec, "train", words=WORDS) for spec in specs]
    tasks += [make(kind, "train", 800) for kind in KINDS] + [CustomJSON()]
    for task in tasks:
        for row in task:
            asked = [m for m in row["messages"] if m["role"] == "user"]
            # Later turns are short ("thanks"): only what opens a conversation is compared.
            assert normal(said(asked[0])) not in reserved(), (task.name, said(asked[0]))
