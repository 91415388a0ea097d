"""A trained model as a folder that transformers, and whatever builds on it, can load.

B batch, T time, C channels, V vocabulary

A portable model becomes transformers' own `nanochat` model type. Every other one carries its
modelling file along (`modeling_nanochat_full.py`) and is loaded with `trust_remote_code=True`.
Either computes the same logits, and `check` proves it.

Only the real vocabulary is exported: `config.vocab_size` is the tokenizer's. The rows that our
embedding and head have beyond it, up to a multiple of 64, are read by nobody and never predicted.
"""

import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanochat import paths
from nanochat.errors import UserError
from nanochat.gpt import GPT, NORM_EPS
from nanochat.scoring import read_evaluation
from nanochat.tokenizer import SystemStyle, Tokenizer

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
"""What an exported folder may hold."""
CHECKED_TOKENS = 512
TOLERANCE = 1e-3
"""A logit that is farther from ours is computed otherwise. Rounding alone moves one of a small
model by up to 1e-5, and more with every layer; a wrong window or rotary base moves it by 0.1."""

# A conversation as `Tokenizer.render_conversation` renders it. `generation` marks what that one's
# mask marks, for `apply_chat_template(..., return_assistant_tokens_mask=True)`. A template can only
# produce text, and in text the tokenizer takes a special token's spelling for the token: a message
# that contains one is refused rather than let it end its turn.
CHAT_TEMPLATE = r"""{%- set special_tokens = SPECIAL_TOKENS -%}
{%- set merge_system = MERGE_SYSTEM -%}
{%- macro plain(text) -%}
    {%- for name in special_tokens if name in text -%}
        {{- raise_exception('a message spells the special token ' ~ name) -}}
    {%- endfor -%}
    {{- text -}}
{%- endmacro -%}
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {{- plain(message['content']) -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] != 'text' -%}
                {{- raise_exception('only assistant messages have parts of the type '
                                    ~ part['type']) -}}
            {%- endif -%}
            {{- plain(part['text']) -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if add_generation_prompt and messages and messages[-1]['role'] == 'assistant' -%}
    {%- set messages = messages[:-1] -%}
{%- endif -%}
{%- if not messages -%}
    {{- raise_exception('there is no message before the assistant\'s') -}}
{%- endif -%}
{%- set state = namespace(pending='') -%}
{{- '<|bos|>' -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and merge_system -%}
        {%- set state.pending = state.pending ~ text_of(message) ~ '\n\n' -%}
    {%- elif message['role'] == 'system' -%}
        {{- '<|system_start|>' ~ text_of(message) ~ '<|system_end|>' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '<|user_start|>' ~ state.pending ~ text_of(message) ~ '<|user_end|>' -}}
        {%- set state.pending = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant_start|>' -}}
        {%- if message['content'] is string -%}
            {% generation %}{{ plain(message['content']) }}{% endgeneration %}
        {%- else -%}
            {%- for part in message['content'] -%}
                {%- if part['type'] == 'python_output' -%}
                    {{- '<|output_start|>' ~ plain(part['text']) ~ '<|output_end|>' -}}
                {%- elif part['type'] == 'python' -%}
                    {% generation %}{{ '<|python_start|>' ~ plain(part['text']) ~ '<|python_end|>' }}{% endgeneration %}
                {%- else -%}
                    {% generation %}{{ plain(part['text']) }}{% endgeneration %}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {% generation %}{{ '<|assistant_end|>' }}{% endgeneration %}
    {%- else -%}
        {{- raise_exception('the role ' ~ message['role']
                            ~ ' is none of system, user and assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if state.pending -%}
    {{- raise_exception('no user message follows the system message') -}}
{%- endif -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}
"""  # noqa: E501


class Check(NamedTuple):
    """How far an exported folder is from the model it came from."""

    largest_difference: float
    """Of any logit, in float32, on random rows as long as the context (at most CHECKED_TOKENS)."""
    texts: int
    """Random Unicode texts whose ids and whose decoding agree."""


