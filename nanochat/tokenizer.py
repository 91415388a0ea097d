"""The tokenizer: byte-pair encoding trained with rustbpe, applied with tiktoken.

Ids are numbered in this order: the 256 single bytes, the merges in the order they were learned, the
special tokens. Every byte is a token, so any text can be encoded and `decode(encode(text))` is
`text`. The only exception are surrogates (halves of a UTF-16 pair, which UTF-8 cannot encode): a
pair of them is joined into its character, a lone one becomes U+FFFD.

A conversation becomes these tokens,

    <|bos|> <|system_start|>text<|system_end|> <|user_start|>text<|user_end|>
    <|assistant_start|>text <|python_start|>code<|python_end|>
    <|output_start|>text<|output_end|> text<|assistant_end|>

without the spaces shown here. Text that spells a special token is encoded as ordinary text.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import rustbpe
import tiktoken

from nanochat.conversation import is_trained, parts
from nanochat.errors import UserError
from nanochat.paths import atomic_folder, tokenizer_dir, tokenizers_dir

# The pattern cuts text into pieces in the style of GPT-4's; merges never cross pieces. Runs of
# digits are cut after two digits instead of three, since a small vocabulary cannot spare 1,000
# entries for numbers. Quantifiers are possessive (`++`) where backtracking could not help, so that
# a run of a million equal characters needs no stack.
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

# Roles of tokens, for losses by role (`Tokenizer.render_roles`).
ROLE_NAMES = ("special", "system", "user", "assistant", "tool_call", "tool_output")
SPECIAL, SYSTEM, USER, ASSISTANT, TOOL_CALL, TOOL_OUTPUT = range(len(ROLE_NAMES))
IGNORED = len(ROLE_NAMES)
"""Role of all tokens of a message that is never trained on (`conversation.is_trained`)."""

_RANKS_FILE = "tokenizer.tiktoken"
_META_FILE = "tokenizer_config.json"
_VERSION = 1


def pack_mask(mask: Sequence[int], roles: Sequence[int]) -> np.ndarray:
    """Pack loss mask and role into one uint8 per token, `mask | role << 1`, for a token store."""
    packed = np.asarray(mask, dtype=np.uint8) | (np.asarray(roles, dtype=np.uint8) << 1)
    return packed.astype(np.uint8)


def unpack_mask(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the `(mask, roles)` that `pack_mask` packed, both uint8; a 0/1 mask has role 0."""
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
        """Build the tokenizer whose token i stands for the bytes `ranks[i]`.

        Most callers want `train` or `load`. `training` describes how the vocabulary was made; it is
        saved, but not part of `hash`.
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
        the length of the text. The same texts give the same vocabulary. Texts too short for so many
        merges give a smaller vocabulary; `vocab_size` of the result tells its size. Raises
        UserError if `vocab_size` is below 256 bytes and the special tokens.
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

        Without `folder` this tokenizer becomes the default one. A copy of it, and of the default it
        replaces, stay in `tokenizers/<hash>`, where `find` looks for a checkpoint's tokenizer.
        """
        if folder is None:
            try:
                former = [Tokenizer.load()]
            except UserError:  # there is none, or its files are incomplete
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
        """Load the tokenizer that `scripts.tok_train --name` made, or the default one."""
        return cls.load(tokenizer_dir(name))

    @classmethod
    def find(cls, digest: str) -> "Tokenizer":
        """Load the tokenizer with this hash: the default one, or one in `tokenizers/`.

        Raises UserError if there is none.
        """
        for folder in (tokenizer_dir(), *sorted(tokenizers_dir().glob("[!.]*"))):
            try:
                tokenizer = cls.load(folder)
            except (UserError, NotADirectoryError):  # damaged files of some other tokenizer
                continue
            if tokenizer.hash == digest:
                return tokenizer
        raise UserError(
            f"there is no tokenizer {digest[:12]} in {tokenizer_dir()} or {tokenizers_dir()}; set "
            "NANOCHAT_BASE_DIR to where it was trained, or copy its folder into tokenizers/"
        )

    @classmethod
    def load(cls, folder: Path | None = None) -> "Tokenizer":
        """Read what `save` wrote; raises UserError if files are missing, cut off or edited."""
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
        """Id of a special token, e.g. `special("<|bos|>")`."""
        return self._special[name]

    def encode(self, text: str) -> list[int]:
        """Encode text as ordinary tokens: no `<|bos|>`, and never a special token."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str], num_threads: int | None = None) -> list[list[int]]:
        """Encode each text, on `num_threads` threads (default: one for each CPU we may use)."""
        from nanochat.hardware import cpus  # not above: a tokenizer needs no torch

        return self._encoding.encode_ordinary_batch(texts, num_threads=num_threads or cpus())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes that `ids` stand for; special tokens give their names."""
        return self._encoding.decode_bytes(self._checked(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Text that `ids` stand for; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _checked(self, ids: Iterable[int]) -> list[int]:
        """Make a list of ints of `ids` (a tensor or an array too); UserError for an unknown id."""
        checked = [int(i) for i in ids]
        if checked and not 0 <= min(checked) <= max(checked) < self.vocab_size:
            wrong = next(i for i in checked if not 0 <= i < self.vocab_size)
            raise UserError(
                f"token id {wrong} is not in the vocabulary (0 to {self.vocab_size - 1}); "
                "was the text encoded with another tokenizer?"
            )
        return checked

    def token_bytes(self) -> np.ndarray:
        """Length of each token in bytes, (vocab_size,) int32; 0 for special tokens.

        The raw bytes are counted, because a token that is half a character is no string.
        """
        lengths = [len(token) for token in self.ranks] + [0] * len(self._special)
        return np.array(lengths, dtype=np.int32)

    # Conversations

    def _spans(
        self, conversation: Mapping[str, Any], system: SystemStyle, completion: bool = False
    ) -> Iterator[_Span]:
        """Yield the spans of the rendered conversation.

        With `completion` the spans end with `<|assistant_start|>`, and the last message is left out
        if it is the assistant's.
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
        """Render a conversation as `(ids, mask, roles)`, three lists of one length.

        `roles` are indices into `ROLE_NAMES`, or `IGNORED` in a message that is never trained on.
        The conversation must be valid (`conversation.validate`). Only the first `max_tokens` tokens
        are kept.
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
        """Render a conversation as `(ids, mask)`, two lists of one length.

        The mask is 1 on what the assistant must produce: its text, its tool calls with their start
        and end tokens, and `<|assistant_end|>`. It is 0 on everything else: `<|assistant_start|>`,
        the tools' output, other roles, and messages that are never trained on.
        `system="merge"` puts a system message at the start of the user message after it.
        """
        ids, mask, _ = self.render_roles(conversation, max_tokens, system)
        return ids, mask

    def render_for_completion(
        self, conversation: Mapping[str, Any], system: SystemStyle = "tokens"
    ) -> list[int]:
        """Render the prompt for the assistant's next message; it ends with `<|assistant_start|>`.

        If the last message is the assistant's, it is the one to complete, so it is left out.
        Raises UserError if no other message is left.
        """
        return [i for span in self._spans(conversation, system, completion=True) for i in span.ids]


def _rank_file(ranks: list[bytes]) -> bytes:
    """Write the ranks in tiktoken's format: one line `base64(token) rank` per token."""
    lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks))
    return b"".join(lines)


def _valid_unicode(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, as tiktoken does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _merge_system(messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Move each system message to the front of the user message after it."""
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
