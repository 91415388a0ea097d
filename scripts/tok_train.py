"""Train the tokenizer on a corpus.

Examples:
    python -m scripts.tok_train --corpus bbe --vocab-size 4096
    python -m scripts.tok_train --corpus climbmix

With the same settings, an existing tokenizer is kept. A tokenizer that checkpoints were trained
with is not replaced: give the new one a --name, and pass that to base_train with --tokenizer.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat import paths
from nanochat.checkpoint_manager import trained_with
from nanochat.data.corpus import Corpus, Shard, same_shards
from nanochat.data.hub import open_corpus
from nanochat.errors import BadRows, UserError
from nanochat.progress import Bar, progress_bar
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer

if TYPE_CHECKING:
    from nanochat.runtime import Runtime


@dataclass(frozen=True)
class Config:
    corpus: str = "climbmix"
    """bbe, climbmix, fineweb-edu, a file or folder, or ORG/NAME[:COLUMN] of a downloaded one."""
    vocab_size: int = 32768
    """Number of tokens, special tokens included."""
    max_chars: int = 2_000_000_000
    """Number of characters to train on, from the beginning of the corpus."""
    doc_cap: int = 10_000
    """Number of characters to use of each document, so that long ones do not dominate."""
    bad_rows: BadRows = "error"
    """Stop at a row without usable text (error), or leave it out (skip)."""
    name: str = "default"
    """Name of the tokenizer, for `--tokenizer` of tok_encode and base_train."""
    force: bool = False
    """Train anew and replace the tokenizer; its models and stores still find it by its hash."""


class _Texts:
    """Texts from the beginning of the training split, and counts of what was read."""

    def __init__(self, cfg: Config, corpus: Corpus, shards: list[Shard], bar: Bar):
        self.cfg, self.corpus, self.shards, self.bar = cfg, corpus, shards, bar
        self.num_documents = self.num_chars = self.num_bytes = 0
        self.read: list[Shard] = []

    def __iter__(self) -> Iterator[str]:
        before, total = 0, max(1, sum(shard.size for shard in self.shards))
        for shard in self.shards:
            self.read.append(shard)
            for text, position in self.corpus.read("train", shard.name):
                text = text[: min(self.cfg.doc_cap, self.cfg.max_chars - self.num_chars)]
                self.num_documents += 1
                self.num_chars += len(text)
                self.num_bytes += len(text.encode("utf-8", "surrogatepass"))
                yield text
                # Reading ends at the limit of characters or at the end of the corpus, so the bar
                # follows the one that comes first.
                by_chars, by_bytes = (
                    self.num_chars / self.cfg.max_chars,
                    (before + position) / total,
                )
                self.bar.set(max(by_chars, by_bytes))
                if self.num_chars >= self.cfg.max_chars:
                    return
            before += shard.size


def main(cfg: Config, runtime: Runtime) -> Tokenizer | None:
    """Returns the tokenizer, trained or found (None on ranks other than 0, which do nothing)."""
    if not runtime.is_main:
        return None
    for name in ("max_chars", "doc_cap"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name} {getattr(cfg, name)} must be at least 1")
    corpus = open_corpus(cfg.corpus, cfg.bad_rows)
    for note in corpus.notes():
        runtime.print(note)
    shards = corpus.shards("train")
    settings = {
        "corpus": corpus.name,
        "vocab_size": cfg.vocab_size,
        "max_chars": cfg.max_chars,
        "doc_cap": cfg.doc_cap,
    }
    folder = paths.tokenizer_dir(cfg.name)
    with paths.lock(folder, f"training a tokenizer on {corpus.name}"):
        return _train(cfg, runtime, corpus, shards, settings, folder)


def _train(
    cfg: Config,
    runtime: Runtime,
    corpus: Corpus,
    shards: list[Shard],
    settings: dict[str, Any],
    folder: Path,
) -> Tokenizer:
    old = _existing(folder)
    if old is not None:
        users = trained_with(old.hash)
        if not cfg.force and _same(old, settings, shards):
            runtime.print(
                f"the tokenizer in {folder} was trained with these settings "
                f"({old.vocab_size} tokens, {old.hash[:12]}): kept"
            )
            return old
        if users and not cfg.force:
            raise UserError(
                f"the tokenizer in {folder} ({old.hash[:12]}) has other settings or text, and "
                f"{', '.join(users)} were trained with it; give the new one a --name, or replace "
                "the old one with --force"
            )
        old.save(paths.tokenizers_dir() / old.hash[:16])
        runtime.print(
            f"replacing the tokenizer {old.hash[:12]}, which stays in "
            f"{paths.tokenizers_dir() / old.hash[:16]} for what was made with it"
        )

    start = time.monotonic()
    with progress_bar(f"reading {corpus.name}", 1) as bar, _merges_shown(bar):
        texts = _Texts(cfg, corpus, shards, bar)
        tokenizer = Tokenizer.train(texts, cfg.vocab_size)
    if texts.num_chars == 0:
        raise UserError(f"the training split of {cfg.corpus} has no text; add some")
    seconds = time.monotonic() - start
    tokenizer.training = {
        **settings,
        "shards": [[shard.name, shard.fingerprint] for shard in texts.read],
        "documents": texts.num_documents,
        "chars": texts.num_chars,
        "bytes": texts.num_bytes,
        "skipped": corpus.skipped,
        "seconds": round(seconds, 2),
    }
    tokenizer.save(folder if cfg.name != "default" else None)
    runtime.print(
        f"tokenizer {tokenizer.hash[:12]}: {tokenizer.vocab_size} tokens from "
        f"{texts.num_documents:,} documents, {texts.num_chars:,} characters, {seconds:.1f} s, "
        f"in {folder}"
    )
    if tokenizer.vocab_size < cfg.vocab_size:
        runtime.print(
            f"the text has no more to merge: {tokenizer.vocab_size} tokens instead of "
            f"{cfg.vocab_size}"
        )
    if corpus.skipped:
        runtime.print(f"skipped {corpus.skipped} bad rows")
    return tokenizer


def _existing(folder: Path) -> Tokenizer | None:
    try:
        return Tokenizer.load(folder)
    except UserError:  # there is none, or its files are incomplete
        return None


def _same(old: Tokenizer, settings: dict[str, Any], shards: list[Shard]) -> bool:
    """True if `old` was trained with these settings on this text.

    Shards that were added to the corpus since then do not count, so that a continued download does
    not change the tokenizer of a run.
    """
    if old.pattern != SPLIT_PATTERN or any(old.training.get(k) != v for k, v in settings.items()):
        return False
    read = old.training.get("shards", [])
    return bool(read) and same_shards(read, shards[: len(read)])


@contextmanager
def _merges_shown(bar: Bar) -> Iterator[None]:
    """Make the bar follow the merges, which rustbpe reports only in its log."""

    class Follow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = re.match(r"Progress: (\d+)%", record.getMessage())
            if found:
                bar.relabel("learning merges")
                bar.set(int(found[1]) / 100)

    logger, handler = logging.getLogger("rustbpe"), Follow()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


if __name__ == "__main__":
    from nanochat.cli import launch

    launch(main, Config, __doc__)
