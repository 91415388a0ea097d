"""Construction of a task from its spec, and the command `python -m tasks.<name>`."""

import argparse
import inspect
import sys
from collections.abc import Callable
from typing import Any

from nanochat.errors import UserError
from nanochat.paths import user_path
from tasks.common import Task, show


def construct(
    constructor: Callable[..., Task], bare: str | None, spec: str, split: str, **options: Any
) -> Task:
    """Build the task of a spec, which begins with its name.

    `bare` is the option that a value without `key=` means. `options` are arguments that the spec
    leaves open; those that the task does not take are ignored. Raises UserError for an option in
    the spec that the task does not take.
    """
    name, _, rest = spec.partition(":")
    known = list(inspect.signature(constructor).parameters)
    known.remove("split")
    arguments = {key: value for key, value in options.items() if key in known}
    given: set[str] = set()
    for part in _option_parts(rest, bare):
        key, equals, value = part.partition("=")
        if not equals or (key not in known and is_file(part)):
            key, value = bare or "", part
        if key not in known:
            takes = f"options: {', '.join(known)}" if known else "no options"
            raise UserError(f"task '{spec}': cannot read '{part}'; {name} takes {takes}")
        if key in given:
            no_file = f"; there is no file {rest}" if bare == "path" else ""
            raise UserError(
                f"task '{spec}': {key} is given twice{no_file}; a weight belongs to --mix only"
            )
        given.add(key)
        arguments[key] = int(value) if value.isdecimal() else value
    return constructor(split, **arguments)


def is_file(path: str) -> bool:
    return bool(path) and user_path(path).is_file()


def _option_parts(text: str, bare: str | None) -> list[str]:
    """Split at colons, but not inside the name of a file, nor after a Windows drive letter."""
    parts: list[str] = []
    pieces = text.split(":") if text else []
    if bare == "path":
        for count in range(len(pieces), 1, -1):
            front = ":".join(pieces[:count])
            if is_file(front.removeprefix("path=")):
                parts, pieces = [front], pieces[count:]
                break
    for part in pieces:
        if parts and len(parts[-1].rpartition("=")[2]) == 1 and part[:1] in ("\\", "/"):
            parts[-1] += ":" + part
        else:
            parts.append(part)
    return parts


def main(bare: str | None, **constructors: Callable[..., Task]) -> None:
    """Print a few rows of each of a file's tasks, for `python -m tasks.<name> [OPTION ...]`."""
    parser = argparse.ArgumentParser(description=f"Show rows of {', '.join(constructors)}.")
    parser.add_argument("option", nargs="*", help="what follows the name in a spec: easy, level=2")
    parser.add_argument("--split", help="default: train, where there is such a split")
    parser.add_argument("-n", "--count", type=int, default=3, help="rows to show")
    arguments = parser.parse_args()
    try:
        for name, constructor in constructors.items():
            default = inspect.signature(constructor).parameters["split"].default
            split = arguments.split or (default if isinstance(default, str) else "train")
            spec = ":".join([name, *arguments.option])
            show(construct(constructor, bare, spec, split), arguments.count)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
