"""Search for documents that share runs of words with the problems of evaluation tasks."""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanochat.data.order import GOLDEN
from nanochat.data.store import StoreWriter, TokenStore
from nanochat.data.workers import in_processes
from nanochat.errors import UserError
from nanochat.progress import progress_bar
from nanochat.tokenizer import Tokenizer

_JOB_TOKENS = 2**20
_WORD = re.compile(r"[^\W_]+")
# Invisible characters: soft hyphens, joiners, direction marks, variation selectors.
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)
_BASE = np.uint64(GOLDEN)  # odd, so that every word changes a hash modulo 2^64
_MAX_TASKS = 63  # a set of tasks is the bits of an int64
SHORTEST = 8
"""Number of words of the shortest problem to search for; fewer occur in unrelated texts too."""


class Item(NamedTuple):
    """A problem of a task, with the texts to search for.

    forms: the problem as it may be written in a document; the first form is the one that the model
        is asked in. Its first n words are searched for, or all of it if it has fewer.
    parts: texts of which any n consecutive words are searched for; shorter texts are not.
    """

    task: str
    name: str
    forms: list[str]
    parts: list[str] = []  # noqa: RUF012 (a tuple's default is never changed)


def split_words(text: str) -> list[str]:
    """Split text into words; case, punctuation, letter forms and invisible characters are ignored.

    >>> split_words("Don't pa\\u00adnic: ﬁve_Apples!")
    ['don', 't', 'panic', 'five', 'apples']
    """
    if not text.isascii():
        text = _UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    return _WORD.findall(text.casefold())


