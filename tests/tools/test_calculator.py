"""The calculator: exact, formatted for people, and closed to everything that is not arithmetic."""

import contextlib
import re
import threading
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tools import calculator
from nanochat.tools.calculator import CalculatorError, calculate


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        # decimal arithmetic is exact
        ("0.1+0.2", "0.3"),
        ("1.1*1.1", "1.21"),
        ("0.07*100", "7"),
        ("100*(1-0.2)", "80"),
        ("0.1+0.2 == 0.3", "True"),
        ("123456789.123456789*2", "246913578.246913578"),
        # formatting
        ("10/5", "2"),
        ("10/4", "2.5"),
        ("10/3", "3.33333333333333"),
        ("-1/3", "-0.333333333333333"),
        ("1e5", "100000"),
        ("1e-12", "1e-12"),
        ("2**-40", "9.09494701772928e-13"),
        ("1e40/3", "3" * 40),
        ("0*-1.0", "0"),
        # operators
        ("-2**2", "-4"),
        ("2**-3", "0.125"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("7.5 % 2", "1.5"),
        ("1 < 2 < 3", "True"),
        ("1 < 3 < 2", "False"),
        ("2 != 2", "False"),
        ("+5--3", "8"),
        # as people type
        ("3×4÷2−1", "5"),
        ("$1,234.50 + $5", "1239.5"),
        ("1,234,567", "1234567"),
        (".5 + 5.", "5.5"),
        ("007+1", "8"),
        ("12 +\n 13", "25"),
        # functions; a comma inside a call separates arguments
        ("max(1,234)", "234"),
        ("min([3, 1, 2])", "1"),
        ("sum([0.1,0.2,100])", "100.3"),
        ("abs(-3)+floor(2.7)+ceil(2.1)", "8"),
        ("round(2.675, 2)", "2.68"),
        ("round(1234, -2)", "1200"),
        ("sqrt(144)", "12"),
        ("sqrt(2)", "1.4142135623731"),
        ("sqrt(2)**2", "2"),
        ("8**(1/3)", "2"),
        ("(1+0.0375/12)**360", "3.07481839521473"),
        # spelling
        ("'strawberry'.count('r')", "3"),
        ('len("naïveté") + "×".count("×")', "8"),
        ('"a" == "b"', "False"),
        # powers whose exponent alone would be too long to compute with
        ("(-1)**99999999999", "-1"),
        ("0**99999999999", "0"),
        ("0.5**99999999999", "0"),
        ("9**-9**9+1", "1"),
        ("2**1000", str(2**1000)),
    ],
)
def test_value(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "empty"),
        ("1/0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0**-1", "division by zero"),
        ("0**-0.5", "division by zero"),
        ("(-8)**0.5", "no real result"),
        ("sqrt(-1)", "no real result"),
        ("2^3", r"\*\*"),
        ("9**9**9", "too large"),
        ("1.5**99999", "too large"),
        ("1e999999999", "too large"),
        ("1e-99999", "too large"),
        ("+".join(["1"] * 450), "too many terms"),
        ("(" * 50 + "1" + ")" * 50, "too many terms"),
        ("1" * 2000, "longer than"),
        ("__import__('os')", "unknown name"),
        ("().__class__.__bases__", "not an arithmetic expression"),
        ("'a'.upper()", "not an arithmetic expression"),
        ("'a'.count", "not an arithmetic expression"),
        ("'{0}'.format(1)", "not an arithmetic expression"),
        ("lambda: 1", "unknown name"),
        ("1 if 1 else 2", "unknown name"),
        ("f'{1}'", "unknown name"),
        ("'a'*1000000000", "number is needed"),
        ("[1]*1000000000", "number is needed"),
        ("'abc'", "number is needed"),
        ("(1 < 2) + 1", "number is needed"),
        ("1 < 'a'", "compared"),
        ("max()", "number is needed"),
        ("max(*[1, 2])", "not an arithmetic expression"),
        ("round(1, ndigits=2)", "cannot read|unknown name"),
        ("round(1.5, 10**9)", "decimal places"),
        ("sqrt(1, 2)", "not an arithmetic expression"),
        ("3(4)", "not an arithmetic expression"),
        ("sqrt", "not an arithmetic expression"),
        ("1 2", "not an arithmetic expression"),
        ("1,23", "number is needed"),
        ("1j", "cannot read"),
        ("0x10", "cannot read"),
        ("x = 1", "cannot read|unknown name"),
        ("'a\x00'.count('a')", "not an arithmetic expression"),
        ("'\ud800'.count('a')", "not an arithmetic expression"),
    ],
)
def test_refusal(expression: str, message: str) -> None:
    with pytest.raises(CalculatorError, match=message) as error:
        calculate(expression)
    assert len(str(error.value)) < 80
    assert error.value.__cause__ is None


def _expressions() -> st.SearchStrategy[str]:
    numbers = st.integers(0, 10**6).map(str) | st.decimals(0, 1000, places=3).map(str)
    return st.recursive(
        numbers,
        lambda inner: st.tuples(inner, st.sampled_from("+-*/%"), inner).map(
            lambda t: f"({t[0]}{t[1]}{t[2]})"
        ),
        max_leaves=12,
    )


@settings(deadline=None)
@given(_expressions())
def test_agrees_with_exact_rationals(expression: str) -> None:
    """The slow twin: Python's own evaluation with every literal wrapped in a Fraction."""
    wrapped = re.sub(r"[0-9.]+", lambda m: f"F('{m.group()}')", expression)
    try:
        exact = eval(wrapped, {"F": Fraction})
    except ZeroDivisionError:
        with pytest.raises(CalculatorError):
            calculate(expression)
        return
    result = Fraction(calculate(expression))
    assert abs(result - exact) <= abs(exact) * Fraction(1, 10**14)


@settings(deadline=None)
@given(st.text() | st.text(alphabet="0123456789.,+-*/%()[]$'\"<=> eE_maxlensqrt", max_size=60))
def test_any_text_gives_a_result_or_the_one_error(text: str) -> None:
    with contextlib.suppress(CalculatorError):
        assert isinstance(calculate(text), str)


def test_intermediate_values_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operand ever exceeds the stated size: that bounds the time."""
    seen = []

    def watch(function):  # type: ignore[no-untyped-def]
        def wrapper(left, right):  # type: ignore[no-untyped-def]
            value = function(left, right)
            for number in (left, right, value):
                seen.append(max(number.numerator.bit_length(), number.denominator.bit_length()))
            return value

        return wrapper

    watched = {node: watch(function) for node, function in calculator._OPERATORS.items()}
    monkeypatch.setattr(calculator, "_OPERATORS", watched)
    for text in ["1.1**99*" * 100 + "1", "sqrt(1.7)*" * 80 + "1", "1e999*" * 100 + "1"]:
        with pytest.raises(CalculatorError):
            calculate(text)
    assert calculate("*".join(f"sqrt({i / 10})" for i in range(2, 50))) != "0"
    # One operation of bounded operands before the bound is applied: at most the sum, twice.
    assert 0 < max(seen) <= 4 * calculator.MAX_BITS


def test_works_off_the_main_thread() -> None:
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(calculate("6*7")))
    thread.start()
    thread.join()
    assert results == ["42"]
