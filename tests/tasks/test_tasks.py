"""Tasks: the interface, mixtures, answers that are numbers, loading, specs by name."""

import json
import math
from collections import Counter
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import tiny_tokenizer

from nanochat.data.conversations import conversations_store
from nanochat.errors import UserError
from nanochat.eval.results import pass_at_k
from nanochat.tools.sandbox import layer_report
from tasks import registry, specs
from tasks.arc import ARC
from tasks.common import (
    Conversation,
    Task,
    choice_conversation,
    final_answer,
    parse_number,
    row_random,
    same_number,
    show,
)
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, solution_parts
from tasks.humaneval import HumanEval, build_program
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.views import TaskMixture, TaskSlice


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Artifacts and data sets in a folder of this test, and no network."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path / "hub"))
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return tmp_path


def put_rows(home: Path, repo: str, config: str, split: str, rows: list[dict[str, Any]]) -> None:
    """Lay `rows` out as the data set's repository has them."""
    folder = home / "hub" / repo
    (folder / config).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}-0.parquet")
    configs = ""
    for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
        configs += f"- config_name: {sub.name}\n  data_files:\n"
        for file in sorted(sub.glob("*.parquet")):
            name = file.name.split("-")[0]
            configs += f"  - split: {name}\n    path: {sub.name}/{name}-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


class Numbers(Task):
    """Row i says i; an answer is right if it is i."""

    def __init__(self, name: str, count: int, split: str = "train"):
        super().__init__(name, split)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def row(self, index: int) -> Conversation:
        return {"messages": [{"role": "user", "content": f"{self.name} {index}"}], "n": index}

    def settings(self) -> dict[str, Any]:
        return {"count": self.count}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion == f"{self.name} {conversation['n']}"


def texts(task: Task) -> list[str]:
    return [conversation["messages"][0]["content"] for conversation in task]


# The interface


def test_rows_end_where_the_task_ends():
    task = Numbers("a", 3)
    assert texts(task) == ["a 0", "a 1", "a 2"]
    for index in (3, -1):
        with pytest.raises(IndexError):
            task[index]


def test_a_row_that_does_not_fit_the_schema_is_named():
    class Bad(Numbers):
        def row(self, index: int) -> Conversation:
            return {"messages": [{"role": "robot", "content": "x"}]}

    with pytest.raises(UserError, match=r"a/train row 2: .*'robot'"):
        Bad("a", 3)[2]


def test_reward_is_the_evaluation_where_there_is_one():
    task = Numbers("a", 3)
    assert [task.reward(task[1], text) for text in ("a 1", "a 2")] == [1.0, 0.0]

    class Unscored(Numbers):
        evaluate = Task.evaluate

    class Choice(Numbers):
        eval_type = "categorical"

    for unrewarded in (Unscored("a", 1), Choice("a", 1)):
        with pytest.raises(UserError, match="has no rewards"):
            unrewarded.reward(unrewarded[0], "a 0")
    with pytest.raises(UserError, match="no check for answers"):
        Unscored("a", 1).evaluate({}, "")


def test_fingerprints_tell_tasks_apart_and_only_those():
    class Newer(Numbers):
        """The same settings, and a changed line of code."""

        def row(self, index: int) -> Conversation:
            row = super().row(index)
            row["messages"][0]["content"] += "?" if index == 2 else ""
            return row

    Newer.__name__ = "Numbers"
    tasks = [
        Numbers("a", 3),
        Numbers("b", 3),
        Numbers("a", 4),
        Numbers("a", 3, "test"),
        Newer("a", 3),
        TaskSlice(Numbers("a", 3), 1),
        TaskSlice(Numbers("a", 3), 2),
        TaskMixture([(Numbers("a", 3), 1)]),
        TaskMixture([(Numbers("a", 3), 2)]),
        TaskMixture([(Numbers("a", 3), 1)], seed=1),
        TaskMixture([(Numbers("a", 3), 1)], epoch=1),
    ]
    prints = [task.fingerprint() for task in tasks]
    assert len(set(prints)) == len(prints)
    assert Numbers("a", 3).fingerprint() == prints[0]


