"""Measure the tokenizer: its bytes per token beside GPT-2's and GPT-4's, and decoding to the text.

Example:
    python -m scripts.tok_eval --corpus bbe

More bytes per token mean fewer tokens for the same text. GPT-2's and GPT-4's vocabularies are used
if tiktoken has them in its cache (`TIKTOKEN_CACHE_DIR`), or may fetch them (`--online`). The result
is written to `report/tok_eval.json` under `NANOCHAT_BASE_DIR`, that of a tokenizer with a name to
`report/tok_eval-NAME.json`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tiktoken
import tiktoken.load
from rich.table import Table

from nanochat import paths
from nanochat.data.hub import open_corpus
from nanochat.errors import BadRows, UserError
from nanochat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanochat.runtime import Runtime

# Names of the other tokenizers, here and in tiktoken.
OTHERS = {"gpt-2": "gpt2", "gpt-4": "cl100k_base"}
_DOWNLOAD_SECONDS = 20

SNIPPETS = {
    "english": (
        "The ferry left at a quarter past seven, ten minutes late, with more bicycles than "
        "passengers on its deck. Nobody minded: the fog had lifted, the coffee was hot, and the "
        "harbour smelled of tar and oranges.\n\nWhen they had passed the lighthouse, the captain's "
        'voice came over the loudspeaker. "We\'re going round the island today," she said.'
    ),
    "code": (
        "def moving_average(values: list[float], width: int) -> list[float]:\n"
        '    """Mean of each window of `width` values."""\n'
        "    if not 0 < width <= len(values):\n"
        '        raise ValueError(f"width {width} does not fit {len(values)} values")\n'
        "    total = sum(values[:width])\n"
        "    means = [total / width]\n"
        "    for i in range(width, len(values)):\n"
        "        total += values[i] - values[i - width]\n"
        "        means.append(total / width)\n"
        "    return means\n"
    ),
    "numbers": (
        "In 2024 the 17 stations counted 1,204,583 travellers, 3.75 % more than the 1,161,043 of "
        "2023. 128 * 4096 = 524288; pi = 3.14159265358979; +49 30 1234567; 10:45:30"
    ),
    "other scripts": (
        "Über den Dächern graut der Morgen. À bientôt, à l'été prochain ! "
        "Сегодня утром шёл дождь. Το πλοίο έφυγε νωρίς. 今天早上下雨了。"
        "今朝は雨が降りました。 오늘 아침에는 비가 왔어요. هطل المطر هذا الصباح. "
        "आज सुबह बारिश हुई। เช้านี้ฝนตก 🌧️🚲👩‍🚀"
    ),
}


@dataclass(frozen=True)
class Config:
    corpus: str = "climbmix"
    """Corpus whose validation text is measured."""
    tokenizer: str = "default"
    """Name that scripts.tok_train gave the tokenizer."""
    max_chars: int = 2_000_000
    """Characters of validation text, from the beginning."""
    online: bool = False
    """Let tiktoken download GPT-2's and GPT-4's vocabularies if they are not in its cache."""
    bad_rows: BadRows = "error"
    """Stop at a row without usable text (error), or leave it out (skip)."""


def main(cfg: Config, runtime: Runtime) -> dict[str, Any] | None:
    """Returns what is written to tok_eval.json (None on ranks other than 0)."""
    if not runtime.is_main:
        return None
    if cfg.max_chars < 1:
        raise UserError(f"max_chars {cfg.max_chars} must be at least 1")
    tokenizer = Tokenizer.named(cfg.tokenizer)
    corpus = open_corpus(cfg.corpus, cfg.bad_rows)
    texts = {f"{corpus.name} val": _beginning(corpus.documents("val"), cfg.max_chars)}
    texts |= {name: [text] for name, text in SNIPPETS.items()}

    encoders: dict[str, Callable[[list[str]], list[list[int]]]] = {
        "nanochat": tokenizer.encode_batch
    }
    sizes = {"nanochat": tokenizer.vocab_size}
    unavailable = []
    for name, encoding_name in OTHERS.items():
        encoding = _load(encoding_name, cfg.online)
        if encoding is None:
            unavailable.append(name)
        else:
            encoders[name] = encoding.encode_ordinary_batch
            sizes[name] = encoding.n_vocab

    check_round_trip(tokenizer, [text for group in texts.values() for text in group])
    rows = []
    for name, group in texts.items():
        num_bytes = sum(len(text.encode("utf-8", "replace")) for text in group)
        tokens = {key: sum(map(len, encode(group))) for key, encode in encoders.items()}
        rows.append(
            {
                "text": name,
                "bytes": num_bytes,
                "tokens": tokens,
                "bytes_per_token": {key: num_bytes / max(1, n) for key, n in tokens.items()},
            }
        )
    result = {
        "tokenizer_hash": tokenizer.hash,
        "vocab_sizes": sizes,
        "unavailable": unavailable,
        "round_trip": True,
        "rows": rows,
    }
    paths.atomic_write(paths.tok_eval_path(cfg.tokenizer), json.dumps(result, indent=2) + "\n")

    table = Table(title="bytes per token")
    table.add_column("text")
    table.add_column("bytes", justify="right")
    for name, size in sizes.items():
        table.add_column(f"{name}\n({size:,} tokens)", justify="right")
    for row in rows:
        values = [f"{row['bytes_per_token'][name]:.2f}" for name in sizes]  # type: ignore[index]
        table.add_row(str(row["text"]), f"{row['bytes']:,}", *values)
    runtime.console.print(table)
    if unavailable:
        runtime.print(
            f"not compared with {' and '.join(unavailable)}: tiktoken has no copy of "
            f"{'its vocabulary' if len(unavailable) == 1 else 'their vocabularies'} "
            + ("and cannot fetch one" if cfg.online else "(--online fetches one)")
        )
    runtime.print("every text came back unchanged")
    return result


def _beginning(documents: Iterator[str], max_chars: int) -> list[str]:
    texts = []
    for text in documents:
        texts.append(text[:max_chars])
        max_chars -= len(text)
        if max_chars <= 0:
            break
    if not texts:
        raise UserError("the validation split has no text; add more documents")
    return texts


def check_round_trip(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Encode and decode `texts` and strings of random characters from all of Unicode.

    Lone surrogates are not among the characters, since they are decoded as U+FFFD.
    """
    generator = random.Random(0)
    planes = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    made = [
        "".join(chr(generator.randint(*generator.choice(planes))) for _ in range(length))
        for length in range(1, 200)
    ]
    specials = ["".join(Tokenizer.SPECIAL_TOKENS)]
    for text in [*texts, *made, *specials]:
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != valid or max(ids, default=0) >= tokenizer.bos:
            raise RuntimeError(f"encode and decode do not return the text {text[:80]!r}")


def _load(name: str, online: bool) -> tiktoken.Encoding | None:
    """Load one of tiktoken's encodings; None if it is not in the cache and cannot be downloaded."""
    with _downloads(online):
        try:
            return tiktoken.get_encoding(name)
        except Exception:  # tiktoken raises the errors of its HTTP client
            return None


@contextmanager
def _downloads(allowed: bool) -> Iterator[None]:
    """Forbid tiktoken's downloads, or limit their time, which tiktoken does not."""

    def read_file(blobpath: str) -> bytes:
        if not allowed:
            raise OSError("not in the cache")
        import requests

        response = requests.get(blobpath, timeout=_DOWNLOAD_SECONDS)
        response.raise_for_status()
        return response.content

    original = tiktoken.load.read_file
    tiktoken.load.read_file = read_file
    try:
        yield
    finally:
        tiktoken.load.read_file = original


if __name__ == "__main__":
    from nanochat.cli import launch

    launch(main, Config, __doc__)
