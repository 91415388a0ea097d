"""Calculator: evaluates one arithmetic expression and returns its value as text.

Text written by a model is never given to `eval`. A scanner accepts numbers, operators, brackets,
string literals and a few names. `ast` parses them, and a small evaluator computes the known nodes.

Values are `Fraction`s, so `0.1+0.2` is `0.3` and `10/4` is `2.5`. A value without an exact form of
bounded size (a root, a long power) is rounded to a multiple of 10**-100. The number of tokens and
the size of every value are bounded before it is computed, so the longest computation takes
milliseconds. No timer is needed, which would need signals and the main thread of a Unix process.
"""

import ast
import math
import operator
import re
from collections.abc import Callable
from decimal import Context, Decimal, DecimalException, Inexact, InvalidOperation, Overflow
from fractions import Fraction
from typing import Any, TypeAlias, cast

MAX_CHARACTERS = 1000
MAX_TOKENS = 400
MAX_NESTING = 40
MAX_BITS = 4096
"""Largest number of bits of a numerator or denominator: integers of about 1,230 digits."""
GRID = 10**100
"""Rounded values are multiples of 1/GRID and smaller than MAX_ROUNDED."""
MAX_ROUNDED = 10**40
EXACT_DIGITS = 20
"""Longest finite decimal, in digits, that is written in full (sums of money); longer ones are
rounded."""
SIGNIFICANT_DIGITS = 15

Value: TypeAlias = "Fraction | bool | str | list[Value]"


class CalculatorError(ValueError):
    """Error for an expression without a result; the message is short, for the model."""


def calculate(expression: str) -> str:
    """Evaluate `expression` and return its value as people write it.

    An expression may contain decimal numbers (`12`, `.5`, `1e3`, and outside a call `1,234` and
    `$5`), the operators `+ - * / // % **` and the signs `× · ÷ −`, brackets, chained comparisons,
    the functions `abs ceil floor len max min round sqrt sum`, and string literals with
    `.count(...)`.

    Integers, and decimals of at most 20 digits, are written exactly. Other values have 15
    significant digits, or more if their integer part is longer. There are no trailing zeros, and an
    exponent only below 1e-9. `round` rounds ties to the even neighbour, as Python's does. The
    function works in any thread and on any system.

    >>> calculate("0.1 + 0.2"), calculate("$1,200 ÷ 7"), calculate('"strawberry".count("r")')
    ('0.3', '171.428571428571', '3')

    Raises CalculatorError for everything else: unknown names, division by zero, too large numbers.
    """
    source = _scan(expression)
    try:
        tree = ast.parse(source, mode="eval")
        value = _evaluate(tree.body, source)
    except CalculatorError:
        raise
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None
    except (RecursionError, MemoryError):
        raise CalculatorError("too deeply nested") from None
    except (SyntaxError, ValueError, ArithmeticError, TypeError):
        raise CalculatorError("not an arithmetic expression") from None
    if isinstance(value, bool):
        return str(value)
    return _format(_number(value))


_TOKEN = re.compile(
    r"""(?P<grouped>\$?[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])(?:\.[0-9]*)?)
      | (?P<number>\$?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?![A-Za-z_]))
      | (?P<name>[A-Za-z_][A-Za-z_0-9]*)
      | (?P<string>"[^"\\\n]*"|'[^'\\\n]*')
      | (?P<operator>\*\*|//|[<>=!]=|[-+*/%<>,.×·÷−])
      | (?P<open>[(\[])
      | (?P<close>[)\]])""",
    re.VERBOSE,
)
_LOOKALIKES = {"×": "*", "·": "*", "÷": "/", "−": "-"}


