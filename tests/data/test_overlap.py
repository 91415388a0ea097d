"""Decontamination: what is found is exactly what a plain search finds, and only that is dropped."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import Echo

from nanochat.data import overlap
from nanochat.data.conversations import conversations_store
from nanochat.data.overlap import Item, NgramIndex, look_through, split_words
from nanochat.data.store import StoreWriter, TokenStore
from nanochat.errors import UserError
from nanochat.runtime import single
from nanochat.tokenizer import Tokenizer
from scripts import decontaminate, tok_encode
from scripts.decontaminate import Config, Tasks, task_items
from tasks import registry
from tasks.common import Conversation, Task, choice_conversation

QUESTION = "How many of the seven small ships that left the old harbour at dawn came home again?"
SHORT = "What is the sea?"


class Quiz(Task):
    """A question with options and one that is answered freely."""

    def __init__(self) -> None:
        super().__init__("quiz", "test")

    def __len__(self) -> int:
        return 3

    def settings(self) -> dict[str, Any]:
        return {}

    def row(self, index: int) -> Conversation:
        if index == 0:
            return choice_conversation(QUESTION, ["none", "four"], 1, self.where(0))
        if index == 1:
            return choice_conversation(SHORT, ["salt", "water"], 1, self.where(1))
        said = [
            {"type": "text", "text": "the bread of the king was eaten by "},
            {"type": "python", "text": "6+1"},
            {"type": "python_output", "text": "7"},
            {"type": "text", "text": "seven brothers in the house of their sister's friend"},
        ]
        return {
            "messages": [
                {"role": "user", "content": "Who ate it?"},
                {"role": "assistant", "content": said},
            ]
        }


ATE = "the bread of the king was eaten by seven brothers in the house"
DOCUMENTS = [
    "a text of its own, " * 20,
    f"He asked: {QUESTION.upper()} Nobody knew.",
    "How many of the seven small ships that left the old port at dawn came home again?",
    "Of seven small ships, that left THE old -- harbour, at dawn; came home again? four men",
    f"1. {ATE.replace(' ', '  ')}",
    f"What is the sea?{' water' * 30}",
]


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(decontaminate, "build", lambda spec, split, **options: Quiz())
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    tokenizer.save()
    return tokenizer


def store_of(tokenizer: Tokenizer, folder: Path, documents: Sequence[str]) -> TokenStore:
    with StoreWriter(
        folder,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        fingerprint="print",
        extra={"shards": [["a", "b"]], "skipped": 0},
    ) as writer:
        for text in documents:
            writer.add([tokenizer.bos, *tokenizer.encode(text)])
    return TokenStore.open(folder)


def test_documents_that_share_thirteen_words_are_found_and_dropped(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of(tokenizer, tmp_path / "text", DOCUMENTS)
    cfg = Config(store=(store.folder,), tasks=Tasks(("quiz",)), workers=1)
    report = decontaminate.main(cfg, single())["text"]
    assert [match["document"] for match in report["matches"]] == [1, 3, 4]
    assert [match["item"] for match in report["matches"]] == [
        "quiz/test row 0",
        "quiz/test row 0",
        "quiz/test row 2",
    ]
    assert report["matches"][2]["words"] == ATE
    assert report["tasks"] == {"quiz": {"items": 3, "covered": 2, "found": 2, "documents": 3}}
    assert (report["contaminated"], report["dropped"]) == (3, False)
    path = tmp_path / "base" / "report" / "decontamination-text.json"
    assert json.loads(path.read_text()) == report
    assert "3 of 6 documents (50.000%)" in capsys.readouterr().out
    assert len(TokenStore.open(store.folder)) == 6, "nothing is dropped unasked"

    report = decontaminate.main(dataclasses.replace(cfg, drop=True), single())["text"]
    assert report["contaminated"] == 3
    cleaned = TokenStore.open(store.folder)
    texts = [tokenizer.decode(cleaned.ids(i)[1:]) for i in range(len(cleaned))]
    assert texts == [DOCUMENTS[0], DOCUMENTS[2], DOCUMENTS[5]]
    assert all(cleaned.ids(i)[0] == tokenizer.bos for i in range(3))
    note = {"ngram": 13, "tasks": ["quiz"], "dropped": 3}
    assert cleaned.meta["decontaminated"] == [note]
    assert [cleaned.meta[key] for key in ("fingerprint", "shards", "skipped")] == [
        "print",
        [["a", "b"]],
        0,
    ]
    report = decontaminate.main(dataclasses.replace(cfg, drop=True), single())["text"]
    assert report["contaminated"] == 0


def test_all_that_is_found_is_what_a_plain_search_finds(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few words, so that n-grams occur by chance, within texts, across them, in several items."""
    monkeypatch.setattr(overlap, "SHORTEST", 4)
    chance = random.Random(3)

    def text(length: int) -> str:
        return " ".join(chance.choice(["sea", "Ship", "king's", "é"]) for _ in range(length))

    items = [
        Item(
            "ab"[i % 2],
            str(i),
            [text(chance.randint(0, 9))],
            [text(chance.randint(0, 9)) for _ in range(2)],
        )
        for i in range(40)
    ]
    documents = [text(chance.randint(1, 30)) for _ in range(200)]

    def grams(words: Sequence[str], lengths: Sequence[int]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1)}

    def grams_of(item: Item) -> set[tuple[str, ...]]:
        form = split_words(item.forms[0])
        whole = {tuple(form[:6])} if len(form) >= 4 else set()
        return whole.union(*(grams(split_words(text), [6]) for text in item.parts))

    of_items = [grams_of(item) for item in items]
    of_documents = [grams(split_words(document), [4, 5, 6]) for document in documents]
    index = NgramIndex(items, 6)
    store = store_of(tokenizer, tmp_path / "text", documents)
    report = look_through(store, tokenizer, index, workers=1)
    expected = [i for i, own in enumerate(of_documents) if any(own & o for o in of_items)]
    assert 20 < len(expected) < 180
    assert [match["document"] for match in report["matches"]] == expected
    for match in report["matches"]:
        gram = tuple(match["words"].split())
        assert gram in of_documents[match["document"]]
        assert gram in of_items[int(match["item"])]
    for task in "ab":
        mine = [o for o, item in zip(of_items, items, strict=True) if item.task == task]
        assert report["tasks"][task] == {
            "items": 20,
            "covered": sum(
                len(split_words(item.forms[0])) >= 4 for item in items if item.task == task
            ),
            "found": sum(any(o & own for own in of_documents) for o in mine),
            "documents": sum(any(o & own for o in mine) for own in of_documents),
        }


