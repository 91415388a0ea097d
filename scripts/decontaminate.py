"""Find training documents that share text with the evaluation tasks, and drop them.

Examples:
    python -m scripts.decontaminate --corpus climbmix --task mmlu gsm8k
    python -m scripts.decontaminate --corpus climbmix --drop

A document is contaminated if it has 13 consecutive words in common with a question or an answer
(as in arXiv 2005.14165): lower case, without punctuation. Memory holds the evaluation tasks' words,
whatever the size of the corpus. The report goes to report/decontamination-<store>.json under
NANOCHAT_BASE_DIR.

What is read, and with --drop rewritten, is the encoded corpus that training reads. Run it after
scripts.tok_encode, and again where that has appended shards; deleting the store and encoding the
corpus anew brings the dropped documents back.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.table import Table

from nanochat import paths
from nanochat.conversation import parts
from nanochat.dataset import open_corpus
from nanochat.errors import UserError
from nanochat.progress import progress_bar
from nanochat.token_store import StoreWriter, TokenStore
from nanochat.tokenizer import Tokenizer
from tasks.common import Task
from tasks.registry import build

if TYPE_CHECKING:  # the processes that read need no torch, which takes seconds to import
    from nanochat.core_eval import CoreTask
    from nanochat.runtime import Runtime

_JOB_TOKENS = 2**20
_WORD = re.compile(r"[^\W_]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of an n-gram is lost modulo 2^64
_MAX_TASKS = 63  # bits of a set of tasks


@dataclass(frozen=True)
class Config:
    corpus: tuple[str, ...] = ("climbmix",)
    """Encoded corpora to look through."""
    store: tuple[Path, ...] = ()
    """Token stores to look through instead, those of conversations too."""
    task: tuple[str, ...] = ("arc:easy", "arc:challenge", "mmlu", "gsm8k", "humaneval")
    """Evaluation tasks; generated ones have nothing to leak. `--task` alone means none."""
    split: str = "test"
    """Split of the tasks."""
    bundle: Path | None = None
    """CORE's task files; default: NANOCHAT_BASE_DIR/eval_bundle, skipped where it is missing."""
    ngram: int = 13
    """Consecutive words that make a match."""
    drop: bool = False
    """Write the stores anew without the documents found."""
    workers: int = 0
    """Processes; 0: one for each CPU."""


