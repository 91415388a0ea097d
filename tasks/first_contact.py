"""First contact: messages that people type before they know what a small model can do.

`tasks/data/first_contact.jsonl` has messages by kind: identity, greetings, sums, spelling,
counting, passages, unknown and follow-ups. None is ever trained on (`tasks.asking.reserved`). Each
has a check that reads everything that an answer claims (`tasks/judges.py`). Names, nouns and
openings in braces are filled in from the corpus, so the same messages test a model of any text.

Do not tune training data to these messages. A message that fails shows a wording that is missing.
"""

import json
import re
from collections.abc import Sequence
from random import Random
from typing import Any

from nanochat.errors import UserError
from tasks.asking import FIRST_CONTACT
from tasks.common import Conversation, Task, digest, row_random
from tasks.judges import judge, reference
from tasks.passages import index_of, known_texts, pairs_of

_SUBJECT = re.compile(r"\{(name|noun)\}")
FAMOUS = 25
"""Number of the most frequent names and nouns among which the messages choose."""


class FirstContact(Task):
    """Messages of first contact; row i is line i, filled in from `corpus_texts`; only for test."""

    BY_KIND = True

    def __init__(self, split: str, corpus_texts: Sequence[str] | None = None):
        super().__init__("first_contact", split)
        if split != "test":
            raise UserError(f"first_contact has only a test split, not '{split}'")
        text = FIRST_CONTACT.read_text(encoding="utf-8")
        self.lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        self.texts = tuple(known_texts() if corpus_texts is None else corpus_texts)
        self.index = index_of(self.texts, "train")
        if not self.index.names and not self.index.nouns:  # no English text: ask the rest
            self.lines = [
                line for line in self.lines if not _SUBJECT.search(json.dumps(line["turns"]))
            ]

    def __len__(self) -> int:
        return len(self.lines)

    def settings(self) -> dict[str, Any]:
        return {"made_from": digest(repr([self.lines, digest("\n".join(self.texts))]))}

    def row(self, index: int) -> Conversation:
        random, line = row_random("first_contact", index), self.lines[index]
        values = self._values(random)
        messages: list[dict[str, Any]] = []
        check: dict[str, Any] = {}
        for turn in line["turns"]:
            check = {key: _filled(value, values) for key, value in turn["check"].items()}
            if check.get("answer") == "{passage}":
                check["answer"] = self.index.passage(check["about"], random)
            asked = {"role": "user", "content": _filled(turn["user"], values)}
            answer = reference({"answer": "(any answer that the check accepts)", **check})
            messages += [asked, {"role": "assistant", "content": answer}]
        return {"messages": messages, "check": check, "kind": line["kind"]}

    def _values(self, random: Random) -> dict[str, str]:
        """Draw values for the words in braces."""
        name = random.choice(self.index.names[:FAMOUS] or self.index.nouns[:FAMOUS] or [""])
        noun = random.choice(self.index.nouns[:FAMOUS] or self.index.names[:FAMOUS] or [""])
        opening, _ = self.index.opening(random)
        return {"{name}": name, "{noun}": noun, "{opening}": opening}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """True if the last answer is one that a person would accept."""
        return judge(conversation["check"], completion, pairs_of(self.texts))


def _filled(value: Any, values: dict[str, str]) -> Any:
    if isinstance(value, str):
        for key, text in values.items():
            value = value.replace(key, text)
    return value


if __name__ == "__main__":
    from tasks.specs import main

    main(None, first_contact=FirstContact)
