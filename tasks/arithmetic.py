"""Arithmetic: generated word problems of one to three steps, and plain sums (level 0).

The model learns to read a problem: which numbers matter, which operation each sentence means, and
in what order. The calculator computes: the model copies numbers into a call, the engine inserts the
result, and the next step starts from it.

Level 0 has no story: `17+25=`, `What is 12 times 30?` (`tasks/sums.py`).

A problem's *skeleton* is its events and its numbers. The skeleton's hash decides the split, so no
held-out problem is a training problem with other people, things or phrasing.
"""

from dataclasses import dataclass
from dataclasses import field as default
from fractions import Fraction
from random import Random
from typing import Any

from nanochat.errors import UserError
from nanochat.tools.calculator import calculate
from tasks.common import (
    Conversation,
    Task,
    check_generated,
    final_answer,
    parse_number,
    row_random,
    same_number,
    split_of,
)
from tasks.judges import judge, reference
from tasks.sums import ask_sum, draw_sum

# fmt: off
PEOPLE = (
    "farmer", "baker", "woman", "man", "boy", "girl", "teacher", "servant", "king", "queen",
    "trader", "gardener", "father", "mother", "neighbour", "builder", "sister", "brother",
    "doctor", "captain",
)
THINGS = (
    "sheep", "goats", "apples", "loaves", "cakes", "books", "stones", "trees", "fishes", "cups",
    "lamps", "flowers", "birds", "eggs", "nuts", "pens", "chairs", "stars", "letters", "roses",
    "oxen", "pots", "seeds", "bottles", "balls",
)
HOLDERS = ("boxes", "bags", "baskets", "rooms", "carts", "drawers", "houses")
# fmt: on


@dataclass(frozen=True)
class Level:
    steps: tuple[int, int]
    """Smallest and largest number of calls of the calculator."""
    largest: int
    """Largest number in the text, apart from factors and divisors."""
    factor: int
    """Largest factor or divisor."""
    distractor: float
    """Probability of a sentence with a number that does not matter."""


LEVELS = {
    1: Level(steps=(1, 2), largest=99, factor=9, distractor=0.0),
    2: Level(steps=(1, 3), largest=999, factor=20, distractor=0.1),
    3: Level(steps=(2, 3), largest=9999, factor=99, distractor=0.5),
}


@dataclass
class Problem:
    """A problem that is being written, sentence by sentence."""

    random: Random
    level: Level
    skeleton: list[object] = default(default_factory=list)
    sentences: list[str] = default(default_factory=list)
    steps: list[tuple[str, str, int, str]] = default(default_factory=list)
    """Calls of the calculator: (operation in words, expression, result, unit) of each."""
    total: int = 0

    def __post_init__(self) -> None:
        self.who = self.random.choice(PEOPLE)
        self.things, self.others = self.random.sample(THINGS, 2)

    def number(self, low: int, high: int) -> int:
        """Draw a number for the text; each number of digits is equally likely."""
        digits = self.random.randint(len(str(low)), len(str(high)))
        value = self.random.randint(max(low, 10 ** (digits - 1)), min(high, 10**digits - 1))
        self.skeleton.append(value)
        return value

    def amount(self) -> int:
        return self.number(2, self.level.largest)

    def fewer(self) -> int:
        """Draw a number to subtract that leaves at least 2, so that "1 apples" never occurs."""
        return self.number(2, min(self.total - 2, self.level.largest))

    def divisor(self) -> int | None:
        """Draw a number that divides the total; None if there is none."""
        largest = min(self.level.factor, self.total - 1)
        divisors = [n for n in range(2, largest + 1) if self.total % n == 0]
        return self.random.choice(divisors) if divisors else None

    def tell(self, *ways: str) -> None:
        """Add a sentence, worded in one of the given ways; its first letter becomes a capital."""
        sentence = self.random.choice(ways)
        self.sentences.append(sentence[0].upper() + sentence[1:])

    def compute(self, what: str, sign: str, number: int, unit: str | None = None) -> None:
        """Add one step: the total becomes `total sign number`."""
        expression = f"{self.total}{sign}{number}"
        results = {
            "+": self.total + number,
            "-": self.total - number,
            "*": self.total * number,
            "/": self.total // number,
        }
        self.total = results[sign]
        self.steps.append((what, expression, self.total, unit or self.things))


