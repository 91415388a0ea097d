"""Small token stores and conversation tasks for the tests of the data path."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.data.store import StoreWriter, TokenStore


def take(loader: Iterator[Any], count: int) -> list[Any]:
    """The next `count` micro-batches; `for batch in loader` would end with the data."""
    return [next(loader) for _ in range(count)]


def make_store(
    folder: Path,
    documents: Iterable[Sequence[int]],
    masks: Sequence[Sequence[int]] | None = None,
    vocab_size: int = 2**16,
    tokenizer_hash: str = "hash",
) -> TokenStore:
    with StoreWriter(
        folder,
        vocab_size=vocab_size,
        tokenizer_hash=tokenizer_hash,
        fingerprint="print",
        with_mask=masks is not None,
    ) as writer:
        for i, ids in enumerate(documents):
            writer.add(ids, None if masks is None else masks[i])
    return TokenStore.open(folder)


def numbered_store(
    folder: Path, lengths: Sequence[int], first: int = 1, vocab_size: int = 2**16
) -> TokenStore:
    """Documents in which every token is another id: first, first + 1, ..."""
    ends = first + np.cumsum([0, *lengths])
    documents = [range(ends[i], ends[i + 1]) for i in range(len(lengths))]
    return make_store(folder, documents, vocab_size=vocab_size)


class Echo:
    """A task of `size` conversations; the rows in `bad` have a role that does not exist."""

    def __init__(self, size: int, bad: Sequence[int] = (), text: str = "echo"):
        self.size, self.bad, self.text = size, bad, text
        self.name, self.split = "echo", "train"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        role = "robot" if index in self.bad else "assistant"
        return {
            "messages": [
                {"role": "user", "content": f"{self.text} {index}"},
                {"role": role, "content": f"{index}!"},
            ]
        }

    def fingerprint(self) -> str:
        return f"{self.text}-{self.size}"
