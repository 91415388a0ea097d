"""A tiny tokenizer and tiny random models for the decoding tests."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.infer.decoder import Decoder
from nanochat.kv_cache import KVCache
from nanochat.tokenizer import Tokenizer

TEXT = "the king went to the sea and said 12 + 34 = 46. what is a word? naïve café 東京 🙂\n"


@cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT] * 3, 320)


def tiny_model(
    dtype: torch.dtype = torch.float32, seed: int = 0, kind: type[GPT] = GPT, **overrides: Any
) -> GPT:
    """Every parameter is random: the initialisation's zeros would switch half of the model off."""
    settings: dict[str, Any] = {
        "vocab_size": tiny_tokenizer().vocab_size,
        "n_layer": 3,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 32,
        "head_dim": 8,
        "context_length": 96,
        "windows": (8, 0, 5),
    }
    config = GPTConfig(**{**settings, **overrides})
    model = kind(config, dtype).init_weights(seed, tiny_tokenizer().ranks)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def likes_tools(logits: torch.Tensor) -> torch.Tensor:
    """Makes a call of the tool likelier, and the end of the answer unlikely."""
    tokenizer = tiny_tokenizer()
    bias = torch.zeros(logits.shape[-1])
    for name in ("<|python_start|>", "<|python_end|>"):
        bias[tokenizer.special(name)] = 6.0
    bias[tokenizer.encode("1")] = 3.0
    bias[tokenizer.encode("+")] = 2.0
    for name in ("<|assistant_end|>", "<|bos|>"):
        bias[tokenizer.special(name)] = -20.0
    return logits + bias


class ToolCaller(Decoder):
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return likes_tools(super().logits(hidden))


class Scripted(Decoder):
    """Writes its script after the prompt, then repeats the last token.

    By place in the context: what a tool forces takes the place of as many tokens of the script.
    """

    guesses = 0
    script: tuple[int, ...] = ()
    prompt: tuple[int, ...] | list[int] = ()
    """The last one that was read."""

    def next_logits(
        self, ids: torch.Tensor, cache: KVCache, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        if counts is not None and cache.longest == 0:  # a prompt
            self.prompt = ids[0, : int(counts[0])].tolist()
        logits = super().next_logits(ids, cache, counts) * 0
        for row, length in enumerate(cache.lengths.tolist()):
            at = min(length - len(self.prompt), len(self.script) - 1)
            logits[row, self.script[at]] = 100.0
        return logits


def scripted(items: Sequence[int | str], kind: type[Scripted] = Scripted, **overrides: Any) -> Any:
    """items: token ids, names of special tokens, and texts."""
    tokenizer = tiny_tokenizer()
    script: list[int] = []
    for item in items:
        if isinstance(item, int):
            script.append(item)
        elif item.startswith("<|"):
            script.append(tokenizer.special(item))
        else:
            script += tokenizer.encode(item)
    decoder = kind(tiny_model(**overrides))
    decoder.script = tuple(script)
    return decoder