def export(
    model: GPT,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    meta: Mapping[str, Any] | None = None,
    texts: int | None = None,
) -> Check | None:
    """Write the model to `folder`, which must be new, empty or an earlier export.

    dtype: of the saved weights; float32 is exact. meta: the checkpoint's metadata, for the model
    card and the style in which system messages are rendered. texts: compare the result with the
    model first, the tokenizers on so many texts; a folder that fails is not written.
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
    meta = meta or {}
    config = hf_config(model, tokenizer)
    config.dtype = dtype
    tensors = {name: tensor.to(dtype) for name, tensor in hf_tensors(model).items()}
    _compare_names(tensors, config)
    bos, end = tokenizer.bos, tokenizer.special("<|assistant_end|>")
    generation = GenerationConfig(bos_token_id=bos, eos_token_id=[end, bos], pad_token_id=bos)
    system: SystemStyle = meta.get("run_config", {}).get("system", "tokens")
    with paths.atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        # Written for the owner alone otherwise; a server may run as someone else.
        (temporary / "model.safetensors").chmod(0o644)
        config.save_pretrained(temporary)
        generation.save_pretrained(temporary)
        hf_tokenizer(tokenizer, model.config.context_length, system).save_pretrained(temporary)
        if not model.config.is_portable:
            shutil.copy(Path(__file__).with_name(MODELING_FILE), temporary / MODELING_FILE)
        (temporary / "README.md").write_text(model_card(model, meta), encoding="utf-8")
        return None if texts is None else check(temporary, model, tokenizer, texts=texts)


def hf_config(model: GPT, tokenizer: Tokenizer) -> Any:
    """The transformers configuration: NanoChatConfig if the model is portable.

    Generation ends where our engine's does: after <|assistant_end|>, and before a new document.
    <|bos|> is also the padding. No model is trained to predict it, so a loss that leaves padding
    out misses nothing; and as one of the end tokens it makes `generate` see that padding cannot be
    told from the ids alone.
    """
    from transformers import NanoChatConfig

    from nanochat.modeling_nanochat_full import NanoChatFullConfig

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
    """The name of one of our tensors in transformers; UserError if it has none."""
    if name in _TOP:
        return _TOP[name]
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if block and block[2] in _IN_BLOCK:
        return f"model.layers.{block[1]}.{_IN_BLOCK[block[2]]}.weight"
    if re.fullmatch(r"value_embeddings\.\d+\.weight", name):
        return f"model.{name}"
    raise UserError(f"the tensor {name} has no counterpart in transformers; export cannot drop it")


def hf_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """All parameters under their new names; of those with a row per token, the real vocabulary."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "embedding" in name or name == "head.weight":
            tensor = tensor[: model.config.vocab_size]
        tensors[hf_name(name)] = tensor.detach().cpu().contiguous()
    return tensors


def _compare_names(tensors: Mapping[str, torch.Tensor], config: Any) -> None:
    """UserError unless the model of this configuration has exactly these tensors."""
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
    """The transformers class that an exported model loads as."""
    from transformers import NanoChatForCausalLM

    from nanochat.modeling_nanochat_full import NanoChatFullForCausalLM

    return NanoChatForCausalLM if portable else NanoChatFullForCausalLM


# The tokenizer


def hf_tokenizer(tokenizer: Tokenizer, context_length: int, system: SystemStyle = "tokens") -> Any:
    """The same vocabulary and rules as a transformers tokenizer.

    Calling it on a text gives a pretraining document, `[bos] + encode(text)`; with
    `add_special_tokens=False`, `encode(text)`. Where a text spells a special token it gives the
    token, unlike ours, unless it is called with `split_special_tokens=True`.
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
    """The Jinja template; see its comment for where it is stricter than our renderer."""
    names = json.dumps(list(Tokenizer.SPECIAL_TOKENS))
    merge = json.dumps(system == "merge")
    return CHAT_TEMPLATE.replace("SPECIAL_TOKENS", names).replace("MERGE_SYSTEM", merge)


def bpe_merges(ranks: Sequence[bytes]) -> list[tuple[int, int]]:
    """The two tokens that each token of more than one byte was merged from, in the order of ranks.

    A token's bytes, merged by the rules learned before it, end as exactly the two tokens whose
    merge it is. UserError if they do not: then the list is not what byte-pair encoding learns.

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
    """Our split pattern in the dialect of the tokenizers library.

    There a possessive `{1,2}+` repeats the group instead. A digit run needs no possessive: nothing
    follows it that could make it give back. (`$` also matches before a line's end there, but not
    after `\\s++`, which has taken that too.)
    """
    return pattern.replace("{1,2}+", "{1,2}")


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte, as GPT-2 chose them.

    Bytes that are printable Latin-1 characters stand for themselves, the others are numbered from
    U+0100.
    """
    letters, unprintable = [], 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            letters.append(chr(byte))
        else:
            letters.append(chr(0x100 + unprintable))
            unprintable += 1
    return letters


# Proof


@torch.no_grad()
def check(folder: Path, model: GPT, tokenizer: Tokenizer, *, texts: int = 1000) -> Check:
    """Load an exported folder and compare it with its origin, both in float32 on the CPU.

    Weights that were saved in another dtype are compared with ours, rounded likewise. Raises
    RuntimeError where logits or ids differ, or transformers made up or left out a weight.
    """
    from transformers import PreTrainedTokenizerFast

    theirs, loading = model_class(model.config.is_portable).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if any(loading.values()):
        raise RuntimeError(f"transformers does not load all of {folder}: {loading}")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        saved = file.get_tensor("lm_head.weight").dtype
    ours = GPT(model.config)
    for name, parameter in ours.named_parameters():
        parameter.copy_(model.get_parameter(name).to(saved))
    generator = torch.Generator().manual_seed(0)
    length = min(model.config.context_length, CHECKED_TOKENS)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    difference = (ours(ids) - theirs.eval()(ids).logits).abs().max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"logits of the exported model differ by {difference:.1e}: this version of "
            "transformers computes another function"
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
    return Check(difference, texts)


def random_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Strings of up to 80 characters from all of Unicode, words and blanks prevailing."""
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


# The model card


