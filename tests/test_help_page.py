"""`--help` is a page a person can read."""

import dataclasses
import importlib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nanochat.config import parse
from nanochat.help_page import field_texts, laid_out
from nanochat.runtime import Runtime

SCRIPTS = sorted(p.stem for p in (Path(__file__).parent.parent / "scripts").glob("[a-z]*.py"))


@dataclass(frozen=True)
class Inner:
    """What belongs together."""

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
    """Whether it hurries."""


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
    assert "Whether it hurries. (default: off)" in page
    assert "inner options" in page
    assert "What belongs together." in page
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_an_example_and_a_text_for_every_flag(name: str) -> None:
    module = importlib.import_module(f"scripts.{name}")
    examples = [line for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert any(f"-m scripts.{name}" in line for line in examples)
    # Scripts that start without torch do not import what they only annotate with.
    cfg = typing.get_type_hints(module.main, localns={"Runtime": Runtime})["cfg"]
    missing, classes = [], list(typing.get_args(cfg)) or [cfg]
    for cls in classes:
        texts = field_texts(cls)
        for entry, hint in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(hint):
                classes.append(hint)
            elif not texts.get(entry):
                missing.append(f"{cls.__name__}.{entry}")
    assert not missing
