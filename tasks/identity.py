"""Identity: who the model is, what it can do, and small talk.

`tasks/data/identity.json` has a name, a maker and *intents*. An intent has patterns that ask for it
(`tasks/asking.py`; `held_out` ones are in the split test only) and answers, in which `{name}` and
`{maker}` are filled in. A user's own file needs only

    {"name": "Marvin", "maker": "the people at Example",
     "intents": {"who": {"ask": ["?who are you"], "answer": ["I am {name}."]}}}

and `intents` may be left out; the project's intents are then used with the new name and maker.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from nanochat.data.files import parse_json
from nanochat.errors import UserError
from tasks.asking import Ways, ask
from tasks.common import Conversation, Task, check_generated, digest, row_random

INTENTS = Path(__file__).parent / "data" / "identity.json"
PEOPLE = ("Anna", "Ben", "Tom", "Maria", "Sam", "Lisa", "Max", "Kim", "Leo", "Nina", "John", "Eva")


@dataclass(frozen=True)
class Intent:
    name: str
    ways: Ways
    answers: tuple[str, ...]


def read_intents(path: str | Path = INTENTS) -> list[Intent]:
    """Read a file's intents and fill in name and maker; UserError if the file does not fit."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a .json with name, maker and intents")
    try:
        values = parse_json(path.read_bytes(), first=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise UserError(f'{path}: needs a \'name\', such as {{"name": "Marvin"}}')
    intents = values.get("intents") or json.loads(INTENTS.read_text(encoding="utf-8"))["intents"]
    maker = str(values.get("maker", "somebody"))
    told = {"name": values["name"], "maker": maker, "maker_capital": maker[:1].upper() + maker[1:]}
    found = []
    for name, intent in intents.items():
        patterns = intent.get("ask") if isinstance(intent, dict) else None
        answers = intent.get("answer") if isinstance(intent, dict) else None
        for key, listed in (("ask", patterns), ("answer", answers)):
            if (
                not isinstance(listed, list)
                or not listed
                or not all(isinstance(one, str) and one for one in listed)
            ):
                raise UserError(f"{path}: intent '{name}' needs '{key}', a list of sentences")
        held_out = tuple(intent.get("held_out") or intent["ask"])
        filled = tuple(_filled(answer, told, path) for answer in intent["answer"])
        found.append(Intent(name, Ways(tuple(intent["ask"]), held_out), filled))
    return found


def _filled(answer: str, told: dict[str, str], path: Path) -> str:
    try:
        return answer.format(**told)
    except (KeyError, IndexError, ValueError):
        raise UserError(
            f"{path}: answer '{answer}' has braces around something else than name or maker"
        ) from None


class Identity(Task):
    """Questions about the model; row i of a split is a pure function of (file, seed, split, i).

    `path`: a .json file of intents. All intents are about equally frequent, with any of their
    answers.
    """

    VAL_BY_CONTENT = True

    def __init__(
        self, split: str, size: int | None = None, path: str | Path = INTENTS, seed: int = 0
    ):
        super().__init__("identity", split)
        self.size = check_generated("identity", split, size)
        self.seed = seed
        self.intents = read_intents(str(path))

    def __len__(self) -> int:
        return self.size

    def settings(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self.seed, "intents": digest(repr(self.intents))}

    def row(self, index: int) -> Conversation:
        random = row_random("identity", self.split, self.seed, index)
        intent = random.choice(self.intents)
        return {
            "messages": [
                {"role": "user", "content": ask_intent(intent, random, self.split)},
                {"role": "assistant", "content": random.choice(intent.answers)},
            ],
            "intent": intent.name,
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """True if the completion is one of the intent's answers."""
        (intent,) = (one for one in self.intents if one.name == conversation["intent"])
        return completion.strip() in intent.answers


def ask_intent(intent: Intent, random: Random, split: str) -> str:
    return ask(random, split, intent.ways, {"person": random.choice(PEOPLE)})


if __name__ == "__main__":
    from tasks.specs import main

    main("size", identity=Identity)