def main(cfg: Config, runtime: Runtime) -> dict[str, Any]:
    """Returns the reports by the store's name (nothing on ranks other than 0)."""
    if not runtime.is_main:
        return {}
    if cfg.ngram < 1 or cfg.workers < 0:
        raise UserError(
            f"--ngram {cfg.ngram} must be at least 1, --workers {cfg.workers} 0 or more"
        )
    tokenizer = Tokenizer.load()
    folders = cfg.store or [open_corpus(corpus).store_folder("train") for corpus in cfg.corpus]
    stores = [TokenStore.open(folder, tokenizer.hash) for folder in folders]
    items = list(evaluation_items(cfg, runtime))
    if not items:
        raise UserError("there is no evaluation task to look for; name some with --task")
    index = Index(items, cfg.ngram)
    reports = {}
    for store in stores:
        report = look_through(store, tokenizer, index, cfg.workers or os.cpu_count() or 1)
        runtime.console.print(make_table(report))
        share = report["contaminated"] / report["documents"]
        runtime.print(
            f"{store.name}: {report['contaminated']:,} of {report['documents']:,} documents "
            f"({share:.3%}) share {cfg.ngram} words with an evaluation task"
        )
        if cfg.drop and report["contaminated"]:
            cleaned = drop_documents(store, tokenizer, report)
            runtime.print(f"{store.folder} has {len(cleaned):,} documents now")
        report["dropped"] = cfg.drop
        path = paths.report_dir() / f"decontamination-{store.name}.json"
        paths.atomic_write(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        runtime.print(f"written to {path}")
        reports[store.name] = report
    return reports


# The evaluation tasks


class Item(NamedTuple):
    """A problem of a task: what it is called, and its texts."""

    task: str
    name: str
    texts: list[str]


def evaluation_items(cfg: Config, runtime: Runtime) -> Iterator[Item]:
    for spec in cfg.task:
        yield from task_items(build(spec, cfg.split), spec)
    bundle = cfg.bundle or paths.eval_bundle_dir()
    if cfg.bundle is not None or bundle.is_dir():
        from nanochat.core_eval import load_bundle

        tasks, missing = load_bundle(bundle)
        if missing:
            runtime.print(f"not looked for, since {bundle} lacks them: {', '.join(missing)}")
        for task in tasks:
            yield from core_items(task)
    else:
        runtime.print(f"CORE is not looked for: {bundle} is missing")


def task_items(task: Task, label: str) -> Iterator[Item]:
    """Questions with options as below; else the messages, without their tool calls."""
    for i in range(len(task)):
        conversation = task[i]
        if "choices" in conversation:
            choices = list(conversation["choices"])
            right = choices.pop(conversation["letters"].index(conversation["answer"]))
            texts = [f"{conversation['question']} {right}", *choices]
        else:
            texts = [
                "".join(part["text"] for part in parts(message) if part["type"] == "text")
                for message in conversation["messages"]
            ]
        yield Item(label, task.where(i), texts)


def core_items(task: CoreTask) -> Iterator[Item]:
    """Question and right answer as one text, other answers on their own."""
    for i, item in enumerate(task.items):
        if task.kind == "multiple_choice":
            choices = list(item["choices"])
            texts = [f"{item['query']} {choices.pop(item['gold'])}", *choices]
        elif task.kind == "schema":
            texts = [f"{item['context_options'][item['gold']]} {item['continuation']}"]
        else:
            texts = [f"{item['context']} {item['continuation']}"]
        yield Item(f"CORE {task.label}", f"{task.label} item {i}", texts)


def split_words(text: str) -> list[str]:
    """Lower case, punctuation and the forms of letters forgotten.

    >>> split_words("Don't panic: ﬁve_Apples!")
    ['don', 't', 'panic', 'five', 'apples']
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())


class Index:
    """The n-grams of the evaluation tasks' words.

    Words are numbered from 1; 0 is any word that no task has, and what lies between texts. About 20
    bytes for each word of the tasks.
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
        for item in items:
            for text in item.texts:
                words.extend(
                    self.number.setdefault(w, len(self.number) + 1) for w in split_words(text)
                )
                words.append(0)
            ends.append(len(words))
        self.vocabulary = list(self.number)
        self.words = np.array(words, dtype=np.int32)
        self.ends = np.array(ends, dtype=np.int64)  # of each item's words
        starts, hashes = _ngrams(self.words, n)
        order = np.argsort(hashes, kind="stable")
        starts, hashes = starts[order], hashes[order]
        # Equal n-grams lie together: gram g has the places starts[bounds[g] : bounds[g + 1]].
        first = np.flatnonzero(np.diff(hashes, prepend=~hashes[:1])) if len(hashes) else starts
        self.hashes, self.starts = hashes[first], starts
        self.bounds = np.append(first, len(starts))

        task_of = {task: number for number, task in enumerate(self.tasks)}
        bits = np.array([1 << task_of[item.task] for item in items], dtype=np.int64)
        owner = self.item_of(self.starts)
        self.task_bits = np.bitwise_or.reduceat(bits[owner], first) if len(first) else bits[:0]
        self.checked = np.zeros(len(items), dtype=bool)  # items with at least one n-gram
        self.checked[owner] = True

    def item_of(self, starts: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, starts, side="right")

    def lookup(self, text: str) -> list[int]:
        number = self.number.get
        return [number(word, 0) for word in split_words(text)]

    def find(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places, grams): where in `words` (int32) an n-gram of the tasks begins, and which."""
        places, hashes = _ngrams(words, self.n)
        if len(self.hashes) == 0:
            return places[:0], places[:0]
        grams = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        hit = self.hashes[grams] == hashes
        places, grams = places[hit], grams[hit]
        # Hashes may collide: compare the words.
        offsets = np.arange(self.n)
        theirs = self.words[self.starts[self.bounds[grams]][:, None] + offsets]
        same = (words[places[:, None] + offsets] == theirs).all(axis=1)
        return places[same], grams[same]

    def text(self, gram: int) -> str:
        """The words of an n-gram."""
        start = self.starts[self.bounds[gram]]
        numbers = self.words[start : start + self.n].tolist()
        return " ".join(self.vocabulary[number - 1] for number in numbers)


def _ngrams(words: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the n-grams without a 0 begin, int64, and their hashes, uint64."""
    if len(words) < n:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64)
    zeros = np.concatenate([[0], np.cumsum(words == 0)])
    starts = np.flatnonzero(zeros[n:] == zeros[:-n])
    hashes = np.zeros(len(starts), dtype=np.uint64)
    for offset in range(n):
        hashes = hashes * _BASE + words[starts + offset].astype(np.uint64)
    return starts, hashes


