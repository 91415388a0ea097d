"""Passkey: find a password in a long text, at any depth and length, among distractors.

    ... And the people of the town came out to him. Say to the captain silver lion. And in the
    morning he went up to the mountain ...

    What do you say to the captain?
    > Say to the captain silver lion.

The text is consecutive sentences of a corpus, or built-in filler. A *needle* is the sentence with
the password. `distractors` further sentences tell what to say to others, so the model has to use
the listener in the question to find the needle.

Two choices let small models learn this within minutes; without them a model of 4 layers had learned
nothing of it after 300,000 tokens:

- **The wording.** The easiest skill to learn is to continue as after an earlier place that looks
  the same ("induction", arXiv 2209.11895). So the answer repeats the needle. The password comes
  right after the only word that differs between needles, which is rare in prose.
- **Three of four training rows are short** (`short`): needles and questions without text around.
  Untrained attention is spread over all tokens, and a needle's part in it is lost in a long text.

Passwords are pairs of words drawn anew for every row. The pair's hash decides the split, so no
tested pair was ever an answer in training.
"""

import re
from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Any

import numpy as np

from nanochat.data.store import TokenStore
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from tasks.common import Conversation, Task, check_generated, digest, row_random, split_of

# fmt: off
LISTENERS = (
    "watchman", "guest", "potter", "worker", "builder", "helper", "teacher", "owner", "girl", "boy",
    "queen", "expert", "keeper", "friend", "sister", "captain", "neighbour", "judge", "ruler",
    "prophet",
)
FIRST = (
    "warm", "cold", "soft", "happy", "black", "green", "blue", "thick", "purple", "bright", "short",
    "white", "red", "sharp", "sweet", "feeble", "quiet", "fat", "deep", "wide", "loud", "small",
    "dry", "bitter", "dark", "hard", "wise", "silver", "clean", "smooth", "tall", "wet",
)
SECOND = (
    "dog", "star", "ring", "snow", "window", "branch", "eagle", "pot", "flower", "root", "wool",
    "cord", "goat", "fish", "snake", "ship", "cloth", "bird", "boat", "tower", "moon", "horse",
    "milk", "honey", "bow", "cup", "crown", "garden", "lion", "rock", "river", "cloud",
)
FILLER = (
    "The sun comes up in the east and goes down in the west.",
    "A man went down the road with his two dogs.",
    "In the winter the nights are long and the wind is cold.",
    "She put the bread on the table and went to the window.",
    "There was no one in the street at that hour.",
    "The water of the river was high after the rain.",
    "He had been waiting there since the early morning.",
    "Some of them were sleeping and some were at work.",
    "The old house at the end of the road was empty.",
    "Every year in spring the birds come back from the south.",
    "They took their seats and said nothing for a long time.",
    "On the other side of the hill is a small town.",
    "The children were playing by the water till it was dark.",
    "It was not far to the market, and the day was warm.",
    "The ship went slowly out of the harbour.",
    "He took the book from the shelf and put it back again.",
    "The doors were open, and there was music inside.",
    "After the meal the guests went out into the garden.",
    "The snow was on the mountains for half of the year.",
    "A letter had come, but nobody had opened it.",
    "The horses were tired and went no faster than a man.",
    "In those days there was only one bridge over the river.",
    "She gave the man his money and he went away.",
    "The fire was out, and the room was getting cold.",
)
# fmt: on
QUESTION = "What do you say to the {listener}?"
NEEDLE = "Say to the {listener} {key}."
LONGEST_SENTENCE = 60
"""Largest number of words of a sentence; a long list without a full stop is left out."""
MAX_SENTENCES = 20_000
SHORT_NEEDLES = 4

_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


