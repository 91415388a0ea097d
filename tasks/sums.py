"""Sums: plain sums as people type them, with the expression for the calculator.

    17+25=   what is 12 times 30?   Take 4 from 19.   (3 + 4) x 5   half of ninety

The model learns to copy the numbers into the call in the right order, brackets included, and which
sign each word means. Numbers go up to 1,000; those up to a hundred are sometimes written in words.
"""

from random import Random

from tasks.asking import Ways, ask, expand
from tasks.common import split_of

MAX_NUMBER = 1000
WORDS_SHARE = 0.4
"""Share of the sums in words whose numbers are written in words too; a few mix both."""
ROUND_SHARE = 0.15
"""Share of the numbers that are round (30, 400, 1000), which people type more often than others."""

SUMS = Ways(
    train=(
        *(
            "?what is {sum}",
            "?what is {sum}",
            "?what's {sum}",
            "?whats {sum}",
            "?how much is {sum}",
        ),
        "!(calculate|compute|work out|solve|count) {sum}",
        "!do (the|this|) (sum|math|) {sum}",
        "!tell me (what|how much|) {sum} (is|makes|)",
        *(".{sum}", ".{sum}", ".{sum}", ".{sum}=", ".{sum} =", ".{sum} = ?", ".{sum}?", ".{sum} ?"),
        "?what (does|do) {sum} (make|give|equal)",
        "?what do (you|i|we) get (for|from|with) {sum}",
        *(".{sum} is", ".{sum} equals", ".result of {sum}", ".sum: {sum}", ".so {sum}"),
        "?what is the (result|answer|value) of {sum}",
        "?can you (do|solve|work out|calculate|tell me) {sum}",
        "?how many (is|are) {sum}",
        "?what would {sum} be",
    ),
    held_out=(
        "?what will {sum} come to",
        "!give me (the result of|the answer to|) {sum}",
        "!(figure out|evaluate|find) {sum}",
        "?how much do (you|we) get if (you|we) take {sum}",
        *("?do you know {sum}", ".answer to {sum}", ".{sum} makes", ".{sum} = what"),
        "!say how much {sum} is",
    ),
)
# {a} and {b} are in the order of the call.
SIGNED = {
    "+": ("+", "+", "+", "plus"),
    "-": ("-", "-", "-", "minus", "\N{MINUS SIGN}"),
    "*": ("*", "x", "times", "\N{MULTIPLICATION SIGN}", "X"),
    "/": ("/", "/", ":", "\N{DIVISION SIGN}", "divided by"),
}
WORDED = {
    "+": ("{a} plus {b}", "{a} plus {b}", "{a} and {b}", "{a} added to {b}",
          "the sum of {a} and {b}", "sum of {a} and {b}"),
    "-": ("{a} minus {b}", "{a} minus {b}", "{a} less {b}", "{a} take away {b}",
          "the difference (between|of) {a} and {b}",
          "difference (between|of) {a} and {b}"),
    "*": ("{a} times {b}", "{a} times {b}", "{a} multiplied by {b}",
          "the product of {a} and {b}", "product of {a} and {b}"),
    "/": ("{a} divided by {b}", "{a} divided by {b}", "{a} over {b}"),
}  # fmt: skip
REQUESTED = {
    "+": Ways(
        train=("!add {a} and {b}", "!add {a} to {b}", "!sum {a} and {b}", "!add up {a} and {b}"),
        held_out=("!put {a} and {b} together", "!add {b} onto {a}"),
    ),
    "-": Ways(
        train=("!(subtract|take|take away) {b} from {a}", "!take {b} away from {a}"),
        held_out=("!remove {b} from {a}", "?what is left (if|when) you take {b} from {a}"),
    ),
    "*": Ways(
        train=("!multiply {a} (by|with|and) {b}", "!multiply {a} (by|with|and) {b}"),
        held_out=("!take {a} times {b}", "!multiply together {a} and {b}"),
    ),
    "/": Ways(
        train=("!divide {a} by {b}", "!divide {a} by {b}", "?how often does {b} go into {a}"),
        held_out=("!split {a} into {b} parts", "!share {a} among {b}"),
    ),
}
OF_ONE = {
    "half of {a}": "{a}/2",
    "double {a}": "{a}*2",
    "twice {a}": "{a}*2",
    "a third of {a}": "{a}/3",
    "a quarter of {a}": "{a}/4",
    "{a} squared": "{a}*{a}",
}
# fmt: off
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on


def in_words(number: int) -> str:
    """Write a number from 0 to 100 in words.

    >>> in_words(42), in_words(100)
    ('forty-two', 'a hundred')
    """
    if number < 20:
        return _SMALL[number]
    if number == 100:
        return "a hundred"
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_SMALL[ones]}" if ones else "")


