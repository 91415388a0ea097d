"""HumanEval: Python functions from their docstrings, judged by running tests (arXiv 2107.03374)."""

import re
import textwrap
from typing import Literal

from nanochat.errors import UserError
from nanochat.tools.sandbox import run_python
from tasks.common import Conversation, HubTask, field

_FENCE = re.compile(r"(`{3,}|~{3,})[^\n`]*\n(.*?)(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)
_DEFINITION = re.compile(
    r"(?:async +)?def +\w+ *[(\[]|class +\w+ *[(:]|@\w|import \w|from [\w.]+ import |\w+ *=[^=]"
)
_FUTURE = re.compile(r"^from __future__ import .*\n", re.MULTILINE)


class HumanEval(HubTask):
    """`openai/openai_humaneval`, 164 problems in the split test; no training data.

    `evaluate` runs the model's program in the sandbox (`nanochat.tools.sandbox`). With
    sandbox="strict" it raises UserError if the system lacks a layer of the sandbox. `pass_at_k`
    needs several samples. The tests run in the same process as the answer, which could therefore
    cheat (docs/sandbox.md).
    """

    def __init__(
        self,
        split: str = "test",
        sandbox: Literal["strict", "best-effort"] = "best-effort",
        timeout: float = 5.0,
    ):
        if split != "test":
            raise UserError(f"humaneval has only the split test, not '{split}'")
        super().__init__("humaneval", split, "openai/openai_humaneval", None, "test")
        self.sandbox = sandbox
        self.timeout = timeout

    def row(self, index: int) -> Conversation:
        where = self.where(index)
        row = self.rows[index]
        prompt = field(row, "prompt", str, where)
        solution = prompt + field(row, "canonical_solution", str, where)
        return {
            "messages": [
                {"role": "user", "content": f"Complete this Python function:\n\n{prompt}"},
                {"role": "assistant", "content": f"```python\n{solution.strip()}\n```"},
            ],
            "prompt": prompt,
            "entry_point": field(row, "entry_point", str, where),
            "test": field(row, "test", str, where),
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        program = build_program(conversation, completion)
        result = run_python(program, timeout=self.timeout, mode=self.sandbox)
        return result.ok and result.finished


def build_program(conversation: Conversation, completion: str) -> str:
    """Build the program to run: the prompt's imports, the model's function, and the tests.

    The function comes from the last fenced block that defines it, with the definitions of the
    blocks before; else from the definitions in the unfenced text. If nothing defines it, the first
    block, or the text, is taken as the body that follows the prompt.
    """
    prompt, entry_point = conversation["prompt"], conversation["entry_point"]
    name = re.escape(entry_point)
    defines = re.compile(rf"^(?:(?:async +)?def +{name}\b|{name} *=[^=])", re.MULTILINE)
    text = completion.replace("\r\n", "\n")
    blocks = [textwrap.dedent(match[2]) for match in _FENCE.finditer(text)]
    solutions = [number for number, block in enumerate(blocks) if defines.search(block)]
    unfenced = _definitions(_FENCE.sub("", text))
    if solutions:
        helpers = [
            block
            for block in blocks[: solutions[-1]]
            if not defines.search(block) and re.search("^(?:def|class) ", block, re.MULTILINE)
        ]
        code = "\n".join([*helpers, blocks[solutions[-1]]])
    elif defines.search(unfenced):
        code = unfenced
    else:
        return _program(prompt + _body(blocks[0] if blocks else text), conversation)
    before = defines.search(prompt)
    return _program(prompt[: before.start() if before else None] + "\n" + code, conversation)


def _program(code: str, conversation: Conversation) -> str:
    future = "".join(_FUTURE.findall(code))  # Python requires it first
    code = future + _FUTURE.sub("", code)
    return f"{code}\n\n{conversation['test']}\n\ncheck({conversation['entry_point']})\n"


def _definitions(text: str) -> str:
    """Extract the functions, classes, imports and names that a text defines, without its prose.

    A definition is a line that begins like one, with the more deeply indented lines after it.
    """
    kept: list[str] = []
    indent: int | None = None  # that of the present definition
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        if not line.strip():
            kept.append("")
            continue
        closes = depth == indent and line[depth] in ")]}"  # def f(⏎    x,⏎):
        if indent is None or (depth <= indent and not closes):
            indent = depth if _DEFINITION.match(line, depth) else None
        if indent is not None:
            kept.append(line[indent:])
    return "\n".join(kept)


def _body(text: str) -> str:
    """Extract a function's body, indented by four spaces, from a text that begins with it.

    >>> _body("y = 2 * x\\nreturn y\\n")
    '    y = 2 * x\\n    return y'
    """
    lines = text.expandtabs(4).strip("\n").splitlines()
    if lines and lines[0][0] != " ":
        following = next((line for line in lines[1:] if line.strip()), "")
        inside = 4 if lines[0].rstrip()[-1] in ":([{" else 0
        if len(following) - len(following.lstrip()) > inside:
            lines[0] = "    " + lines[0]  # only the first line has lost its indentation
        else:
            lines = ["    " + line for line in lines]
    # Lines without indentation are after the body: prose, or other functions.
    end = next((i for i, line in enumerate(lines) if line.strip() and line[0] != " "), len(lines))
    return "\n".join([*lines[:end], _definitions("\n".join(lines[end:]))]).rstrip()


if __name__ == "__main__":
    from tasks.specs import main

    main(None, humaneval=HumanEval)
