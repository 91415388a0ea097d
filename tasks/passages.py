"""Passages: questions about subjects of a corpus, answered by its sentences.

    Who was Moses?            > Moses said to the people, Have no fear: ...
    Tell me about a king.     > And the king was angry ...
    Go on: In the beginning   > God made the heaven and the earth.

The task works with any corpus. Its *subjects* are found by counting. Names are words with a capital
inside sentences that never occur in lower case. Nouns come right after an article or a similar
word, and end the phrase (`the king.`, `a king of`). A sentence is about a subject if its first
words name it. The model learns to repeat what it has read about a subject, not to know more.

Each document belongs to one split by its hash, and so do the answers made of it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from random import Random
from typing import Any

from nanochat.data.hub import open_corpus
from nanochat.data.store import TokenStore
from nanochat.errors import UserError
from nanochat.paths import stores_dir
from nanochat.tokenizer import Tokenizer
from tasks.asking import Ways, ask
from tasks.common import Conversation, Task, check_generated, digest, row_random, split_of
from tasks.judges import WordPairs, judge
from tasks.spellingbee import noted_corpus

MAX_CHARACTERS = 20_000_000
"""Largest number of characters to read of a corpus; its first documents have enough subjects."""
MAX_SUBJECTS = 400
"""Largest number of names, and of nouns."""
LEAST_SENTENCES = 8
"""Smallest number of sentences about a subject."""
SHORTEST, LONGEST = 5, 30
"""Smallest and largest number of words of a sentence in an answer."""
FEW_DOCUMENTS = 100
CUT = 80
"""Number of characters of a piece of a text without sentences."""
FIRST_WORDS = 6
"""Number of first words of a sentence in which its subject must be named."""

TELLING = (
    "!tell me (something|more|a little|all|everything|) (you know|) about {x}",
    "?(can|could) you (tell|say) (me|) (something|anything|more) about {x}",
    "!say (something|a few words|a sentence|a word or two|anything) (about|on|of) {x}",
    "!(tell me|give me|write|say|i want|let me have) (a|some|two|three|a few) "
    "(sentence|sentences|line|lines|words|verses) (about|on|of|with) {x}",
    "!(tell|tell me|give me|write|write me|make up|make|say) (a|a short|a little|the) "
    "(story|text|passage|tale) (about|of|on|with) {x}",
    ".(a|a short|one|the|) (story|text|passage|sentence|line) (about|of|on|with) {x}",
    "?(have you|did you) ever (hear|heard|read) (of|about|anything about) {x}",
    "?have you (heard|read) (of|about) {x}",
    "?do you know (anything|something|a story|much|) about {x}",
    "?what (does|do|can) (your|the) text (say|tell) (us|me|) about {x}",
    "?what is (in|said in) (your|the) text about {x}",
    "?what (do|can) you (know|tell me|say|have|remember) (about|of|on) {x}",
    "!(speak|talk) (to me|) (about|of) {x}",
    "!i (want|would like) to (know|hear|read) (more|something|) (about|of) {x}",
    "?(is|are) there (something|anything|a story|sentences) (about|of|on) {x}",
    *("?any (stories|news|words) (about|of) {x}", ".{x} please", ".{x}, tell me", "!quote {x}"),
)
"""Ways of asking for what is known about {x}, also used where nothing is (`tasks/ignorance.py`)."""


def telling(subject: str) -> tuple[str, ...]:
    """These ways with the name of a pattern's value in the place of x.

    >>> telling("a {noun}")[-1]
    '!quote a {noun}'
    """
    return tuple(pattern.replace("{x}", subject) for pattern in TELLING)


ABOUT = Ways(
    train=(
        *telling("{name}"),
        *("?who (was|is|were) {name} and what did (he|she|they) do", "?who are the {name}"),
        *("?(can you tell me|do you know) who {name} (is|was)", "?who (was|is) (the|this) {name}"),
        *("?what('s| is| was) {name}", "?why is {name} (important|known|famous)"),
        *("?(where|when) did {name} (live|go|come from)", "?what is {name} (known|famous) for"),
        *("?who was (with|near|around|against|before|after) {name}", "!explain who {name} was"),
        *("?who (was|is) {name}", "?who (was|is) {name}", "?who(s|'s) {name}", "?who is {name}"),
        *("!tell me (something|more|a little|) about {name}", "!tell me about {name}"),
        *("?what (do|can) you (know|tell me|say) about {name}", ".{name}", ".about {name}"),
        *("!say something about {name}", "?what (was|is) {name}", "?where (is|was) {name}"),
        *("!tell me (a|the) story (about|of) {name}", ".(a|the) story (about|of) {name}"),
        *("?what did {name} (do|say)", "?what happened to {name}", "!talk about {name}"),
        *("!give me a (sentence|passage|line) about {name}", "!write about {name}"),
        *("?do you know (who {name} was|{name}|about {name})", "?what about {name}"),
    ),
    held_out=(
        *("?what has been told of {name}", "!let me hear about {name}"),
        *("!describe {name}", "?which words of your text are about {name}"),
        *("!recite a bit about {name}", "?what is written (of|about) {name}"),
    ),
)
ABOUT_NOUN = Ways(
    train=(
        *telling("(a|the|) {noun}"),
        *("!tell me (a|the|) story about (a|the) {noun}", "!tell me about (a|the|) {noun}"),
        *("!tell me a (short|little|) story (about|of|with) (a|the) {noun}", ".about {noun}"),
        *(
            "!say (something|a sentence|a word) about (a|the|) {noun}",
            ".story about (a|the) {noun}",
        ),
        *("?what (do|can) you (know|say|tell me) about (a|the|) {noun}", "!talk about {noun}"),
        "!give me a (sentence|passage|line|verse) (about|with) (a|the|) {noun}",
        "!write (something|a sentence|a line|a story) about (a|the|) {noun}",
        *("?(do|can) you (know|tell) a story about (a|the) {noun}", "?what is (a|the|) {noun}"),
    ),
    held_out=(
        *("!let me hear (something|) about (a|the) {noun}", "!recite a bit about a {noun}"),
        *("?what has been told of (a|the) {noun}", "!describe (a|the) {noun}"),
        *("!make a sentence with {noun}", "?what is written about (a|the) {noun}"),
    ),
)
CONTINUE = Ways(
    train=(
        *(
            "!go on: {opening}",
            "!go on with: {opening}",
            "!go on: {opening}",
            "!continue: {opening}",
        ),
        *("!continue (this|the text|the sentence|the story): {opening}", ".{opening} ..."),
        *("!finish (this|the sentence|this sentence): {opening}", ".{opening}..."),
        *("?what comes (next|after this): {opening}", "?how does this go on: {opening}"),
        *("!complete (this|the sentence|): {opening}", "?what comes after: {opening}"),
    ),
    held_out=(
        *("!carry on from here: {opening}", "?how does it end: {opening}"),
        *("!write what follows: {opening}", ".and then: {opening}"),
    ),
)

SENTENCE_END = re.compile(r"(?<=[.!?;])\s+(?=[A-Z\"'“‘(])|\n\s*\n")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")
_SMALL = re.compile(r"\b[a-z]{3,}\b")
_NOUN = re.compile(
    r"\b(?:a|an|the|his|her|my|your|their|our|this) ([a-z]{3,})"
    r"(?=[.,:;?!]| (?:of|and|was|is|were|are|in|to|had|has|for|from|on|who|which|that|with)\b)"
)
_NO_NOUNS = {
    *("same", "first", "last", "others", "other", "one", "ones", "most", "more", "own", "few"),
    *("me", "him", "her", "them", "you", "this", "that"),
}


@lru_cache(maxsize=2)
def known_texts(tokenizer_hash: str | None = None) -> tuple[str, ...]:
    """Training documents of the corpus that was noted for a tokenizer, or of the embedded corpus.

    They are decoded from the token store, so the corpus's own files are not needed.
    """
    corpus = noted_corpus(tokenizer_hash) if tokenizer_hash else None
    folder = stores_dir() / f"{corpus}-train"
    if corpus and folder.is_dir():
        store = TokenStore.open(folder)
        return store_texts(store, Tokenizer.find(store.meta["tokenizer_hash"]))
    return tuple(open_corpus("bbe").documents("train"))


def store_texts(store: TokenStore, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Decode the documents of a store, up to MAX_CHARACTERS."""
    texts, characters = [], 0
    for index in range(len(store)):
        texts.append(tokenizer.decode(store.ids(index, 1)))
        characters += len(texts[-1])
        if characters >= MAX_CHARACTERS:
            break
    return tuple(texts)


