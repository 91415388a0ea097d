"""CustomJSON: your own conversations, in this project's format or another (`tasks.formats`)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanochat.conversation import validate
from nanochat.data.files import opened, parse_json, returns_only
from nanochat.errors import UserError
from nanochat.paths import file_sha256, user_path
from tasks.common import Conversation, Task
from tasks.formats import convert, is_messages

IDENTITY = Path(__file__).parent / "data" / "identity_conversations.jsonl"
_MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8


class CustomJSON(Task):
    """Conversations of the file `path`, by default the project's own identity conversations.

    A row is a line, or an object of the list that the file holds. Files may end in `.gz` or `.zst`.
    `tasks.formats` converts ShareGPT, Alpaca, OASST trees and OpenAI's tool calls. Blank lines are
    not rows. There is only a train split; `TaskSlice` holds rows out.

    Rows are read when they are needed, and use 24 bytes of memory each. A compressed file, and one
    with carriage returns as line ends, is kept in memory as a whole. A row that is not a
    conversation raises UserError with its number. With bad_rows="skip" the whole file is checked at
    the start, `skipped` counts such rows, and `first_skipped` describes the first one.
    """

    def __init__(
        self,
        split: str = "train",
        path: str | Path = IDENTITY,
        bad_rows: Literal["error", "skip"] = "error",
    ):
        super().__init__("customjson", split)
        self.path = user_path(str(path))  # a spec gives `customjson:20` as a number
        if split != "train":
            raise UserError(
                f"{self.path.name} has only a train split, not '{split}'; hold rows out of it"
            )
        if bad_rows not in ("error", "skip"):
            raise UserError(f"bad_rows '{bad_rows}' must be error or skip")
        if not self.path.is_file():
            raise UserError(f"{self.path} is not a file; give a .jsonl of conversations")
        self._data = b""
        with opened(self.path) as (stream, _):
            head = stream.read(1 << 16)
            if self.path.suffix.lower() in (".gz", ".zst") or returns_only(head):
                self._data = head + stream.read()
        self.skipped = 0
        self.first_skipped = ""
        places = []
        self._row_word = "line"
        for number, start, stop in self._places():
            if bad_rows == "error" or self._is_good(number, start, stop):  # else checked when read
                places.append((number, start, stop))
        if not places:
            found = f"; first of {self.skipped} bad ones: {self.first_skipped}"
            raise UserError(f"{self.path} has no conversations{found if self.skipped else ''}")
        self._rows = np.array(places, dtype=np.int64)

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Yield (number, start, stop) of each row; lines count from 1, a list's objects from 0."""
        first = True
        position = 0
        for number, line in enumerate(self._lines(), start=1):
            if line.removeprefix(_MARK).strip():
                if first and _begins_list(line):
                    self._row_word = "object"
                    yield from _list_places(self._read(0, None), self.path.name)
                    return
                first = False
                yield number, position, position + len(line)
            position += len(line)

    def _lines(self) -> Iterator[bytes]:
        if self._data:
            yield from self._data.splitlines(keepends=True)
            return
        with self.path.open("rb") as file:
            yield from file

    def _read(self, start: int, stop: int | None) -> bytes:
        if self._data:
            return self._data[start:stop]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)

    def _is_good(self, number: int, start: int, stop: int) -> bool:
        try:
            where = self._where(number)
            validate(self._parse(number, start, stop), where)
        except UserError as error:
            self.skipped += 1
            self.first_skipped = self.first_skipped or str(error)
            return False
        return True

    def _where(self, number: int) -> str:
        return f"{self.path.name} {self._row_word} {number}"

    def _parse(self, number: int, start: int, stop: int) -> Conversation:
        try:
            name, conversation = convert(parse_json(self._read(start, stop), first=start == 0))
        except UserError as error:
            raise UserError(f"{self._where(number)}: {error}") from None
        return conversation if name == "messages" else {**conversation, "format": name}

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Conversation:
        number, start, stop = map(int, self._rows[index])
        return self._parse(number, start, stop)

    def where(self, index: int) -> str:
        return f"{self.name}/{self.split} row {index} ({self._where(int(self._rows[index, 0]))})"

    def settings(self) -> dict[str, Any]:
        return {"file": file_sha256(self.path)[:32], "rows": len(self)}


def _begins_list(line: bytes) -> bool:
    """True if a file with this first line is one list of rows, not a row per line."""
    text = line.removeprefix(_MARK).strip()
    if not text.startswith(b"["):
        return False
    try:
        return not is_messages(parse_json(text))
    except UserError:  # the value continues on the next line
        return True


def _list_places(data: bytes, name: str) -> Iterator[tuple[int, int, int]]:
    # Every byte is a character of latin-1, so positions in the text are positions in the file.
    text = data.decode("latin-1")
    blank = json.decoder.WHITESPACE  # type: ignore[attr-defined]
    position = blank.match(text, text.index("[") + 1).end()
    number = 0
    try:
        while text[position : position + 1] != "]" or number:
            _, end = json.JSONDecoder().raw_decode(text, position)
            yield number, position, end
            number += 1
            position = blank.match(text, end).end()
            if text[position : position + 1] == "]":
                return
            if text[position : position + 1] != ",":
                raise ValueError("a comma is missing, or the end of the list")
            position = blank.match(text, position + 1).end()
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{name} object {number}: not valid JSON ({error}); write a list of conversations, or "
            "one of them per line"
        ) from None


if __name__ == "__main__":
    from tasks.specs import main

    main("path", customjson=CustomJSON)
