"""Task, the base class of all tasks; loading from the hub; judging of answers.

A task is a sequence of conversations (the schema of `nanochat.conversation`) that can judge an
answer. Beside `messages`, a conversation may have keys that its task needs for this: `answer`,
`letters`, `words`.
"""

import hashlib
import json
import os
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from nanochat.conversation import is_trained, parts, validate
from nanochat.errors import UserError
from nanochat.paths import base_dir, hub_source

Conversation: TypeAlias = dict[str, Any]
EvalType = Literal["categorical", "generative"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

FINGERPRINTED = 256
"""Largest number of rows that a fingerprint covers."""


class Task(ABC):
    """A named split of conversations.

    Subclasses implement `__len__`, `row` and `settings`, and override `evaluate` if answers can be
    checked. `eval_type` is then "categorical" (one right letter among `conversation["letters"]`) or
    "generative" (a free answer).
    """

    eval_type: EvalType = "generative"
    VAL_BY_CONTENT: ClassVar[bool] = False
    """True if there is a split val that shares no content with train."""
    BY_KIND: ClassVar[bool] = False
    """True if rows have a `kind`; results are then reported by kind, with some of the answers."""
    SHOTS_FROM: ClassVar[str] = "train"
    """Split whose rows are shown as solved examples before a problem."""

    def __init__(self, name: str, split: str):
        self.name = name
        self.split = split

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> Conversation:
        """Make the conversation at 0 <= index < len(self); UserError if the data do not fit."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Settings that determine the rows, beside name and split; JSON values."""

    def __getitem__(self, index: int) -> Conversation:
        """Return a validated conversation; raises IndexError, or UserError if it is not valid."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}/{self.split} has {len(self)} rows, no row {index}")
        conversation = self.row(index)
        validate(conversation, self.where(index))
        return conversation

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """Name of a row in error messages: `gsm8k/train row 17`."""
        return f"{self.name}/{self.split} row {index}"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """True if `completion` is a right answer to the conversation's last user message."""
        if self.eval_type == "categorical":
            return bool(completion.strip() == conversation["answer"])
        raise UserError(f"{self.name} has no check for answers; evaluate its loss instead")

    def reward(self, conversation: Conversation, completion: str) -> float:
        """Reward for reinforcement learning: 1.0 for a right answer, else 0.0."""
        if self.eval_type == "categorical" or type(self).evaluate is Task.evaluate:
            raise UserError(
                f"{self.name} has no rewards; use a generative task with checked answers, "
                "such as gsm8k, arithmetic, spellingbee or simplespelling"
            )
        return float(self.evaluate(conversation, completion))

    def well_formed(self, conversation: Conversation, completion: str) -> bool:
        """True if `completion` has an answer that can be judged, right or wrong."""
        return bool(completion.strip())

    def vote(self, conversation: Conversation, completion: str) -> Hashable | None:
        """Answer in `completion`, for a majority vote; None if there is none."""
        return None

    def fingerprint(self) -> str:
        """Digest of name, split, settings, and of FINGERPRINTED rows spread over the split.

        Another digest means other rows. The rows show a change of the code too, such as a new way
        of asking, unless it concerns fewer than about one row in a hundred. A bad row counts by its
        mistake; whoever reads it decides what to do about it.
        """

        def shown(index: int) -> Any:
            try:
                return self.row(index)
            except UserError as error:
                return str(error)

        step = -(-len(self) // FINGERPRINTED) or 1
        rows = [shown(index) for index in range(0, len(self), step)]
        identity = [type(self).__name__, self.name, self.split, self.settings(), rows]
        return digest(json.dumps(identity, sort_keys=True, default=str))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# Data sets from the hub


class HubTask(Task):
    """A task whose rows come from a data set in the hub's layout, online or in a folder."""

    def __init__(self, name: str, split: str, repo_id: str, config: str | None, hub_split: str):
        super().__init__(name, split)
        self.rows, self.data = load_hub(repo_id, config, hub_split, f"{name}/{split}")

    def __len__(self) -> int:
        return len(self.rows)

    def settings(self) -> dict[str, Any]:
        return {"data": self.data}


def load_hub(repo_id: str, config: str | None, split: str, where: str) -> tuple[Any, str]:
    """Load a `datasets.Dataset` and its fingerprint from `NANOCHAT_HUB_DIR/<repo_id>` or the hub.

    A folder needs the files of this split only. The prepared copy lies under NANOCHAT_BASE_DIR,
    like every artifact, unless HF_HOME or HF_DATASETS_CACHE name another place. Raises UserError if
    the data set cannot be loaded or has no rows.
    """
    import datasets  # takes seconds to import, and generated tasks do not need it

    source = hub_source(repo_id)
    cache: Path | None = base_dir() / "datasets"
    state = ""
    arguments: dict[str, Any] = {"path": source, "name": config}
    hidden = datasets.are_progress_bars_disabled()
    if source != repo_id:
        # `datasets` 5.2 does not notice that a file of such a folder has changed, and would return
        # the old rows. So each state of the folder has a prepared copy of its own.
        state = _folder_state(Path(source))
        cache = base_dir() / "datasets" / state
        # `datasets` would also need the files of every split that the README names.
        files = _split_files(Path(source), config, split, where)
        kind = {".jsonl": "json"}.get(files[0].suffix, files[0].suffix[1:])
        arguments = {"path": kind, "data_files": {split: [str(file) for file in files]}}
        datasets.disable_progress_bars()  # reading a folder is quick
    elif os.environ.get("HF_HOME") or os.environ.get("HF_DATASETS_CACHE"):
        cache = None
    try:
        cache_dir = str(cache) if cache else None
        rows = datasets.load_dataset(**arguments, split=split, cache_dir=cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if source != repo_id:
            remedy = "download or write that file again"
        elif os.environ.get("NANOCHAT_HUB_DIR"):
            remedy = f"NANOCHAT_HUB_DIR has no folder {repo_id}"
        else:
            remedy = (
                f"without a network, put a copy of the repository in a folder D/{repo_id} and set "
                "NANOCHAT_HUB_DIR=D"
            )
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{where}: cannot load {source} (config {config}, split {split}): {reason}; {remedy}"
        ) from error
    finally:
        if not hidden:
            datasets.enable_progress_bars()
    if len(rows) == 0:
        raise UserError(f"{where}: {source} (config {config}) has no rows in its split {split}")
    return rows, rows._fingerprint + state


def _split_files(folder: Path, config: str | None, split: str, where: str) -> list[Path]:
    """List the files of one split in a copy of a data set's repository, sorted; never empty.

    If the README has a list of files for the config, that decides. Else the names do: a part of the
    path, or the beginning of the file's name, is the split (`main/test-00000-of-00001.parquet`).
    """
    patterns = _card_patterns(folder, config).get(split, [])
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    inside = folder / config if config and (folder / config).is_dir() else folder
    data = sorted(
        path
        for path in inside.rglob("*")
        if path.suffix in (".parquet", ".jsonl", ".json", ".csv")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        found = {
            path
            for path in data
            if split in path.relative_to(inside).parts
            or re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", path.name)
        }
    files = sorted(path for path in found if path.is_file())
    kinds = sorted({path.suffix for path in files})
    if len(kinds) > 1:
        raise UserError(f"{where}: the files of the split {split} in {inside} mix {kinds}")
    if not files:
        names = ", ".join(str(path.relative_to(folder)) for path in data[:5]) or "no data file"
        wanted = patterns[0] if patterns else f"{config or 'data'}/{split}-00000-of-00001.parquet"
        raise UserError(
            f"{where}: {folder} has no file of the split {split} (config {config}); it has {names}"
            f"; put that split's file there, such as {wanted}"
        )
    return files


def _card_patterns(folder: Path, config: str | None) -> dict[str, list[str]]:
    """Patterns of each split's files, from the settings at the top of the data set's README."""
    import yaml

    try:
        head = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
        configs = yaml.safe_load(head)["configs"]
        files = next(c for c in configs if c["config_name"] == (config or "default"))["data_files"]
        return {
            entry["split"]: [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
            for entry in files
        }
    # If the README lacks them, the files' names decide.
    except (OSError, ValueError, LookupError, TypeError, StopIteration, yaml.YAMLError):
        return {}


def _folder_state(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return digest(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]))


def field(row: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """Return `row[key]`; UserError if it is missing, of another type or a blank string."""
    if key not in row:
        raise UserError(f"{where}: has no field '{key}', only {', '.join(map(str, row))}")
    value = row[key]
    if not isinstance(value, kind):
        raise UserError(f"{where}: '{key}' is {str(value)[:60]!r}, expected {kind.__name__}")
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{where}: '{key}' is blank")
    return value


# Multiple choice


def choice_conversation(
    question: str, choices: Sequence[str], answer: int, where: str
) -> Conversation:
    """Make a question with lettered options; the answer is the right option's letter only.

    The letter follows its option. To answer, attention has to find the right option and copy the
    token after it. `->` has two characters because of the split pattern: a single mark or a space
    before a letter would be one token with it (`=A`, ` A`), which is not the token `A` of the
    answer.
    """
    if not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{where}: has {len(choices)} options, expected 2 to {len(LETTERS)}")
    if not 0 <= answer < len(choices):
        raise UserError(f"{where}: the answer is option {answer} of {len(choices)}")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str):
            raise UserError(f"{where}: option {number} is {choice!r}, expected a string")
    letters = list(LETTERS[: len(choices)])
    options = [f"- {choice} ->{letter}" for choice, letter in zip(choices, letters, strict=True)]
    prompt = "\n".join([question, *options, "Answer with the letter of the right option."])
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": letters[answer]},
        ],
        "question": question,
        "letters": letters,
        "choices": list(choices),
        "answer": letters[answer],
    }


# Answers that are numbers

_NUMBER = re.compile(
    r"(?<![0-9.,])([-+−]?)\s?[$€£]?\s?([-−]?)"  # -$5 and $-5
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/([0-9]+))?(?!,?[0-9])"
)
_MAX_DIGITS = 100


