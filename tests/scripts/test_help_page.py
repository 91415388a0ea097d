"""`--help` is a page a person can read."""

import dataclasses
import importlib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nanochat.cli import field_texts, laid_out, parse
from nanochat.runtime import Runtime

SCRIPTS = sorted(p.stem for p in (Path(__file__).parents[2] / "scripts").glob("[a-z]*.py"))


@dataclass(frozen=True)
class Inner:
    """Flags that belong together."""

    limit: int | None = None
    """Most of them."""
    names: tuple[str, ...] = ()
    """Their names; default: all."""


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=lambda: Inner(limit=3))
    count: int | None = None
    """A text that takes more than one line in the source, and continues with a
    256 and a half sentence."""
    fast: bool = False
    """Hurry."""


def test_a_field_that_is_a_dataclass_is_a_heading_and_its_flags_have_no_prefix(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = help_of(Outer, capsys)
    own, heading, inner = page.partition("inner options")
    assert heading
    assert "--count INT" in own
    assert "--limit INT  " not in own
    for part in ("Flags that belong together.", "--limit INT", "Most of them. (default: 3)"):
        assert part in inner
    line = ["--names", "a", "b", "--count", "2", "--names", "c"]
    assert parse(Outer, line) == Outer(inner=Inner(3, ("a", "b", "c")), count=2)


def test_no_page_is_a_long_list() -> None:
    """Flags that belong together stand together."""
    for name in SCRIPTS:
        cfg = config_of(importlib.import_module(f"scripts.{name}"))
        for cls in typing.get_args(cfg) or [cfg]:
            hints = typing.get_type_hints(cls)
            own = [name for name, hint in hints.items() if not dataclasses.is_dataclass(hint)]
            assert len(own) <= 12, (name, own)


def help_of(cls: type[Any], capsys: pytest.CaptureFixture[str], text: str | None = None) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(cls, ["--help"], text)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_one_flag_one_text_and_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    page = help_of(Outer, capsys)
    assert "source, and continues with a 256 and a half sentence. (default: none)" in page
    assert "--count INT" in page
    assert "Hurry. (default: off)" in page
    assert "inner options" in page
    assert "Flags that belong together." in page
    assert "Most of them. (default: 3)" in page
    assert "Their names; default: all.  " in page  # said once
    assert "None" not in page


def test_the_introduction_fits_the_terminal_and_examples_stay_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """One line.

    Words words words words
    words words words.

    Example:
        python -m scripts.plan --depth 20 --gpus 8 --gpu h100 --mfu 0.35 --price-per-hour 2.5
        python -m scripts.plan
    """
    monkeypatch.setenv("COLUMNS", "40")
    assert laid_out(text).splitlines() == [
        "One line.",
        "",
        "Words words words words words words",
        "words.",
        "",
        "Example:",
        "    python -m scripts.plan --depth 20 --gpus 8 --gpu h100 --mfu 0.35 --price-per-hour 2.5",
        "    python -m scripts.plan",
    ]
    assert help_of(Outer, capsys, text).startswith(laid_out(text))


def config_of(module: Any) -> Any:
    """The class, or the union of classes, that a script is configured with."""
    # Scripts that start without torch do not import what they only annotate with.
    return typing.get_type_hints(module.main, localns={"Runtime": Runtime})["cfg"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_an_example_and_a_text_for_every_flag(name: str) -> None:
    module = importlib.import_module(f"scripts.{name}")
    examples = [line for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert any(f"-m scripts.{name}" in line for line in examples)
    cfg = config_of(module)
    missing, classes = [], list(typing.get_args(cfg)) or [cfg]
    for cls in classes:
        texts = field_texts(cls)
        for entry, hint in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(hint):
                classes.append(hint)
            elif not texts.get(entry):
                missing.append(f"{cls.__name__}.{entry}")
    assert not missing
