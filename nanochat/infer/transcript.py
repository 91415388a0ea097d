"""Transcript of a sample (tokens turned into text), and truncation of chats to the context."""

import bisect
import codecs
from collections.abc import Mapping
from typing import Any

from nanochat.conversation import parts
from nanochat.errors import UserError
from nanochat.tokenizer import SystemStyle, Tokenizer


class Transcript:
    """Turns tokens into message parts and bytes into characters, and finds stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self.tokenizer = tokenizer
        self.stop = stop
        self.type = "text"
        self.parts: list[dict[str, str]] = []
        self.fresh: list[tuple[str, str]] = []
        """Pieces (type, text) that `take` has not returned yet."""
        self.stopped = False
        self._pending = ""  # text that may be the beginning of a stop string
        self._open = False  # True while the last part may still grow
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> None:
        self._text(self._decoder.decode(self.tokenizer.ranks[token]))

    def switch(self, kind: str) -> None:
        """End the current part; the next one is of type `kind`."""
        self.end()
        self.type = kind
        if kind != "text":
            # An empty call or output is a part too.
            self.parts.append({"type": kind, "text": ""})
            self._open = True

    def end(self) -> None:
        """End the current part and release text that was held back for it."""
        self._text(self._decoder.decode(b"", final=True))
        self._emit(self._pending)
        self._pending = ""
        self._open = False

    def take(self) -> list[tuple[str, str]]:
        fresh, self.fresh = self.fresh, []
        return fresh

    def _text(self, text: str) -> None:
        if self.stopped or not text:
            return
        if not self.stop or self.type != "text":
            self._emit(text)
            return
        text = self._pending + text
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped = True
            held, text = 0, text[: min(found)]
        else:
            held = max(_overlap(text, stop) for stop in self.stop)
        cut = len(text) - held
        self._pending = text[cut:]
        self._emit(text[:cut])

    def _emit(self, text: str) -> None:
        if not text:
            return
        if not self._open:
            self.parts.append({"type": self.type, "text": ""})
            self._open = True
        self.parts[-1]["text"] += text
        self.fresh.append((self.type, text))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with; less than all of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def truncate_chat(
    conversation: Mapping[str, Any],
    tokenizer: Tokenizer,
    max_tokens: int,
    system: SystemStyle = "tokens",
) -> tuple[dict[str, Any], str]:
    """Leave out the oldest turns until the prompt has at most `max_tokens` tokens.

    Returns the conversation and a notice for the user, which is empty if everything fits. System
    messages at the beginning stay, and the rest begins with a user's message. If not even the last
    user's message fits, its beginning is cut off. If the system messages leave no room for it, they
    are left out too. Raises UserError if nothing fits.
    """
    messages = list(conversation["messages"])
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()  # the message to be completed

    def length(kept: list[Any]) -> int:
        return len(tokenizer.render_for_completion({"messages": kept}, system))

    if length(messages) <= max_tokens:
        return {**conversation, "messages": messages}, ""
    turns = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages) - 1)
    head, turns_left = messages[:turns], messages[turns:]
    starts = [i for i, m in enumerate(turns_left) if m["role"] == "user" and i > 0]
    # Fewer messages are fewer tokens, so the first start that fits can be found by bisection.
    first = bisect.bisect_left(
        starts, True, key=lambda start: length(head + turns_left[start:]) <= max_tokens
    )
    if first < len(starts):
        kept, dropped = turns_left[starts[first] :], starts[first]
        noun = "message" if dropped == 1 else "messages"
        notice = f"the oldest {dropped} {noun} no longer fit into the context and were left out"
        return {**conversation, "messages": head + kept}, notice
    last = dict(turns_left[starts[-1] if starts else 0])
    ids = tokenizer.encode("".join(part["text"] for part in parts(last)))
    for opening in (head, []):
        room = max_tokens - length([*opening, {**last, "content": ""}])
        while room > 0:
            message = {**last, "content": tokenizer.decode(ids[-room:])}
            excess = length([*opening, message]) - max_tokens
            if excess <= 0:
                notice = "only the end of the last message fits into the context"
                return {**conversation, "messages": [*opening, message]}, notice
            room -= excess
    raise UserError(f"no message fits into {max_tokens} tokens; allow more")
