"""Models as folders of transformers: export of trained ones, loading of any for evaluation.

B batch, T time, C channels, V vocabulary

A portable model becomes transformers' own `nanochat` model type. For every other model, the folder
contains the modelling file (`modeling_nanochat_full.py`), and the model is loaded with
`trust_remote_code=True`. Both compute the same logits as the original; `check` compares them.

Only the real vocabulary is exported: `config.vocab_size` is the tokenizer's. The padding rows of
embedding and head, up to a multiple of 64, are left out, since they are never used.
"""

import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanochat import paths
from nanochat.checkpoint_manager import system_style
from nanochat.errors import UserError
from nanochat.eval.options import LogitsScorer
from nanochat.export.card import model_card
from nanochat.export.tokenizer import hf_tokenizer
from nanochat.functional import NORM_EPS
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

MODELING_FILE = "modeling_nanochat_full.py"
FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    MODELING_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Names of the files that an exported folder may hold."""
CHECKED_TOKENS = 512
TOLERANCE = 1e-3
"""Largest accepted difference of a logit. In a small model, rounding alone changes logits by up to
1e-5, and more with every layer. A wrong window or rotary base changes them by 0.1."""


class Check(NamedTuple):
    """Result of comparing an exported folder with its model."""

    largest_difference: float
    """Largest difference of any logit, in float32, on random rows as long as the context (at most
    CHECKED_TOKENS). The rows are read at once, and decoded by `generate` as a padded batch with
    each of its two caches."""
    texts: int
    """Number of random Unicode texts whose ids and decoded text agree."""


def export(
    model: GPT,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    meta: Mapping[str, Any] | None = None,
    texts: int | None = None,
    names: Literal["transformers", "mlx"] = "transformers",
) -> Check | None:
    """Write the model to `folder`, which must be new, empty or an earlier export.

    dtype: dtype of the saved weights; float32 is exact. meta: the checkpoint's metadata, for the
    model card and the style of system messages. texts: number of texts on which the tokenizers are
    compared; with None nothing is compared, else the model is compared too, and a folder that
    differs is not written. names: names of the tensors; mlx-lm's differ from transformers' for the
    `nanochat` type, and are given after the comparison. Raises UserError if the folder or the model
    does not fit.
    """
    from transformers import GenerationConfig

    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}: load the tokenizer the model was trained with"
        )
    if folder.exists():
        others = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
        if others:
            raise UserError(
                f"{folder} holds {others[0]!r}, which no export writes: choose another --out"
            )
    if names == "mlx":
        _check_fits_mlx(model)
    meta = meta or {}
    config = hf_config(model, tokenizer)
    config.dtype = dtype
    tensors = {name: tensor.to(dtype) for name, tensor in hf_tensors(model).items()}
    _compare_names(tensors, config)
    bos, end = tokenizer.bos, tokenizer.special("<|assistant_end|>")
    generation = GenerationConfig(bos_token_id=bos, eos_token_id=[end, bos], pad_token_id=bos)
    with paths.atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(temporary)
        generation.save_pretrained(temporary)
        system = system_style(meta)
        hf_tokenizer(tokenizer, model.config.context_length, system).save_pretrained(temporary)
        if not model.config.is_portable:
            shutil.copy(Path(__file__).with_name(MODELING_FILE), temporary / MODELING_FILE)
        (temporary / "README.md").write_text(
            model_card(model, meta, MODELING_FILE, names), encoding="utf-8"
        )
        result = None if texts is None else check(temporary, model, tokenizer, texts=texts)
        if names == "mlx":
            save_file(
                {mlx_name(name): tensor for name, tensor in tensors.items()},
                temporary / "model.safetensors",
                metadata={"format": "mlx"},
            )
            # Versions of mlx-lm look for the rotary base in different places.
            path = temporary / "config.json"
            known = json.loads(path.read_text(encoding="utf-8"))
            known["rope_theta"] = model.config.rope_base
            path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        # By default only the owner could read the files, but a server may run as another user.
        (temporary / "model.safetensors").chmod(0o644)
        return result


def _check_fits_mlx(model: GPT) -> None:
    """Raise UserError unless mlx-lm's `nanochat` type computes this model."""
    config = model.config
    if not config.is_portable:
        raise UserError(
            "--names mlx is for models trained with --portable: mlx-lm's type has no value "
            "embeddings, residual scalars, windows or heads that do not fill the width"
        )
    if config.softcap != 15:
        raise UserError(f"mlx-lm has a softcap of 15; this model has {config.softcap:g}")


