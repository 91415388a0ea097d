"""Encode a corpus into token stores, which training reads.

Example:
    python -m scripts.tok_encode --corpus bbe

Several processes encode the shards. Run the command again to continue after an interruption, or to
append shards that were downloaded later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat.data.corpus import Split
from nanochat.data.encode import encode_split
from nanochat.data.hub import open_corpus
from nanochat.data.store import TokenStore
from nanochat.data.workers import cpus
from nanochat.errors import BadRows, UserError
from nanochat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanochat.runtime import Runtime


@dataclass(frozen=True)
class Config:
    corpus: str = "climbmix"
    """bbe, climbmix, fineweb-edu, a file or folder, or ORG/NAME[:COLUMN] of a downloaded one."""
    tokenizer: str = "default"
    """Name that scripts.tok_train gave the tokenizer."""
    verify: bool = False
    """Read the existing stores completely, and stop if one is damaged."""
    workers: int = 0
    """Number of processes and threads together; 0: one per CPU."""
    bad_rows: BadRows = "error"
    """Stop at a row without usable text (error), or leave it out and count it (skip)."""


def main(cfg: Config, runtime: Runtime) -> dict[Split, TokenStore]:
    """Returns the stores by split (none on ranks other than 0, which do nothing)."""
    if not runtime.is_main:
        return {}
    if cfg.workers < 0:
        raise UserError(f"workers {cfg.workers} must be 0 (one for each CPU) or more")
    tokenizer = Tokenizer.named(cfg.tokenizer)
    corpus = open_corpus(cfg.corpus, cfg.bad_rows)
    for note in corpus.notes():
        runtime.print(note)
    stores: dict[Split, TokenStore] = {}
    splits: tuple[Split, Split] = ("val", "train")  # the small one first: it shows mistakes early
    for split in splits:
        store = encode_split(corpus, split, tokenizer, cfg.workers or cpus(), tell=runtime.print)
        stores[split] = store
        if cfg.verify:
            store.verify()
        skipped = store.meta["skipped"]
        runtime.print(
            f"{split}: {len(store):,} documents, {store.num_tokens:,} tokens"
            + (f", {skipped} bad rows skipped" if skipped else "")
            + f", in {store.folder}"
            + (", verified" if cfg.verify else "")
        )
    return stores


if __name__ == "__main__":
    from nanochat.cli import launch

    launch(main, Config, __doc__)
