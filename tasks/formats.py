"""Formats of conversations, and their conversion to the schema of `nanochat.conversation`.

`FORMATS` lists the formats that are converted, `OTHERS` those that are recognised but cannot be
converted. Nothing is guessed: a field that has no place in the schema is an error, apart from
these:

- A tool call becomes a `python` part with the call as Python (`get_weather(city='Paris')`). The
  tool's answer becomes the `python_output` part after it. The model does not see the definitions in
  `tools`.
- At each turn of an OASST tree, the best-ranked reply is taken.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nanochat.conversation import is_trained
from nanochat.errors import UserError

Row = Any  # a value of JSON
Messages = list[dict[str, Any]]

# Functions of these names take source code as their only argument.
_PYTHON = {"python", "calculator", "code_interpreter"}
_CODE = {"code", "expression", "input", "source"}


class Format(NamedTuple):
    """A format of conversations: its name, how it is recognised, how it is converted."""

    name: str
    fits: Callable[[Row], bool]
    convert: Callable[[Row], Messages]


def convert(row: Row) -> tuple[str, dict[str, Any]]:
    """Convert a row; returns the name of its format and the conversation, not yet validated.

    Raises UserError, without the row's place, if the format is unknown or cannot be converted.
    """
    for form in FORMATS:
        if form.fits(row):
            if isinstance(row, dict):
                _check_keys(row)
            try:
                messages = form.convert(row)
            except UserError:
                raise
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"this looks like {form.name}, but cannot be read ({error!r}); mend or drop it"
                ) from None
            # Keys that a task needs beside the messages are kept.
            rest = row if isinstance(row, dict) and "messages" in row else {}
            return form.name, {**rest, "messages": messages}
    for name, fits, remedy in OTHERS:
        if fits(row):
            raise UserError(f"this looks like {name}; {remedy}")
    seen = f"the value {str(row)[:60]}"
    if isinstance(row, dict):
        seen = f"an object with {', '.join(map(str, row))[:200] or 'nothing in it'}"
    raise UserError(
        f"no conversation but {seen}; known formats are {', '.join(f.name for f in FORMATS)}"
    )


_CONTROLS = re.compile(r"weight|train(ing|able)?|mask(ed)?|loss.*")


def _check_keys(row: Mapping[str, Any]) -> None:
    for key, value in row.items():
        if value is not None and _CONTROLS.fullmatch(str(key)):
            raise UserError(
                f"the row has the key '{key}', which means nothing here; say in each message "
                'whether it is trained on ("weight": 0 or 1), and weigh the file in --mix'
            )


def _is_text(row: Row, *keys: str) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)


def _is_list(value: Row, *keys: str) -> bool:
    """True for a list of objects, the first of which has all these keys."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and all(key in value[0] for key in keys)
    )


def is_messages(value: Row) -> bool:
    """True for a list of messages, as OpenAI or ShareGPT write them."""
    return _is_list(value, "role") or _is_list(value, "from", "value")


# OpenAI's messages: roles `developer` and `tool`, calls beside the content


def _openai(messages: Row) -> Messages:
    """Convert messages; a tool's answer, and the text after it, join the message with the call."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return messages  # validate says what is wrong
    out: Messages = []
    grouped: list[int] = []  # assistants' messages whose content is a list of lists of parts
    waiting: dict[str, list[dict[str, str]]] = {}  # calls without an answer, by id
    answered = False
    for number, message in enumerate(messages):
        role = message.get("role")
        if role in ("tool", "function"):
            key = str(message.get("tool_call_id") or message.get("name") or "")
            if not key and len(waiting) == 1:
                key = next(iter(waiting))
            if key not in waiting:
                raise UserError(
                    f"message {number} ({role}) answers the call '{key}'; calls before it that "
                    f"have no answer: {', '.join(waiting) or 'none'}"
                )
            waiting.pop(key).append({"type": "python_output", "text": _text(message["content"])})
            answered = True
            continue
        waiting = {}
        calls = _calls(message, number)
        rest = {k: v for k, v in message.items() if k not in ("tool_calls", "function_call")}
        if role == "assistant" and (calls or answered):
            for key, source in calls:
                waiting[key] = [{"type": "python", "text": source}]
            content = [_parts(message.get("content")), *waiting.values()]
            if answered and is_trained(message) == is_trained(out[-1]):
                out[-1] = {**rest, **out[-1], "content": out[-1]["content"] + content}
            else:
                out.append({**rest, "content": content})
                grouped.append(len(out) - 1)
        else:
            out.append({**rest, "role": "system" if role == "developer" else role})
        answered = False
    for index in grouped:
        out[index]["content"] = [part for group in out[index]["content"] for part in group]
    return out


def _text(content: Row) -> str:
    return content if isinstance(content, str) else "".join(p["text"] for p in content or [])


def _parts(content: Row) -> list[Any]:
    """List the parts of a message, which may have calls only."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content or [])