def test_processes_find_the_same(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tokenizer, tmp_path / "text", DOCUMENTS * 2)
    index = NgramIndex(list(task_items(Quiz(), "quiz")), 13)
    alone = look_through(store, tokenizer, index, workers=1)
    monkeypatch.setattr(overlap, "_JOB_TOKENS", 300)
    assert look_through(store, tokenizer, index, workers=2) == alone
    assert [match["document"] for match in alone["matches"]] == [1, 3, 4, 7, 9, 10]


class Short(Task):
    """One question of up to 7 words; its options and their letters are 7 words more."""

    def __init__(self, words: int) -> None:
        super().__init__("short", "test")
        self.words = words

    def __len__(self) -> int:
        return 1

    def settings(self) -> dict[str, Any]:
        return {}

    def row(self, index: int) -> Conversation:
        question = " ".join(["what", "is", "the", "name", "of", "this", "sea"][: self.words])
        return choice_conversation(f"{question}?", ["salt", "a café", "red"], 2, self.where(0))


@pytest.mark.parametrize(
    "text",
    [
        "{asked}",
        "{question}\n(A) salt\n(B) a café\n(C) red\nAnswer: C",
        "{question}\n- Salt\n- A café\n- Red\n",
        "{question} Red!",
        "What is the na\u00adme of th\u200bis sea: re\ufeffd",
        "What is the name of this sea? salt A cafe\u0301 red",
    ],
)
def test_short_question_is_looked_for_as_a_whole_in_every_form(
    text: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    conversation = Short(7)[0]
    asked = conversation["messages"][0]["content"]
    text = "So: " + text.format(asked=asked, question=conversation["question"]) + " That is all."
    store = store_of(tokenizer, tmp_path / "text", [text, "what is the name of this sea salt"])
    index = NgramIndex(list(task_items(Short(7), "short")), 13)
    report = look_through(store, tokenizer, index, workers=1)
    assert [match["document"] for match in report["matches"]] == [0]
    assert report["tasks"]["short"] == {"items": 1, "covered": 1, "found": 1, "documents": 1}


def test_what_problems_share_is_not_looked_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Options that many questions have are in no n-gram but the one that begins with a question."""
    options = ["I and II only", "I and III only", "II and III only", "I, II and III"]
    question = choice_conversation("Which of the laws of motion did he find?", options, 0, "here")
    item = Item("a", "0", decontaminate.choice_forms(question), options)
    store = store_of(tokenizer, tmp_path / "text", ["Which one? " + " ".join(options)])
    assert look_through(store, tokenizer, NgramIndex([item], 13), workers=1)["contaminated"] == 0


def test_what_is_too_short_is_not_covered() -> None:
    """Options and letters count."""
    assert NgramIndex(list(task_items(Short(1), "short")), 13).covered.tolist() == [True]
    assert NgramIndex(list(task_items(Short(0), "short")), 13).covered.tolist() == [False]


def test_rows_of_a_data_set_are_looked_for_as_they_are(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With GSM8K's marks and HumanEval's tests, which the conversations lack."""
    gsm8k = tmp_path / "hub/openai/gsm8k/main"
    humaneval = tmp_path / "hub/openai/openai_humaneval/openai_humaneval"
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path / "hub"))
    answer = "".join(f"{n} and {n} is {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}.\n" for n in range(9))
    check = "def check(candidate):\n" + "".join(
        f"    assert candidate({n}, 'blue') == {n * n}\n" for n in range(9)
    )
    for folder, row in (
        (gsm8k, {"question": "How many?", "answer": f"{answer}#### 16"}),
        (
            humaneval,
            {
                "task_id": "0",
                "prompt": "def f(x):\n",
                "canonical_solution": "    return x\n",
                "test": check,
                "entry_point": "f",
            },
        ),
    ):
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    items = [
        item
        for spec in ("gsm8k", "humaneval")
        for item in task_items(registry.build(spec, "test"), spec)
    ]
    store = store_of(tokenizer, tmp_path / "text", [f"Easy:\n{answer}", f"Tests:\n{check}", "No."])
    report = look_through(store, tokenizer, NgramIndex(items, 13), workers=1)
    assert [match["document"] for match in report["matches"]] == [0, 1]
    assert [match["item"] for match in report["matches"]] == [
        "gsm8k/test row 0",
        "humaneval/test row 0",
    ]