def sentences(text: str) -> list[str]:
    """Split a document into sentences; runs of white space become one space."""
    return [" ".join(part.split()) for part in SENTENCE_END.split(text) if part and part.strip()]


def subjects(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Find (names, nouns) of the texts, the most frequent first.

    >>> subjects(["Then Anna saw the fox. The fox saw Anna, and the fox ran."] * 9)
    (['Anna'], ['fox'])
    """
    capital: Counter[str] = Counter()
    small: Counter[str] = Counter()
    nouns: Counter[str] = Counter()
    for text in texts:
        capital.update(_NAME.findall(text))
        small.update(_SMALL.findall(text))
        nouns.update(_NOUN.findall(text))
    least = LEAST_SENTENCES
    names = [
        name for name, n in capital.most_common() if n >= least and small[name.lower()] < n / 20
    ]
    chosen = [
        noun
        for noun, n in nouns.most_common()
        if n >= least and n >= small[noun] / 5 and noun not in _NO_NOUNS
    ]
    return names[:MAX_SUBJECTS], chosen[:MAX_SUBJECTS]


def documents_of(texts: Sequence[str], split: str) -> list[str]:
    """List the documents of a split; few long ones are first cut into pieces of ten sentences.

    If the train split would be empty (a single page of text), it gets everything.
    """
    pieces = list(texts)
    if len(pieces) < FEW_DOCUMENTS:
        found = [sentences(text) for text in texts]
        pieces = [" ".join(said[i : i + 10]) for said in found for i in range(0, len(said), 10)]
    chosen = [text for text in pieces if split_of(text) == split]
    return chosen or (pieces if split == "train" else [])


class PassageIndex:
    """Index of a corpus: sentences by subject, and openings of sentences with their rest."""

    def __init__(self, texts: Sequence[str], split: str):
        self.texts = documents_of(texts, split)
        names, nouns = subjects(texts)
        wanted = {**dict.fromkeys(names, "name"), **dict.fromkeys(nouns, "noun")}
        about: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self.openings: list[tuple[str, str]] = []
        """Pairs (first words of a sentence, the rest of it)."""
        for text in self.texts:
            found = sentences(text)
            for here, after in zip(found, [*found[1:], ""], strict=True):
                parts = here.split()
                if not SHORTEST <= len(parts) <= LONGEST:
                    continue
                first = [re.sub(r"\W+$", "", word) for word in parts[:FIRST_WORDS]]
                answer = here if len(parts) >= 12 or len(after.split()) > 20 else f"{here} {after}"
                for place, word in enumerate(first):
                    if word in wanted and word not in first[:place]:
                        about[word].append((place, answer.strip()))
                if len(parts) >= 8:
                    self.openings.append((here, after))
        if not self.openings:  # a language without such sentences: running text, cut anywhere
            flat = [" ".join(text.split()) for text in self.texts]
            self.openings = [
                (text[i : i + CUT], "") for text in flat for i in range(0, len(text) - CUT, CUT)
            ]
        self.about = {word: _soonest(said) for word, said in about.items()}
        known = {word for word, said in self.about.items() if len(said) >= 2}
        self.names = [name for name in names if name in known]
        self.nouns = [noun for noun in nouns if noun in known]

    def passage(self, subject: str, random: Random) -> str:
        """Draw sentences about the subject."""
        return random.choice(self.about[subject])

    def opening(self, random: Random) -> tuple[str, str]:
        """Draw (beginning of a sentence, the rest of it)."""
        here, _ = random.choice(self.openings)
        parts = here.split()
        if len(parts) < 8:
            return here[: CUT // 2], here[CUT // 2 :]
        cut = random.randint(3, min(10, len(parts) - 3))
        return " ".join(parts[:cut]), " ".join(parts[cut:])


def _soonest(said: list[tuple[int, str]]) -> list[str]:
    """The sentences that name their subject at once, if there are some, else all of them.

    An answer that begins as any other sentence does often forgets what it was asked about.
    """
    at_once = [answer for place, answer in said if place <= 2]
    return at_once if len(at_once) >= 3 else [answer for _, answer in said]


@lru_cache(maxsize=4)
def index_of(texts: tuple[str, ...], split: str) -> PassageIndex:
    return PassageIndex(texts, split)


@lru_cache(maxsize=2)
def pairs_of(texts: tuple[str, ...]) -> WordPairs:
    return WordPairs(texts)


class Passages(Task):
    """Questions about a corpus; row i of a split is a function of (corpus_texts, seed, split, i).

    `corpus_texts` are training documents, by default those that the stages noted. Texts without
    names give questions about nouns only, and texts without nouns about names only.
    """

    VAL_BY_CONTENT = True

    def __init__(
        self,
        split: str,
        size: int | None = None,
        corpus_texts: Sequence[str] | None = None,
        seed: int = 0,
    ):
        super().__init__("passages", split)
        self.size = check_generated("passages", split, size)
        self.seed = seed
        self.texts = tuple(known_texts() if corpus_texts is None else corpus_texts)
        self.index = index_of(self.texts, split)
        if not self.index.openings:
            raise UserError(
                f"passages: the {len(self.index.texts)} documents of the split {split} have no "
                f"sentence of 8 to {LONGEST} words and no {CUT} characters of running text; give "
                "more text, or leave the task out"
            )

    def __len__(self) -> int:
        return self.size

    def settings(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self.seed, "texts": digest("\n".join(self.texts))}

    def row(self, index: int) -> Conversation:
        random = row_random("passages", self.split, self.seed, index)
        question, answer, check = draw_passage(self.index, random, self.split)
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "check": check,
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """True for a text like the corpus's that names the subject."""
        return judge(conversation["check"], completion, pairs_of(self.texts))


def draw_passage(
    index: PassageIndex, random: Random, split: str
) -> tuple[str, str, dict[str, str]]:
    """Draw (question, answer, check) about a name, about a noun, or continuing an opening.

    Frequent subjects are drawn more often, since people ask about Moses and not about Zelophehad.
    """
    kind = random.random()
    if kind < 0.45 and index.names:
        name = _frequent(index.names, random)
        return (
            ask(random, split, ABOUT, {"name": name}),
            index.passage(name, random),
            {"about": name},
        )
    if kind < 0.8 and index.nouns:
        noun = _frequent(index.nouns, random)
        said = ask(random, split, ABOUT_NOUN, {"noun": noun})
        return said, index.passage(noun, random), {"about": noun}
    opening, rest = index.opening(random)
    said = ask(random, split, CONTINUE, kept={"opening": opening})
    return said, rest, {"continue": opening}


def _frequent(subjects: Sequence[str], random: Random) -> str:
    """Draw a subject; those at the beginning of the list are drawn more often."""
    return subjects[int(len(subjects) * random.random() ** 1.7)]


if __name__ == "__main__":
    from tasks.specs import main

    main("size", passages=Passages)
