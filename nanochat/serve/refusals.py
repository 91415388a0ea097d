"""Error messages for invalid requests: which field is wrong, and which values are allowed.

FastAPI reports every way in which a value failed every type that its field may have. A client gets
the one failure that lies deepest in what it sent, named by the path in its own JSON.
"""

import json
from collections.abc import Sequence
from typing import Any

from nanochat.serve.service import ApiError

_KINDS = {
    "string": "a string",
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a number",
    "bool": "true or false",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
    "model_attributes": "an object",
}
_LIMITS = {
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_long": "may have at most {max_length} characters",
    "too_long": "may have at most {max_length} entries",
}
_JSON = "the answer cannot be held to a format; ask for it in a message and check what comes"
_TOOLS = (
    "this server calls no tools of its clients; the model's own tools run on the server, and "
    "answers show them as parts"
)
UNSUPPORTED = {
    "response_format": f'only {{"type": "text"}}: {_JSON}',
    "structured_outputs": _JSON,
    "guided_json": _JSON,
    "guided_regex": _JSON,
    "guided_choice": _JSON,
    "guided_grammar": _JSON,
    "grammar": _JSON,
    "json_schema": _JSON,
    "tools": f'{_TOOLS}; leave it out or add "tool_choice": "none"',
    "functions": f'{_TOOLS}; leave it out or add "function_call": "none"',
    "tool_choice": f'only "none" and "auto": {_TOOLS}',
    "function_call": f'only "none" and "auto": {_TOOLS}',
    "tool_calls": _TOOLS,
    "modalities": 'only ["text"]: this model reads and writes text',
    "audio": "this model reads and writes text",
    "web_search_options": "this server searches nothing",
    "reasoning_effort": 'only "none": this model has no hidden reasoning',
    "verbosity": 'only "medium": say in a message how long the answer should be',
    "store": "only false: answers are not stored here",
    "logit_bias": "leave it out",
    "frequency_penalty": "only 0: repetition_penalty is supported",
    "presence_penalty": "only 0: repetition_penalty is supported",
    "echo": "only false",
    "suffix": "leave it out",
    "best_of": "only 1: ask for n samples and choose",
}
"""Fields of other servers that are not supported, with the supported values and the reason."""

_SHAPES = {
    "stop": "must be a string of 1 to 200 characters, or a list of at most 16 of them",
    "prompt": "must be a string, a list of token ids, or a list of strings or lists of token ids",
}
"""Fields of several types, with all allowed types in one sentence."""


def refusal(errors: Sequence[Any], body: Any) -> ApiError:
    """Make the error for a request. errors: pydantic's, with locations that begin with "body"."""
    first = errors[0]
    if first["type"] == "json_invalid":
        what = first.get("ctx", {}).get("error", "it cannot be read")
        return ApiError(400, f"the body is not JSON ({what} at character {first['loc'][-1]})")
    paths = [_path(error, body) for error in errors]
    path = max(paths, key=len)
    group = [error for error, at in zip(errors, paths, strict=True) if at == path]
    if not path:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    if group[0]["type"].startswith("union_tag"):
        path = [*path, "role"]
    for i, field in enumerate(path):
        if field in UNSUPPORTED:
            name = _shown_path(path[: i + 1])
            message = f"{name} is not supported: {UNSUPPORTED[field]}"
            return ApiError(400, message, "unsupported_parameter", name)
    name = _shown_path(path)
    words = _SHAPES.get(str(path[0])) or _words(group)
    return ApiError(400, f"{name} {words}", param=name)


def _path(error: Any, body: Any) -> list[str | int]:
    """Path of an error in the client's JSON: `("body", "stop", "constrained-str")` gives `stop`."""
    path: list[str | int] = []
    node = body
    for step in error["loc"][1:]:
        inside = isinstance(node, list) and isinstance(step, int) and step < len(node)
        if inside or (isinstance(node, dict) and step in node):
            path.append(step)
            node = node[step]
    if error["type"] == "missing" and len(error["loc"]) > 1:
        path.append(error["loc"][-1])
    return path


def _shown_path(path: Sequence[str | int]) -> str:
    """Format a path: `["messages", 0, "content"]` -> `messages[0].content`."""
    return "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in path).lstrip(".")


def _words(group: Sequence[Any]) -> str:
    """Describe what is wrong with one value, from the errors for each of its allowed types."""
    # If the value has an allowed type but is too long, the other types are not mentioned.
    first = next((e for e in group if _kind(e) is None), None)
    got = _shown(group[0]["input"])
    if first is None:
        kinds = dict.fromkeys(str(_kind(error)) for error in group)
        return f"must be {' or '.join(kinds)}, not {got}"
    kind, context = first["type"], first.get("ctx", {})
    if kind == "missing":
        return "is required"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    if kind == "union_tag_not_found":
        return "is required"
    if kind == "union_tag_invalid":
        return f"{context['tag']!r} is not supported; it must be one of {context['expected_tags']}"
    if kind == "literal_error":
        return f"{got} is not supported; it must be {context['expected']}"
    if kind in _LIMITS:
        limits = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in context.items()
        }
        return f"{_LIMITS[kind].format(**limits)}, not {got}"
    return "is not valid"


def _kind(error: Any) -> str | None:
    """Type that the value should have had; None for an error that is not about its type."""
    name = error["type"]
    for ending in ("_type", "_parsing", "_parsing_size", "_from_float", "_unicode"):
        name = name.removesuffix(ending)
    return _KINDS.get(name)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
