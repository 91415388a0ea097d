"""The tokenizer: byte-pair encoding trained with rustbpe, applied with tiktoken.

Ids are laid out as: the 256 single bytes, the learned merges in the order they were learned, the
special tokens. Every byte is a token, so any text can be encoded and `decode(encode(text))` is
`text`. The one thing that is not text are lone surrogates (half a UTF-16 pair, which UTF-8 cannot
say): a pair of them is joined into its character, a lone one becomes U+FFFD.

A conversation becomes tokens as

    <|bos|> <|system_start|>text<|system_end|> <|user_start|>text<|user_end|>
    <|assistant_start|>text <|python_start|>code<|python_end|>
    <|output_start|>text<|output_end|> text<|assistant_end|>

without the spaces shown here. Text that spells a special token is encoded as ordinary text.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import rustbpe
import tiktoken

from nanochat.conversation import is_trained, parts
from nanochat.errors import UserError
from nanochat.paths import atomic_folder, tokenizer_dir, tokenizers_dir

# The pre-tokenizer in the style of GPT-4's: merges never cross the pieces that it cuts. Digit runs
# are cut after two instead of three: a small vocabulary cannot spare 1,000 entries for numbers.
# Quantifiers are possessive (`++`) where backtracking could not help, so a run of a million equal
# characters costs no stack.
SPLIT_PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?+\p{L}++",  # a word, with the one space or mark before it
        r"\p{N}{1,2}+",  # at most two digits
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+",  # punctuation, with the line ends after it
        r"\s++$",  # blanks at the end of the text
        r"\s*[\r\n]",  # blanks up to the last line end
        r"\s+(?!\S)",  # blanks but the last, which belongs to the next word
        r"\s",
    )
)

SystemStyle = Literal["tokens", "merge"]

# What a token is, for losses by role (`Tokenizer.render_roles`).
ROLE_NAMES = ("special", "system", "user", "assistant", "tool_call", "tool_output")
SPECIAL, SYSTEM, USER, ASSISTANT, TOOL_CALL, TOOL_OUTPUT = range(len(ROLE_NAMES))
IGNORED = len(ROLE_NAMES)
"""The role of all tokens of a message that is never trained on (`conversation.is_trained`)."""

_RANKS_FILE = "tokenizer.tiktoken"
_META_FILE = "tokenizer_config.json"
_VERSION = 1


def pack_mask(mask: Sequence[int], roles: Sequence[int]) -> np.ndarray:
    """Loss mask and role in one byte a token, as a store keeps them: `mask | role << 1`."""
    packed = np.asarray(mask, dtype=np.uint8) | (np.asarray(roles, dtype=np.uint8) << 1)
    return packed.astype(np.uint8)


def unpack_mask(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(mask, roles)` of `pack_mask`'s bytes, both uint8. A plain 0/1 mask has only role 0."""
    return packed & 1, packed >> 1


class _Span(NamedTuple):
    """Consecutive tokens of a rendered conversation that share loss mask and role."""

    ids: list[int]
    mask: int
    role: int


