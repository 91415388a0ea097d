"""Asking: a small grammar of user messages that all generated tasks share.

People ask for one thing in thousands of ways. A *pattern* is the core of a message, with groups of
alternatives. The rest of the grammar is the same for every task: openers, polite words, closers,
punctuation at the end or none, capitals or none, a typing mistake.

    "!spell (the word|) {word}"   ->  Please spell the word "house".   could you spell house   ...

The first character tells what may stand around the core: `!` is a request ("spell it", after which
*could you* fits before it), `?` a question (*hey,* fits), `.` a fragment ("2+2", which needs no
punctuation). A pattern that begins with none of these is a whole message and is not changed.

There are patterns for training and held-out patterns. Rows of the split test use held-out patterns
only, with held-out openers and closers among the others, so no tested wording was ever trained.
Messages of `tasks/data/first_contact.jsonl` are never asked in training either.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

FIRST_CONTACT = Path(__file__).parent / "data" / "first_contact.jsonl"


@dataclass(frozen=True)
class Ways:
    """Patterns that ask for one thing."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    """Patterns of the split test only."""

    def of(self, split: str) -> tuple[str, ...]:
        return self.held_out if split == "test" else self.train


REQUEST_OPENERS = Ways(
    train=(
        *("please", "please", "pls", "can you", "can you", "could you", "could you please"),
        *("will you", "would you", "can u", "hey,", "hi,", "hello,", "ok,", "okay,", "so,", "now"),
        *("now please", "i want you to", "i need you to", "i would like you to", "you should"),
        *("hi! can you", "hello, please", "hey, could you", "try to", "go and", "let us"),
        *("be so good and", "i wonder if you could", "it would be nice if you could", "first,"),
        *("your task:", "my request:", "next,", "you may", "can i ask you to", "i ask you to"),
    ),
    held_out=("kindly", "would you be so kind and", "might you", "well,", "good day, please", "do"),
)
QUESTION_OPENERS = Ways(
    train=(
        *("hey,", "hi,", "hello,", "ok,", "okay,", "so,", "and", "now,", "please,", "hi!"),
        *("quick question:", "question:", "tell me,", "please tell me,", "then", "um,"),
        *("i have a question:", "another question:", "just asking,", "oh,", "ah,", "hmm,", "but"),
        *("can i ask,", "let me ask,", "sorry,", "good morning,", "look,", "listen,"),
    ),
    held_out=("well,", "one question:", "good day,", "excuse me,", "say,"),
)
CLOSERS = Ways(
    train=(
        *("please", "please", "pls", "for me", "for me please", "thanks", "now", "thank you"),
        *("if possible", "will you", "can you", "could you", "when you can", "then"),
        *("right now", "ok", "okay", "my dear", "mate", "once more", "as well", "quickly"),
    ),
    held_out=("if you can", "would you", "my friend", "if you like"),
)

FILLERS = (
    *("just", "now", "simply", "again", "quickly", "really", "maybe", "then", "here", "today"),
    *("also", "once", "exactly", "perhaps", "kind of", "actually", "um", "like", "first", "still"),
    *("too", "even", "only", "ever", "so", "well", "uh", "at all", "as such", "you know", "say"),
)
"""Words that change nothing; they may stand anywhere in a training message."""
_SMALL = re.compile(r"(?<![\w{'])(the|a|an|of|in|is|are|do|does|me|you|to|for|there|it|i) ")

_GROUP = re.compile(r"\(([^()]*)\)")
_VALUE = re.compile(r"(\{\w+\})")


def expand(pattern: str, random: Random) -> str:
    """Choose one of each group of alternatives, from the inside out.

    >>> expand("spell (the (word|)|) {word}", Random(1)).endswith("{word}")
    True
    """
    while match := _GROUP.search(pattern):
        chosen = random.choice(match.group(1).split("|"))
        pattern = pattern[: match.start()] + chosen + pattern[match.end() :]
    return re.sub(r" +([,.:?!])", r"\1", re.sub(" +", " ", pattern)).strip(" ")


def ask(
    random: Random,
    split: str,
    ways: Ways,
    values: Mapping[str, str] | None = None,
    kept: Mapping[str, str] | None = None,
) -> str:
    """Draw a message of one of the `ways`; values take the message's case, `kept` values do not.

    A message that is in first contact is drawn again, at most 20 times, since a user's own file may
    have only that one.
    """
    message = ""
    for _ in range(20):
        message = _message(random, split, ways, values or {}, kept or {})
        if split == "test" or normal(message) not in reserved():
            break
    return message


def _message(
    random: Random, split: str, ways: Ways, values: Mapping[str, str], kept: Mapping[str, str]
) -> str:
    pattern = random.choice(ways.of(split))
    kind = pattern[0] if pattern[0] in "!?." else ""
    core = expand(pattern[len(kind) :], random)
    if not kind:
        return _fill(core, {**values, **kept})
    end, open_end = "", core.endswith(tuple(f"{{{name}}}" for name in kept))
    if kind != ".":
        opener, closer = "", ""
        if random.random() < 0.35:
            openers = REQUEST_OPENERS if kind == "!" else QUESTION_OPENERS
            opener = _draw(random, split, openers)
        if random.random() < 0.12 and not open_end:
            closer = _draw(random, split, CLOSERS)
        if random.random() < 0.06:
            core = slip(core, random)
        if split != "test" and not open_end:
            core = loosen(core, random)
        asks = kind == "?" or bool(re.match(r".*\b(can|could|will|would|might)\b", opener))
        end = random.choice("???!") if asks else random.choice(("", ".", ".", "!"))
        end = "" if open_end else end
        core = " ".join(part for part in (opener, core, closer) if part)
    style = random.random()
    if style < 0.4:  # as it is written in books
        message = _fill(core[0].upper() + core[1:], {**values, **kept}) + (
            end if end != "!" else ""
        )
        return re.sub(r"\bi\b(?=[ ,])", "I", message) if "i " in core else message
    if style < 0.86:  # as it is typed
        values = {name: value.lower() for name, value in values.items()}
        return _fill(core.lower(), {**values, **kept}) + (end if random.random() < 0.4 else "")
    if style < 0.89:
        values = {name: value.upper() for name, value in values.items()}
        core = "".join(
            part if _VALUE.fullmatch(part) else part.upper() for part in _VALUE.split(core)
        )
        return _fill(core, {**values, **kept}) + end
    return _fill(core[0].upper() + core[1:], {**values, **kept})


def _draw(random: Random, split: str, parts: Ways) -> str:
    held_out = split == "test" and random.random() < 0.5
    return random.choice(parts.held_out if held_out else parts.train)


def _fill(text: str, values: Mapping[str, str]) -> str:
    """Fill in the values, which may contain braces themselves."""
    return "".join(
        values[part[1:-1]] if _VALUE.fullmatch(part) else part for part in _VALUE.split(text)
    )


def loosen(text: str, random: Random) -> str:
    """Sometimes leave out a small word, or put in one that changes nothing.

    >>> loosen("count the {letter} in {word}", Random(1))
    'count here the {letter} in {word}'
    """
    chance = random.random()
    small = list(_SMALL.finditer(text))
    if chance < 0.1 and small:
        word = random.choice(small)
        return text[: word.start()] + text[word.end() :]
    # A word right before a value could be taken for the value.
    spaces = [match.end() for match in re.finditer(" (?!{)", text)]
    if 0.1 <= chance < 0.25 and spaces:
        at = random.choice(spaces)
        return f"{text[:at]}{random.choice(FILLERS)} {text[at:]}"
    return text


def slip(text: str, random: Random) -> str:
    """Make a typing mistake: leave out, double or exchange a letter of one of the longer words.

    Values in braces stay as they are.

    >>> slip("{word}", Random(0)), len(slip("count {letter}", Random(0))) in (13, 14, 15)
    ('{word}', True)
    """
    words = list(re.finditer(r"(?<![\w{])[A-Za-z]{4,}(?![\w}])", text))
    if not words:
        return text
    word = random.choice(words)
    at = random.randrange(word.start() + 1, word.end() - 1)
    middle = random.choice(("", text[at] * 2, text[at + 1] + text[at]))
    return (
        text[:at] + middle + text[at + (2 if len(middle) == 2 and middle[0] != middle[1] else 1) :]
    )


def normal(message: str) -> str:
    """Normalise a message: no case, no quotes, no punctuation at the end.

    >>> normal('Spell "House".'), normal("2 + 2 =")
    ('spell house', '2 + 2 =')
    """
    text = re.sub("[\"'“”‘’*]", "", message.lower())
    return " ".join(text.split()).rstrip(" .!?")


@lru_cache(maxsize=1)
def reserved() -> frozenset[str]:
    """Messages of first contact that are a whole conversation, in normal form; never trained on.

    The conversations of several turns are not trained on either, but each of their messages may be,
    such as a thank-you.
    """
    if not FIRST_CONTACT.is_file():
        return frozenset()
    lines = FIRST_CONTACT.read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["turns"] for line in lines if line.strip()]
    return frozenset(normal(only[0]["user"]) for only in turns if len(only) == 1)