def test_a_bad_row_has_a_fingerprint_and_is_skipped_where_it_is_read(home: Path):
    class Torn(Numbers):
        def row(self, index: int) -> Conversation:
            if index == 1:
                raise UserError("row 1 is torn")
            return super().row(index) | {"kinds": {"of row"}}  # no JSON

    assert Torn("a", 3).fingerprint() == Torn("a", 3).fingerprint() != Torn("a", 4).fingerprint()
    store = conversations_store(Torn("a", 3), tiny_tokenizer(), bad_rows="skip")
    assert (len(store), store.meta["skipped"]) == (2, 1)
    with pytest.raises(UserError, match=r"row 1 is torn.*--bad-rows skip"):
        conversations_store(Torn("a", 3), tiny_tokenizer())


def test_a_slice_is_a_part_of_its_task():
    task = Numbers("a", 10)
    assert texts(TaskSlice(task, 1, None, 4)) == ["a 1", "a 5", "a 9"]
    held_out = TaskSlice(task, 7)
    assert texts(held_out) == ["a 7", "a 8", "a 9"]
    assert held_out.evaluate(held_out[1], "a 8")
    assert held_out.where(1) == "a/train row 8"
    with pytest.raises(UserError, match="it has 10"):
        TaskSlice(task, 10)


# Mixtures


def test_an_epoch_of_a_mixture_has_every_row_weight_times():
    a, b, c = Numbers("a", 7), Numbers("b", 5), Numbers("c", 4)
    mixture = TaskMixture([(a, 1), (b, 3), (c, 0.25)], seed=3)
    counts = Counter(texts(mixture))
    assert len(mixture) == sum(counts.values()) == 7 + 15 + 1
    assert all(counts[f"a {i}"] == 1 for i in range(7))
    assert all(counts[f"b {i}"] == 3 for i in range(5))
    # A quarter of c each epoch: all of it, once, in four.
    over_epochs: Counter[str] = Counter()
    for epoch in range(4):
        over_epochs.update(texts(TaskMixture([(c, 0.25), (a, 1)], seed=3, epoch=epoch)))
    assert all(over_epochs[f"c {i}"] == 1 for i in range(4))


def test_a_mixture_is_shuffled_anew_by_seed_and_epoch_and_else_the_same():
    def order(**options: int) -> list[str]:
        return texts(TaskMixture([(Numbers("a", 30), 1), (Numbers("b", 30), 1)], **options))

    assert order() == order(seed=0, epoch=0)
    assert order() != sorted(order())
    assert order() != order(seed=1)
    assert order() != order(epoch=1)
    assert sorted(order()) == sorted(order(seed=1)) == sorted(order(epoch=1))


def test_ten_million_rows_take_no_memory():
    import tracemalloc

    tracemalloc.start()
    mixture = TaskMixture([(Numbers("a", 10_000_000), 1), (Numbers("b", 3_000_000), 0.5)])
    assert len(mixture) == 11_500_000
    for index in (0, 5_000_000, 11_499_999):
        mixture[index]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_answers_in_a_mixture_are_judged_by_the_rows_own_task():
    a, b = Numbers("a", 4), Numbers("b", 4)
    inner = TaskMixture([(a, 1), (b, 1)])
    for joined in (inner, TaskMixture([(TaskSlice(b, 1), 1), (inner, 1)])):
        for conversation in joined:
            said = conversation["messages"][0]["content"]
            assert joined.reward(conversation, said) == 1.0
            other = said.replace("a", "x").replace("b", "a").replace("x", "b")
            assert not joined.evaluate(conversation, other)


def test_a_mixture_names_rows_by_their_task():
    mixture = TaskMixture([(Numbers("a", 2), 1), (Numbers("b", 3), 1)])
    for text, place in zip(texts(mixture), map(mixture.where, range(5)), strict=True):
        name, row = text.split()
        assert place == f"{name}/train row {row}"
    with pytest.raises(UserError, match="at least one task"):
        TaskMixture([])


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_impossible_weights(weight: float):
    with pytest.raises(UserError, match="of a must be above 0"):
        TaskMixture([(Numbers("a", 2), weight)])