def _calls(message: Mapping[str, Any], number: int) -> list[tuple[str, str]]:
    """List (id, source) of each call in a message."""
    calls = message.get("tool_calls") or []
    if message.get("function_call"):  # the older form, with one call
        calls = [{"function": message["function_call"]}]
    try:
        return [
            (str(call.get("id") or call["function"]["name"]), _source(call["function"]))
            for call in calls
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"message {number} has the tool calls {str(calls)[:80]} ({error!r}); expected "
            '[{"id": ..., "function": {"name": ..., "arguments": "{...}"}}]'
        ) from None


def _source(function: Mapping[str, Any]) -> str:
    """Write a call as Python: `get_weather(city='Paris')`."""
    name, arguments = function["name"], function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("a name and an object of arguments are needed")
    if name in _PYTHON and len(arguments) == 1:
        ((key, value),) = arguments.items()
        if key in _CODE and isinstance(value, str):
            return value
    if all(key.isidentifier() for key in arguments):
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    return f"{name}(**{arguments!r})"


# ShareGPT


def _turns(row: Row) -> Row:
    return (row.get("conversations") or row.get("conversation")) if isinstance(row, dict) else None


_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "function_call",
}


def _sharegpt(turns: Row, system: Row = None) -> Messages:
    messages: Messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns):
        speaker = turn["from"]
        if speaker not in _SPEAKERS:
            raise UserError(
                f"turn {number} is from {speaker!r}; expected one of {', '.join(_SPEAKERS)}"
            )
        rest = {key: turn[key] for key in turn if key not in ("from", "value")}
        message = {**rest, "role": _SPEAKERS[speaker], "content": turn["value"]}
        if message["role"] == "function_call":
            function = json.loads(turn["value"])
            message |= {"role": "assistant", "content": None, "function_call": function}
        messages.append(message)
    return _openai(messages)


# Questions and answers in fields of their own

_ANSWERS = ("output", "response", "completion")


def _is_alpaca(row: Row) -> bool:
    return any(
        _is_text(row, question, answer)
        for question in ("instruction", "prompt")
        for answer in _ANSWERS
    )


def _alpaca(row: Row) -> Messages:
    question = row.get("instruction") or row.get("prompt") or ""
    extra = row.get("input") or row.get("context") or ""
    answer = next(row[key] for key in _ANSWERS if isinstance(row.get(key), str))
    messages: Messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for asked, said in row.get("history") or []:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    asked = "\n\n".join(text for text in (question, extra) if text)
    return [
        *messages,
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer},
    ]


# Trees of OASST


def _oasst(row: Row) -> Messages:
    messages: Messages = []
    node = row["prompt"]
    while node is not None:
        role = {"prompter": "user", "assistant": "assistant"}.get(str(node.get("role")))
        if role is None:
            raise UserError(
                f"a message of the tree has the role {node.get('role')!r}; expected "
                "prompter or assistant"
            )
        messages.append({"role": role, "content": node.get("text")})
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        replies.sort(key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))
        node = replies[0] if replies else None
    while messages and messages[-1]["role"] == "user":
        messages.pop()  # the last message has no answer
    if not messages:
        raise UserError("nobody has answered the tree's prompt; leave it out")
    return messages


FORMATS = (
    Format(
        "messages",
        lambda row: isinstance(row, dict) and "messages" in row,
        lambda row: _openai(row["messages"]),
    ),
    Format("a list of messages", lambda row: _is_list(row, "role"), _openai),
    Format("a list of ShareGPT turns", lambda row: _is_list(row, "from", "value"), _sharegpt),
    Format(
        "ShareGPT",
        lambda row: _is_list(_turns(row), "from", "value"),
        lambda row: _sharegpt(_turns(row), row.get("system")),
    ),
    Format(
        "conversations", lambda row: _is_list(_turns(row), "role"), lambda r: _openai(_turns(r))
    ),
    Format("Alpaca", _is_alpaca, _alpaca),
    Format(
        "an OASST tree",
        lambda row: (
            isinstance(row, dict)
            and isinstance(row.get("prompt"), dict)
            and "replies" in row["prompt"]
        ),
        _oasst,
    ),
)
OTHERS: tuple[tuple[str, Callable[[Row], bool], str], ...] = (
    (
        "a pair of answers to choose from",
        lambda row: isinstance(row, dict) and {"chosen", "rejected"} <= row.keys(),
        "such files are for chat_rl --algo dpo --pairs",
    ),
    (
        "a single message of OASST",
        lambda row: isinstance(row, dict) and {"parent_id", "text", "role"} <= row.keys(),
        "take the file of trees instead (its name ends in trees.jsonl.gz)",
    ),
    (
        "plain text",
        lambda row: _is_text(row, "text"),
        "such files are a corpus: give them to tok_encode and mid_train with --corpus",
    ),
)