def hf_config(model: GPT, tokenizer: Tokenizer) -> Any:
    """Build the transformers configuration; a NanoChatConfig if the model is portable.

    Generation ends where the engine's does: after <|assistant_end|>, and before a new document.
    <|bos|> is also the padding token. No model is trained to predict it, so a loss may leave
    padding out. It is one of the end tokens too; so `generate` knows that padding cannot be told
    from the ids alone.
    """
    from transformers import NanoChatConfig

    from nanochat.export.modeling_nanochat_full import NanoChatFullConfig

    ours = model.config
    bos, end = tokenizer.bos, tokenizer.special("<|assistant_end|>")
    common: dict[str, Any] = {
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.n_embd,
        "intermediate_size": 4 * ours.n_embd,
        "num_hidden_layers": ours.n_layer,
        "num_attention_heads": ours.n_head,
        "num_key_value_heads": ours.n_kv_head,
        "head_dim": ours.head_dim,
        "max_position_embeddings": ours.context_length,
        "rms_norm_eps": NORM_EPS,
        "final_logit_softcapping": ours.softcap,
        "bos_token_id": bos,
        "eos_token_id": [end, bos],
        "pad_token_id": bos,
        "tie_word_embeddings": False,
    }
    if ours.is_portable:
        rope = {"rope_type": "default", "rope_theta": ours.rope_base}
        return NanoChatConfig(**common, rope_parameters=rope, architectures=["NanoChatForCausalLM"])
    module = MODELING_FILE.removesuffix(".py")
    return NanoChatFullConfig(
        **common,
        rope_base=ours.rope_base,
        windowed_rope_base=ours.windowed_rope_base,
        windows=[ours.window(i) for i in range(ours.n_layer)],
        value_embedding_layers=[i for i in range(ours.n_layer) if ours.has_value_embedding(i)],
        residual_scalars=ours.residual_scalars,
        token_shift=ours.token_shift,
        architectures=["NanoChatFullForCausalLM"],
        auto_map={
            "AutoConfig": f"{module}.NanoChatFullConfig",
            "AutoModelForCausalLM": f"{module}.NanoChatFullForCausalLM",
        },
    )


_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "residual_scale": "model.residual_scale",
    "first_scale": "model.first_scale",
    "shift_scale": "model.shift_scale",
}
_IN_BLOCK = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.value_gate": "self_attn.value_gate",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def hf_name(name: str) -> str:
    """Name of one of our tensors in transformers; UserError if it has none."""
    if name in _TOP:
        return _TOP[name]
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if block and block[2] in _IN_BLOCK:
        return f"model.layers.{block[1]}.{_IN_BLOCK[block[2]]}.weight"
    if re.fullmatch(r"value_embeddings\.\d+\.weight", name):
        return f"model.{name}"
    raise UserError(f"the tensor {name} has no counterpart in transformers; export cannot drop it")


