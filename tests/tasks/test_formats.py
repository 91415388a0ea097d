"""Conversations in the formats of others become the project's own, or are named and refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nanochat.conversation import validate
from nanochat.errors import UserError
from tasks import registry
from tasks.customjson import CustomJSON
from tasks.formats import FORMATS, convert

ASKED, SAID = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
CALL = {"id": "c1", "type": "function"}
WEATHER = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}}
PYTHON = {**CALL, "id": "c2", "function": {"name": "python", "arguments": {"code": "6*7"}}}
REPLIES = [
    {"role": "assistant", "text": "Worse.", "rank": 1, "replies": []},
    {"role": "assistant", "text": "Gone.", "rank": 0, "deleted": True},
    {
        "role": "assistant",
        "text": "Yes.",
        "rank": 0,
        "replies": [{"role": "prompter", "text": "?"}],
    },
]
SHAREGPT = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]


def text(*parts: tuple[str, str]) -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for kind, text in parts]


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("messages", {"messages": [ASKED, SAID], "id": 7}, [ASKED, SAID]),
        ("a list of messages", [ASKED, SAID], [ASKED, SAID]),
        ("a list of ShareGPT turns", SHAREGPT, [ASKED, SAID]),
        ("ShareGPT", {"id": "x", "conversations": SHAREGPT}, [ASKED, SAID]),
        (
            "ShareGPT",
            {"conversations": [SHAREGPT[0], {**SHAREGPT[1], "weight": 0}], "system": "Be kind."},
            [{"role": "system", "content": "Be kind."}, ASKED, {**SAID, "weight": 0}],
        ),
        (
            "ShareGPT",
            {
                "conversations": [
                    {"from": "human", "value": "Hi?"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "one"},
                    {"from": "gpt", "value": "Yes."},
                ]
            },
            [
                ASKED,
                {
                    "role": "assistant",
                    "content": text(
                        ("python", "f(x=1)"), ("python_output", "one"), ("text", "Yes.")
                    ),
                },
            ],
        ),
        ("conversations", {"conversation": [ASKED, SAID]}, [ASKED, SAID]),
        ("Alpaca", {"instruction": "Hi?", "input": "", "output": "Yes."}, [ASKED, SAID]),
        (
            "Alpaca",
            {"instruction": "Hi?", "input": "You.", "output": "Yes.", "history": [["a", "b"]]},
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "Hi?\n\nYou."},
                SAID,
            ],
        ),
        ("Alpaca", {"instruction": "Hi?", "context": "", "response": "Yes."}, [ASKED, SAID]),
        ("Alpaca", {"prompt": "Hi?", "completion": "Yes."}, [ASKED, SAID]),
        (
            "an OASST tree",
            {
                "message_tree_id": "t",
                "prompt": {"role": "prompter", "text": "Hi?", "replies": REPLIES},
            },
            [ASKED, SAID],
        ),
        (
            "messages",
            {
                "tools": [{"type": "function"}],
                "messages": [
                    {"role": "developer", "content": "Be kind."},
                    ASKED,
                    {"role": "assistant", "content": None, "tool_calls": [WEATHER, PYTHON]},
                    {"role": "tool", "tool_call_id": "c2", "content": "42"},
                    {"role": "tool", "tool_call_id": "c1", "content": text(("text", "Sunny"))},
                    {"role": "assistant", "content": "So.", "tool_calls": [PYTHON]},
                    {"role": "tool", "tool_call_id": "c2", "content": "42"},
                    {"role": "assistant", "content": "Yes.", "refusal": None, "weight": 1},
                    ASKED,
                ],
            },
            [
                {"role": "system", "content": "Be kind."},
                ASKED,
                {
                    "role": "assistant",
                    "content": text(
                        ("python", "weather(city='Paris', days=2)"),
                        ("python_output", "Sunny"),
                        ("python", "6*7"),
                        ("python_output", "42"),
                        ("text", "So."),
                        ("python", "6*7"),
                        ("python_output", "42"),
                        ("text", "Yes."),
                    ),
                    "refusal": None,
                    "weight": 1,
                },
                ASKED,
            ],
        ),
        (
            "messages",  # a call that is not trained on stays apart from the answer that is
            {
                "messages": [
                    ASKED,
                    {
                        "role": "assistant",
                        "content": None,
                        "function_call": {"name": "odd", "arguments": '{"a b": 1}'},
                        "weight": 0,
                    },
                    {"role": "function", "name": "odd", "content": ""},
                    SAID,
                ]
            },
            [
                ASKED,
                {
                    "role": "assistant",
                    "content": text(("python", "odd(**{'a b': 1})"), ("python_output", "")),
                    "weight": 0,
                },
                {"role": "assistant", "content": text(("text", "Yes."))},
            ],
        ),
    ],
)
def test_formats(name: str, row: Any, messages: list[Any]) -> None:
    before = json.dumps(row)
    found, conversation = convert(row)
    assert (found, conversation["messages"]) == (name, messages)
    validate(conversation, "here")
    assert json.dumps(row) == before
    assert name in {form.name for form in FORMATS}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "Once upon a time."}, "looks like plain text; such files are a corpus"),
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b"}, "pair of answers.*chat_rl --algo dpo"),
        ({"message_id": 1, "parent_id": None, "text": "", "role": "prompter"}, "file of trees"),
        (
            {"question": "Hi?", "answer": "Yes."},
            "but an object with question, answer",
        ),
        ({}, "an object with nothing in it"),
        (["Hi?"], r"the value \['Hi\?'\]; known formats are messages, a list of messages"),
        (None, "the value None"),
        ({"messages": [ASKED, SAID], "weight": 0}, "the row has the key 'weight'"),
        ({"conversations": SHAREGPT, "loss_mask": [0, 1]}, "the row has the key 'loss_mask'"),
        (
            {"conversations": [SHAREGPT[0], {"from": "alien", "value": ""}]},
            "turn 1 is from 'alien'",
        ),
        ({"conversations": [SHAREGPT[0], "Yes."]}, "looks like ShareGPT, but cannot be read"),
        (
            {"messages": [ASKED, {"role": "tool", "tool_call_id": "x", "content": ""}]},
            "the call 'x'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            r"message 0 has the tool calls \[\{'id': 'x'\}\]",
        ),
        (
            {"messages": [{**SAID, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "message 0 has the tool calls",
        ),
        ({"prompt": {"role": "prompter", "text": "Hi?", "replies": []}}, "nobody has answered"),
    ],
)
def test_what_cannot_be_converted_is_named(row: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        convert(row)
    assert len(str(caught.value)) < 400


ROWS = [{"instruction": f"Say {i}.", "input": "é", "output": f"{i}"} for i in range(3)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", "\ufeff \n" + json.dumps(ROWS, ensure_ascii=False)),
        ("a.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("a.jsonl", "\r".join(json.dumps(row) for row in ROWS)),
        ("a.jsonl", "\n".join(json.dumps([ASKED, {**SAID, "content": str(i)}]) for i in range(3))),
        ("a.json", json.dumps([[ASKED, {**SAID, "content": str(i)}] for i in range(3)])),
        ("a.jsonl.gz", "\n".join(json.dumps(row) for row in ROWS)),
        ("a.json.GZ", json.dumps(ROWS, indent=1)),
    ],
)
def test_files_of_rows(tmp_path: Path, name: str, content: str) -> None:
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    task = CustomJSON(path=tmp_path / name)
    assert [row["messages"][-1]["content"] for row in task] == ["0", "1", "2"]
    assert {row["format"] for row in task} <= {"Alpaca", "a list of messages"}


@pytest.mark.parametrize("broken", ['[{"a": 1} {}]', '[{"a": 1},', '[{"a": 1', "[1,]"])
def test_a_broken_list(tmp_path: Path, broken: str) -> None:
    (tmp_path / "a.json").write_text(broken)
    with pytest.raises(UserError, match=r"a\.json object \d: not valid JSON .*per line"):
        CustomJSON(path=tmp_path / "a.json")


def test_an_empty_list_has_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(" [ ] ")
    with pytest.raises(UserError, match="has no conversations"):
        CustomJSON(path=tmp_path / "a.json")


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps([ASKED], ensure_ascii=False).encode() + b"\n")
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write('[{"role": "user", "content": "café"}]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.jsonl line 2: byte 0xe9 .* is not UTF-8; convert"):
        CustomJSON(path=tmp_path / "a.jsonl")[1]


@pytest.mark.parametrize("name", ["10:30.jsonl", "a=b.jsonl", "a:b=c:7", "7"])
def test_odd_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(json.dumps([ASKED, SAID]))
    for path in (name, str(tmp_path / name)):
        for spec in (f"customjson:{path}", f"customjson:{path}:bad_rows=skip"):
            assert len(registry.build(spec, "train")) == 1
        assert registry.split_weight(f"customjson:{path}") == (f"customjson:{path}", 1.0)
        assert registry.split_weight(f"customjson:{path}:0.5") == (f"customjson:{path}", 0.5)
    with pytest.raises(UserError, match="there is no file gone:1:x"):
        registry.build("customjson:gone:1:x", "train")