def _scan(expression: str) -> str:
    """Check every token and rebuild the text of them, so that `ast.parse` sees no other tokens."""
    if len(expression) > MAX_CHARACTERS:
        raise CalculatorError(f"longer than {MAX_CHARACTERS} characters")
    tokens: list[str] = []
    calls: list[bool] = []  # for each open bracket: does a comma in it separate arguments?
    position = 0
    while position < len(expression):
        if expression[position].isspace():
            position += 1
            continue
        match = _TOKEN.match(expression, position)
        if match is not None and match.lastgroup == "grouped" and any(calls):
            # max(1,234) has two arguments: read the number up to the comma only.
            match = _TOKEN.match(expression, position, expression.index(",", position))
        if match is None:
            found = expression[position]
            hint = " (powers are written **)" if found == "^" else ""
            raise CalculatorError(f"cannot read {found!r}{hint}")
        kind, text = cast(str, match.lastgroup), match.group()
        position = match.end()
        if kind in ("grouped", "number"):
            text = _plain_number(text)
        elif kind == "name" and text not in _FUNCTIONS and tokens[-1:] != ["."]:
            raise CalculatorError(f"unknown name {text!r}")
        elif kind == "operator":
            text = _LOOKALIKES.get(text, text)
        elif kind == "open":
            calls.append(text == "[" or (bool(tokens) and tokens[-1].isidentifier()))
        elif kind == "close" and calls:
            calls.pop()
        tokens.append(text)
        if len(tokens) > MAX_TOKENS or len(calls) > MAX_NESTING:
            raise CalculatorError("too many terms")
    if not tokens:
        raise CalculatorError("empty expression")
    return " ".join(tokens)


def _plain_number(text: str) -> str:
    """Write a number as Python accepts it: `$1,234.50` -> `1234.50`, `007` -> `7`."""
    text = text.lstrip("$").replace(",", "").lstrip("0")
    return text if text[:1].isdigit() else "0" + text


def _evaluate(node: ast.expr, source: str) -> Value:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return node.value
        # The digits come from the source: a float would have rounded them. Offsets are in bytes.
        literal = source.encode()[node.col_offset : node.end_col_offset].decode()
        return _literal(literal)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        operand = _number(_evaluate(node.operand, source))
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left = _number(_evaluate(node.left, source))
        right = _number(_evaluate(node.right, source))
        return _bounded(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Compare):
        return _compare(node, source)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate(element, source) for element in node.elts]
    if isinstance(node, ast.Call) and not node.keywords:
        arguments = [_evaluate(argument, source) for argument in node.args]
        if isinstance(node.func, ast.Name):
            return _FUNCTIONS[node.func.id](*arguments)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "count":
            text = _evaluate(node.func.value, source)
            if isinstance(text, str) and len(arguments) == 1 and isinstance(arguments[0], str):
                return Fraction(text.count(arguments[0]))
    raise CalculatorError("not an arithmetic expression")