def parse_number(text: str) -> Fraction | None:
    """Read the first number in `text` exactly; None if there is none.

    A currency or percent sign is dropped, like any word after the number.

    >>> [str(parse_number(t)) for t in ("10.0", "$1,234.50", "-3", "50%", "42.", "none")]
    ['10', '2469/2', '-3', '50', '42', 'None']
    """
    match = _NUMBER.search(text)
    if match is None or len(match.group()) > _MAX_DIGITS:
        return None
    before, after, digits, denominator = match.groups()
    value = Fraction(digits.replace(",", ""))
    if denominator is not None:
        if int(denominator) == 0:
            return None
        value /= int(denominator)
    return -value if before in ("-", "−") or after else value


def final_answer(completion: str) -> Fraction | None:
    """Read the number after the last `####`, on the same line."""
    _, marker, tail = completion.rpartition("####")
    return parse_number(tail.split("\n")[0]) if marker else None


def same_number(answer: Fraction | None, expected: Fraction | None) -> bool:
    """True if both are equal up to the rounding of floats (0.30000000000000004); None never is."""
    if answer is None or expected is None:
        return False
    return abs(answer - expected) <= Fraction(1, 10**12) * max(Fraction(1), abs(expected))


# Generated rows


def row_random(*key: object) -> random.Random:
    """Make the random generator of one row; equal keys give equal numbers on every machine.

    The seed is the key as text. An integer seed would lose its sign: `random.seed(-1)` gives the
    same numbers as `random.seed(1)`.
    """
    return random.Random(repr(key))


