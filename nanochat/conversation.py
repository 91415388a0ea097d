"""Schema of a conversation, and its validation.

    {"messages": [{"role": "system" | "user" | "assistant", "content": str | [part, ...]}, ...]}
    part = {"type": "text" | "python" | "python_output", "text": str}

A plain string is one text part. Only assistants have `python` parts (a tool call) and
`python_output` parts (its result, directly after the call). Roles need not alternate: consecutive
messages of one role stay separate messages. A task may keep its answer beside "messages".

A message may also have `"weight": 0` or `"train": false`: the model sees the message but is never
trained on it. 1 and true change nothing. A `name` is accepted, but the model does not see it. Any
other key is an error unless its value is null or empty, because it might say what to train on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nanochat.errors import UserError

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "python", "python_output")
_KEYS = ("role", "content", "weight", "train", "name")


def _shown(value: object) -> str:
    """Show `value` so briefly that it fits into an error of one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def parts(message: Mapping[str, Any]) -> list[dict[str, str]]:
    """List the parts of a valid message: `[{"type": ..., "text": ...}, ...]`."""
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{"type": part["type"], "text": part["text"]} for part in content]


def is_trained(message: Mapping[str, Any]) -> bool:
    """Return False if a valid message has `"weight": 0` or `"train": false`, else True."""
    return message.get("weight") in (None, 1) and message.get("train") in (None, True)


def validate(conversation: object, where: str, last_role: str | None = None) -> None:
    """Raise `UserError` unless `conversation` fits the schema.

    `where` names the row in the error (`"gsm8k/train row 17"`). With `last_role`, the last message
    must be from that role. A message must have some text; whitespace counts as text, an empty
    string does not.
    """

    def fail(wrong: str, right: str) -> None:
        raise UserError(f"{where}: {wrong}; {right}")

    if not isinstance(conversation, Mapping) or "messages" not in conversation:
        fail(
            f"a conversation must have 'messages', got {_shown(conversation)}",
            'expected {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    messages = conversation["messages"]  # type: ignore[index]
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        fail(f"'messages' is {_shown(messages)}", "expected a list of messages")
    if len(messages) == 0:
        fail("'messages' is empty", "expected at least one message")

    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            fail(f"message {i} is {_shown(message)}", "expected an object with role and content")
        for key in ("role", "content"):
            if key not in message:
                fail(f"message {i} has no '{key}'", "every message needs role and content")
        for key, value in message.items():
            if key not in _KEYS and value not in (None, "", [], {}):
                fail(
                    f"message {i} has the key '{key}', which means nothing here",
                    f"a message has {', '.join(_KEYS)}; remove the key, and write "
                    '"weight": 0 in a message that is not to be trained on',
                )
        for key, known in (("weight", "0 or 1"), ("train", "true or false")):
            value = message.get(key)
            if value is not None and not (
                value in (0, 1) and (key == "weight" or value is bool(value))
            ):
                fail(f"message {i} has the {key} {_shown(value)}", f"expected {known}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            fail(f"message {i} has the role {_shown(role)}", f"expected one of {', '.join(ROLES)}")
        if isinstance(content, str):
            if not content:
                fail(f"message {i} ({role}) has no text", "fill it in or drop the message")
            continue
        if not isinstance(content, Sequence) or isinstance(content, bytes):
            fail(
                f"message {i} ({role}) has the content {_shown(content)}",
                "expected a string or a list of parts",
            )
        previous = None
        for j, part in enumerate(content):
            name = f"message {i} ({role}) part {j}"
            if not isinstance(part, Mapping) or not {"type", "text"} <= part.keys():
                fail(f"{name} is {_shown(part)}", 'expected {"type": ..., "text": ...}')
            kind, text = part["type"], part["text"]
            if kind not in PART_TYPES:
                fail(
                    f"{name} has the type {_shown(kind)}",
                    f"expected one of {', '.join(PART_TYPES)}",
                )
            if not isinstance(text, str):
                fail(f"{name} has the text {_shown(text)}", "expected a string")
            if kind != "text" and role != "assistant":
                fail(f"{name} has the type '{kind}'", "only assistant messages call tools")
            if kind == "python_output" and previous != "python":
                fail(f"{name} is a tool output", "it must directly follow a python part")
            previous = kind
        # A tool's output may be empty; text and tool calls may not.
        if not any(part["text"] for part in content if part["type"] != "python_output"):
            fail(f"message {i} ({role}) has no text", "fill it in or drop the message")

    if last_role is not None and messages[-1]["role"] != last_role:
        fail(
            f"the last message is from '{messages[-1]['role']}'",
            f"expected it to be from '{last_role}'",
        )
