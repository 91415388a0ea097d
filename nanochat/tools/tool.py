"""Tools that a model calls by writing between <|python_start|> and <|python_end|>."""

from collections.abc import Callable
from typing import Literal

from nanochat.tools.calculator import CalculatorError, calculate
from nanochat.tools.sandbox import run_python

Tool = Callable[[str], str]
"""Function from the text between the python tokens to the text between the output tokens."""


def calculator_tool(expression: str) -> str:
    """Run `calculate`, the default tool; an error becomes a short text."""
    try:
        return calculate(expression)
    except CalculatorError as error:
        return f"error: {error}"


_NOTEBOOK_CELL = """\
import ast
tree = ast.parse({source!r})
last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
scope = {{"__name__": "__main__"}}
exec(compile(tree, "cell", "exec"), scope)
if last is not None:
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), scope)
    if value is not None:
        print(value)
"""


def python_tool(mode: Literal["strict", "best-effort"] = "strict", timeout: float = 5.0) -> Tool:
    """Make a tool that runs Python in the sandbox (`nanochat/tools/sandbox.py`).

    The output is what the code prints and, as in a notebook, the value of its last expression.
    Raises UserError at once if `mode` is strict and the system lacks a layer of the sandbox.
    """
    run_python("", mode=mode, timeout=timeout)

    def run(source: str) -> str:
        result = run_python(_NOTEBOOK_CELL.format(source=source), mode=mode, timeout=timeout)
        if result.ok:
            return result.stdout.rstrip("\n")
        last = result.stderr.strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        reason = f"{result.limit} limit" if result.limit else last[0]
        return f"{result.stdout}error: {reason}"

    return run
