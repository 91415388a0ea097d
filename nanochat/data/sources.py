"""Sources of a run: encoded corpora and tasks, each with its mixture weight."""

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
    """A token store and its mixture weight: `weight` passes over it per epoch.

    The loss weight of a target is 1 if the store's mask is 1 there or the store has no mask, else
    `prompt_weight` (user text, tool output, format tokens). Targets with loss weight 0 are ignored
    and not counted in N, by which the loss is divided.
    """

    store: TokenStore
    weight: float | str | Fraction = 1.0
    prompt_weight: float = 1.0
    name: str = ""
    note: str = ""
    """Note for the user before the run; usually empty."""


def open_store(corpus: str, split: str, tokenizer: Tokenizer) -> TokenStore:
    """Open the token store of a corpus's split; UserError if it is not encoded."""
    folder = open_corpus(corpus).store_folder(split, tokenizer.hash)  # type: ignore[arg-type]
    if not folder.is_dir():
        raise UserError(
            f"{corpus} is not encoded: {folder} is missing; "
            f"run python -m scripts.tok_encode --corpus {corpus}"
        )
    return TokenStore.open(folder, tokenizer.hash)


def parse_shares(parts: Sequence[str], flag: str) -> dict[str, Fraction]:
    """Parse corpora and shares like `["climbmix:0.9", "org/name:column:0.1"]`; 0.9 is 9/10."""
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
    """Make sources of corpora whose targets are in the proportion of their shares.

    The proportion is exact in the long run. An epoch ends when any corpus has been read once, so
    that nothing is repeated in an epoch. The other corpora continue in the next epoch.
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
    """Make sources of the texts' documents of at least `minimum` tokens; UserError if none."""
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


def targets_of(sources: Sequence[Source]) -> Fraction:
    """Number of targets of these sources in an epoch."""
    return sum((Fraction(str(s.weight)) * s.store.num_targets for s in sources), Fraction(0))


@dataclass(frozen=True)
class HeldOut:
    """Data that a stage is evaluated on and never trained on."""

    texts: Sequence[Source]
    """Corpora, for bits per byte of each and of their mixture."""
    conversations: Sequence[Source] = ()
    """Conversations, for the mean loss on the assistant's tokens and on each role's."""


def pretraining_sources(
    cfg: BaseConfig, tokenizer: Tokenizer, split: str = "train"
) -> list[Source]:
    """Make the sources of pretraining: its corpus, or its mixture of corpora."""
    shares = parse_shares(cfg.mix, "--mix") if cfg.mix else {cfg.corpus: Fraction(1)}
    return text_sources(shares, tokenizer, split)


def describe_mixture(sources: Sequence[Source], tokens: int) -> str:
    """Describe each source's share of the targets and its passes in a run of `tokens` tokens."""
    targets = [source.store.num_targets for source in sources]
    parts = [float(Fraction(str(s.weight)) * n) for s, n in zip(sources, targets, strict=True)]
    lines = [
        f"{source.name} {part / sum(parts):.1%} ({tokens * part / sum(parts) / n:.3g} passes)"
        for source, part, n in zip(sources, parts, targets, strict=True)
    ]
    return f"mixture: {', '.join(lines)}"
