"""Command line of every script: parse flags, start the ranks, run, report a user's mistake."""

import ast
import dataclasses
import errno
import functools
import inspect
import io
import itertools
import os
import shutil
import signal
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from nanochat import runtime
from nanochat.errors import UserError
from nanochat.runtime import Runtime

C = TypeVar("C")
T = TypeVar("T")


def launch(
    main: Callable[[C, Runtime], Any], config_class: type[C], description: str | None
) -> None:
    """Run `main(cfg, runtime)` from the command line.

    UserError and OSError (a full disk, a missing file) become one line on stderr and exit status 1.
    So does running out of memory, with advice on what to set. `NANOCHAT_TRACEBACK=1` shows their
    traceback. Every other exception is a bug and keeps its traceback. In a job of several ranks,
    any of these ends the whole job (`runtime.Alarm`).
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # scripts/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks is shown as "?" instead of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    cfg = parse(config_class, description=description)
    run = getattr(cfg, "run", cfg)
    started = None
    try:
        started = runtime.start(getattr(run, "device", "auto"), getattr(run, "dtype", "auto"))
        main(cfg, started)
        started.close()
        status = started.exit_code
    except Exception as failure:
        error = failure
        if is_out_of_memory(failure):
            advice = started.memory_advice if started else Runtime.memory_advice
            reason = str(failure).strip().partition("\n")[0] or type(failure).__name__
            error = UserError(f"out of memory: {advice} ({reason})")
        mistake = isinstance(error, (UserError, OSError))
        silent = mistake and not os.environ.get("NANOCHAT_TRACEBACK")
        if started and started.alarm:
            started.alarm.fail(error, "" if silent else traceback.format_exc())
        if not silent:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if status:
        sys.exit(status)


def is_out_of_memory(error: BaseException) -> bool:
    """True if the device or the machine had no memory left; on CPUs only the text tells."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


WIDEST = 100
PLACEHOLDERS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
registry = ConstructorRegistry()


def program() -> str | None:
    """Command that started this program: `python -m scripts.base_train`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else None


def laid_out(description: str) -> str:
    """Break the paragraphs of a text to the terminal's width; indented lines stay as they are.

    >>> print(laid_out("A long\\nsentence.\\n\\nExample:\\n    command --flag"))
    A long sentence.
    <BLANKLINE>
    Example:
        command --flag
    """
    width = min(shutil.get_terminal_size().columns, WIDEST)
    lines: list[str] = []
    for flowing, group in itertools.groupby(
        inspect.cleandoc(description).splitlines(), lambda line: line[:1].strip() != ""
    ):
        text = list(group)
        lines += textwrap.wrap(" ".join(text), width) if flowing else text
    return "\n".join(lines)


@registry.struct_rule
def configuration(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Describe a configuration's fields to tyro: type, default and help text of each."""
    if not dataclasses.is_dataclass(info.type):
        return None
    texts = field_texts(info.type)
    hints = typing.get_type_hints(info.type, include_extras=True)
    fields: list[StructFieldSpec] = []
    for field in dataclasses.fields(info.type):
        default = _default(field, info)
        hint, text = hints[field.name], texts.get(field.name)
        if text is not None and not dataclasses.is_dataclass(hint):
            shown = tyro.conf.arg(
                metavar=_placeholder(hint), help_behavior_hint=_default_shown(hint, default, text)
            )
            hint = Annotated[hint, shown]
        fields.append(StructFieldSpec(field.name, hint, default, text))
    return StructConstructorSpec(info.type, tuple(fields))


def field_texts(cls: type[Any]) -> dict[str, str]:
    """Docstring under each field, inherited fields included, each joined into one line."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _own_texts(base)
    return texts


@functools.cache  # finding the source of a class parses its whole file
def _own_texts(cls: type[Any]) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except OSError:  # made without a source file
        return {}
    texts: dict[str, str] = {}
    for field, below in itertools.pairwise(typing.cast(ast.ClassDef, tree.body[0]).body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts


def _default(field: "dataclasses.Field[Any]", info: StructTypeInfo) -> Any:
    if isinstance(info.default, info.type):
        return getattr(info.default, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING


def _placeholder(hint: Any) -> str | None:
    """Placeholder of a value in the help, such as INT for `int | None`; None leaves it to tyro."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return None
    options = [option for option in typing.get_args(hint) if option is not types.NoneType]
    return PLACEHOLDERS.get(options[0]) if len(options) == 1 else None


def _default_shown(hint: Any, default: Any, text: str) -> str | None:
    """Text in brackets after a flag's help; None leaves it to tyro."""
    if tyro.conf.UseAppendAction in getattr(hint, "__metadata__", ()):
        return None
    if isinstance(default, bool):
        return f"(default: {'on' if default else 'off'})"
    if default is None or default == ():
        return "" if "default" in text.lower() else "(default: none)"
    return None


def parse(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Read a configuration from the command line; unknown flags end the program with status 2."""
    arguments = [_expanded(part) for part in (sys.argv[1:] if argv is None else argv)]
    if description and not {"-h", "--help"}.isdisjoint(arguments):
        print(laid_out(description), end="\n\n")
    with registry:
        return tyro.cli(
            cls,
            prog=program(),
            args=_gathered(arguments, _list_flags(cls)),
            description="",
            config=(tyro.conf.OmitArgPrefixes,),
        )


def _expanded(argument: str) -> str:
    """Expand the `~` of `--out=~/x`; shells expand it only at the beginning of a word."""
    flag, equals, value = argument.partition("=") if argument[:1] == "-" else ("", "", argument)
    is_path = value == "~" or (value.startswith("~/") and not any(map(str.isspace, value)))
    return f"{flag}{equals}{Path(value).expanduser()}" if is_path else argument


def _list_flags(cls: type[Any]) -> set[str]:
    """List the flags that take any number of values, such as `--mix`."""
    flags = set()
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            flags |= _list_flags(hint)  # type: ignore[arg-type]
        elif typing.get_origin(hint) is tuple and ... in typing.get_args(hint):
            flags.add("--" + name.replace("_", "-"))
    return flags


def _gathered(arguments: list[str], flags: set[str]) -> list[str]:
    """Join repeated flags, `--mix a --mix b` -> `--mix a b`; else only the last one would count."""
    kept: list[str] = []
    values: dict[str, list[str]] = {}
    flag = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if argument.startswith("-"):
            flag = name if name in flags else ""
            if flag:
                values.setdefault(flag, []).extend([value] if equals else [])
                continue
        (values[flag] if flag else kept).append(argument)
    return kept + [part for flag, given in values.items() for part in (flag, *given)]
