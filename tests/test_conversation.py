"""The conversation schema accepts what it should, and says what is wrong with everything else."""

from typing import Any

import pytest

from nanochat.conversation import parts, validate
from nanochat.errors import UserError

WHERE = "gsm8k/train row 17"


def user(content: Any = "Hi.") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(*kinds: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": kind, "text": kind} for kind in kinds]}


@pytest.mark.parametrize(
    "messages",
    [
        [user()],
        [user(), user("Still there?"), assistant("text"), assistant("text")],
        [{"role": "system", "content": "Be kind."}, user(), assistant("text")],
        [user([{"type": "text", "text": "Hi."}])],
        [user(), assistant("text", "python", "python_output", "text", "python")],
        [user(" ")],
        [user(), {"role": "assistant", "content": "Yes.", "name": "Ann", "tool_calls": []}],
        [{**user(), "weight": 0}, {"role": "assistant", "content": "Yes.", "weight": 1.0}],
        [{**user(), "train": False}, {"role": "assistant", "content": "Yes.", "train": True}],
        (user(),),
    ],
)
def test_valid(messages: Any) -> None:
    validate({"messages": messages, "answer": 42}, WHERE)


def test_empty_tool_output_is_fine() -> None:
    call = [{"type": "python", "text": "None"}, {"type": "python_output", "text": ""}]
    validate({"messages": [user(), {"role": "assistant", "content": call}]}, WHERE)


def test_tool_output_alone_is_nothing_said() -> None:
    call = [{"type": "python", "text": ""}, {"type": "python_output", "text": "4"}]
    with pytest.raises(UserError, match=r"message 1 \(assistant\) has no text"):
        validate({"messages": [user(), {"role": "assistant", "content": call}]}, WHERE)


@pytest.mark.parametrize(
    ("conversation", "says"),
    [
        (None, "'messages', got None"),
        ({"turns": []}, "'messages', got"),
        ({"messages": "Hi."}, "'messages' is 'Hi.'"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [user(), "Hi."]}, "message 1 is 'Hi.'"),
        ({"messages": [{"content": "Hi."}]}, "message 0 has no 'role'"),
        ({"messages": [{"role": "user"}]}, "message 0 has no 'content'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "the role 'tool'"),
        ({"messages": [{"role": None, "content": "x"}]}, "the role None"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "the role \\['user'\\]"),
        ({"messages": [{**user(), "weight": 0.5}]}, "the weight 0.5; expected 0 or 1"),
        ({"messages": [{**user(), "weight": "0"}]}, "the weight '0'; expected 0 or 1"),
        ({"messages": [{**user(), "train": 0}]}, "the train 0; expected true or false"),
        ({"messages": [{**user(), "mask": 0}]}, "the key 'mask', which means nothing here"),
        ({"messages": [{**user(), "tool_calls": [{}]}]}, "the key 'tool_calls'"),
        ({"messages": [user("")]}, "message 0 \\(user\\) has no text"),
        ({"messages": [user([])]}, "message 0 \\(user\\) has no text"),
        ({"messages": [user(None)]}, "the content None"),
        ({"messages": [user(3)]}, "the content 3"),
        ({"messages": [user(["Hi."])]}, "part 0 is 'Hi.'"),
        ({"messages": [user([{"type": "image", "text": "x"}])]}, "the type 'image'"),
        ({"messages": [user([{"type": "text", "text": None}])]}, "the text None"),
        ({"messages": [user([{"type": "python", "text": "1"}])]}, "only assistant messages"),
        ({"messages": [user(), assistant("python_output")]}, "directly follow"),
        ({"messages": [user(), assistant("python", "text", "python_output")]}, "directly follow"),
    ],
)
def test_errors_name_row_and_reason(conversation: Any, says: str) -> None:
    with pytest.raises(UserError, match=f"^{WHERE}: .*{says}") as caught:
        validate(conversation, WHERE)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # and what would be right


def test_long_values_are_shortened() -> None:
    with pytest.raises(UserError) as caught:
        validate({"messages": [{"role": "x" * 10_000, "content": ""}]}, WHERE)
    assert len(str(caught.value)) < 300


def test_last_role() -> None:
    conversation = {"messages": [user(), assistant("text")]}
    validate(conversation, WHERE, last_role="assistant")
    with pytest.raises(UserError, match="the last message is from 'assistant'"):
        validate(conversation, WHERE, last_role="user")


def test_parts() -> None:
    assert parts(user("Hi.")) == [{"type": "text", "text": "Hi."}]
    assert parts(assistant("text", "python")) == [
        {"type": "text", "text": "text"},
        {"type": "python", "text": "python"},
    ]
