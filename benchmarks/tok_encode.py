"""Compare scripts.tok_encode, from parquet shards to token stores, with tiktoken's batch call.

    python -m benchmarks.tok_encode [--text FOLDER] [--json out.json]

tiktoken: `encode_ordinary_batch` on all CPUs over texts in memory, in calls of tok_encode's size;
the ids are dropped. tok_encode: the whole command except the start of the interpreter; it reads the
shards, starts its processes, encodes, writes the stores and syncs them. Both encode the same
documents with the same vocabulary, in turn, A B A B. The results are medians of bytes of text per
second. Made-up documents have log-normal lengths, like web text, and Zipf-distributed words; --text
takes real documents (a folder as for tok_encode --corpus).
"""

import os
import random
import shutil
import statistics
import tempfile
import time
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from benchmarks.common import publish
from nanochat import runtime
from nanochat.cli import parse
from nanochat.data.hub import open_corpus
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from scripts import tok_encode

CALL_CHARS = 1 << 21


@dataclass(frozen=True)
class Config:
    megabytes: int = 100
    """Size of the made-up text."""
    shards: int = 8
    """Number of files that hold the text."""
    text: Path | None = None
    """Folder of files to encode instead."""
    vocab_size: int = 32768
    """Vocabulary size of the tokenizer, which is trained on the beginning of the text."""
    repeats: int = 3
    """Number of measurements of each way."""
    json: Path | None = None
    """File for the result, which is also printed."""


def made_up_documents(num_bytes: int) -> Iterator[str]:
    chance = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    lexicon = ["".join(chance.choices(syllables, k=1 + i % 4)) for i in range(50_000)]
    lexicon += [word.capitalize() for word in lexicon[:5_000]]
    lexicon += [f"{word}{mark}" for word in lexicon[:5_000] for mark in ".,"]
    chance.shuffle(lexicon)
    totals = list(accumulate(1 / rank for rank in range(1, len(lexicon) + 1)))
    while num_bytes > 0:
        count = 5 + round(chance.lognormvariate(5.6, 0.97))
        # One word in fifty is a number or a name that occurs once.
        words = [
            str(chance.randrange(10**6))
            if chance.random() < 0.02
            else lexicon[bisect(totals, chance.random() * totals[-1])]
            for _ in range(count)
        ]
        text = " ".join(words)
        num_bytes -= len(text)
        yield text


def write_shards(folder: Path, cfg: Config) -> None:
    folder.mkdir()
    texts = list(made_up_documents(cfg.megabytes * 10**6))
    for shard in range(cfg.shards):
        table = pa.table({"text": texts[shard :: cfg.shards]})
        pq.write_table(table, folder / f"shard_{shard:05d}.parquet", row_group_size=1024)


def in_calls(texts: list[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= CALL_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def tiktoken_seconds(encoding: tiktoken.Encoding, texts: list[str]) -> float:
    start = time.perf_counter()
    for batch in in_calls(texts):
        encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1)
    return time.perf_counter() - start


def our_seconds(corpus: str, base: Path, run: Runtime) -> float:
    shutil.rmtree(base / "stores", ignore_errors=True)
    start = time.perf_counter()
    tok_encode.main(tok_encode.Config(corpus=corpus), run)
    return time.perf_counter() - start


def main(cfg: Config) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        os.environ["NANOCHAT_BASE_DIR"] = str(base)
        if cfg.text is None:
            write_shards(base / "text", cfg)
        spec = str(cfg.text or base / "text")
        corpus = open_corpus(spec)
        texts = [*corpus.documents("val"), *corpus.documents("train")]
        size = sum(len(text.encode()) for text in texts)
        tokenizer = Tokenizer.train(texts[: max(1, len(texts) * 10**7 // size)], cfg.vocab_size)
        tokenizer.save()
        ranks = {token: rank for rank, token in enumerate(tokenizer.ranks)}
        encoding = tiktoken.Encoding(
            "plain", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens={}
        )
        run = runtime.single()
        seconds: dict[str, list[float]] = {"tiktoken": [], "tok_encode": []}
        for _ in range(cfg.repeats):
            seconds["tiktoken"].append(tiktoken_seconds(encoding, texts))
            seconds["tok_encode"].append(our_seconds(spec, base, run))
    speed = {name: size / statistics.median(times) / 1e6 for name, times in seconds.items()}
    result = {
        "cpus": os.cpu_count(),
        "documents": len(texts),
        "bytes": size,
        "vocab_size": tokenizer.vocab_size,
        "megabytes_per_second": speed,
        "all_seconds": seconds,
        "ratio": speed["tok_encode"] / speed["tiktoken"],
    }
    publish(result, cfg.json)
    return result


if __name__ == "__main__":
    main(parse(Config, description=__doc__))
