"""Encoding of a corpus into a token store, with reading, encoding and writing in parallel."""

from __future__ import annotations

import ctypes
import multiprocessing
import shutil
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nanochat import paths
from nanochat.data.corpus import Corpus, Shard, Split, combined_fingerprint, same_shards
from nanochat.data.store import StoreWriter, TokenStore, merge_stores
from nanochat.data.workers import check_stopped, in_processes
from nanochat.errors import UserError
from nanochat.progress import progress_bar
from nanochat.tokenizer import Tokenizer

_BATCH_CHARS = 1 << 17
"""Number of characters that a thread encodes at a time."""
_PROCESS_BYTES = 32 << 20
"""Bytes of shards per process; starting a process takes as long as encoding 10 MB."""


def encode_split(
    corpus: Corpus,
    split: Split,
    tokenizer: Tokenizer,
    workers: int,
    tell: Callable[[str], None] = print,
) -> TokenStore:
    """Encode a split of a corpus into its store, shards in the corpus's order; returns the store.

    A store that is already up to date is returned as it is. If the corpus has grown by shards at
    its end, only those are encoded and appended. During encoding, each finished shard is kept as a
    store of its own under `<store>.shards/`.
    """
    from nanochat.checkpoint_manager import trained_with  # with torch, which no worker needs

    folder = corpus.store_folder(split, tokenizer.hash)
    with suppress(UserError):  # there is no store, or its files are incomplete
        other = TokenStore.open(folder).meta["tokenizer_hash"]
        if other != tokenizer.hash and (users := trained_with(other)):
            folder = folder.with_name(f"{folder.name}-{tokenizer.hash[:8]}")
            tell(
                f"{split}: {', '.join(users)} use another tokenizer's store, this is {folder.name}"
            )
    with paths.lock(folder, f"encoding {corpus.name} {split}"):
        return _encode_into(folder, corpus, split, tokenizer, workers, tell)


def _encode_into(
    folder: Path,
    corpus: Corpus,
    split: Split,
    tokenizer: Tokenizer,
    workers: int,
    tell: Callable[[str], None],
) -> TokenStore:
    slices = folder.with_name(f"{folder.name}.shards")
    shards = corpus.shards(split)
    fingerprint = combined_fingerprint(shards)
    # With --bad-rows error, a store from which bad rows were left out must not be reused.
    may_skip = corpus.bad_rows == "skip"
    done = TokenStore.open_if_current(folder, tokenizer.hash, fingerprint)
    grown = _grown_from(folder, tokenizer, shards)
    if done is None and grown is not None and len(grown.meta["shards"]) == len(shards):
        done = grown  # made by an earlier version, which took the files' times for their content
    if done is not None and (may_skip or not done.meta.get("skipped")):
        shutil.rmtree(slices, ignore_errors=True)
        return done

    parts, todo = [slices / shard.name for shard in shards], shards
    looked_through: list[dict[str, Any]] = []
    if grown is not None and (may_skip or not grown.meta.get("skipped")):
        count = len(grown.meta["shards"])
        parts, todo = [folder, *parts[count:]], shards[count:]
        # scripts.decontaminate has searched these shards and none behind them; note how many.
        notes = grown.meta.get("decontaminated", [])
        looked_through = [{"shards": count, **note} for note in notes]
    missing = []
    for shard in todo:
        part = TokenStore.open_if_current(slices / shard.name, tokenizer.hash, shard.fingerprint)
        if part is None or (part.meta["skipped"] and not may_skip):
            missing.append(shard)
    _encode_shards(corpus, split, missing, slices, tokenizer, workers)

    metas = [TokenStore.open(part, tokenizer.hash).meta for part in parts]
    if sum(meta["num_documents"] for meta in metas) == 0:
        raise UserError(f"the {split} split of {corpus.name} has no documents; add more text")
    store = merge_stores(
        folder,
        parts,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        fingerprint=fingerprint,
        extra={
            "skipped": sum(meta["skipped"] for meta in metas),
            "shards": [[shard.name, shard.fingerprint] for shard in shards],
            **({"decontaminated": looked_through} if looked_through else {}),
        },
    )
    if looked_through:
        reach = min(note["shards"] for note in looked_through)
        tell(
            f"{split}: the first {reach} shards were decontaminated, those behind them were not "
            f"looked through: run scripts.decontaminate on {folder} again"
        )
    shutil.rmtree(slices, ignore_errors=True)
    return store


