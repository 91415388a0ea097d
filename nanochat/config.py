"""A frozen dataclass per script <-> command line (tyro) <-> JSON in the checkpoint.

A field that is itself a dataclass is a heading of the help page: named after the field, above the
dataclass's docstring and its flags. The flags carry no prefix: `--matrix-lr`, not
`--learning.matrix-lr`.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import tyro

from nanochat.errors import BadRows, UserError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON-ready nested dictionaries."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Rebuild a configuration saved by `to_dict`.

    A field missing in `values` takes its default (an older checkpoint); an unknown one is an error,
    since dropping a setting silently would change what the run means.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(
            f"{where}: unknown setting {', '.join(unknown)} for {cls.__name__}; "
            "it was written by another version of nanochat: load it with that version"
        )
    known: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            value = from_dict(hint, value, f"{where}.{name}")  # type: ignore[arg-type]
        elif isinstance(value, list) and _is_tuple(hint):
            value = tuple(value)
        elif isinstance(value, str) and typing.get_origin(hint) is tuple:
            value = (value,)  # saved when the setting took a single value
        known[name] = value
    return cls(**known)


def _is_tuple(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_tuple(option) for option in typing.get_args(hint))
    return hint is tuple or typing.get_origin(hint) is tuple


RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr", "gate_lr", "lr_scale"), (0, 1000)
    ),
    "weight_decay": (0, 100),
    "adam_betas": (0, 0.9999999),
    "muon_momentum": (0, 0.9999999),
    "warmup": (0, 1),
    "warmdown": (0, 1),
    "final_lr": (0, 1),
    "num_steps": (1, 10**9),
    "epochs": (1, 10**6),
    "target_tokens": (1, 10**15),
    "target_flops": (1, 10**30),
    "target_param_data_ratio": (0.000001, 10**6),
    "device_batch_size": (1, 2**20),
    "total_batch_size": (1, 2**30),
    "window": (1, 2**24),
    "context_length": (2, 2**24),
    "depth": (1, 1000),
    "aspect_ratio": (1, 4096),
    "head_dim": (2, 4096),
    "kv_heads": (1, 4096),
    "eval_every": (0, 10**9),
    "eval_tokens": (0, 10**12),
    "sample_every": (0, 10**9),
    "save_every": (0, 10**9),
    "keep_last": (0, 10**6),
    "max_hours": (0, 10**6),
    "check_replicas": (0, 10**9),
    "replay": (0, 0.999999),
    "long_fraction": (0, 0.999999),
    "prompt_weight": (0, 1000),
    "prompts_per_step": (1, 10**6),
    "max_tokens": (1, 2**24),
    "max_slots": (1, 2**16),
    "updates_per_rollout": (1, 10**4),
    "max_importance": (1, 10**6),
    "format_bonus": (0, 10**6),
    "eval_problems": (1, 10**6),
    "eval_samples": (1, 10**4),
    "temperature": (0, 100),
    "group_size": (1, 10**4),
    "beta": (0.000001, 10**6),
}
"""Least and greatest value of a setting of the training stages, by its name."""


def check_ranges(config: Any) -> None:
    """Raise UserError for a number outside RANGES, or one that is not finite."""
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        if one.name not in RANGES:
            continue
        low, high = RANGES[one.name]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not low <= number <= high:
                flag = "--" + one.name.replace("_", "-")
                raise UserError(f"{flag} {number} must be from {low:g} to {high:g}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a run goes on with that it did not begin with: "--matrix-lr 0.02 -> 0.01".

    Settings that change no step are left out: when to save, evaluate, log and resume.
    """
    found = []
    for name, value in now.items():
        old = before.get(name, value)
        if name in ("evaluating", "saving", "resume", "wandb", "check_replicas", "device"):
            continue
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            found += changes(old, value)
        elif json.dumps(old) != json.dumps(value):  # tuples are lists in a checkpoint
            found.append(f"--{name.replace('_', '-')} {old} -> {value}")
    return found