# Numbers as answers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("10.0", 10),
        ("$1,234.50", Fraction("1234.5")),
        ("1,234,567", 1234567),
        ("-3", -3),
        ("−3", -3),
        ("-$5", -5),
        ("$-5", -5),
        ("50%", 50),
        ("42.", 42),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("about 12 apples or 13", 12),
        ("=7", 7),
        ("", None),
        ("none", None),
        ("$", None),
        ("1,23", None),
        ("1/0", None),
        ("9" * 5000, None),
    ],
)
def test_parse_number(text: str, value: object):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("so\n#### 42", 42),
        ("#### $10", 10),
        ("####10.0\nmore 5", 10),
        ("#### 1\n#### 2", 2),
        ("42", None),
        ("####", None),
        ("####\n42", None),
    ],
)
def test_the_final_answer_stands_behind_the_last_mark(completion: str, value: object):
    assert final_answer(completion) == value


def test_numbers_are_equal_up_to_float_noise_only():
    assert same_number(parse_number("0.30000000000000004"), parse_number("0.3"))
    assert not same_number(parse_number("10000000001"), parse_number("10000000000"))
    assert not same_number(parse_number("33.33"), parse_number("33.3333"))
    assert not same_number(None, parse_number("0"))
    assert not same_number(parse_number("0"), None)


def test_pass_at_k_is_the_share_of_draws_with_a_right_sample():
    for samples in range(1, 7):
        for correct in range(samples + 1):
            for k in range(1, samples + 1):
                draws = list(combinations(range(samples), k))
                hits = sum(min(draw) < correct for draw in draws)
                assert pass_at_k(samples, correct, k) == pytest.approx(hits / len(draws))
    with pytest.raises(UserError, match="at least 5 samples"):
        pass_at_k(4, 1, 5)
    with pytest.raises(UserError):
        pass_at_k(4, 5, 1)


def test_row_random_keeps_the_sign_of_its_key():
    draws = [row_random(key).random() for key in (1, -1, "1", 2)]
    assert len(set(draws)) == 4
    assert row_random("task", 3).random() == row_random("task", 3).random()


# Multiple choice


def test_options_are_lettered_after_their_text():
    conversation = choice_conversation("Which?", ["red", "blue", "green"], 2, "here")
    prompt, reply = conversation["messages"]
    assert reply["content"] == conversation["answer"] == "C"
    assert conversation["letters"] == ["A", "B", "C"]
    lines = prompt["content"].split("\n")
    assert lines[0] == "Which?"
    assert [line.endswith(f"->{letter}") for line, letter in zip(lines[1:4], "ABC", strict=True)]
    assert [line[2:].split(" ->")[0] for line in lines[1:4]] == ["red", "blue", "green"]


def test_the_letter_of_an_option_is_the_token_that_answers():
    """With a tokenizer that has merged ` A`, `=A` and `>A` into tokens."""
    from nanochat.tokenizer import Tokenizer

    text = "1 A1 B1=A1=B1>A1>B" * 50
    tokenizer = Tokenizer.train([text] * 20, vocab_size=330)
    assert all(len(tokenizer.encode(text)) == 1 for text in (" A", "=A", ">A"))
    conversation = choice_conversation("Which?", ["x", "y"], 0, "here")
    ids = tokenizer.encode(conversation["messages"][0]["content"])
    for letter in "AB":
        assert tokenizer.encode(letter)[0] in ids


def test_impossible_options_are_named():
    for choices, answer, message in [
        (["a"], 0, "1 options"),
        (["a", "b"], 2, "option 2 of 2"),
        (["a", "b"], -1, "option -1"),
        (["a", None], 0, "option 1 is None"),
    ]:
        with pytest.raises(UserError, match=f"here: .*{message}"):
            choice_conversation("Which?", choices, answer, "here")  # type: ignore[arg-type]


# Tasks on the hub, from a folder in the hub's layout


MMLU_ROW = {"question": "1+1?", "subject": "sums", "choices": ["1", "2", "3", "4"], "answer": 1}


def test_mmlu(home: Path):
    put_rows(home, "cais/mmlu", "all", "test", [MMLU_ROW])
    put_rows(home, "cais/mmlu", "all", "dev", [MMLU_ROW, MMLU_ROW])
    nested = {"train": {**MMLU_ROW, "question": "2+1?", "subject": "", "answer": 2}}
    put_rows(home, "cais/mmlu", "auxiliary_train", "train", [nested])
    test, train = MMLU("test"), MMLU("train")
    assert (len(test), len(MMLU("dev")), len(train)) == (1, 2, 1)
    assert test[0]["subject"] == "sums"
    assert train[0]["messages"][0]["content"].startswith("2+1?")
    assert (test[0]["answer"], train[0]["answer"]) == ("B", "C")
    assert test.evaluate(test[0], " B\n")
    assert not test.evaluate(test[0], "C")
    assert test.fingerprint() == MMLU("test").fingerprint() != train.fingerprint()


