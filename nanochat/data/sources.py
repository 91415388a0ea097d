"""What a run reads: encoded corpora and tasks, each with its weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from nanochat.config import BaseConfig
from nanochat.data.hub import open_corpus
from nanochat.data.store import LongDocuments, TokenStore
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """A store and its share: `weight` passes over it an epoch.

    A target counts with 1 where the store's mask is 1 or there is none, and with `prompt_weight`
    elsewhere (user text, tool output, format tokens). Targets of weight 0 are no targets: they are
    not in the N that the loss is divided by.
    """

    store: TokenStore
    weight: float | str | Fraction = 1.0
    prompt_weight: float = 1.0
    name: str = ""
    note: str = ""
    """What a person should know about it before the run; empty for most."""


def open_store(corpus: str, split: str, tokenizer: Tokenizer) -> TokenStore:
    """The encoded split of a corpus."""
    folder = open_corpus(corpus).store_folder(split, tokenizer.hash)  # type: ignore[arg-type]
    if not folder.is_dir():
        raise UserError(
            f"{corpus} is not encoded: {folder} is missing; "
            f"run python -m scripts.tok_encode --corpus {corpus}"
        )
    return TokenStore.open(folder, tokenizer.hash)


def parse_shares(parts: Sequence[str], flag: str) -> dict[str, Fraction]:
    """`["climbmix:0.9", "org/name:column:0.1"]` -> each corpus and its share, exactly."""
    shares: dict[str, Fraction] = {}
    for part in parts:
        name, _, number = part.rpartition(":")
        try:
            share = Fraction(number)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not name or share <= 0:
            raise UserError(
                f"{flag} {part}: write a corpus and its share above 0, like climbmix:0.9"
            )
        if name in shares:
            raise UserError(f"{flag} names {name} twice; give it once, with its whole share")
        shares[name] = share
    return shares


def text_sources(
    shares: Mapping[str, Fraction], tokenizer: Tokenizer, split: str = "train"
) -> list[Source]:
    """Corpora whose targets come in the proportion of their shares, exactly in the long run.

    An epoch ends when the first corpus has been read once: nothing is repeated in it. The others
    go on in the next epoch where they were.
    """
    stores = {name: open_store(name, split, tokenizer) for name in shares}
    if len(stores) == 1:
        return [Source(store, name=name) for name, store in stores.items()]
    first: dict[Path, str] = {}
    for name, store in stores.items():
        other = first.setdefault(store.folder, name)
        if other != name:
            raise UserError(f"{other} and {name} are the same corpus; name it once")
        if store.num_targets == 0:
            raise UserError(f"{name} has no document of more than one token; leave it out")
    targets = {name: store.num_targets for name, store in stores.items()}
    epoch = min(targets[name] / share for name, share in shares.items())  # per unit of share
    return [
        Source(store, weight=epoch * shares[name] / targets[name], name=name)
        for name, store in stores.items()
    ]


def long_documents(texts: Sequence[Source], minimum: int) -> list[Source]:
    """The texts' documents of at least `minimum` tokens; UserError where there are none at all."""
    views = [(text, LongDocuments(text.store, minimum)) for text in texts]
    found = [
        replace(text, store=view, name=f"{text.name} from {minimum} tokens")
        for text, view in views
        if len(view)
    ]
    if not found:
        longest = max(view.longest for _, view in views)
        raise UserError(
            f"no document of {', '.join(text.name for text in texts)} has {minimum} tokens, the "
            f"longest has {longest}; choose a --context-length up to that, a --corpus with longer "
            "documents, or --long-fraction 0"
        )
    return found


def _targets(sources: Sequence[Source]) -> Fraction:
    """Of an epoch."""
    return sum(
        (Fraction(str(s.weight)) * s.store.num_targets for s in sources),
        start=Fraction(0),
    )


@dataclass(frozen=True)
class HeldOut:
    """What a stage is measured on, and never trained on."""

    texts: Sequence[Source]
    """Corpora: bits per byte of each, and of their mixture."""
    conversations: Sequence[Source] = ()
    """Mean loss of what the assistant must produce, and by role."""


def pretraining_sources(
    cfg: BaseConfig, tokenizer: Tokenizer, split: str = "train"
) -> list[Source]:
    """The corpus of pretraining, or its mixture of corpora."""
    shares = parse_shares(cfg.mix, "--mix") if cfg.mix else {cfg.corpus: Fraction(1)}
    return text_sources(shares, tokenizer, split)


def describe_mixture(sources: Sequence[Source], tokens: int) -> str:
    """Each source's share of the targets, and how often a run of so many tokens reads it."""
    targets = [source.store.num_targets for source in sources]
    parts = [float(Fraction(str(s.weight)) * n) for s, n in zip(sources, targets, strict=True)]
    lines = [
        f"{source.name} {part / sum(parts):.1%} ({tokens * part / sum(parts) / n:.3g} passes)"
        for source, part, n in zip(sources, parts, targets, strict=True)
    ]
    return f"mixture: {', '.join(lines)}"