def corpus_sentences(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    """List sentences of a corpus in order, at most MAX_SENTENCES.

    Their documents are taken evenly from the whole store.
    """
    count = min(len(store), MAX_SENTENCES // 20)
    sentences: list[str] = []
    for index in np.linspace(0, len(store) - 1, count).astype(int).tolist():
        text = " ".join(tokenizer.decode(store.ids(index, 1)).split())
        sentences += (s for s in _END.split(text) if 0 < len(s.split()) <= LONGEST_SENTENCE)
        if len(sentences) >= MAX_SENTENCES:
            break
    if not sentences:
        raise UserError(
            f"{store.folder} has no sentences to hide a password between; use the filler"
        )
    return sentences[:MAX_SENTENCES]


class Haystack:
    """Text to hide passwords in; lengths are in tokens, or in words without a tokenizer."""

    def __init__(self, sentences: Sequence[str] = FILLER, tokenizer: Tokenizer | None = None):
        self.sentences = list(sentences)
        self.tokenizer = tokenizer
        if tokenizer is None:
            self.sizes = [len(sentence.split()) for sentence in self.sentences]
        else:
            self.sizes = list(map(len, tokenizer.encode_batch([f" {s}" for s in self.sentences])))

    def size(self, conversation: Conversation) -> int:
        """Length of the whole conversation, format tokens and answers included."""
        if self.tokenizer is not None:
            return len(self.tokenizer.render_conversation(conversation)[0])
        return sum(len(message["content"].split()) for message in conversation["messages"])

    def conversation(
        self,
        random: Random,
        length: int,
        depths: Sequence[float],
        distractors: int = 0,
        split: str = "test",
    ) -> Conversation:
        """Make a conversation: a password hidden at each of the `depths`, then a question for each.

        A depth of 0 is the beginning, 1 the end. The text has as many sentences as `length` allows.
        Passwords and the order of questions are random.
        """
        needles, count = len(depths), len(depths) + distractors
        if not all(0 <= depth <= 1 for depth in depths):
            raise UserError(f"depths {list(depths)} must be between 0 (beginning) and 1 (end)")
        least = self.least(needles, distractors)
        if length < least:
            raise UserError(
                f"length {length} is too short for {needles} needles and {distractors} "
                f"distractors, which take up to {least}"
            )
        listeners = random.sample(LISTENERS, count)
        keys = _draw_keys(random, count, split)
        told = [
            NEEDLE.format(listener=who, key=key) for who, key in zip(listeners, keys, strict=True)
        ]
        places = [*depths, *(random.random() for _ in range(distractors))]
        asked = random.sample(range(needles), needles)

        def make(chosen: list[int]) -> Conversation:
            text = [self.sentences[i] for i in chosen]
            ends = [0, *accumulate(self.sizes[i] for i in chosen)]
            for place, sentence in sorted(zip(places, told, strict=True), reverse=True):
                before = min(range(len(ends)), key=lambda i: abs(ends[i] - place * ends[-1]))
                text.insert(before, sentence)
            turns = [(listeners[number], told[number]) for number in asked]
            return {"messages": _dialogue(text, turns), "answer": keys[asked[-1]]}

        room = length - self.size(make([]))
        first = random.randrange(len(self.sentences))
        chosen: list[int] = []
        while room >= (size := self.sizes[(first + len(chosen)) % len(self.sizes)]):
            chosen.append((first + len(chosen)) % len(self.sizes))
            room -= size
        while self.size(made := make(chosen)) > length and chosen:
            chosen.pop()  # joined sentences may have more tokens than the sentences alone
        return made

    def least(self, needles: int, distractors: int) -> int:
        """Upper bound of the length of needles, distractors and questions without text."""
        if needles < 1 or distractors < 0 or needles + distractors > len(LISTENERS):
            raise UserError(
                f"{needles} needles and {distractors} distractors: there must be a needle, and "
                f"at most {len(LISTENERS)} of both"
            )
        listener = max(LISTENERS, key=self._size_of)
        key = f"{max(FIRST, key=self._size_of)} {max(SECOND, key=self._size_of)}"
        told = NEEDLE.format(listener=listener, key=key)
        messages = _dialogue([told] * (needles + distractors), [(listener, told)] * needles)
        return self.size({"messages": messages})

    def _size_of(self, word: str) -> int:
        return len(self.tokenizer.encode(f" {word}")) if self.tokenizer else 1


def _dialogue(text: list[str], turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Make messages: the text with the first question, then the others; turns are (listener,
    answer)."""
    messages = []
    for turn, (listener, answer) in enumerate(turns):
        question = QUESTION.format(listener=listener)
        asked = question if turn else f"{' '.join(text)}\n\n{question}"
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _draw_keys(random: Random, count: int, split: str) -> list[str]:
    keys: list[str] = []
    while len(keys) < count:
        key = f"{random.choice(FIRST)} {random.choice(SECOND)}"
        if key not in keys and split_of(key) == split:
            keys.append(key)
    return keys


class Passkey(Task):
    """Passwords in long texts; row i of a split is a function of (seed, split, i) and the text.

    1 to `needles` passwords are hidden, at random depths or all at `depth`, and asked for one after
    the other. 0 to `distractors` more are hidden and not asked for. The lengths of rows are spread
    evenly over the doublings up to `length` tokens (words without a `tokenizer`), apart from the
    share of `short` rows in the split train. mid_train passes its tokenizer, its context as the
    length, and sentences of the replayed corpus.
    """

    VAL_BY_CONTENT = True

    def __init__(
        self,
        split: str,
        size: int | None = None,
        length: int = 256,
        needles: int = 8,
        distractors: int = 2,
        depth: float | str | None = None,
        short: float | str = 0.75,
        seed: int = 0,
        sentences: Sequence[str] = FILLER,
        tokenizer: Tokenizer | None = None,
    ):
        super().__init__("passkey", split)
        self.size = check_generated("passkey", split, size)
        self.length, self.needles, self.distractors = length, needles, distractors
        self.depth = None if depth is None else _share("depth", depth)
        self.short = _share("short", short)
        self.seed = seed
        self.haystack = Haystack(sentences, tokenizer)
        # Settings that do not fit raise their error here.
        self.haystack.conversation(Random(0), length, [self.depth or 0.0] * needles, distractors)

    def __len__(self) -> int:
        return self.size

    def settings(self) -> dict[str, Any]:
        tokenizer = self.haystack.tokenizer
        return {
            "size": self.size,
            "length": self.length,
            "needles": self.needles,
            "distractors": self.distractors,
            "depth": self.depth,
            "short": self.short,
            "seed": self.seed,
            "sentences": digest("\n".join(self.haystack.sentences)),
            "tokenizer": tokenizer.hash if tokenizer else None,
        }

    def row(self, index: int) -> Conversation:
        random = row_random("passkey", self.split, self.seed, index)
        short = self.split == "train" and random.random() < self.short
        needles = random.randint(1, min(SHORT_NEEDLES, self.needles) if short else self.needles)
        distractors = 0 if short else random.randint(0, self.distractors)
        length = shortest = self.haystack.least(needles, distractors)
        if not short:
            length = round(shortest * (self.length / shortest) ** random.random())
        depths = [random.random() if self.depth is None else self.depth for _ in range(needles)]
        return self.haystack.conversation(random, length, depths, distractors, self.split)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """True if the answered sentence ends with the password, or is the password alone."""
        said = completion.strip().removesuffix(".")
        return f" {said}".endswith(f" {conversation['answer']}") and "." not in said


def _share(name: str, value: float | str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"passkey: {name} {value!r} is not a number from 0 to 1")
    return share


if __name__ == "__main__":
    from tasks.specs import main

    main("size", passkey=Passkey)