def make_problem(random: Random, level: Level) -> Problem:
    """Write a problem: an opening, changes and a question, with the level's number of steps."""
    p = Problem(random, level)
    steps = random.randint(*level.steps)
    # Each kind of opening and of closing has no step or one.
    opening = random.choice(("has", "has", "groups", "together"))
    p.skeleton.append(opening)
    open_problem(p, opening)
    if random.random() < level.distractor:
        distract(p)
    closing = random.choice(("count", "count", "compare", "sell", "pack"))
    if len(p.steps) == steps:
        closing = "count"
    while len(p.steps) < steps - (closing != "count"):
        change(p)
    ask(p, closing)
    return p


def open_problem(p: Problem, kind: str) -> None:
    who, things = p.who, p.things
    p.total = first = p.amount()
    if kind == "has":
        p.tell(
            f"a {who} has {first} {things}.",
            f"there are {first} {things} in the house of a {who}.",
            f"at first, a {who} had {first} {things}.",
            f"one day a {who} counted {first} {things}.",
        )
    elif kind == "groups":
        p.total = number = p.number(2, p.level.factor)
        holders = p.random.choice(HOLDERS)
        p.tell(
            f"a {who} has {number} {holders} with {first} {things} in each.",
            f"a {who} has {number} {holders}. In each of them are {first} {things}.",
            f"a {who} puts {first} {things} into each of {number} {holders}.",
        )
        p.compute("Together", "*", first)
    else:
        second = p.amount()
        p.tell(
            f"a {who} has {first} {things} in one place and {second} in another.",
            f"a {who} got {first} {things} in the morning and {second} in the evening.",
            f"a {who} has {first} small {things} and {second} great ones.",
        )
        p.compute("Together", "+", second)


def distract(p: Problem) -> None:
    number = p.amount()
    p.tell(
        f"the {p.who} has {number} {p.others} as well.",
        f"in the same place are {number} {p.others}.",
        f"a friend has {number} {p.others}.",
    )


def change(p: Problem) -> None:
    """Write a sentence that changes the total by one step."""
    who, things = p.who, p.things
    divisor = p.divisor()
    kinds = ["gain"]
    kinds += ["loss"] if p.total >= 4 else []
    kinds += ["times"] if p.total <= p.level.largest else []
    kinds += ["share"] if divisor else []
    kind = p.random.choice(kinds)
    p.skeleton.append(kind)
    if kind == "gain":
        number = p.amount()
        p.tell(
            f"the {who} gets {number} more {things}.",
            f"then the {who} buys {number} more.",
            f"a friend gives the {who} {number} {things}.",
            f"after that {number} more {things} come in.",
        )
        p.compute("Adding", "+", number)
    elif kind == "loss":
        number = p.fewer()
        p.tell(
            f"the {who} gives away {number} {things}.",
            f"then the {who} sells {number} of them.",
            f"{number} of the {things} are lost.",
            f"after that {number} {things} are taken away.",
        )
        p.compute("Taking away", "-", number)
    elif kind == "times":
        number = p.number(2, p.level.factor)
        p.tell(
            f"then the number becomes {number} times as great.",
            f"after a year there are {number} times as many {things}.",
            f"the {who} works till there are {number} times as many.",
        )
        p.compute("Multiplying", "*", number)
    elif divisor:
        p.skeleton.append(divisor)
        p.tell(
            f"the {things} are put into {divisor} equal groups, and the {who} keeps one group.",
            f"the {who} makes {divisor} equal parts of them and keeps one part.",
            f"the {things} are shared equally among {divisor} people, one of them the {who}.",
        )
        p.compute("Dividing", "/", divisor)


