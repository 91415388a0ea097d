"""Conversion of the tokenizer and its rendering of conversations to transformers' formats."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.tokenizer import SystemStyle, Tokenizer

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def hf_tokenizer(tokenizer: Tokenizer, context_length: int, system: SystemStyle = "tokens") -> Any:
    """Build a transformers tokenizer with the same vocabulary and rules.

    Calling it on a text gives a pretraining document, `[bos] + encode(text)`; with
    `add_special_tokens=False` it gives `encode(text)`. Unlike ours, it encodes the spelling of a
    special token as that token, unless it is called with `split_special_tokens=True`.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    letters = _byte_letters()
    names = ["".join(letters[byte] for byte in token) for token in tokenizer.ranks]
    merges = [(names[a], names[b]) for a, b in bpe_merges(tokenizer.ranks)]
    vocab = {name: i for i, name in enumerate(names)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(oniguruma_pattern(tokenizer.pattern)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    bos, end = "<|bos|>", "<|assistant_end|>"
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in tokenizer.SPECIAL_TOKENS]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=end,
        pad_token=bos,
        additional_special_tokens=[n for n in tokenizer.SPECIAL_TOKENS if n not in (bos, end)],
        padding_side="left",
        model_max_length=context_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(system),
    )


def chat_template(system: SystemStyle = "tokens") -> str:
    """Return the template that renders a conversation as `Tokenizer.render_conversation` does.

    `generation` marks the tokens with mask 1, for `apply_chat_template(...,
    return_assistant_tokens_mask=True)`. A template can only produce text, in which the tokenizer
    would take the spelling of a special token for the token itself. So a message that spells one is
    refused.
    """
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    names = json.dumps(list(Tokenizer.SPECIAL_TOKENS))
    merge = json.dumps(system == "merge")
    return template.replace("SPECIAL_TOKENS", names).replace("MERGE_SYSTEM", merge)


def bpe_merges(ranks: Sequence[bytes]) -> list[tuple[int, int]]:
    """Find the two tokens that each token of several bytes was merged from, in the order of ranks.

    When a token's bytes are merged by all earlier rules, exactly two tokens are left, and the token
    is their merge. Raises UserError if it is otherwise: byte-pair encoding never learns such a
    list.

    >>> bpe_merges([b"a", b"b", b"ab", b"aab"])
    [(0, 1), (0, 2)]
    """
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    merges = []
    for rank, token in enumerate(ranks):
        if len(token) == 1:
            continue
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 2:
            pairs = [rank_of.get(a + b, rank) for a, b in pairwise(pieces)]
            lowest = min(pairs)
            if lowest >= rank:
                break
            at = pairs.index(lowest)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        if len(pieces) != 2 or any(rank_of.get(piece, rank) >= rank for piece in pieces):
            raise UserError(
                f"token {rank} ({token!r}) is no merge of two tokens before it; "
                "only a vocabulary learned by byte-pair encoding can be exported"
            )
        merges.append((rank_of[pieces[0]], rank_of[pieces[1]]))
    return merges


def oniguruma_pattern(pattern: str) -> str:
    """Convert the split pattern to the dialect of the tokenizers library.

    In that dialect `{1,2}+` is not possessive but repeats the group. A run of digits does not need
    to be possessive, since nothing follows it that could force backtracking. (`$` also matches
    before a line end in that dialect, but not after `\\s++`, which has consumed the line end.)
    """
    return pattern.replace("{1,2}+", "{1,2}")


def _byte_letters() -> list[str]:
    """List the printable character that stands for each byte, as in GPT-2.

    Bytes that are printable Latin-1 characters stand for themselves; the others are numbered from
    U+0100 on.
    """
    letters, unprintable = [], 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            letters.append(chr(byte))
        else:
            letters.append(chr(0x100 + unprintable))
            unprintable += 1
    return letters