def model_card(model: GPT, meta: Mapping[str, Any]) -> str:
    """README.md: what the model is, how to use it, and what was measured."""
    config = model.config
    portable = config.is_portable
    stage, tag, step = (meta.get(key) for key in ("stage", "tag", "step"))
    counts = sum(model.num_parameters().values())
    origin = f", stage `{stage}`, run `{tag}`, step {step:,}" if stage else ""
    remote = "" if portable else ", trust_remote_code=True"
    architecture = (
        "transformers' own `nanochat` model type"
        if portable
        else f"`nanochat_full`, defined by `{MODELING_FILE}` in this folder"
    )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# nanochat, {counts / 1e6:,.1f} million parameters",
        "",
        f"Trained with nanochat {metadata.version('nanochat')}{origin}. "
        f"Architecture: {architecture}.",
        "",
        "| | |",
        "|---|---|",
        f"| layers × width | {config.n_layer} × {config.n_embd} |",
        f"| heads, query / key-value | {config.n_head} / {config.n_kv_head} |",
        f"| vocabulary | {config.vocab_size:,} |",
        f"| context | {config.context_length:,} tokens |",
        *_training_rows(meta),
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("PATH"{remote})',
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{remote})',
        'messages = [{"role": "user", "content": "Who are you?"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        f"output = model.generate(**inputs, max_new_tokens={min(256, config.context_length // 2)})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
        "```",
        "",
        "Batches are padded on the left, with `<|bos|>`. A text that is no conversation begins",
        "with `<|bos|>`; the tokenizer adds it. To keep a text that spells a special token from",
        "becoming that token, pass `split_special_tokens=True`; the chat template refuses such",
        "messages.",
        "",
        "The model may write a tool call between `<|python_start|>` and `<|python_end|>`. Whoever",
        "runs it is to append `<|output_start|>`, the result and `<|output_end|>`; `generate` runs",
        "no tools, and the model then makes up the result.",
        "",
        *_measurements(meta),
    ]
    return "\n".join(lines)


def _training_rows(meta: Mapping[str, Any]) -> list[str]:
    rows = []
    if tokens := meta.get("train_state", {}).get("tokens"):
        rows.append(f"| tokens trained on in this stage | {tokens:,} |")
    if source := meta.get("source"):
        rows.append(f"| begun from | {source['stage']}/{source['tag']}, step {source['step']:,} |")
    return rows


def _measurements(meta: Mapping[str, Any]) -> list[str]:
    """What was measured of this checkpoint, and of those that it was begun from."""
    lines = ["## Measured", ""]
    for stage, tag, step, known in _lineage(meta):
        rows = []
        for split, value in known.get("bpb", {}).items():
            rows.append(f"| bits per byte, {split} | {value:.4f} |")
        for key, name in (("core", "CORE"), ("core_partial", "CORE"), ("chat_core", "ChatCORE")):
            if known.get(key) is not None:
                note = " (of some of its tasks)" if key == "core_partial" else ""
                rows.append(f"| {name}{note} | {known[key]:.4f} |")
        for task, result in known.get("results", {}).items():
            low, high = result["ci"]
            rows.append(
                f"| {task} | {result['accuracy']:.1%} of {result['total']:,} "
                f"(95 % interval {low:.1%} to {high:.1%}) |"
            )
        if rows:
            lines += [f"| {stage}/{tag}, step {step:,} | |", "|---|---|", *rows, ""]
    rows = [f"| {name} | {value:.2f} |" for name, value in _bytes_per_token(meta).items()]
    if rows:
        lines += ["| tokenizer, bytes per token | |", "|---|---|", *rows, ""]
    if len(lines) == 2:
        lines += ["Nothing was measured of this checkpoint.", ""]
    return lines


def _bytes_per_token(meta: Mapping[str, Any]) -> dict[str, float]:
    """Text -> compression, if this checkpoint's tokenizer was evaluated last."""
    with suppress(OSError, ValueError):
        text = (paths.report_dir() / "tok_eval.json").read_text(encoding="utf-8")
        known = json.loads(text)
        if known.get("tokenizer_hash") == meta.get("tokenizer_hash"):
            return {row["text"]: row["bytes_per_token"]["nanochat"] for row in known["rows"]}
    return {}


def _lineage(meta: Mapping[str, Any]) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """(stage, tag, step, evaluation) of a checkpoint and its ancestors, as long as they exist."""
    while {"stage", "tag", "step"} <= meta.keys():
        stage, tag, step = meta["stage"], meta["tag"], meta["step"]
        trained = meta.get("train_state", {}).get("metrics", {}).get("bpb")
        measured = read_evaluation(stage, tag, step)
        if "bpb" not in measured and isinstance(trained, float):
            measured["bpb"] = {"validation": trained}
        yield stage, tag, step, measured
        source = meta.get("source") or {}
        try:
            folder = paths.checkpoints_dir(source["stage"], source["tag"])
            path = folder / f"step_{source['step']:06d}" / "meta.json"
            meta = json.loads(path.read_text(encoding="utf-8"))
        except (KeyError, OSError, ValueError):
            return