def ask(p: Problem, kind: str) -> None:
    """Write the question; all kinds but "count" add a last step, which is "sell" if need be."""
    who, things = p.who, p.things
    divisor = p.divisor()
    if (kind == "compare" and p.total < 4) or (kind == "pack" and divisor is None):
        kind = "sell"
    p.skeleton.append(kind)
    if kind == "compare":
        number = p.fewer()
        p.tell(
            f"a friend has {number} {things}. How many more than the friend has the {who}?",
            f"a friend has only {number}. How many more {things} has the {who}?",
        )
        p.compute("The difference", "-", number)
    elif kind == "sell":
        number = p.number(2, p.level.factor)
        p.tell(
            f"each of them is sold for {number} coins. How many coins does the {who} get?",
            f"the price of each is {number} coins. What is the price of all of them?",
        )
        p.compute("The price", "*", number, "coins")
    elif kind == "pack" and divisor:
        p.skeleton.append(divisor)
        holders = p.random.choice(HOLDERS)
        p.tell(
            f"all are put into {divisor} {holders}, the same number in each. "
            f"How many {things} are in one of the {holders}?",
            f"how many {things} are in each of {divisor} {holders} if they are equally full?",
        )
        p.compute("In each", "/", divisor)
    else:
        p.tell(
            f"how many {things} does the {who} have now?",
            f"how many {things} are there in the end?",
            f"how many {things} has the {who}?",
            f"what is the number of {things} now?",
        )


class Arithmetic(Task):
    """Arithmetic problems; row i of a split is a pure function of (seed, level, split, i).

    Level 0 has plain sums up to 1,000, in signs or words, asked in many ways (`tasks/asking.py`).
    Level 1 has 1-2 steps and numbers up to 99. Level 2 has 1-3 steps and numbers up to 999. Level 3
    has 2-3 steps, numbers up to 9999, and often a number that does not matter.
    """

    VAL_BY_CONTENT = True

    def __init__(self, split: str, size: int | None = None, level: int = 1, seed: int = 0):
        super().__init__("arithmetic" if level == 1 else f"arithmetic-level{level}", split)
        if level != 0 and level not in LEVELS:
            raise UserError(f"arithmetic has no level {level}, only 0 to {max(LEVELS)}")
        self.size = check_generated("arithmetic", split, size)
        self.level = level
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def settings(self) -> dict[str, Any]:
        return {"size": self.size, "level": self.level, "seed": self.seed}

    def row(self, index: int) -> Conversation:
        random = row_random("arithmetic", self.level, self.split, self.seed, index)
        if self.level == 0:
            return self.plain_sum(random)
        problem = make_problem(random, LEVELS[self.level])
        while split_of(repr(problem.skeleton)) != self.split:
            problem = make_problem(random, LEVELS[self.level])
        content: list[dict[str, str]] = []
        text = ""
        for what, expression, result, unit in problem.steps:
            content.append({"type": "text", "text": f"{text}{what}: "})
            content.append({"type": "python", "text": expression})
            content.append({"type": "python_output", "text": str(result)})
            text = f"{result} {unit}.\n"
        content.append({"type": "text", "text": f"{text}#### {problem.total}"})
        return {
            "messages": [
                {"role": "user", "content": " ".join(problem.sentences)},
                {"role": "assistant", "content": content},
            ],
            "answer": str(problem.total),
            "skeleton": repr(problem.skeleton),
        }

    def plain_sum(self, random: Random) -> Conversation:
        """Make a row of level 0; the hash of the call decides the split, whatever the wording."""
        shape, said, call = draw_sum(random, self.split)
        check = {"sum": call}
        return {
            "messages": [
                {"role": "user", "content": ask_sum(random, self.split, shape, said)},
                {"role": "assistant", "content": reference(check)},
            ],
            "answer": calculate(call),
            "skeleton": call,
            "check": check,
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        if "check" in conversation:
            return judge(conversation["check"], completion)
        return same_number(final_answer(completion), parse_number(conversation["answer"]))

    def well_formed(self, conversation: Conversation, completion: str) -> bool:
        if "check" in conversation:
            return parse_number(completion) is not None
        return final_answer(completion) is not None

    def vote(self, conversation: Conversation, completion: str) -> Fraction | None:
        return final_answer(completion)


if __name__ == "__main__":
    from tasks.specs import main

    main("size", arithmetic=Arithmetic)