def split_of(content: str, parts: int = 20) -> str:
    """The split that generated content belongs to: two of the parts are test, one is val.

    With 20 parts 85 % are for train, 5 % for val and 10 % for test. The split is a hash of the
    content alone, so whatever the seed, size or word list of two tasks, nothing in the one's train
    split is in the other's test split.
    """
    bucket = int(hashlib.sha256(content.encode()).hexdigest(), 16) % parts
    return {parts - 3: "val", parts - 2: "test", parts - 1: "test"}.get(bucket, "train")


def check_generated(name: str, split: str, size: int | None) -> int:
    """The number of rows: `size`, by default 10,000 for train and 256 for val and test."""
    if split not in ("train", "val", "test"):
        raise UserError(f"{name} has no split '{split}', only train, val and test")
    if size is None:
        return 10_000 if split == "train" else 256
    if size < 1:
        raise UserError(f"{name}: size {size} must be at least 1")
    return size


# Looking at rows

_STYLES = {"text": "green", "python": "bold cyan", "python_output": "yellow"}


def show(task: Task, count: int = 3, console: Console | None = None) -> None:
    """Print the first rows: what the assistant must say in green, its tool calls in cyan."""
    console = console or Console()
    for index in range(min(count, len(task))):
        conversation = task[index]
        body = Text()
        for message in conversation["messages"]:
            trained = is_trained(message)
            body.append(f"{message['role']}{'' if trained else ' (not trained)'}: ", style="bold")
            for part in parts(message):
                style = _STYLES[part["type"]] if trained and message["role"] == "assistant" else ""
                text = part["text"]
                if part["type"] != "text":
                    text = f"[{part['type']}: {text}]"
                body.append(text, style=style)
            body.append("\n")
        body.rstrip()
        extra = {k: v for k, v in conversation.items() if k in ("answer", "letters", "format")}
        subtitle = ", ".join(f"{key}: {value}" for key, value in extra.items())
        console.print(
            Panel(body, title=Text(task.where(index)), subtitle=Text(subtitle), title_align="left")
        )
    console.print(f"{task.name}/{task.split}: {len(task):,} rows, {task.eval_type}")