def _grown_from(folder: Path, tokenizer: Tokenizer, shards: list[Shard]) -> TokenStore | None:
    """Open the store at `folder` if it holds the first of these shards, else return None."""
    try:
        store = TokenStore.open(folder, tokenizer.hash)
    except UserError:
        return None
    names = store.meta.get("shards") or []
    return store if names and same_shards(names, shards[: len(names)]) else None


def _encode_shards(
    corpus: Corpus,
    split: Split,
    shards: list[Shard],
    slices: Path,
    tokenizer: Tokenizer,
    workers: int,
) -> None:
    """Encode each shard into `slices/<shard>`, in several processes, each with threads."""
    if not shards:
        return
    label, total = f"encoding {corpus.name} {split}", sum(shard.size for shard in shards)
    processes = max(1, min(workers, len(shards), total // _PROCESS_BYTES))
    threads = max(1, workers // processes)
    if processes == 1:
        with progress_bar(label, total) as bar:
            before = 0
            for shard in shards:
                _encode_shard(
                    corpus,
                    split,
                    shard,
                    slices,
                    tokenizer,
                    threads,
                    lambda position, before=before: bar.set(before + position),  # type: ignore[misc]
                )
                before += shard.size
        return
    # Bytes done of each shard; the workers write them.
    positions: Any = multiprocessing.get_context("spawn").Array(
        ctypes.c_longlong, len(shards), lock=False
    )
    state = (corpus, split, shards, slices, tokenizer, threads, positions)
    with progress_bar(label, total) as bar:
        remedy = "run it again with fewer --workers, finished shards are kept"
        jobs = range(len(shards))
        for _ in in_processes(
            _encode_job, state, jobs, processes, remedy, lambda: bar.set(sum(positions))
        ):
            pass


_State = tuple[Corpus, Split, list[Shard], Path, Tokenizer, int, Any]


def _encode_job(state: _State, index: int) -> None:
    corpus, split, shards, slices, tokenizer, threads, positions = state

    def report(position: int) -> None:
        check_stopped()
        positions[index] = position

    _encode_shard(corpus, split, shards[index], slices, tokenizer, threads, report)
    report(shards[index].size)


def _encode_shard(
    corpus: Corpus,
    split: Split,
    shard: Shard,
    slices: Path,
    tokenizer: Tokenizer,
    threads: int,
    report: Callable[[int], None],
) -> None:
    skipped_before = corpus.skipped
    with (
        StoreWriter(
            slices / shard.name,
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash,
            fingerprint=shard.fingerprint,
        ) as writer,
        ThreadPoolExecutor(threads) as pool,
    ):
        # This thread reads and writes while the others encode; the queue between them is bounded.
        pending: deque[tuple[Future[list[np.ndarray]], int]] = deque()

        def write_first() -> None:
            future, position = pending.popleft()
            for ids in future.result():
                writer.add(ids)
            report(position)

        texts: list[str] = []
        size = position = 0
        for text, position in corpus.read(split, shard.name):
            texts.append(text)
            size += len(text)
            if size >= _BATCH_CHARS:
                pending.append((pool.submit(_encode, tokenizer, texts), position))
                texts, size = [], 0
                if len(pending) > 4 * threads:
                    write_first()
        pending.append((pool.submit(_encode, tokenizer, texts), position))
        while pending:
            write_first()
        writer.extra["skipped"] = corpus.skipped - skipped_before


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    documents = []
    for text in texts:
        ids = tokenizer.encode(text)
        ids.insert(0, tokenizer.bos)
        # array reads a list about three times as fast as numpy does.
        documents.append(np.frombuffer(array("I", ids), dtype=np.uintc))
    return documents