@dataclass(frozen=True)
class Run:
    """What runs where."""

    tag: str = "default"
    """Name of this run: checkpoints/<stage>/<tag> and runs/<stage>-<tag>."""
    seed: int = 1337
    """Seeds initialisation, data order and sampling."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Activation dtype; weights are always kept in float32."""
    fp8: bool = False
    """Multiply the blocks' matrices in float8, on GPUs from compute capability 8.9 (needs the extra
    fp8; has not been run on a GPU yet)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the loss; auto: on for CUDA, off elsewhere."""
    resume: bool = False
    """Continue from the newest checkpoint of this tag (from the start where there is none)."""
    wandb: str | None = None
    """Also log to wandb under this run name."""
    check_replicas: int = 0
    """Every N steps compare a hash of all parameters across ranks; 0 = never."""

    def compiles(self, device: torch.device) -> bool:
        """Whether the loss is compiled; micro-batches of one shape are then compiled once."""
        return self.compile == "on" or (self.compile == "auto" and device.type == "cuda")


@dataclass(frozen=True)
class Computing:
    """What it runs on."""

    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Activation dtype; auto: the fastest that the device trains in."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are computed one after the other."""

    quantize: Literal["none", "int8"] = "none"
    """int8: weights in 8 bits, for large models on a CPU in bfloat16."""
    cuda_graphs: bool = False
    """Compile the decoding step, once per start and length of the cache (not yet run on a GPU)."""


@dataclass(frozen=True)
class Tools:
    """What a model may call while it answers."""

    tools: bool = True
    """The calculator."""
    python_tool: bool = False
    """Python in the sandbox, instead of the calculator."""
    sandbox: Literal["strict", "best-effort"] = "strict"
    """strict refuses to run Python where a layer of the sandbox is missing."""


@dataclass(frozen=True)
class Batching:
    """How many tokens a step sees."""

    device_batch_size: Literal["auto"] | int = "auto"
    """Rows per rank and micro-batch; auto: the largest that fits and divides the total."""
    total_batch_size: Literal["auto"] | int = "auto"
    """Tokens per optimizer step over all ranks; auto: from the scaling rule."""
    window: int | None = None
    """Documents that are packed together, at least 1,024 and enough to fill 256 rows by default;
    larger packs tighter and shuffles wider."""
    recompute: bool = False
    """Recompute each block's activations in the backward pass: less memory, about 30 % slower."""


@dataclass(frozen=True)
class Duration:
    """When training stops: the first of these that is set, in this order."""

    num_steps: int | None = None
    """Optimizer steps."""
    target_tokens: int | None = None
    """Training tokens."""
    target_flops: float | None = None
    """Training FLOPs, e.g. 1e18."""
    target_param_data_ratio: float | None = None
    """Tokens per parameter of the block matrices and the head."""
    # Last, since epochs are the default of some stages and must not overrule a flag.
    epochs: int | None = None
    """Passes over all sources; an epoch covers every row exactly once."""

    @property
    def counts_epochs(self) -> bool:
        """Whether the epochs decide."""
        others = (
            self.num_steps,
            self.target_tokens,
            self.target_flops,
            self.target_param_data_ratio,
        )
        return self.epochs is not None and all(other is None for other in others)


@dataclass(frozen=True)
class Learning:
    """Learning rates at a batch of 2^19 tokens and width 768, before the scaling rules."""

    matrix_optimizer: Literal["muon", "adamw", "lion"] = "muon"
    """Update rule of the block matrices; adamw and lion want less --matrix-lr: 0.003, 0.0003."""
    matrix_lr: float = 0.02
    """The block matrices."""
    embedding_lr: float = 0.3
    """AdamW: token embedding and value embeddings."""
    head_lr: float = 0.004
    """AdamW: the output head."""
    scalar_lr: float = 0.5
    """AdamW: residual scalars (a tenth of that in mid-training and SFT)."""
    gate_lr: float = 0.01
    """AdamW: the small gate projections."""
    weight_decay: float | Literal["auto"] = "auto"
    """Muon's cautious weight decay; auto: from the scaling rule."""
    lr_scale: float | Literal["auto"] = "auto"
    """Factor on every learning rate for the batch size; auto: sqrt(B / 2^19), at least 1."""
    adam_betas: tuple[float, float] = (0.8, 0.95)
    """AdamW's moment decay rates."""
    muon_momentum: tuple[float, float] = (0.85, 0.95)
    """Muon's momentum: at the start, and after its warm-up."""
    warmup: float = 0.04
    """Fraction of the steps with a rising learning rate."""
    warmdown: float = 0.5
    """Fraction of the steps, at the end, with a falling learning rate."""
    final_lr: float = 0.0
    """Learning rate at the end, as a fraction of its peak."""