_MLX = {
    "model.embed_tokens": "transformer.wte",
    "model.layers": "transformer.h",
    "self_attn.q_proj": "attn.c_q",
    "self_attn.k_proj": "attn.c_k",
    "self_attn.v_proj": "attn.c_v",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def mlx_name(name: str) -> str:
    """Name in mlx-lm (0.32) of one of transformers' tensors.

    >>> mlx_name("model.layers.3.mlp.fc1.weight")
    'transformer.h.3.mlp.c_fc.weight'
    """
    for theirs, mlx in _MLX.items():
        name = name.replace(theirs, mlx)
    return name


def hf_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Parameters by their new names; embeddings and head without padding rows."""
    tensors = {}
    for name, tensor in model.plain_weights().items():
        if "embedding" in name or name == "head.weight":
            tensor = tensor[: model.config.vocab_size]
        tensors[hf_name(name)] = tensor.detach().cpu().contiguous()
    return tensors


def _compare_names(tensors: Mapping[str, torch.Tensor], config: Any) -> None:
    """Raise UserError unless the model of this configuration has exactly these tensors."""
    target = model_class(config.model_type == "nanochat")
    with torch.device("meta"):
        expected = {name: t.shape for name, t in target(config).state_dict().items()}
    ours = {name: t.shape for name, t in tensors.items()}
    wrong = sorted(n for n in expected.keys() | ours.keys() if expected.get(n) != ours.get(n))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{len(wrong)} tensors do not fit {config.model_type}: {name} is "
            f"{_shape(ours.get(name))}, expected {_shape(expected.get(name))}"
        )


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def model_class(portable: bool) -> Any:
    """Class of transformers that an exported model is loaded as."""
    from transformers import NanoChatForCausalLM

    from nanochat.export.modeling_nanochat_full import NanoChatFullForCausalLM

    return NanoChatForCausalLM if portable else NanoChatFullForCausalLM


# Comparison


@torch.no_grad()
def check(folder: Path, model: GPT, tokenizer: Tokenizer, *, texts: int = 1000) -> Check:
    """Load an exported folder and compare it with its origin, both in float32 on the CPU.

    If weights were saved in another dtype, the model's weights (`GPT.plain_weights`) are rounded to
    it first. Raises RuntimeError if logits or ids differ, or if transformers invented or ignored a
    weight.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers import __version__ as transformers_version

    theirs, loading = model_class(model.config.is_portable).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if any(loading.values()):
        raise RuntimeError(f"transformers does not load all of {folder}: {loading}")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        saved = file.get_tensor("lm_head.weight").dtype
    ours = GPT(replace(model.config, spelling_bytes=0))
    weights = model.plain_weights()
    for name, parameter in ours.named_parameters():
        parameter.copy_(weights[name].to(saved))
    generator = torch.Generator().manual_seed(0)
    length = min(model.config.context_length, CHECKED_TOKENS)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    theirs.eval()
    differences = {"": (ours(ids) - theirs(ids).logits).abs().max().item()}
    for cache in ("dynamic", "static") if length > 2 else ():
        differences[f" decoded with a {cache} cache"] = _decoding_difference(
            ours, theirs, ids, cache
        )
    for how, difference in differences.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"logits of the exported model{how} differ by {difference:.1e}: transformers "
                f"{transformers_version} computes another function"
            )

    other = PreTrainedTokenizerFast.from_pretrained(folder)
    for name in tokenizer.SPECIAL_TOKENS:
        if other.encode(name, add_special_tokens=False) != [tokenizer.special(name)]:
            raise RuntimeError(f"the exported tokenizer does not know {name}")
    for text in random_texts(texts):
        ids_of_text = tokenizer.encode(text)
        split = {"add_special_tokens": False, "split_special_tokens": True}
        if other.encode(text, **split) != ids_of_text:
            raise RuntimeError(f"the exported tokenizer encodes {text!r} differently")
        if other.decode(ids_of_text) != text:
            raise RuntimeError(f"the exported tokenizer decodes {text!r} differently")
    return Check(max(differences.values()), texts)


def _decoding_difference(ours: GPT, theirs: Any, ids: torch.Tensor, cache: str) -> float:
    """Compute the largest difference between the logits of `generate` and those of our model.

    ids is (2, T) with T > 2; the second row is half as long and padded on the left. Our logits are
    computed for the tokens that `generate` chose, so ties between tokens do not matter.
    """
    new = min(16, ids.shape[1] // 2)
    prompts = ids[:, new:]  # (2, T - new)
    mask = torch.ones_like(prompts)
    mask[1, : prompts.shape[1] // 2] = 0
    ends = theirs.generation_config.eos_token_id
    theirs.generation_config.eos_token_id = None  # no row ends before the last step
    try:
        output = theirs.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
    finally:
        theirs.generation_config.eos_token_id = ends
    logits = torch.stack(output.logits, dim=1)  # (2, new, V)
    largest = 0.0
    for b in range(2):
        row = output.sequences[b, prompts.shape[1] - int(mask[b].sum()) :]
        expected = ours(row[None])[0, -new - 1 : -1]
        largest = max(largest, (expected - logits[b]).abs().max().item())
    return largest


def random_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Yield strings of up to 80 characters from all of Unicode, mostly words and blanks."""
    generator = random.Random(seed)
    planes = [(0x20, 0x7E), (0xA0, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    pieces = [
        *("the", "Word", "don't", "I'LL", "it'\u017f", "12345", "3.14", "naïve", "東京", "🙂"),
        *(" ", " ", "  ", "\n", "\r\n", " \n ", "\t", "\u00a0", "\u2028", "\u0301", "...", "!?\n"),
        *Tokenizer.SPECIAL_TOKENS,
    ]
    for _ in range(count):
        text = ""
        for _ in range(generator.randint(0, 20)):
            if generator.random() < 0.6:
                text += generator.choice(pieces)
            else:
                plane = generator.choice(planes)
                text += "".join(chr(generator.randint(*plane)) for _ in range(4))
        yield text


# Loading


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
