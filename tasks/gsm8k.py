"""GSM8K: grade school word problems whose solutions call a calculator (arXiv 2110.14168)."""

import re
from fractions import Fraction

from nanochat.errors import UserError
from nanochat.tools.calculator import CalculatorError, calculate
from tasks.common import Conversation, HubTask, field, final_answer, parse_number, same_number

_ANNOTATION = re.compile(r"<<(.*?)>>", re.DOTALL)


class GSM8K(HubTask):
    """`openai/gsm8k`; splits train (7.5k rows) and test (1.3k). Answers compare as numbers."""

    def __init__(self, split: str):
        super().__init__("gsm8k", split, "openai/gsm8k", "main", split)

    def row(self, index: int) -> Conversation:
        where = self.where(index)
        row = self.rows[index]
        question, solution = field(row, "question", str, where), field(row, "answer", str, where)
        if final_answer(solution) is None:
            raise UserError(f"{where}: the solution {solution[-60:]!r} does not end in '#### 42'")
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": solution_parts(solution)},
            ],
            "answer": solution.rpartition("####")[2].strip(),
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return same_number(final_answer(completion), parse_number(conversation["answer"]))

    def well_formed(self, conversation: Conversation, completion: str) -> bool:
        return final_answer(completion) is not None

    def vote(self, conversation: Conversation, completion: str) -> Fraction | None:
        return final_answer(completion)


def solution_parts(solution: str) -> list[dict[str, str]]:
    """Turn calculator annotations into tool calls.

    `48/2 = <<48/2=24>>24 clips` becomes the text `48/2 = `, the call `48/2`, its output `24` and
    the text `24 clips`. The number stays in the text, because the reader does not see the output.
    The output is written as the calculator writes it.
    """
    parts: list[dict[str, str]] = []
    pieces = _ANNOTATION.split(solution)
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            if piece and parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += piece
            elif piece:
                parts.append({"type": "text", "text": piece})
            continue
        expression, *results = (side.strip() for side in piece.split("="))
        if expression and results:  # an empty annotation is dropped
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": _as_calculated(expression, results[-1])})
    return parts


def _as_calculated(expression: str, result: str) -> str:
    """Write the result as the calculator does (`.5` is `0.5`), if it computes the same number."""
    try:
        calculated = calculate(expression)
    except CalculatorError:
        return result
    return calculated if same_number(parse_number(calculated), parse_number(result)) else result


if __name__ == "__main__":
    from tasks.specs import main

    main(None, gsm8k=GSM8K)