def _literal(text: str) -> Fraction:
    exponent = text.lower().partition("e")[2]
    # Fraction("1e999999999") would really build that power of ten.
    if exponent and (len(exponent) > 5 or abs(int(exponent)) > MAX_BITS // 4):
        raise CalculatorError("number too large")
    return _bounded(Fraction(text))


def _number(value: Value) -> Fraction:
    if not isinstance(value, Fraction):
        raise CalculatorError("a number is needed")
    return value


def _bounded(value: Fraction) -> Fraction:
    """Round `value` to the grid if its exact form is too long; CalculatorError if too large."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS:
        return value
    if value.denominator == 1 or abs(value) >= MAX_ROUNDED:
        raise CalculatorError("number too large")
    return Fraction(round(value * GRID), GRID)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(base) in (0, 1) or bits * abs(exponent) <= MAX_BITS:
            # For 0 and ±1 only the exponent's sign and parity matter; the exponent may be huge.
            small = exponent if abs(exponent) <= MAX_BITS else 2 + exponent % 2
            if base == 0 and exponent < 0:
                raise CalculatorError("division by zero")
            return base ** int(small)
        if base.denominator == 1 and exponent > 0:
            raise CalculatorError("number too large")
    if base == 0 and exponent < 0:
        raise CalculatorError("division by zero")
    # Correctly rounded to 150 digits: more than the grid's 100 plus MAX_ROUNDED's 40.
    context = Context(prec=150, Emin=-9999, Emax=9999, traps=[InvalidOperation, Overflow])
    try:
        result = context.power(_decimal(base, context), _decimal(exponent, context))
    except Overflow:
        raise CalculatorError("number too large") from None
    except DecimalException:
        raise CalculatorError("no real result") from None
    if abs(result) >= MAX_ROUNDED:
        raise CalculatorError("number too large")
    return Fraction(int(context.scaleb(result, 100).to_integral_value()), GRID)


def _decimal(value: Fraction, context: Context) -> Decimal:
    return context.divide(Decimal(value.numerator), Decimal(value.denominator))


def _square_root(value: Value) -> Fraction:
    number = _number(value)
    if number < 0:
        raise CalculatorError("no real result")
    roots = math.isqrt(number.numerator), math.isqrt(number.denominator)
    if (roots[0] ** 2, roots[1] ** 2) == (number.numerator, number.denominator):
        return Fraction(*roots)
    if number >= MAX_ROUNDED**2:
        raise CalculatorError("number too large")
    return Fraction(math.isqrt(math.floor(number * GRID**2)), GRID)


def _round(value: Value, digits: Value = Fraction(0)) -> Fraction:
    places = _number(digits)
    if places.denominator != 1 or abs(places) > 100:
        raise CalculatorError("round takes -100 to 100 decimal places")
    scale = Fraction(10) ** int(places)
    return Fraction(round(_number(value) * scale)) / scale


def _items(arguments: tuple[Value, ...]) -> list[Fraction]:
    """List the numbers of `max(1, 2)` or of `max([1, 2])`."""
    single = arguments[0] if len(arguments) == 1 else None
    items = [_number(v) for v in (single if isinstance(single, list) else arguments)]
    if not items:
        raise CalculatorError("a number is needed")
    return items


def _sum(*arguments: Value) -> Fraction:
    total = Fraction(0)
    for item in _items(arguments):
        total = _bounded(total + item)
    return total


def _length(value: Value) -> Fraction:
    if not isinstance(value, (str, list)):
        raise CalculatorError("len needs a string")
    return Fraction(len(value))


def _compare(node: ast.Compare, source: str) -> bool:
    values = [_evaluate(operand, source) for operand in (node.left, *node.comparators)]
    if not all(isinstance(v, Fraction) for v in values) and not all(
        isinstance(v, str) for v in values
    ):
        raise CalculatorError("only two numbers or two strings can be compared")
    pairs = zip(node.ops, values, values[1:], strict=False)
    return all(_COMPARISONS[type(op)](left, right) for op, left, right in pairs)


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda left, right: Fraction(left // right),
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Fraction]] = {
    "abs": lambda value: abs(_number(value)),
    "ceil": lambda value: Fraction(math.ceil(_number(value))),
    "floor": lambda value: Fraction(math.floor(_number(value))),
    "len": _length,
    "max": lambda *arguments: max(_items(arguments)),
    "min": lambda *arguments: min(_items(arguments)),
    "round": _round,
    "sqrt": _square_root,
    "sum": _sum,
}


def _format(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    context = Context(prec=EXACT_DIGITS, Emin=-9999, Emax=9999)
    rounded = _decimal(value, context)
    if context.flags[Inexact]:
        integer_digits = len(str(abs(value.numerator) // value.denominator))
        context.prec = max(SIGNIFICANT_DIGITS, integer_digits)
        rounded = _decimal(value, context)
    if abs(rounded) < Decimal("1e-9"):
        mantissa, _, exponent = f"{rounded:e}".partition("e")
        mantissa = mantissa if "." in mantissa else mantissa + "."
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    text = f"{rounded:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