def draw_number(random: Random, low: int = 0) -> int:
    """Draw a number; each number of digits occurs, small and round numbers more often."""
    if random.random() < ROUND_SHARE:
        return random.choice((10, 100, 100)) * random.randint(1, 10)
    largest = random.choice((9, 12, 20, 99, 99, 100, 999, 999, MAX_NUMBER))
    return random.randint(min(low, largest), largest)


def draw_small(random: Random) -> int:
    """Draw a number that people write in words: up to a hundred, mostly up to twenty."""
    if random.random() < ROUND_SHARE:
        return random.choice((100, 100, 10 * random.randint(1, 9)))
    return random.randint(0, random.choice((9, 12, 20, 20, 99)))


def draw_pair(random: Random, sign: str, worded: bool = False) -> tuple[int, int]:
    """Draw two numbers whose result is mostly a whole number of at least 0.

    Numbers to be `worded` are at most a hundred.
    """
    draw, most = (draw_small, 100) if worded else (draw_number, MAX_NUMBER)
    a, b = draw(random), draw(random)
    if sign == "-" and random.random() < 0.85:
        a, b = max(a, b), min(a, b)
    if sign == "/":
        b = max(b, 1)
        if random.random() < 0.85:
            b = random.randint(1, min(b, 100))
            a = b * random.randint(1, max(1, most // b))
    return a, b


def draw_sum(random: Random, split: str) -> tuple[str, str, str]:
    """Draw (shape of the sum, its text with signs or words, the call).

    The hash of the call decides the split, whatever the wording.
    """
    while True:
        shape, said, call = _draw_sum(random)
        if split_of(call) == split:
            return shape, said, call


def _draw_sum(random: Random) -> tuple[str, str, str]:
    shape = random.choice(("signs",) * 8 + ("words",) * 6 + ("asked",) * 3 + ("three",) * 3 +
                          ("brackets",) * 3 + ("one",))  # fmt: skip
    sign = random.choice("+-*/" if shape in ("signs", "words", "asked") else "++-*")
    worded = shape in ("words", "asked", "one") and random.random() < WORDS_SHARE
    a, b = draw_pair(random, sign, worded)
    if shape == "one":
        said, call = random.choice(list(OF_ONE.items()))
        a = max(a, 1) * (12 if "/" in call and random.random() < 0.8 else 1)
        a = min(a, MAX_NUMBER) if "/" not in call else a % 996 + 12 - a % 996 % 12
        return shape, said.format(a=_shown([a], random, worded)[0]), call.format(a=a)
    if shape == "asked":
        return sign, "\t".join(_shown([a, b], random, worded)), f"{a}{sign}{b}"
    if shape == "words":
        said = expand(random.choice(WORDED[sign]), random)
        first, other = _shown([a, b], random, worded)
        return shape, said.format(a=first, b=other), f"{a}{sign}{b}"
    if shape == "signs":
        spoken = random.choice(SIGNED[sign])
        return shape, _joined(str(a), spoken, str(b), random), f"{a}{sign}{b}"
    # People who type three numbers mostly type small ones.
    second, largest = random.choice("++-*"), random.choice((9, 12, 20, 99, MAX_NUMBER))
    a, b, c = (random.randint(0, largest) for _ in range(3))
    shown, other = random.choice(SIGNED[sign]), random.choice(SIGNED[second])
    tight = random.random() < 0.5
    said = _joined(_joined(str(a), shown, str(b), random, tight), other, str(c), random, tight)
    if shape == "three":
        return shape, said, f"{a}{sign}{b}{second}{c}"
    if random.random() < 0.5:
        left = _joined(str(a), shown, str(b), random, tight)
        said = _joined(f"({left})", other, str(c), random, tight)
        return shape, said, f"({a}{sign}{b}){second}{c}"
    right = _joined(str(b), other, str(c), random, tight)
    return shape, _joined(str(a), shown, f"({right})", random, tight), f"{a}{sign}({b}{second}{c})"


def ask_sum(random: Random, split: str, shape: str, said: str) -> str:
    """Write a message that asks for a sum of `draw_sum`."""
    if shape in REQUESTED:
        a, b = said.split("\t")  # "one hundred" has a space
        return ask(random, split, REQUESTED[shape], {"a": a, "b": b})
    return ask(random, split, SUMS, {"sum": said})


def _shown(numbers: list[int], random: Random, worded: bool) -> list[str]:
    """Write numbers in digits, or those up to a hundred in words; one in ten is written the other
    way than its neighbour."""
    shown = []
    for number in numbers:
        if number > 100 or worded == (random.random() < 0.1):
            shown.append(str(number))
        else:
            hundred = random.choice(("a hundred", "hundred", "one hundred"))
            shown.append(in_words(number).replace("a hundred", hundred))
    return shown


def _joined(a: str, sign: str, b: str, random: Random, tight: bool | None = None) -> str:
    """Write `a sign b`; a sign in words has spaces around it, others often have none."""
    if len(sign) > 1 or not (random.random() < 0.6 if tight is None else tight):
        return f"{a} {sign} {b}"
    return f"{a}{sign}{b}"