class Tokenizer:
    """A trained byte-pair vocabulary and the project's special tokens."""

    SPECIAL_TOKENS: ClassVar[tuple[str, ...]] = (
        "<|bos|>",
        "<|system_start|>",
        "<|system_end|>",
        "<|user_start|>",
        "<|user_end|>",
        "<|assistant_start|>",
        "<|assistant_end|>",
        "<|python_start|>",
        "<|python_end|>",
        "<|output_start|>",
        "<|output_end|>",
    )

    def __init__(
        self,
        ranks: list[bytes],
        pattern: str = SPLIT_PATTERN,
        training: Mapping[str, Any] | None = None,
    ):
        """`ranks[i]` is the byte string of token i. Most callers want `train` or `load`.

        `training` says how the vocabulary came about; it is saved along and does not enter `hash`.
        """
        self.ranks = ranks
        self.pattern = pattern
        self.training = dict(training or {})
        self._special = {name: len(ranks) + i for i, name in enumerate(self.SPECIAL_TOKENS)}
        self.vocab_size = len(ranks) + len(self._special)  # real tokens, before a model's padding
        self.bos = self._special["<|bos|>"]
        digest = hashlib.sha256(_rank_file(ranks))
        digest.update(json.dumps([pattern, self._special]).encode())
        self.hash = digest.hexdigest()
        self._encoding = tiktoken.Encoding(
            name=f"nanochat-{self.hash[:12]}",
            pat_str=pattern,
            mergeable_ranks={token: i for i, token in enumerate(ranks)},
            special_tokens=self._special,
        )

    # Making, saving and loading

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        training: Mapping[str, Any] | None = None,
    ) -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` tokens, special tokens included.

        The texts are streamed: memory grows with the number of distinct pieces (words), not with
        the text. The same texts give the same vocabulary. A text too small for so many merges
        gives a smaller vocabulary: look at `vocab_size` of the result.
        """
        smallest = 256 + len(cls.SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size {vocab_size} is below {smallest} "
                f"(256 bytes + {len(cls.SPECIAL_TOKENS)} special tokens); choose a larger one"
            )
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(
            (_valid_unicode(text) for text in texts),
            vocab_size - len(cls.SPECIAL_TOKENS),
            pattern=SPLIT_PATTERN,
        )
        pairs = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls([bytes(token) for token, _ in pairs], training=training)

    def save(self, folder: Path | None = None) -> None:
        """Write the rank file and its description; the folder is replaced as a whole.

        Without `folder` it becomes the default tokenizer. That one, and the default it replaces,
        stay in `tokenizers/<hash>`, where `find` looks for the tokenizer of a checkpoint.
        """
        if folder is None:
            try:
                former = [Tokenizer.load()]
            except UserError:  # none, or a torn one
                former = []
            for tokenizer in (*former, self):
                kept = tokenizers_dir() / tokenizer.hash[:16]
                if not kept.is_dir():
                    tokenizer.save(kept)
        meta = {
            "version": _VERSION,
            "hash": self.hash,
            "vocab_size": self.vocab_size,
            "pattern": self.pattern,
            "special_tokens": self._special,
            "training": self.training,
        }
        with atomic_folder(Path(folder or tokenizer_dir())) as temporary:
            (temporary / _RANKS_FILE).write_bytes(_rank_file(self.ranks))
            text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
            (temporary / _META_FILE).write_bytes(text.encode())

    @classmethod
    def named(cls, name: str = "default") -> "Tokenizer":
        """The tokenizer that `scripts.tok_train --name` made, or the default one."""
        return cls.load(tokenizer_dir(name))

    @classmethod
    def find(cls, digest: str) -> "Tokenizer":
        """The tokenizer with this hash, the default one or any in `tokenizers/`."""
        for folder in (tokenizer_dir(), *sorted(tokenizers_dir().glob("[!.]*"))):
            try:
                tokenizer = cls.load(folder)
            except (UserError, NotADirectoryError):  # another one may be torn
                continue
            if tokenizer.hash == digest:
                return tokenizer
        raise UserError(
            f"there is no tokenizer {digest[:12]} in {tokenizer_dir()} or {tokenizers_dir()}; set "
            "NANOCHAT_BASE_DIR to where it was trained, or copy its folder into tokenizers/"
        )

    @classmethod
    def load(cls, folder: Path | None = None) -> "Tokenizer":
        """Read what `save` wrote; `UserError` if it is missing, torn or was edited."""
        folder = Path(folder or tokenizer_dir())
        try:
            meta = json.loads((folder / _META_FILE).read_text(encoding="utf-8"))
            lines = (folder / _RANKS_FILE).read_bytes().splitlines()
        except FileNotFoundError as error:
            raise UserError(
                f"no tokenizer in {folder}; train one with python -m scripts.tok_train"
            ) from error
        except ValueError as error:
            raise UserError(
                f"{folder / _META_FILE} is not valid JSON ({error}); train the tokenizer again"
            ) from error
        try:
            if meta["version"] != _VERSION:
                raise UserError(
                    f"{folder} holds a tokenizer of format {meta['version']}, this program reads "
                    f"format {_VERSION}; train the tokenizer again"
                )
            ranks = []
            for i, line in enumerate(lines):
                token, rank = line.split()
                if int(rank) != i:
                    raise ValueError(f"rank {int(rank)} on line {i + 1}")
                ranks.append(base64.b64decode(token, validate=True))
            digest, pattern, training = meta["hash"], meta["pattern"], meta.get("training")
            same_specials = meta["special_tokens"] == {
                name: len(ranks) + i for i, name in enumerate(cls.SPECIAL_TOKENS)
            }
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the tokenizer in {folder} cannot be read ({error!r}); train it again"
            ) from error
        torn = UserError(
            f"the tokenizer in {folder} does not have the hash it was saved with: it is torn or "
            "was edited; train it again or restore its files"
        )
        # Checked before tiktoken sees the ranks: it panics on some broken ones.
        if not same_specials or not {bytes([i]) for i in range(256)} <= set(ranks):
            raise torn
        tokenizer = cls(ranks, pattern, training)
        if tokenizer.hash != digest:
            raise torn
        return tokenizer

    # Text

    def special(self, name: str) -> int:
        """The id of a special token: `special("<|bos|>")`."""
        return self._special[name]

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without `<|bos|>`; never a special token."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str], num_threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, on as many threads as there are CPUs if not told otherwise."""
        threads = num_threads or os.cpu_count() or 1
        return self._encoding.encode_ordinary_batch(texts, num_threads=threads)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; special tokens give their names."""
        return self._encoding.decode_bytes(self._checked(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _checked(self, ids: Iterable[int]) -> list[int]:
        """`ids` as a list of ints (they may be a tensor or an array), all of them known."""
        checked = [int(i) for i in ids]
        if checked and not 0 <= min(checked) <= max(checked) < self.vocab_size:
            wrong = next(i for i in checked if not 0 <= i < self.vocab_size)
            raise UserError(
                f"token id {wrong} is not in the vocabulary (0 to {self.vocab_size - 1}); "
                "was the text encoded with another tokenizer?"
            )
        return checked

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: each token's length in bytes, 0 for special tokens.

        From the raw bytes: a token that is half a character has no length as a string.
        """
        lengths = [len(token) for token in self.ranks] + [0] * len(self._special)
        return np.array(lengths, dtype=np.int32)

    # Conversations

    def _spans(
        self, conversation: Mapping[str, Any], system: SystemStyle, completion: bool = False
    ) -> Iterator[_Span]:
        """The rendered conversation, piece by piece.

        With `completion` the last message is left out if it is the assistant's, and the spans end
        with `<|assistant_start|>`.
        """
        special = self._special
        messages = list(conversation["messages"])
        if completion and messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise UserError(
                "there is nothing to complete: the conversation has no message before the "
                "assistant's; add a user message"
            )
        if system == "merge":
            messages = _merge_system(messages)

        yield _Span([special["<|bos|>"]], 0, SPECIAL)
        for message in messages:
            spans = self._message_spans(message)
            if is_trained(message):
                yield from spans
            else:
                yield from (_Span(span.ids, 0, IGNORED) for span in spans)
        if completion:
            yield _Span([special["<|assistant_start|>"]], 0, SPECIAL)

    def _message_spans(self, message: Mapping[str, Any]) -> Iterator[_Span]:
        special, role = self._special, message["role"]
        yield _Span([special[f"<|{role}_start|>"]], 0, SPECIAL)
        for part in parts(message):
            ids = self.encode(part["text"])
            if part["type"] == "python":
                yield _Span([special["<|python_start|>"]], 1, SPECIAL)
                yield _Span(ids, 1, TOOL_CALL)
                yield _Span([special["<|python_end|>"]], 1, SPECIAL)
            elif part["type"] == "python_output":
                yield _Span([special["<|output_start|>"]], 0, SPECIAL)
                yield _Span(ids, 0, TOOL_OUTPUT)
                yield _Span([special["<|output_end|>"]], 0, SPECIAL)
            else:
                yield _Span(ids, int(role == "assistant"), ROLE_NAMES.index(role))
        yield _Span([special[f"<|{role}_end|>"]], int(role == "assistant"), SPECIAL)

    def render_roles(
        self,
        conversation: Mapping[str, Any],
        max_tokens: int | None = None,
        system: SystemStyle = "tokens",
    ) -> tuple[list[int], list[int], list[int]]:
        """`(ids, mask, roles)`, all of one length; `roles` are indices into `ROLE_NAMES`, `IGNORED`
        in a message that is never trained on.

        The conversation must be valid (`conversation.validate`). `max_tokens` keeps the beginning.
        """
        ids: list[int] = []
        mask: list[int] = []
        roles: list[int] = []
        for span in self._spans(conversation, system):
            ids += span.ids
            mask += [span.mask] * len(span.ids)
            roles += [span.role] * len(span.ids)
            if max_tokens is not None and len(ids) >= max_tokens:
                break
        return ids[:max_tokens], mask[:max_tokens], roles[:max_tokens]

    def render_conversation(
        self,
        conversation: Mapping[str, Any],
        max_tokens: int | None = None,
        system: SystemStyle = "tokens",
    ) -> tuple[list[int], list[int]]:
        """`(ids, mask)`; mask 1 on what the assistant must produce, 0 on everything else and on
        messages that are never trained on.

        The assistant produces its text, `<|assistant_end|>` and its tool calls with both their
        tokens; it does not produce `<|assistant_start|>` and what tools answer.
        `system="merge"` folds a system message into the user message that follows it.
        """
        ids, mask, _ = self.render_roles(conversation, max_tokens, system)
        return ids, mask

    def render_for_completion(
        self, conversation: Mapping[str, Any], system: SystemStyle = "tokens"
    ) -> list[int]:
        """The prompt for the assistant's next message; it ends with `<|assistant_start|>`.

        If the last message is the assistant's, that is the one to be completed: it is left out.
        """
        return [i for span in self._spans(conversation, system, completion=True) for i in span.ids]


def _rank_file(ranks: list[bytes]) -> bytes:
    """tiktoken's format: one `base64(token) rank` a line."""
    lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks))
    return b"".join(lines)


def _valid_unicode(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced, as tiktoken does it."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _merge_system(messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """System messages moved to the front of the user message that comes next."""
    merged: list[Mapping[str, Any]] = []
    pending: list[str] = []
    for message in messages:
        if message["role"] == "system":
            pending += [part["text"] for part in parts(message)]
        elif message["role"] == "user" and pending:
            text = "".join(part["text"] for part in parts(message))
            merged.append({**message, "content": "\n\n".join([*pending, text])})
            pending = []
        else:
            merged.append(message)
    if pending:
        raise UserError(
            "a system message that no user message follows cannot be merged; "
            'add a user message or render it with its own tokens (system="tokens")'
        )
    return merged
