"""What `--help` prints: one page a person can read, from the docstrings of a configuration.

tyro keeps the line breaks of the source in the text of a flag, never breaks the lines of the
introduction, and writes an unset option as `{None}|INT (default: None)`; this mends it.
"""

import ast
import dataclasses
import inspect
import itertools
import shutil
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

WIDEST = 100
PLACEHOLDERS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}

registry = ConstructorRegistry()


def program() -> str | None:
    """How this program was started: `python -m scripts.base_train`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else None


def laid_out(description: str) -> str:
    """The text with its paragraphs broken to the terminal's width; indented lines stay as they are.

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


class Group:
    """A base of configurations whose fields have a heading of their own in their help.

    `class Config(Sampling)` with `class Sampling(Group)`: `cfg.temperature` is a setting like any
    other, and stands under "sampling options", below the docstring of Sampling.
    """


@registry.struct_rule
def configuration(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A configuration's fields for tyro, with its own types and what the help says of each."""
    if not dataclasses.is_dataclass(info.type):
        return None
    texts = field_texts(info.type)
    hints = typing.get_type_hints(info.type, include_extras=True)
    all_fields = dataclasses.fields(info.type)
    fields: list[StructFieldSpec] = []
    grouped: set[str] = set()
    groups: list[Any] = [b for b in info.type.__bases__ if issubclass(b, Group) and b is not Group]
    for group in groups:
        names = {field.name for field in dataclasses.fields(group)}
        values = {f.name: _default(f, info) for f in all_fields if f.name in names}
        name = group.__name__.lower()
        fields.append(StructFieldSpec(name, group, group(**values), group.__doc__))
        grouped |= names
    for field in all_fields:
        if field.name in grouped:
            continue
        default = _default(field, info)
        hint, text = hints[field.name], texts.get(field.name)
        if text is not None and not dataclasses.is_dataclass(hint):
            shown = tyro.conf.arg(
                metavar=_placeholder(hint), help_behavior_hint=_default_shown(hint, default, text)
            )
            hint = Annotated[hint, shown]
        fields.append(StructFieldSpec(field.name, hint, default, text))

    def build(**values: Any) -> Any:
        for group in groups:
            values |= vars(values.pop(group.__name__.lower()))
        return info.type(**values)

    return StructConstructorSpec(build if groups else info.type, tuple(fields))


def field_texts(cls: type[Any]) -> dict[str, str]:
    """The docstring under each field, inherited ones too, in one line each."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except OSError:  # made without a source file
            continue
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
    """INT for `int | None`; None for what tyro names well itself."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return None
    options = [option for option in typing.get_args(hint) if option is not types.NoneType]
    return PLACEHOLDERS.get(options[0]) if len(options) == 1 else None


def _default_shown(hint: Any, default: Any, text: str) -> str | None:
    """What follows the text in brackets; None leaves it to tyro."""
    if tyro.conf.UseAppendAction in getattr(hint, "__metadata__", ()):
        return None
    if isinstance(default, bool):
        return f"(default: {'on' if default else 'off'})"
    if default is None or default == ():
        return "" if "default" in text.lower() else "(default: none)"
    return None
