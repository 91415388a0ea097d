"""Model card of an exported model: its architecture, its use, and its measurements."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

from nanochat import __version__, paths
from nanochat.eval.record import Measurement, chat_core_texts, labels, of_checkpoint, to_show
from nanochat.gpt import GPT
from nanochat.memory import parameter_counts

TEMPLATE = Path(__file__).with_name("model_card.md")
MLX_USAGE = """\
```bash
mlx_lm.generate --model PATH --prompt "Who are you?"
```"""
TRANSFORMERS_USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH"$remote)
model = AutoModelForCausalLM.from_pretrained("PATH"$remote)
messages = [{"role": "user", "content": "Who are you?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=$new_tokens)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
```"""


def model_card(
    model: GPT, meta: Mapping[str, Any], modeling_file: str, names: str = "transformers"
) -> str:
    """Write the text of README.md. names: "transformers" or "mlx", whose tensor names are used."""
    config = model.config
    parameters = sum(parameter_counts(replace(config, spelling_bytes=0)).values())  # as exported
    stage, tag, step = (meta.get(key) for key in ("stage", "tag", "step"))
    remote = "" if config.is_portable else ", trust_remote_code=True"
    new_tokens = min(256, config.context_length // 2)
    usage = Template(TRANSFORMERS_USAGE).substitute(remote=remote, new_tokens=new_tokens)
    architecture = "transformers' own `nanochat` model type"
    if not config.is_portable:
        architecture = f"`nanochat_full`, defined by `{modeling_file}` in this folder"
    if names == "mlx":
        architecture, usage = "`nanochat` in mlx-lm", MLX_USAGE
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        library=names,
        parameters=f"{parameters / 1e6:,.1f}",
        version=__version__,
        origin=f", stage `{stage}`, run `{tag}`, step {step:,}" if stage else "",
        architecture=architecture,
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_kv_head,
        vocabulary=f"{config.vocab_size:,}",
        context=f"{config.context_length:,}",
        training="".join(f"{row}\n" for row in _training_rows(meta)),
        usage=usage,
        measurements="\n".join(_measurements(meta)).rstrip(),
    )


def _training_rows(meta: Mapping[str, Any]) -> list[str]:
    rows = []
    if tokens := meta.get("train_state", {}).get("tokens"):
        rows.append(f"| tokens trained on in this stage | {tokens:,} |")
    if source := meta.get("source"):
        rows.append(f"| begun from | {source['stage']}/{source['tag']}, step {source['step']:,} |")
    return rows


def _measurements(meta: Mapping[str, Any]) -> list[str]:
    """Tables of the measurements of this checkpoint and of those it was started from."""
    lines = ["## Measured", ""]
    for stage, tag, step, known in _lineage(meta):
        measured = [one for one in to_show(known) if one["kind"] in ("bpb", "text", "core", "task")]
        rows = []
        for label, one in zip(labels(measured), measured, strict=True):
            if cell := _cell(one["kind"], one["result"]):
                rows.append(f"| {label} | {cell} |")
        rows += [f"| {name} | {text} |" for name, text in chat_core_texts(known).items()]
        if rows:
            lines += [f"| {stage}/{tag}, step {step:,} | |", "|---|---|", *rows, ""]
    rows = [f"| {name} | {value:.2f} |" for name, value in _bytes_per_token(meta).items()]
    if rows:
        lines += ["| tokenizer, bytes per token | |", "|---|---|", *rows, ""]
    if len(lines) == 2:
        lines += ["Nothing was measured of this checkpoint.", ""]
    return lines


def _cell(kind: str, result: Mapping[str, Any]) -> str:
    key = {"task": "accuracy", "core": "core" if "core" in result else "core_partial"}.get(
        kind, "bpb"
    )
    if not isinstance(result.get(key), int | float):
        return ""
    interval = result.get("ci")
    form = ".1%" if kind == "task" else ".4f"
    text = f"{result[key]:{form}}"
    if kind == "task":
        text += f" of {result['total']:,}"
    if interval:
        text += f" (95 % interval {interval[0]:{form}} to {interval[1]:{form}})"
    if kind == "text":
        text += f", {result['word_perplexity']:,.1f} a word"
    return text


def _bytes_per_token(meta: Mapping[str, Any]) -> dict[str, float]:
    """Bytes per token by text, if this checkpoint's tokenizer was evaluated."""
    for path in sorted(paths.report_dir().glob("tok_eval*.json")):
        with suppress(OSError, ValueError):
            known = json.loads(path.read_text(encoding="utf-8"))
            if known.get("tokenizer_hash") == meta.get("tokenizer_hash"):
                return {row["text"]: row["bytes_per_token"]["nanochat"] for row in known["rows"]}
    return {}


def _lineage(meta: Mapping[str, Any]) -> Iterator[tuple[str, str, int, list[Measurement]]]:
    """Yield (stage, tag, step, measurements) of a checkpoint and of its ancestors that exist."""
    while {"stage", "tag", "step"} <= meta.keys():
        stage, tag, step = meta["stage"], meta["tag"], meta["step"]
        trained = meta.get("train_state", {}).get("metrics", {}).get("bpb")
        measured = of_checkpoint(meta)
        if isinstance(trained, float) and not any(one["kind"] == "bpb" for one in measured):
            measured.append(
                {
                    "kind": "bpb",
                    "name": "validation",
                    "step": step,
                    "settings": {"corpus": "when it was trained"},
                    "result": {"bpb": trained},
                }
            )
        yield stage, tag, step, measured
        source = meta.get("source") or {}
        try:
            folder = paths.checkpoints_dir(source["stage"], source["tag"])
            path = folder / f"step_{source['step']:06d}" / "meta.json"
            meta = json.loads(path.read_text(encoding="utf-8"))
        except (KeyError, OSError, ValueError):
            return