# The documents


class Found(NamedTuple):
    """What a range of documents has in common with the tasks."""

    documents: list[int]
    grams: list[int]
    """An n-gram of each document."""
    task_bits: list[int]
    """The tasks that share any n-gram with it."""
    all_grams: np.ndarray
    """Every n-gram that occurs."""


def look_through(
    store: TokenStore, tokenizer: Tokenizer, index: Index, workers: int
) -> dict[str, Any]:
    """The report on a store."""
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
        task: {"items": 0, "too_short": 0, "found": 0, "documents": 0} for task in index.tasks
    }
    for (task, _), checked in zip(index.items, index.checked.tolist(), strict=True):
        tasks[task]["items"] += 1
        tasks[task]["too_short"] += not checked
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
    store: TokenStore, tokenizer: Tokenizer, index: Index, jobs: Sequence[range], workers: int
) -> Iterator[Found]:
    if workers == 1 or len(jobs) < 4:
        yield from (scan(store, tokenizer, index, job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads can deadlock
    with ProcessPoolExecutor(
        min(workers, len(jobs)), context, _start_worker, (store.folder, tokenizer, index)
    ) as pool:
        try:
            yield from pool.map(_work, jobs)
        except BrokenExecutor as error:
            raise UserError(
                "a process died while reading, most likely for want of memory; "
                "run it again with fewer --workers"
            ) from error


_worker: tuple[TokenStore, Tokenizer, Index]


def _start_worker(folder: Path, tokenizer: Tokenizer, index: Index) -> None:
    global _worker
    _worker = TokenStore.open(folder), tokenizer, index


def _work(job: range) -> Found:
    return scan(*_worker, job)


def scan(store: TokenStore, tokenizer: Tokenizer, index: Index, documents: range) -> Found:
    """Look for the index's n-grams in some documents."""
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
    """What stands between the special tokens of a document."""
    special = np.flatnonzero(ids >= len(tokenizer.ranks))
    for piece in np.split(ids, special):
        piece = piece[piece < len(tokenizer.ranks)]
        if len(piece):
            yield tokenizer.decode(piece.tolist())


def drop_documents(store: TokenStore, tokenizer: Tokenizer, report: dict[str, Any]) -> TokenStore:
    """Write the store anew without the documents of a report.

    It keeps its fingerprint: for scripts.tok_encode it is still the encoded corpus.
    """
    unwanted = {match["document"] for match in report["matches"]}
    if len(unwanted) == len(store):
        raise UserError(f"every document of {store.folder} would be dropped; nothing was changed")
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


def make_table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{Path(report['store']).name}: {report['ngram']} words in common")
    table.add_column("evaluation task")
    for name in ("items", "too short", "found", "documents"):
        table.add_column(name, justify="right")
    for task, counts in report["tasks"].items():
        table.add_row(task, *(f"{value:,}" for value in counts.values()))
    return table


if __name__ == "__main__":
    from nanochat.launch import launch

    launch(main, Config, __doc__)
