"""Judges of answers that the chat's tasks share; they check everything that an answer claims.

A *check* is a dictionary. One key names what was asked:

    {"spell": ["water"]}                  letters one by one, one line per word
    {"count": "water", "letter": "e"}     the word spelled, and the number of the letter
    {"sum": "2+2"}                        the calculator's result is the last number
    {"about": "Moses"}                    sentences like the corpus's that name the subject
    {"continue": "In the beginning"}      sentences like the corpus's, without the opening
    {"unknown": "the capital of France"}  says that it does not know, and what it can do
    {"says": ["nanochat"]}                one of these, in upper or lower case

`judge` compares an answer with its check. `reference` writes the answer to train on, for checks
that determine it.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from nanochat.tools.calculator import calculate
from tasks.common import final_answer, parse_number, same_number

Check = Mapping[str, Any]
Content = str | list[dict[str, str]]

UNKNOWING = re.compile(
    r"\b(do not|don't|cannot|can't|could not|not able to) (know|say|tell|answer|help|do)\b"
    r"|\bno idea\b|\bknow nothing\b|\bnothing (in my text|about)\b|\b(beyond|too hard for) me\b"
    r"|\bi have no (internet|clock)\b|\bnever read\b",
    re.I,
)
OFFERS = re.compile(r"\b(spell|count|sums?|text|calculator)\b", re.I)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


class WordPairs:
    """Pairs of neighbouring words of a corpus, by which sentences like the corpus's are recognised.

    >>> WordPairs(["In the house. The house of God."]).share("the house of wax")
    0.666...
    """

    def __init__(self, texts: Iterable[str]):
        self.pairs: set[tuple[str, str]] = set()
        for text in texts:
            found = words(text)
            self.pairs.update(pairwise(found))

    def share(self, text: str) -> float:
        """Share of the text's pairs that the corpus has; 0 for a single word."""
        found = words(text)
        pairs = list(pairwise(found))
        return sum(pair in self.pairs for pair in pairs) / len(pairs) if pairs else 0.0


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def judge(check: Check, completion: str, pairs: WordPairs | None = None) -> bool:
    """True if everything that the answer claims is right; passages need the corpus's `pairs`."""
    if "spell" in check:
        return spelled_letters(completion) == [list(word.lower()) for word in check["spell"]]
    if "count" in check:
        return counted(completion, check["count"].lower(), check["letter"].lower())
    if "sum" in check:
        numbers = re.findall(r"[-−]?\d[\d,]*(?:\.\d+)?", completion)
        expected = parse_number(calculate(check["sum"]))
        return bool(numbers) and same_number(parse_number(numbers[-1]), expected)
    if "about" in check:
        return names(completion, check["about"]) and like_corpus(completion, pairs)
    if "continue" in check:
        return like_corpus(completion, pairs)
    if "unknown" in check:
        return bool(UNKNOWING.search(completion) and OFFERS.search(completion))
    return any(said.lower() in completion.lower() for said in check["says"])


def reference(check: Check) -> Content:
    """Write the answer to a check of spelling, counting or sums."""
    if "spell" in check:
        return "\n".join(" ".join(word.lower()) for word in check["spell"])
    if "count" in check:
        word, letter = check["count"].lower(), check["letter"].lower()
        spelled, count = " ".join(word), word.count(letter)
        return [
            {"type": "text", "text": f"{spelled}\nPython says "},
            {"type": "python", "text": f'"{spelled}".count("{letter}")'},
            {"type": "python_output", "text": str(count)},
            {"type": "text", "text": f"{count}.\n#### {count}"},
        ]
    if "sum" in check:
        result = calculate(check["sum"])
        return [
            {"type": "text", "text": "That is "},
            {"type": "python", "text": check["sum"]},
            {"type": "python_output", "text": result},
            {"type": "text", "text": f"{result}."},
        ]
    return str(check["answer"])


def spelled_letters(completion: str) -> list[list[str]]:
    """List the letters of each line.

    >>> spelled_letters("B-a-d.\\n o n e")
    [['b', 'a', 'd'], ['o', 'n', 'e']]
    """
    lines = completion.strip().lower().split("\n")
    return [re.split(r"[\s,.\-]+", line.strip(" .")) for line in lines]


def counted(completion: str, word: str, letter: str) -> bool:
    """True if the first line spells the word right, and the number of the letter is right."""
    first, count = completion.strip().split("\n")[0], parse_number(str(word.count(letter)))
    return spelled_letters(first) == [list(word)] and same_number(final_answer(completion), count)


def names(text: str, subject: str) -> bool:
    """True if the text has the subject, in the singular or plural."""
    return re.search(rf"\b{re.escape(subject)}(e?s)?\b", text, re.I) is not None


def like_corpus(text: str, pairs: WordPairs | None) -> bool:
    """True for four words or more, most of whose neighbouring pairs are in the corpus too."""
    if len(words(text)) < 4 or UNKNOWING.search(text) or "nanochat" in text.lower():
        return False
    return pairs is None or pairs.share(text) >= 0.75
