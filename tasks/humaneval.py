"""HumanEval: Python functions from their docstrings, judged by running tests (arXiv 2107.03374)."""

import re
from typing import Literal

from nanochat.errors import UserError
from nanochat.tools.sandbox import run_python
from tasks.common import Conversation, HubTask, field

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_IMPORT = re.compile(r"^(?:import|from) .*$", re.MULTILINE)


class HumanEval(HubTask):
    """`openai/openai_humaneval`, 164 problems in the split test; no training data.

    `evaluate` runs what the model wrote, in the sandbox (`nanochat.tools.sandbox`).
    sandbox="strict" refuses to where the system lacks a layer of it. Draw several samples for
    `pass_at_k`.
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
    """The function as the model wrote it, between the prompt's imports and the tests.

    Taken from the first fenced block that defines the function, else the first block, else the
    whole text; where that does not define it, it is read as the body that follows the prompt.
    """
    prompt, entry_point = conversation["prompt"], conversation["entry_point"]
    defines = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    blocks = _FENCE.findall(completion) or [completion]
    code = next((block for block in blocks if defines.search(block)), blocks[0])
    if defines.search(code):
        code = "\n".join([*_IMPORT.findall(prompt), code])
    else:
        code = prompt + code
    return f"{code}\n\n{conversation['test']}\n\ncheck({entry_point})\n"


if __name__ == "__main__":
    from tasks.specs import main

    main(None, humaneval=HumanEval)