@dataclass(frozen=True)
class Evaluating:
    """What is measured on the way."""

    eval_every: int = 250
    """Steps between evaluations; 0 = only at the start and at the end."""
    eval_tokens: int = 2**19
    """Held-out tokens per evaluation, at least one batch."""
    sample_every: int = 0
    """Steps between printed samples; 0 = only at the end."""


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written."""

    save_every: int = 0
    """Steps between checkpoints (there is always one at the end); 0 = only at the end."""
    keep_last: int = 2
    """Older checkpoints of this tag are deleted; 0 keeps all."""
    max_hours: float = 0.0
    """Save and stop after this long; 0 = no limit."""


@dataclass(frozen=True)
class BaseConfig:
    """Pretraining."""

    run: Run = field(default_factory=Run)
    batching: Batching = field(default_factory=Batching)
    duration: Duration = field(default_factory=Duration)
    learning: Learning = field(default_factory=Learning)
    evaluating: Evaluating = field(default_factory=Evaluating)
    saving: Saving = field(default_factory=Saving)
    depth: int = 20
    """The one dial: number of layers; width, heads, batch, steps and rates follow."""
    aspect_ratio: int = 64
    """Width per layer, before rounding up to a multiple of the head size."""
    head_dim: int = 128
    """Size of an attention head."""
    kv_heads: int | None = None
    """Key/value heads (grouped-query attention); default: as many as query heads."""
    context_length: int = 2048
    """Tokens per row."""
    context_schedule: str | None = None
    """Short rows first, instead: each length with its share of the steps, like 256:0.5,512:0.5.
    A step's tokens stay the same; each length must divide the last, which is the context."""
    window_pattern: str = "SSSL"
    """Attention per layer, repeated over the depth: L full, S half the context; the last is L."""
    portable: bool = False
    """Build the plain variant that loads as transformers' own `nanochat` model type."""
    corpus: str = "climbmix"
    """Corpus name or path, as encoded by scripts.tok_encode."""
    mix: tuple[str, ...] = ()
    """Several corpora by share of the tokens instead: climbmix:0.9 ./mybooks:0.1."""
    tokenizer: str = "default"
    """The name given to scripts.tok_train; later stages take the checkpoint's tokenizer."""


@dataclass(frozen=True)
class MidConfig:
    """Mid-training: conversations, tasks and replayed pretraining text, all tokens trained."""

    run: Run = field(default_factory=Run)
    batching: Batching = field(default_factory=Batching)
    duration: Duration = field(default_factory=lambda: Duration(epochs=1))
    learning: Learning = field(
        default_factory=lambda: Learning(scalar_lr=0.05, warmup=0.0, warmdown=0.2, weight_decay=0.0)
    )
    evaluating: Evaluating = field(default_factory=Evaluating)
    saving: Saving = field(default_factory=Saving)
    source: str = "base"
    """Where the weights come from: a stage, stage/tag, or a checkpoint folder."""
    corpus: tuple[str, ...] = ("climbmix",)
    """Pretraining corpus that is replayed and on which bits per byte are measured; several by
    share: climbmix:0.9 ./mybooks:0.1."""
    mix: tuple[str, ...] = (
        "smoltalk",
        "mmlu",
        "gsm8k",
        "customjson:2",
        "simplespelling:0.5",
        "spellingbee:0.5",
    )
    """Tasks as NAME[:OPTION...][:WEIGHT], e.g. arc:easy, spellingbee:3000:0.5; a weight of 2 is two
    passes per epoch."""
    replay: float = 0.2
    """Share of the documents' tokens that is replayed pretraining text."""
    prompt_weight: float = 1.0
    """Loss weight of tokens the assistant does not produce."""
    context_length: int | None = None
    """Extend the model to so many tokens per row; default: as it was trained."""
    rope_scaling: Literal["abf", "none"] = "abf"
    """With --context-length: raise the rotary base of full attention (ABF, arXiv 2309.16039), or
    leave it, for comparison."""
    long_fraction: float = 0.34
    """With --context-length: share of the tokens from documents of --corpus that are at least that
    long."""
    long_conversations: Literal["truncate", "split", "drop"] = "split"
    """Conversations longer than a row: keep their beginning, split them (all pieces but the first
    are trained on without what went before), or leave them out."""
    system: Literal["tokens", "merge"] = "tokens"
    """System message in its own tokens, or merged into the first user message."""
    bad_rows: BadRows = "error"
    """What to do with a conversation that does not fit the schema."""