def test_arc_letters_options_by_position(home: Path):
    rows = [
        {
            "id": str(i),
            "question": "Which one?",
            "choices": {"text": ["x", "y", "z"], "label": labels},
            "answerKey": labels[2],
        }
        for i, labels in enumerate([["A", "B", "C"], ["1", "2", "3"]])
    ]
    put_rows(home, "allenai/ai2_arc", "ARC-Easy", "test", rows)
    put_rows(home, "allenai/ai2_arc", "ARC-Challenge", "validation", rows[:1])
    easy = ARC("test")
    assert [row["answer"] for row in easy] == ["C", "C"]
    assert ARC("val", "challenge").where(0) == "arc-challenge/val row 0"
    with pytest.raises(UserError, match="no subset 'hard'"):
        ARC("test", "hard")


def test_gsm8k(home: Path):
    solution = "She sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    rows = [
        {"question": "How many?", "answer": solution},
        {"question": "How much?", "answer": "So\n#### 1,234"},
    ]
    put_rows(home, "openai/gsm8k", "main", "train", rows)
    task = GSM8K("train")
    content = task[0]["messages"][1]["content"]
    assert [(part["type"], part["text"]) for part in content] == [
        ("text", "She sold 48/2 = "),
        ("python", "48/2"),
        ("python_output", "24"),
        ("text", "24 clips.\nIn all 48+24 = "),
        ("python", "48+24"),
        ("python_output", "72"),
        ("text", "72.\n#### 72"),
    ]
    assert task.evaluate(task[0], "#### $72.00")
    assert task.evaluate(task[1], "#### 1234")
    assert not task.evaluate(task[1], "1234")
    assert not task.evaluate(task[1], "#### 1235")
    assert task.reward(task[0], "#### 72") == 1.0


def test_odd_calculator_annotations():
    assert solution_parts("a <<>>b <<5>>c") == [{"type": "text", "text": "a b c"}]
    assert solution_parts("<<6/2=3=3>><< 2>2 = 0 >>x")[:4] == [
        {"type": "python", "text": "6/2"},
        {"type": "python_output", "text": "3"},
        {"type": "python", "text": "2>2"},
        {"type": "python_output", "text": "0"},
    ]


def test_outputs_are_written_as_the_calculator_writes_them():
    def output(annotation: str) -> str:
        return solution_parts(annotation)[1]["text"]

    assert output("<<1/2=.50>>") == "0.5"
    assert output("<<10/3=3>>") == "3"  # rounded in the solution, which goes on with it
    assert output("<<x+1=3>>") == "3"


def test_smoltalk(home: Path):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"messages": [{"role": "user", "content": ""}]},
    ]
    put_rows(home, "HuggingFaceTB/smol-smoltalk", "data", "train", rows)
    task = SmolTalk("train")
    assert task[0]["messages"][1] == {"role": "assistant", "content": "Ho"}
    with pytest.raises(UserError, match="smoltalk/train row 1: message 0"):
        task[1]
    with pytest.raises(UserError, match="no rewards"):
        task.reward(task[0], "Ho")


