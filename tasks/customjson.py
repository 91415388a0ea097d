"""Conversations of your own: a .jsonl file, one object of the conversation schema per line."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanochat.conversation import validate
from nanochat.errors import UserError
from tasks.common import Conversation, Task, file_digest

IDENTITY = Path(__file__).parent / "data" / "identity_conversations.jsonl"


class CustomJSON(Task):
    """The lines of `path`, by default the project's own identity conversations.

    Lines are read when asked for: memory is 8 bytes per line. Blank lines are no rows. A line that
    is not a conversation raises UserError with its number; with bad_rows="skip" the whole file is
    checked at the start, `skipped` counts such lines and `first_skipped` says what the first was.
    There is only a train split: hold rows out with `TaskSlice`.
    """

    VERSION = 2

    def __init__(
        self,
        split: str = "train",
        path: str | Path = IDENTITY,
        bad_rows: Literal["error", "skip"] = "error",
    ):
        super().__init__("customjson", split)
        self.path = Path(str(path)).expanduser()  # a spec gives `customjson:20` as a number
        if split != "train":
            raise UserError(
                f"{self.path.name} has only a train split, not '{split}'; hold rows out of it"
            )
        if bad_rows not in ("error", "skip"):
            raise UserError(f"bad_rows '{bad_rows}' must be error or skip")
        if not self.path.is_file():
            raise UserError(f"{self.path} is not a file; give a .jsonl of conversations")
        self.skipped = 0
        self.first_skipped = ""
        offsets, lines = [], []
        position = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and self._wanted(line, number, bad_rows):
                    offsets.append(position)
                    lines.append(number)
                position += len(line)
        if not offsets:
            found = f"; first of {self.skipped} bad ones: {self.first_skipped}"
            raise UserError(f"{self.path} has no conversations{found if self.skipped else ''}")
        self._offsets = np.array(offsets, dtype=np.int64)
        self._lines = np.array(lines, dtype=np.int64)

    def _wanted(self, line: bytes, number: int, bad_rows: str) -> bool:
        if bad_rows == "error":
            return True  # checked when read
        try:
            validate(self._parse(line, number), f"{self.path.name} line {number}")
        except UserError as error:
            self.skipped += 1
            self.first_skipped = self.first_skipped or str(error)
            return False
        return True

    def _parse(self, line: bytes, number: int) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
            reason = getattr(error, "msg", None) or str(error)
            raise UserError(
                f"{self.path.name} line {number}: not JSON ({reason}); write one object per line"
            ) from None

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, index: int) -> Conversation:
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[index]))
            conversation: Conversation = self._parse(file.readline(), int(self._lines[index]))
        return conversation

    def where(self, index: int) -> str:
        return f"{self.name}/{self.split} row {index} ({self.path.name} line {self._lines[index]})"

    def settings(self) -> dict[str, Any]:
        return {"file": file_digest(self.path), "rows": len(self)}


if __name__ == "__main__":
    from tasks.specs import main

    main("path", customjson=CustomJSON)