@dataclass(frozen=True)
class SftConfig(MidConfig):
    """Instruction tuning: conversations and tasks, the assistant's tokens trained."""

    learning: Learning = field(
        default_factory=lambda: Learning(scalar_lr=0.05, warmup=0.0, warmdown=1.0, weight_decay=0.0)
    )
    source: str = "mid"
    replay: float = 0.0
    prompt_weight: float = 0.0
    long_fraction: float = 0.0
    long_conversations: Literal["truncate", "split", "drop"] = "truncate"


@dataclass(frozen=True)
class Rollouts:
    """What is sampled for a step."""

    prompts_per_step: int = 16
    """Prompts of a rollout over all ranks, in the order of the mixture (dpo: pairs)."""
    group_size: int = 16
    """Answers to each prompt; their mean reward is the baseline."""
    temperature: float = 1.0
    """Of sampling, and of the loss, which scores what was sampled; at least 0.5."""
    max_tokens: int = 256
    """Longest answer. Longer ones are cut off and not trained on."""
    max_slots: int = 64
    """Answers that a rank decodes at once."""
    updates_per_rollout: int = 1
    """Optimizer steps on each rollout; above 1 with CISPO's clipped importance weights."""
    max_importance: float = 2.0
    """Upper bound of these weights."""
    format_bonus: float = 0.0
    """Added in training to the reward of an answer that its task can read, right or wrong."""


@dataclass(frozen=True)
class Preferences:
    """Direct preference optimisation (--algo dpo)."""

    pairs: str = ""
    """A .jsonl file with lines {"messages": [...], "chosen": "...", "rejected": "..."}."""
    beta: float = 0.1
    """How firmly the model is held to where it began."""
    length_normalised: bool = False
    """Compare log-probabilities per token; beta then has to be larger, such as 2."""
    bad_rows: BadRows = "error"
    """What to do with a line that is no pair, or too long."""


@dataclass(frozen=True)
class RlEvaluating(Evaluating):
    """What is measured on the way."""

    eval_every: int = 20
    """Optimizer steps between evaluations (also at the start and at the end); 0 = both ends."""
    eval_tokens: tyro.conf.Suppress[int] = 0
    eval_problems: int = 128
    """Held-out problems (dpo: pairs) over all tasks."""
    eval_samples: int = 4
    """Answers drawn to each of them beside the greedy one."""
    sample_every: int = 20
    """Optimizer steps between rollouts that are printed and saved, with their rewards; 0 = only the
    last one."""


@dataclass(frozen=True)
class RlConfig:
    """Reinforcement learning on tasks with rewards, or preference optimisation on pairs."""

    run: Run = field(default_factory=Run)
    rollouts: Rollouts = field(default_factory=Rollouts)
    preferences: Preferences = field(default_factory=Preferences)
    learning: Learning = field(
        default_factory=lambda: Learning(lr_scale=0.05, warmup=0.0, warmdown=1.0, weight_decay=0.0)
    )
    evaluating: RlEvaluating = field(default_factory=RlEvaluating)
    saving: Saving = field(default_factory=Saving)
    algo: Literal["reinforce", "dpo"] = "reinforce"
    """Policy gradient on rollouts, or direct preference optimisation on pairs."""
    source: str = "sft"
    """Where the weights come from: a stage, stage/tag, or a checkpoint folder."""
    mix: tuple[str, ...] = ("gsm8k",)
    """Tasks with rewards as NAME[:options][:weight]."""
    num_steps: int | None = None
    """Optimizer steps; default: as many as --epochs has."""
    epochs: int = 1
    """Passes over the prompts (dpo: pairs)."""
    device_batch_size: Literal["auto"] | int = "auto"
    """Rows per rank and micro-batch; auto: the largest that fits."""
    recompute: bool = False
    """Recompute each block's activations in the backward pass: less memory, about 30 % slower."""
    system: Literal["auto", "tokens", "merge"] = "auto"
    """System message in its own tokens, or merged into the first user message; auto: as the source
    was trained."""
