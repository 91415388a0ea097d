"""Tasks by name, as scripts take them: `--task arc:easy`, `--mix spellingbee:3000:0.5`.

A spec is a name, then options separated by colons: `key=value`, or a bare value for the one option
that the table below names. In a mixture, a number at the end is the mixture weight (passes per
epoch).

    gsm8k    arc:challenge    arithmetic:2000:level=2    customjson:my/chats.jsonl
    --mix gsm8k:2    --mix arithmetic:2000:level=2:0.5
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic
from tasks.common import Task
from tasks.customjson import CustomJSON
from tasks.first_contact import FirstContact
from tasks.followups import FollowUps
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.identity import Identity
from tasks.ignorance import Ignorance
from tasks.mmlu import MMLU
from tasks.passages import Passages, known_texts
from tasks.passkey import Passkey
from tasks.smoltalk import SmolTalk
from tasks.specs import construct, is_file
from tasks.spellingbee import SimpleSpelling, SpellingBee, noted_words
from tasks.views import HELD_OUT_ROWS, TaskMixture, TaskSlice, hold_out


class Entry(NamedTuple):
    """A task that specs can name."""

    constructor: Callable[..., Task]
    bare: str | None = None
    """Option that a value without `key=` in a spec means."""
    evaluated: tuple[str, ...] = ()
    """Specs that `chat_eval` measures without `--task`."""


TASKS = {
    "arc": Entry(ARC, "subset", evaluated=("arc:easy", "arc:challenge")),
    "arithmetic": Entry(Arithmetic, "size", evaluated=("arithmetic",)),
    "customjson": Entry(CustomJSON, "path"),
    "first_contact": Entry(FirstContact),
    "followups": Entry(FollowUps, "size"),
    "gsm8k": Entry(GSM8K, evaluated=("gsm8k",)),
    "humaneval": Entry(HumanEval, evaluated=("humaneval",)),
    "identity": Entry(Identity, "size"),
    "ignorance": Entry(Ignorance, "size"),
    "mmlu": Entry(MMLU, evaluated=("mmlu",)),
    "passages": Entry(Passages, "size"),
    "passkey": Entry(Passkey, "size"),
    "simplespelling": Entry(SimpleSpelling, "size", evaluated=("simplespelling",)),
    "smoltalk": Entry(SmolTalk),
    "spellingbee": Entry(SpellingBee, "size", evaluated=("spellingbee",)),
}
EVALUATED = tuple(spec for entry in TASKS.values() for spec in entry.evaluated)
EXAMPLES = {
    "customjson": "Who are you?",
    "simplespelling": "Spell cat",
    "spellingbee": "How many r are in strawberry?",
    "arithmetic": "Ann has 14 stamps. She buys 9 more. How many stamps does she have now?",
    "gsm8k": "A baker makes 24 rolls and sells 3 bags of 5 rolls. How many rolls are left?",
    "smoltalk": "Write a short poem about the sea.",
}
"""Prompts for a person to try, by task."""
MAX_WEIGHT = 100.0


def build(spec: str, split: str, **options: Any) -> Task:
    """Build the task of a spec; `options` are constructor arguments that the spec leaves open.

    An option that the task does not take raises UserError in the spec, but is ignored in `options`,
    so that a script can pass its word list to all tasks.
    """
    name = spec.partition(":")[0]
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'; there are {', '.join(sorted(TASKS))}")
    entry = TASKS[name]
    return construct(entry.constructor, entry.bare, spec, split, **options)


def takes(specs: Sequence[str], option: str) -> bool:
    """True if one of the tasks has this constructor argument, so that it must be prepared."""
    entries = [TASKS[name] for spec in specs if (name := spec.partition(":")[0]) in TASKS]
    return any(option in inspect.signature(entry.constructor).parameters for entry in entries)


def corpus_options(specs: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of these tasks that come from the tokenizer and the corpus it was used on."""
    options: dict[str, Any] = {"tokenizer": tokenizer}
    if takes(specs, "words"):
        options["words"] = noted_words(tokenizer.hash)
    if takes(specs, "corpus_texts"):
        options["corpus_texts"] = known_texts(tokenizer.hash)
    return options


def split_weight(spec: str) -> tuple[str, float]:
    """Split off the mixture weight, 1 by default: `"arc:easy:2"` -> `("arc:easy", 2.0)`."""
    head, colon, tail = spec.rpartition(":")
    name, _, rest = spec.partition(":")
    if TASKS.get(name, (None, None))[1] == "path" and is_file(rest):
        return spec, 1.0  # a number after a colon may be the end of a file's name
    try:
        weight = float(tail)
    except ValueError:
        return spec, 1.0
    if not colon:
        return spec, 1.0
    if not 0 < weight <= MAX_WEIGHT:
        raise UserError(
            f"mixture '{spec}': weight {tail} must be above 0 and at most {MAX_WEIGHT:g}; "
            f"if {tail} is a number of rows, write '{spec}:1'"
        )
    return head, weight


def examples(specs: Sequence[str]) -> tuple[str, ...]:
    """List prompts to try with a model that was trained on this mixture."""
    names = {spec.partition(":")[0] for spec in specs}
    return tuple(text for name, text in EXAMPLES.items() if name in names)


def build_halves(spec: str, **options: Any) -> tuple[Task, Task | None]:
    """Build a task's rows to train on, and its held-out rows, which are not among them.

    Held-out rows are the split val, if it shares no content with train, else some of train's rows.
    The test split is not used, since it is for the final evaluation.
    """
    train = build(spec, "train", **options)
    if not train.VAL_BY_CONTENT:
        return hold_out(train)
    try:
        val = build(spec, "val", **options)
    except UserError:  # a list with a few words may have none for val
        return hold_out(train)
    return train, TaskSlice(val, 0, HELD_OUT_ROWS)


def build_mixture(
    specs: Sequence[str], seed: int = 0, **options: Any
) -> tuple[TaskMixture, list[Task | None]]:
    """Build the tasks of a stage's --mix, and the held-out rows of each of them."""
    weighted = [split_weight(spec) for spec in specs]
    halves = [build_halves(name, **options) for name, _ in weighted]
    tasks = [(train, weight) for (train, _), (_, weight) in zip(halves, weighted, strict=True)]
    return TaskMixture(tasks, seed), [held_out for _, held_out in halves]
