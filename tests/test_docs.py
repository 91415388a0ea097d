"""Names and commands in the pages of docs, and first words of docstrings, are checked."""

import ast
import importlib
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

from nanochat.cli import parse
from nanochat.optim import KINDS
from tasks.common import Task
from tasks.registry import TASKS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"[\w./-]+\.(?:py|md|sh|toml|yml|ipynb|js|css|html)")
NAME = re.compile(r"[A-Za-z]\w*(?:\.[A-Za-z]\w*)*")
COMMAND = re.compile(r"(?:python|torchrun)\b.*?-m (\w+(?:\.\w+)+)(.*)")
ELSEWHERE = {"report.md", "report.html", "out.html", "page.html", "reverse.py"}
"""Written by a run, or by the reader."""


@cache
def files() -> list[str]:
    """Files of the project: a repository next to a virtual environment holds more than that."""
    folders = [
        p for p in ROOT.iterdir() if p.is_dir() and (p.name[0] != "." or p.name == ".github")
    ]
    found = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    return [p.relative_to(ROOT).as_posix() for p in [*found, *ROOT.iterdir()]]


@cache
def words() -> set[str]:
    """Every word of the sources: what is defined there, and what they use of others."""
    kinds = (".py", ".sh", ".toml", ".js", ".yml")
    sources = [ROOT / f for f in files() if f.endswith(kinds) and not f.endswith("test_docs.py")]
    return {word for path in sources for word in re.findall(r"\w+", path.read_text("utf-8"))}


@cache
def defined_tests(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / file).read_text("utf-8"), re.MULTILINE))


def missing(span: str) -> str | None:
    """Name of a code span that does not exist; None if nothing is missing, or it names nothing."""
    file, _, test = span.partition("::")
    if FILE.fullmatch(file):
        ends = file if "/" in file else f"/{file}"
        if Path(file).name not in ELSEWHERE and not any(f"/{f}".endswith(ends) for f in files()):
            return f"no file {file}"
        if test and test not in defined_tests(file):
            return f"no test {test} in {file}"
        return None
    if span.startswith("test_") and span.isidentifier():
        known = {
            t
            for f in files()
            if Path(f).match("tests/**/test_*.py") or Path(f).match("tests/test_*.py")
            for t in defined_tests(f)
        }
        return None if span in known else f"no test {span}"
    name = span.removesuffix("()")
    telling = name != span or re.search(r"[._]|[a-z][A-Z]", name)
    if telling and NAME.fullmatch(name) and not name.isupper():
        return None if set(name.split(".")) <= words() else f"nothing is called {name}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    wrong = {found for span in spans if (found := missing(span))}
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", FENCE.sub("", text))
    wrong |= {f"no page {link}" for link in links if not (page.parent / link).exists()}
    assert not wrong


def test_what_does_not_exist_is_found() -> None:
    for span in (
        "nanochat/nothing.py", "nothing.py", "tests/test_docs.py::test_nothing", "test_nothing",
        "docs/nothing.md", "extend_nothing", "Optimizer.no_such_thing", "NoSuchThing",
    ):  # fmt: skip
        assert missing(span), span
    for span in (
        "nanochat/gpt.py", "gpt.py", "tests/test_rope.py", "test_what_does_not_exist_is_found",
        "extend_context", "Optimizer.step", "NANOCHAT_ANYTHING", "--flag", "bbe", "a sentence.",
    ):  # fmt: skip
        assert missing(span) is None, span


def test_every_file_is_in_the_map() -> None:
    """The name stands in a code span of a table."""
    map_ = "\n".join(
        line
        for line in (ROOT / "docs/design.md").read_text("utf-8").splitlines()
        if line[:1] == "|"
    )
    named = set(re.findall(r"`([\w./]+)`", map_))
    code = [f for f in files() if re.match(r"(nanochat|tasks|scripts)/.*\.(py|sh|bash)$", f)]
    wanted = {Path(f).name for f in code} - {"__init__.py"}
    assert not wanted - {Path(name).name for name in named}


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_every_task_and_every_optimizer_is_named(page: str) -> None:
    known = set(re.findall(r"\w+", (ROOT / page).read_text("utf-8")))
    assert not {*TASKS, *KINDS} - known


def test_every_task_with_rewards_is_in_the_page_on_rl() -> None:
    page = (ROOT / "docs/rl.md").read_text("utf-8")
    judged = [
        name
        for name, entry in TASKS.items()
        if getattr(entry.constructor, "eval_type", "") == "generative"
        and getattr(entry.constructor, "evaluate", None) is not Task.evaluate
    ]
    assert len(judged) > 5
    test_only = {"first_contact", "humaneval"}
    assert not [name for name in judged if f"`{name}`" not in page and name not in test_only]


def commands(page: Path) -> list[str]:
    """The commands of a page that run a module of this project, without their surroundings."""
    text = page.read_text("utf-8")
    blocks = [block.replace("\\\n", " ") for block in FENCE.findall(text)]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(python -m [^`\n]+)`", FENCE.sub("", text))
    return [line for line in lines if COMMAND.search(line)]


def understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command as its module would; nothing is run."""
    match = COMMAND.search(command)
    assert match
    module, rest = match.groups()
    if not (ROOT / module.split(".")[0]).is_dir():
        return
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert path.is_file(), f"no module {module}"
    source = path.read_text("utf-8")
    rest = re.sub(r"\$\{?\w+\}?", "1", rest)  # a variable of the shell
    arguments = shlex.split(re.split(r"[|>;&]|\.\.\.", rest)[0], comments=True)
    parsed = r"^    (?:launch\(main, |main\(parse\()(.+), (?:description=)?__doc__\)"
    launched = re.search(parsed, source, re.MULTILINE)
    if launched is None:
        for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            assert f'"{flag}"' in source, f"{module} has no {flag}"
        return
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    cls = eval(launched[1], vars(importlib.import_module(module)))
    try:
        parse(cls, arguments)
    except SystemExit as end:
        if end.code:
            pytest.fail(f"{module} does not understand: {command}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(page):
        understood(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python -m scripts.nothing",
        "python -m scripts.long_eval --nothing",
        "python -m scripts.base_train --depth four  # a comment",
        "torchrun --nproc_per_node 2 -m scripts.base_train --nothing 3",
        "python -m tasks.gsm8k --nothing",
    ],
)
def test_a_command_that_is_not_understood_is_found(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        understood(command, monkeypatch)


RIDDLES = {
    *("Of", "Its", "Then", "As", "In", "Where", "Also", "Alone", "Likewise", "What", "How"),
    *("So", "And", "It", "Not", "Whatever", "Whether", "Why", "Through"),
}
"""First words of a docstring that make a reader guess what it is about."""


def riddles(source: str) -> list[str]:
    """Return the first lines of docstrings, those under fields too, that begin with a riddle."""
    texts = [
        node.value.value.strip().splitlines()[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    return [text for text in texts if text.split()[0].rstrip(",:;.") in RIDDLES]


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    folders = ("nanochat", "scripts", "tasks", "benchmarks", "tests")
    found = {
        path.relative_to(ROOT).as_posix(): wrong
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if (wrong := riddles(path.read_text("utf-8")))
    }
    assert found == {}, 'say what it is: """Seconds spent in steps.""", not """In steps."""'


def test_a_riddle_is_found() -> None:
    assert riddles('x: int\n"""In steps."""') == ["In steps."]
    assert riddles('"""Steps."""\n\n\ndef f() -> None:\n    """Of a row."""') == ["Of a row."]