DOUBLE = {
    "task_id": "0",
    "prompt": 'from math import floor\n\ndef double(x: int) -> int:\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return floor(2 * x)\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}


def test_humaneval(home: Path):
    put_rows(home, "openai/openai_humaneval", "openai_humaneval", "test", [DOUBLE])
    task = HumanEval()
    right = task[0]["messages"][1]["content"]
    assert task.evaluate(task[0], right)
    assert not task.evaluate(task[0], right.replace("2 * x", "3 * x"))
    # Leaving before the checks is not passing them.
    assert not task.evaluate(task[0], "```python\ndef double(x): ...\nexit(0)\n```")
    with pytest.raises(UserError, match="only the split test"):
        HumanEval("train")


def test_the_canonical_solutions_pass(real_hub: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs in the whole sandbox, where numpy works too."""
    if not (real_hub / "openai/openai_humaneval").is_dir():
        pytest.skip(f"{real_hub} has no openai/openai_humaneval")
    if missing := [f"{k}: {v}" for k, v in layer_report().items() if v != "active"]:
        pytest.skip(f"no strict sandbox here: {missing}")
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(real_hub))
    task = HumanEval(sandbox="strict", timeout=60.0)
    numpy = "```python\nimport numpy\nassert numpy.arange(4).sum() == 6\n"

    def passes(index: int) -> bool:
        row = task[index]
        return task.evaluate(row, row["messages"][1]["content"].replace("```python\n", numpy, 1))

    assert [index for index in range(len(task)) if not passes(index)] == []


@pytest.mark.parametrize(
    "completion",
    [
        "    return floor(2 * x)",  # the body alone
        "```python\n    return floor(2 * x)\n```",
        "def double(x):\n    return floor(2 * x)",  # the import is the prompt's
        "Here:\n```\ndef double(x):\n    return 2 * x\n```\nIt doubles.",
        "```python\ndouble(1)\n```\nwith\n```python\ndef double(x):\n    return 2 * x\n```",
        "```python\ndef double(x):\n    return 2 * x",  # cut off before the fence
        "~~~python\ndef double(x):\n    return 2 * x\n~~~\nIt doubles.",
        "````\ndef double(x):\n    '''\n```'''\n    return 2 * x\n````",
        "1. So:\n   ```python\n   def double(x):\n       return 2 * x\n   ```\n2. Done.",
        "So:\r\n```python\r\ndef double(x):\r\n    return 2 * x\r\n```\r\n",
        "So:\n\n    def double(x):\n        y = 2 * x\n\n        return y\n\nIt doubles.",
        "Here it is.\n\ndef double(\n    x,\n):\n    return 2 * x\n\ndouble(1) is 2.\nAll's well.",
        "double = lambda x: 2 * x",
        "Not def triple, but\nimport math\n@staticmethod\ndef double(x):\n    return 2 * x",
        "```\ndef double(x): return 3\n```\nNo, I meant:\n```\ndef double(x): return 2 * x\n```",
        "def double(x):\n    return 3\n\nNo, I meant:\n\ndef double(x):\n    return 2 * x",
        "```\ndef two(x):\n    return 2 * x\n```\nThen:\n```\ndef double(x): return two(x)\n```\n"
        "```\nprint(double(7))\nassert False\n```",
        "```\nfrom __future__ import annotations\ndef double(x: X): return 2 * x\n```",
        "y = 2 * x\nreturn y",
        "y = 2 * x\n    return y",  # a body without the spaces before it
        "if x:\n    return 2 * x\nreturn 0",
        "if x:\n        return 2 * x\n    return 0",
        "\treturn 2 * x",
        "    y = 2 * x\n\n    return y\n\nThis doubles.\n\ndef main():\n    print(double(1))\n",
        "    return two(x)\n\ndef two(x):\n    return 2 * x\n",
    ],
)
def test_code_is_found_in_the_completion(completion: str):
    row = {key: DOUBLE[key] for key in ("prompt", "entry_point", "test")}
    exec(build_program(row, completion), {})
    with pytest.raises(AssertionError):
        exec(build_program(row, completion.replace("2 * x", "x")), {})


def test_helpers_of_the_prompt_stay():
    prompt = 'def half(x):\n    return x / 2\n\ndef double(x):\n    """Undo half."""\n'
    row = {**DOUBLE, "prompt": prompt, "test": "def check(f):\n    assert half(f(3)) == 3\n"}
    for completion in ("```\ndef double(x):\n    return 2 * x\n```", "    return 2 * x"):
        exec(build_program(row, completion), {})


def test_answer_that_switches_failure_off_fails(home: Path):
    put_rows(home, "openai/openai_humaneval", "openai_humaneval", "test", [DOUBLE])
    task = HumanEval()
    switched = "```python\nimport sys\nsys.exit = print\ndef double(x):\n    return 3\n```"
    assert not task.evaluate(task[0], switched)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Why?"}, "has no field 'answer', only question"),
        ({"question": "Why?", "answer": None}, "'answer' is 'None', expected str"),
        ({"question": " ", "answer": "#### 1"}, "'question' is blank"),
        ({"question": 7, "answer": "#### 1"}, "'question' is '7', expected str"),
        ({"question": "Why?", "answer": "Because."}, "does not end in '#### 42'"),
    ],
)
def test_a_bad_row_of_the_hub_names_task_split_row_and_reason(
    home: Path, row: dict[str, Any], reason: str
):
    put_rows(home, "openai/gsm8k", "main", "test", [row])
    with pytest.raises(UserError, match=f"gsm8k/test row 0: .*{reason}"):
        GSM8K("test")[0]


def test_what_cannot_be_loaded_says_why_and_what_would_help(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    put_rows(home, "openai/gsm8k", "main", "train", [{"question": "?", "answer": "#### 1"}])
    with pytest.raises(UserError, match=r"gsm8k/nope: .*no file of the split nope"):
        GSM8K("nope")
    with pytest.raises(UserError, match="NANOCHAT_HUB_DIR has no folder HuggingFaceTB"):
        SmolTalk("train")
    monkeypatch.delenv("NANOCHAT_HUB_DIR")
    with pytest.raises(UserError, match="set NANOCHAT_HUB_DIR=D"):
        GSM8K("train")


@pytest.mark.parametrize("card", ["path", "paths", "none", "other"])
def test_a_folder_needs_the_files_of_the_wanted_split_only(home: Path, card: str):
    """The README names the files of all splits, and only one of them was copied."""
    rows = [{"question": "?", "answer": "#### 1"}]
    for split in ("train", "test"):
        put_rows(home, "openai/gsm8k", "main", split, rows * 3)
    folder = home / "hub/openai/gsm8k"
    (folder / "main" / "train-0.parquet").unlink()
    readme = (folder / "README.md").read_text()
    if card == "paths":
        readme = readme.replace("main/test-*", "[main/test-*]")
    elif card != "path":
        readme = "" if card == "none" else readme.replace("main", "other")
    (folder / "README.md").write_text(readme)
    assert len(GSM8K("test")) == 3
    with pytest.raises(UserError, match=r"no file of the split train .*it has main/test-0"):
        GSM8K("train")


def test_a_torn_file_and_an_empty_split_are_errors(home: Path):
    put_rows(home, "openai/gsm8k", "main", "train", [{"question": "?", "answer": "#### 1"}])
    file = home / "hub/openai/gsm8k/main/train-0.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="gsm8k/train: cannot load"):
        GSM8K("train")
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    pq.write_table(schema.empty_table(), file)
    with pytest.raises(UserError, match="gsm8k/train: "):
        GSM8K("train")


def test_prepared_data_lie_under_the_base_folder(home: Path):
    put_rows(home, "openai/gsm8k", "main", "train", [{"question": "?", "answer": "#### 1"}])
    first = GSM8K("train").fingerprint()
    assert list((home / "base" / "datasets").rglob("*.arrow"))
    put_rows(home, "openai/gsm8k", "main", "train", [{"question": "!", "answer": "#### 12"}])
    assert GSM8K("train")[0]["messages"][0]["content"] == "!"
    assert GSM8K("train").fingerprint() != first


# Files of one's own


def line(text: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False)


def test_customjson_reads_any_line(home: Path):
    path = home / "chats.jsonl"
    path.write_bytes(f"{line('one')}\r\n\n{line('zwölf')}\n  \n{line('last')}".encode())
    task = CustomJSON(path=path)
    assert texts(task) == ["one", "zwölf", "last"]
    assert "line 3" in task.where(1)
    before = task.fingerprint()
    path.write_text(line("two"))
    assert CustomJSON(path=path).fingerprint() != before


BROKEN = [
    ('{"messages": [', "line 2: not valid JSON"),
    ('{"messages": []}', "'messages' is empty"),
    ('{"messages": [{"role": "user"}]}', "has no 'content'"),
    ("[1]", "no conversation but the value [1]"),
    (
        '{"messages": [{"role": "user", "content": "\xff"}]}',
        "line 2: byte 0xff at offset 43 is not",
    ),
    ("[" * 100_000, "line 2: not valid JSON"),
]


@pytest.mark.parametrize(("broken", "reason"), BROKEN)
def test_a_broken_line_is_named_or_skipped_and_counted(home: Path, broken: str, reason: str):
    path = home / "chats.jsonl"
    lines = [line("a").encode(), broken.encode("latin-1"), line("b").encode()]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match="line 2") as error:
        CustomJSON(path=path)[1]
    assert reason in str(error.value)
    task = CustomJSON(path=path, bad_rows="skip")
    assert texts(task) == ["a", "b"]
    assert task.skipped == 1
    assert reason in task.first_skipped


def test_customjson_refuses_what_is_no_file_of_conversations(home: Path):
    with pytest.raises(UserError, match="is not a file"):
        CustomJSON(path=home)
    with pytest.raises(UserError, match="only a train split"):
        CustomJSON("test")
    (home / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="has no conversations"):
        CustomJSON(path=home / "empty.jsonl")
    (home / "bad.jsonl").write_text("x\ny\n")
    with pytest.raises(UserError, match=r"first of 2 bad ones: bad\.jsonl line 1"):
        CustomJSON(path=home / "bad.jsonl", bad_rows="skip")


def test_the_projects_own_conversations_fit():
    task = CustomJSON()
    assert len(task) > 100
    for conversation in task:
        assert conversation["messages"][-1]["role"] == "assistant"


# By name


def test_specs():
    task = registry.build("arithmetic:7:level=2:seed=5", "test")
    assert (len(task), task.name, task.split) == (7, "arithmetic-level2", "test")
    assert task.settings() == {"size": 7, "level": 2, "seed": 5}
    words = [a + b + c for a in "abcd" for b in "efgh" for c in "ijkl"]
    bee = registry.build("spellingbee:3", "train", words=words, level="ignored")
    assert len(bee) == 3
    with pytest.raises(UserError, match="unknown task 'gsm9k'; there are arc"):
        registry.build("gsm9k", "train")
    with pytest.raises(UserError, match="cannot read 'leve=2'; arithmetic takes options: size"):
        registry.build("arithmetic:leve=2", "train")
    with pytest.raises(UserError, match="mmlu takes no options"):
        registry.build("mmlu:7", "train")


def test_a_path_may_be_an_option(home: Path):
    path = home / "chats.jsonl"
    path.write_text(line("one"))
    assert len(registry.build(f"customjson:{path}:bad_rows=skip", "train")) == 1
    assert specs._option_parts("C:\\a.jsonl:bad_rows=skip", "path") == [
        "C:\\a.jsonl",
        "bad_rows=skip",
    ]
    assert specs._option_parts("path=C:/a.jsonl", "path") == ["path=C:/a.jsonl"]


def test_mixture_specs():
    split_weight = registry.split_weight
    assert split_weight("gsm8k") == ("gsm8k", 1.0)
    assert split_weight("arc:easy:2") == ("arc:easy", 2.0)
    assert split_weight("arc:easy") == ("arc:easy", 1.0)
    assert split_weight("spellingbee:3000:0.5") == ("spellingbee:3000", 0.5)
    with pytest.raises(UserError, match="write 'spellingbee:3000:1'"):
        split_weight("spellingbee:3000")
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="must be above 0"):
            split_weight(f"gsm8k:{weight}")
    mixture, held_out = registry.build_mixture(["arithmetic:10:2", "arithmetic:8:level=3:0.5"])
    assert len(mixture) == len(texts(mixture)) == 10 * 2 + 8 // 2
    assert mixture.weights == [2.0, 0.5]
    rest = {text for half in held_out if half for text in texts(half)}
    assert rest
    assert not rest & set(texts(mixture))


def test_show_prints_rows_and_tool_calls():
    from rich.console import Console

    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    show(registry.build("arithmetic:5", "train"), 2, console)
    printed = console.export_text()
    assert "arithmetic/train row 1" in printed
    assert "arithmetic/train row 2" not in printed
    assert "[python: " in printed
    assert "5 rows" in printed


def test_show_says_what_is_not_trained_and_which_format_it_was(home: Path):
    from rich.console import Console

    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "No.", "weight": 0}]
    (home / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    show(registry.build(f"customjson:{home / 'a.jsonl'}", "train"), 2, console)
    printed = console.export_text()
    assert "user: Hi?" in printed
    assert "assistant (not trained): No." in printed
    assert "format: ShareGPT" in printed
