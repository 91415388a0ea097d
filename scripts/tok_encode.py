"""Encode a corpus into token stores, from which training reads.

Example:
    python -m scripts.tok_encode --corpus bbe

Each shard is encoded on its own, by one process or several: an interrupted run goes on where it
stopped, and shards that are downloaded later are appended by running it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat.data.corpus import Split
from nanochat.data.encode import _cpus, encode_split
from nanochat.data.hub import open_corpus
from nanochat.data.store import TokenStore
from nanochat.errors import BadRows, UserError
from nanochat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanochat.runtime import Runtime


@dataclass(frozen=True)
class Config:
    corpus: str = "climbmix"
    """bbe, climbmix, fineweb-edu, a file or folder, or ORG/NAME[:COLUMN] of a downloaded one."""
    tokenizer: str = "default"
    """Its name, given to scripts.tok_train."""
    verify: bool = False
    """Read the stores that are there, and stop where one is damaged."""
    workers: int = 0
    """Processes and threads together; 0: one for each CPU."""
    bad_rows: BadRows = "error"
    """What to do with rows without usable text: stop, or leave them out and count them."""


def main(cfg: Config, runtime: Runtime) -> dict[Split, TokenStore]:
    """Returns the stores by split (nothing on ranks other than 0, which have no part)."""
    if not runtime.is_main:
        return {}
    if cfg.workers < 0:
        raise UserError(f"workers {cfg.workers} must be 0 (one for each CPU) or more")
    tokenizer = Tokenizer.named(cfg.tokenizer)
    corpus = open_corpus(cfg.corpus, cfg.bad_rows)
    for note in corpus.notes():
        runtime.print(note)
    stores: dict[Split, TokenStore] = {}
    splits: tuple[Split, Split] = ("val", "train")  # the quick one first: it shows mistakes early
    for split in splits:
        store = encode_split(corpus, split, tokenizer, cfg.workers or _cpus(), tell=runtime.print)
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