class NgramIndex:
    """Index of the n-grams (runs of n words) of the evaluation tasks, and of their short problems.

    A gram is an n-gram or a whole problem of fewer than n words. Words are numbered from 1; 0
    stands for a word that no task has, and separates texts. The index needs about 20 bytes per word
    of the tasks. `covered` tells for each item whether a document with its first form is found.
    """

    def __init__(self, items: Sequence[Item], n: int):
        self.n = n
        self.number: dict[str, int] = {}
        self.items = [(item.task, item.name) for item in items]
        self.tasks = list(dict.fromkeys(item.task for item in items))
        if len(self.tasks) > _MAX_TASKS:
            raise UserError(f"{len(self.tasks)} tasks at once; look for at most {_MAX_TASKS}")
        words = array("i")
        ends = []
        short: dict[int, list[int]] = {}  # starts of the short forms, by their length
        self.covered = np.zeros(len(items), dtype=bool)
        for i, item in enumerate(items):
            for form, text in enumerate([*item.forms, *item.parts]):
                start = len(words)
                split = split_words(text)[: n if form < len(item.forms) else None]
                if form < len(item.forms) and SHORTEST <= len(split) < n:
                    short.setdefault(len(split), []).append(start)
                if form == 0:
                    self.covered[i] = len(split) >= min(SHORTEST, n)
                words.extend(self.number.setdefault(w, len(self.number) + 1) for w in split)
                words.append(0)
            ends.append(len(words))
        self.vocabulary = list(self.number)
        self.words = np.array(words, dtype=np.int32)
        self.ends = np.array(ends, dtype=np.int64)  # end of each item's words
        # For each length of grams: the number of its first gram, and the sorted hashes of all.
        self.tables: list[tuple[int, int, np.ndarray]] = []
        places: list[np.ndarray] = []
        bounds, lengths = [0], list[int]()
        for length, starts in [(n, _starts(self.words, n)), *sorted(short.items())]:
            starts = np.array(starts, dtype=np.int64)
            hashes = _hashes(self.words, starts, length)
            order = np.argsort(hashes, kind="stable")
            starts, hashes = starts[order], hashes[order]
            first = np.flatnonzero(np.diff(hashes, prepend=~hashes[:1])) if len(hashes) else starts
            self.tables.append((length, len(lengths), hashes[first]))
            places.append(starts)
            bounds.extend((bounds[-1] + np.append(first[1:], len(starts))[: len(first)]).tolist())
            lengths.extend([length] * len(first))
        # Equal grams are next to each other: gram g is at starts[bounds[g] : bounds[g + 1]].
        self.starts = np.concatenate(places)
        self.bounds = np.array(bounds, dtype=np.int64)
        self.lengths = np.array(lengths, dtype=np.int64)
        # First words of the short forms.
        self.begins = np.zeros(len(self.vocabulary) + 1, dtype=bool)
        self.begins[self.words[[start for starts in short.values() for start in starts]]] = True

        task_of = {task: number for number, task in enumerate(self.tasks)}
        bits = np.array([1 << task_of[item.task] for item in items], dtype=np.int64)
        owner = self.item_of(self.starts)
        grams = self.bounds[:-1]
        self.task_bits = np.bitwise_or.reduceat(bits[owner], grams) if len(grams) else bits[:0]

    def item_of(self, starts: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, starts, side="right")

    def lookup(self, text: str) -> list[int]:
        number = self.number.get
        return [number(word, 0) for word in split_words(text)]

    def find(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find grams of the tasks in `words` (int32); returns their places and their numbers."""
        found = [
            self._find(words, _starts(words, length, begins), length, first, hashes)
            for (length, first, hashes), begins in zip(
                self.tables, [None, *[self.begins] * (len(self.tables) - 1)], strict=True
            )
        ]
        places = np.concatenate([places for places, _ in found])
        grams = np.concatenate([grams for _, grams in found])
        order = np.argsort(places, kind="stable")
        return places[order], grams[order]

    def _find(
        self, words: np.ndarray, places: np.ndarray, length: int, first: int, hashes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if len(hashes) == 0:
            return places[:0], places[:0]
        own = _hashes(words, places, length)
        grams = np.searchsorted(hashes, own).clip(max=len(hashes) - 1)
        hit = hashes[grams] == own
        places, grams = places[hit], grams[hit] + first
        # Hashes may collide: compare the words.
        offsets = np.arange(length)
        theirs = self.words[self.starts[self.bounds[grams]][:, None] + offsets]
        same = (words[places[:, None] + offsets] == theirs).all(axis=1)
        return places[same], grams[same]

    def text(self, gram: int) -> str:
        """Text of a gram, its words joined by spaces."""
        start = self.starts[self.bounds[gram]]
        numbers = self.words[start : start + self.lengths[gram]].tolist()
        return " ".join(self.vocabulary[number - 1] for number in numbers)


def _starts(words: np.ndarray, length: int, begins: np.ndarray | None = None) -> np.ndarray:
    """Starts of all runs of `length` words without a 0, int64; `begins` limits the first word."""
    if len(words) < length:
        return np.empty(0, dtype=np.int64)
    zeros = np.concatenate([[0], np.cumsum(words == 0)])
    whole = zeros[length:] == zeros[:-length]
    if begins is not None:
        whole &= begins[words[: len(whole)]]
    return np.flatnonzero(whole)


def _hashes(words: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Hashes of the `length` words from each start on, one uint64 per start."""
    hashes = np.zeros(len(starts), dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * _BASE + words[starts + offset].astype(np.uint64)
    return hashes


class Found(NamedTuple):
    """Documents of a range that share grams with the tasks."""

    documents: list[int]
    grams: list[int]
    """Number of one shared gram of each document."""
    task_bits: list[int]
    """Set of tasks, as bits, that share any gram with each document."""
    all_grams: np.ndarray
    """Numbers of all grams that occur."""


def look_through(
    store: TokenStore, tokenizer: Tokenizer, index: NgramIndex, workers: int
) -> dict[str, Any]:
    """Search all documents of a store, in `workers` processes; returns a report for JSON."""
    per_job = max(1, _JOB_TOKENS * len(store) // max(1, store.num_tokens))
    jobs = [range(i, min(i + per_job, len(store))) for i in range(0, len(store), per_job)]
    found: list[Found] = []
    with progress_bar(f"reading {store.name}", len(store)) as bar:
        for job, result in zip(jobs, _results(store, tokenizer, index, jobs, workers), strict=True):
            found.append(result)
            bar.advance(len(job))

    grams = np.unique(np.concatenate([f.all_grams for f in found]))
    owners = [index.item_of(index.starts[index.bounds[g] : index.bounds[g + 1]]) for g in grams]
    items = np.unique(np.concatenate(owners)).tolist() if owners else []
    matches = [
        {
            "document": document,
            "item": index.items[int(index.item_of(index.starts[index.bounds[gram]]))][1],
            "words": index.text(gram),
        }
        for f in found
        for document, gram in zip(f.documents, f.grams, strict=True)
    ]
    tasks: dict[str, dict[str, int]] = {
        task: {"items": 0, "covered": 0, "found": 0, "documents": 0} for task in index.tasks
    }
    for (task, _), covered in zip(index.items, index.covered.tolist(), strict=True):
        tasks[task]["items"] += 1
        tasks[task]["covered"] += covered
    for item in items:
        tasks[index.items[item][0]]["found"] += 1
    for bits in (b for f in found for b in f.task_bits):
        for number, task in enumerate(index.tasks):
            tasks[task]["documents"] += bits >> number & 1
    return {
        "store": str(store.folder),
        "documents": len(store),
        "contaminated": len(matches),
        "ngram": index.n,
        "tasks": tasks,
        "matches": matches,
    }


def _results(
    store: TokenStore, tokenizer: Tokenizer, index: NgramIndex, jobs: Sequence[range], workers: int
) -> Iterator[Found]:
    if workers == 1 or len(jobs) < 4:
        yield from (scan(store, tokenizer, index, job) for job in jobs)
        return
    state = (store.folder, tokenizer, index)
    remedy = "run it again with fewer --workers"
    yield from in_processes(_scan_job, state, jobs, workers, remedy)


@lru_cache(maxsize=1)
def _opened(folder: Path) -> TokenStore:
    """Open the store once in each process."""
    return TokenStore.open(folder)


def _scan_job(state: tuple[Path, Tokenizer, NgramIndex], job: range) -> Found:
    folder, tokenizer, index = state
    return scan(_opened(folder), tokenizer, index, job)


def scan(store: TokenStore, tokenizer: Tokenizer, index: NgramIndex, documents: range) -> Found:
    """Search some documents for the index's grams."""
    words = array("i")
    ends = []
    for document in documents:
        for text in texts_of(store.ids(document), tokenizer):
            words.extend(index.lookup(text))
            words.append(0)
        ends.append(len(words))
    places, grams = index.find(
        np.frombuffer(words, dtype=np.int32) if words else np.empty(0, np.int32)
    )
    owner = np.searchsorted(np.array(ends), places, side="right")
    contaminated, first = np.unique(owner, return_index=True)
    bits = np.bitwise_or.reduceat(index.task_bits[grams], first) if len(first) else grams
    return Found(
        [documents[i] for i in contaminated.tolist()],
        grams[first].tolist(),
        bits.tolist(),
        np.unique(grams),
    )


def texts_of(ids: np.ndarray, tokenizer: Tokenizer) -> Iterable[str]:
    """Yield the texts between the special tokens of a document."""
    special = np.flatnonzero(ids >= len(tokenizer.ranks))
    for piece in np.split(ids, special):
        piece = piece[piece < len(tokenizer.ranks)]
        if len(piece):
            yield tokenizer.decode(piece.tolist())


def drop_documents(store: TokenStore, tokenizer: Tokenizer, report: dict[str, Any]) -> TokenStore:
    """Write the store anew without the documents that the report lists; returns the new store.

    The fingerprint is kept, so that scripts.tok_encode does not encode the corpus again. Raises
    UserError if no document would be left.
    """
    unwanted = {match["document"] for match in report["matches"]}
    if len(unwanted) == len(store):
        raise UserError(f"every document of {store.folder} would be dropped; nothing was changed")
    store.verify()  # new digests over damaged tokens would hide the damage
    before = store.meta.get("decontaminated", [])
    note = {"ngram": report["ngram"], "tasks": list(report["tasks"]), "dropped": len(unwanted)}
    with (
        StoreWriter(
            store.folder,
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash,
            fingerprint=store.meta["fingerprint"],
            with_mask=store.has_mask,
            extra={**store.meta, "decontaminated": [*before, note]},
        ) as writer,
        progress_bar(f"writing {store.name}", len(store)) as bar,
    ):
        for document in range(len(store)):
            if document not in unwanted:
                writer.add(store.ids(document), store.mask_bytes(document))
            if document % 1000 == 999:
                bar.advance(1000)
    return TokenStore.open(store.folder, tokenizer.hash)
