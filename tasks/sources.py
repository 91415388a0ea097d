"""Sources of the chat stages: tasks and replayed text."""

from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from typing import Any

from nanochat.config import MidConfig
from nanochat.data.conversations import conversations_store, fit_conversations
from nanochat.data.hub import open_corpus
from nanochat.data.sources import (
    HeldOut,
    Source,
    long_documents,
    parse_shares,
    targets_of,
    text_sources,
)
from nanochat.errors import UserError
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from tasks.passages import store_texts
from tasks.passkey import corpus_sentences
from tasks.registry import build_mixture, takes
from tasks.spellingbee import noted_corpus, noted_words, write_words


def task_sources(
    cfg: MidConfig, tokenizer: Tokenizer, sequence_length: int, split: str = "train"
) -> list[Source]:
    """Build a source of each task of `--mix`; the split val has their held-out rows.

    sequence_length: length of the rows that conversations must fit (`--long-conversations`).
    """
    options: dict[str, Any] = {"tokenizer": tokenizer}
    if takes(cfg.mix, "words"):
        options["words"] = noted_words(tokenizer.hash)
    if cfg.context_length is not None:
        options["length"] = cfg.context_length
    if takes(cfg.mix, "sentences"):
        options["sentences"] = corpus_sentences(replayed(cfg, tokenizer)[0].store, tokenizer)
    if takes(cfg.mix, "corpus_texts"):
        options["corpus_texts"] = store_texts(replayed(cfg, tokenizer)[0].store, tokenizer)
    if not cfg.mix:
        return []
    mixture, held_out = build_mixture(cfg.mix, cfg.run.seed, **options)
    tasks = mixture.tasks if split == "train" else held_out
    sources = []
    for task, weight in zip(tasks, mixture.weights, strict=True):
        if task is None:
            continue
        try:
            store = conversations_store(task, tokenizer, system=cfg.system, bad_rows=cfg.bad_rows)
            store, note = fit_conversations(store, sequence_length, cfg.long_conversations)
        except UserError:
            if split == "train" or (cfg.bad_rows == "error" and cfg.long_conversations != "drop"):
                raise
            continue  # all held-out rows are bad or too long
        note = f"{task.name}: {note}" if note else ""
        sources.append(Source(store, weight, cfg.prompt_weight, task.name, note))
    return sources


def replayed(cfg: MidConfig, tokenizer: Tokenizer, split: str = "train") -> list[Source]:
    """Build sources of the pretraining corpora of `--corpus`, in the proportion of their shares."""
    single = len(cfg.corpus) == 1
    shares = {cfg.corpus[0]: Fraction(1)} if single else parse_shares(cfg.corpus, "--corpus")
    return text_sources(shares, tokenizer, split)


def build_sources(
    cfg: MidConfig, tokenizer: Tokenizer, sequence_length: int, split: str = "train"
) -> list[Source]:
    """Build sources of the tasks of `--mix` and of text; `--replay` is the text's share of targets.

    With `--context-length`, `--long-fraction` is the share of targets in long documents.
    """
    sources = task_sources(cfg, tokenizer, sequence_length, split)
    if not 0 <= cfg.replay < 1:
        raise UserError(f"--replay {cfg.replay} must be at least 0 and below 1")
    replay = Fraction(str(cfg.replay))
    long = Fraction(str(cfg.long_fraction)) if cfg.context_length is not None else Fraction(0)
    if not 0 <= long < 1 - replay:
        raise UserError(
            f"--long-fraction {cfg.long_fraction} must be at least 0, and below 1 together with "
            f"--replay {cfg.replay}: the rest is for the tasks"
        )
    tasks = targets_of(sources)
    for share, minimum in ((replay, 0), (long, cfg.context_length or 0)):
        if share and sources:
            texts = replayed(cfg, tokenizer, split)
            texts = long_documents(texts, minimum) if minimum else texts
            scale = share / (1 - replay - long) * tasks / targets_of(texts)
            sources += [replace(text, weight=Fraction(text.weight) * scale) for text in texts]
    return sources


def chat_sources(
    cfg: MidConfig, tokenizer: Tokenizer, sequence_length: int, runtime: Runtime
) -> tuple[list[Source], HeldOut]:
    """Build sources and held-out data of a chat stage; the ranks do it in turns, as stores are
    built."""
    if runtime.is_main:
        note_words(cfg, tokenizer)
    sources = build_sources(cfg, tokenizer, sequence_length)
    for source in sources:
        if source.note:
            runtime.print(source.note)
    return sources, build_held_out(cfg, tokenizer, sequence_length)


def build_held_out(cfg: MidConfig, tokenizer: Tokenizer, sequence_length: int) -> HeldOut:
    """Build held-out data: pretraining text, to see what is forgotten, and conversations."""
    conversations = task_sources(cfg, tokenizer, sequence_length, "val")
    return HeldOut(replayed(cfg, tokenizer, "val"), conversations)


def note_words(cfg: MidConfig, tokenizer: Tokenizer) -> None:
    """Let the spelling tasks ask for words of the corpus, the first that the tokenizer is used on.

    A list that was damaged is written again.
    """
    name = (
        next(iter(parse_shares(cfg.corpus, "--corpus"))) if len(cfg.corpus) > 1 else cfg.corpus[0]
    )
    if not takes(cfg.mix, "words"):
        return
    noted = None
    with suppress(UserError):  # the list is damaged
        noted = noted_corpus(tokenizer.hash)
    if noted is None:
        with suppress(UserError):  # too few words: those of the embedded corpus are used
            write_words(open_corpus(name), tokenizer.hash)