def test_equal_hashes_of_unequal_words_are_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_BASE", np.uint64(0))  # only the last word counts
    index = NgramIndex([Item("a", "0", ["one two three"])], 3)
    words = np.array([2, 1, 3, 0, 1, 2, 3], dtype=np.int32)
    places, _ = index.find(words)
    assert places.tolist() == [4]


def test_conversations_keep_their_masks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = conversations_store(Echo(6, text=f"{ATE} or not"), tokenizer)
    plain = conversations_store(Echo(4), tokenizer)
    with StoreWriter(
        tmp_path / "both",
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        fingerprint="both",
        with_mask=True,
    ) as writer:
        writer.add_store(plain)
        writer.add_store(store)
    cfg = Config(store=(tmp_path / "both",), tasks=Tasks(("quiz",)), drop=True, workers=1)
    decontaminate.main(cfg, single())
    cleaned = TokenStore.open(tmp_path / "both")
    assert len(cleaned) == 4
    for i in range(4):
        assert np.array_equal(cleaned.ids(i), plain.ids(i))
        assert np.array_equal(cleaned.mask_bytes(i), plain.mask_bytes(i))  # type: ignore[arg-type]


def test_words_do_not_go_on_from_one_message_to_the_next(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    half = ATE.split(" eaten ")

    class Cut(Echo):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {
                "messages": [
                    {"role": "user", "content": f"{half[0]} "},
                    {"role": "assistant", "content": f"eaten {half[1]}"},
                ]
            }

    store = conversations_store(Cut(2), tokenizer)
    report = decontaminate.main(
        Config(store=(store.folder,), tasks=Tasks(("quiz",)), workers=1), single()
    )
    assert report[store.name]["contaminated"] == 0


def test_the_encoded_corpus_is_cleaned_and_stays_current(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"text": text}) for text in DOCUMENTS * 10]
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(lines))
    corpus = str(tmp_path / "corpus")
    encode = tok_encode.Config(corpus, workers=1)
    before = tok_encode.main(encode, single())["train"]
    decontaminate.main(
        Config(corpus=(corpus,), tasks=Tasks(("quiz",)), drop=True, workers=1), single()
    )
    after = tok_encode.main(encode, single())["train"]
    assert 0 < len(after) < len(before)
    (tmp_path / "other.txt").write_text("one")
    with pytest.raises(UserError, match=r"build it first.*scripts\.tok_encode"):
        decontaminate.main(
            Config(corpus=(str(tmp_path / "other.txt"),), tasks=Tasks(("quiz",))), single()
        )


