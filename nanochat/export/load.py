"""Loading of models in the format of transformers, for evaluation."""

from dataclasses import dataclass
from typing import Any

import torch

from nanochat.errors import UserError
from nanochat.eval.options import LogitsScorer
from nanochat.runtime import Runtime


@dataclass(frozen=True)
class HFEncoder:
    """A transformers tokenizer with the interface that CORE needs."""

    tokenizer: Any

    @property
    def bos(self) -> int:
        """Token that rows start with; the end token, if the tokenizer has no beginning token."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UserError("the tokenizer has neither a beginning nor an end token")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]


def load_hf(
    path: str, runtime: Runtime, trust_remote_code: bool = False
) -> tuple[LogitsScorer, HFEncoder]:
    """Load a causal language model with transformers, by folder or hub id (needs the extra `hf`).

    trust_remote_code: run code that the model's folder contains. Our own exports need no such
    trust, since their class is in this package. Raises UserError if it cannot be loaded.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from nanochat.export.modeling_nanochat_full import (
            NanoChatFullConfig,
            NanoChatFullForCausalLM,
        )
    except ImportError as error:
        raise UserError("--hf needs transformers; pip install -e '.[hf]'") from error
    AutoConfig.register(NanoChatFullConfig.model_type, NanoChatFullConfig, exist_ok=True)
    AutoModelForCausalLM.register(NanoChatFullConfig, NanoChatFullForCausalLM, exist_ok=True)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=runtime.dtype, **trust)
        tokenizer = AutoTokenizer.from_pretrained(path, **trust)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason and not trust_remote_code:
            reason = "it brings its own code; run that, if you trust it, with --trust-remote-code"
        raise UserError(f"--hf {path}: {reason[:300]}") from error
    model = model.to(runtime.device).eval()
    context_length = next(
        (
            int(value)
            for name in ("max_position_embeddings", "n_positions", "max_sequence_length")
            if (value := getattr(model.config, name, None))
        ),
        2048,
    )

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    scorer = LogitsScorer(forward, context_length, model.config.vocab_size, runtime.device)
    return scorer, HFEncoder(tokenizer)