def test_core_tasks_are_looked_for_where_the_bundle_is(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "base" / "eval_bundle"
    (bundle / "eval_data").mkdir(parents=True)
    entries = [
        ("choice", "multiple_choice", {"query": "who " * 12, "choices": ["x", "y"], "gold": 1}),
        (
            "scheme",
            "schema",
            {"context_options": ["a " * 9, "b " * 9], "continuation": "c d e f", "gold": 1},
        ),
        ("language", "language_modeling", {"context": "l " * 9, "continuation": "m n o p"}),
        ("absent", "language_modeling", {}),
    ]
    tasks = ["icl_tasks:"]
    rows = ["Eval Task,Random baseline"]
    for label, kind, item in entries:
        tasks.append(
            f"- {{label: {label}, dataset_uri: {label}.jsonl, num_fewshot: [0], "
            f"icl_task_type: {kind}}}"
        )
        rows.append(f"{label},0")
        if item:
            (bundle / "eval_data" / f"{label}.jsonl").write_text(json.dumps(item))
    (bundle / "core.yaml").write_text("\n".join(tasks))
    (bundle / "eval_meta_data.csv").write_text("\n".join(rows))

    documents = [
        "who " * 12 + "y",
        "who " * 12 + "x",
        "a " * 9 + "c d e f",
        "b " * 9 + "c d e f",
        "l " * 9 + "m n o p",
    ]
    store = store_of(tokenizer, tmp_path / "text", documents)
    report = decontaminate.main(
        Config(store=(store.folder,), tasks=Tasks(()), workers=1), single()
    )["text"]
    assert [m["document"] for m in report["matches"]] == [0, 3, 4]
    assert list(report["tasks"]) == ["CORE choice", "CORE scheme", "CORE language"]
    assert "lacks them: absent" in capsys.readouterr().out


def test_what_makes_no_sense_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def fails(match: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=match):
            decontaminate.main(dataclasses.replace(cfg, **settings), single())

    def sought(**settings: Any) -> Tasks:
        return dataclasses.replace(cfg.tasks, **settings)

    store = store_of(tokenizer, tmp_path / "text", [DOCUMENTS[1]])
    cfg = Config(store=(store.folder,), tasks=Tasks(("quiz",)), workers=1)
    fails("--ngram 0 must be at least 1", tasks=sought(ngram=0))
    fails("--workers -1", workers=-1)
    fails("no evaluation task to look for", tasks=Tasks(()))
    fails("core.yaml is missing", tasks=sought(bundle=tmp_path))
    fails("every document of .*text would be dropped", drop=True)
    assert len(TokenStore.open(store.folder)) == 1
    many = [Item(str(i), str(i), ["a b"]) for i in range(64)]
    with pytest.raises(UserError, match="64 tasks at once"):
        NgramIndex(many, 2)
    # Nothing to find is no error.
    empty = NgramIndex([Item("a", "0", ["too short"])], 13)
    assert look_through(store, tokenizer, empty, workers=1)["contaminated"] == 0
