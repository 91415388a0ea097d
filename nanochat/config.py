"""Settings of the training scripts: frozen dataclasses, read from flags and saved in checkpoints.

tyro makes the flags from the fields, and the help from the docstrings. A field that is itself a
dataclass is a heading of the help page: the field's name, the dataclass's docstring and its flags.
The flags have no prefix: `--matrix-lr`, not `--learning.matrix-lr`.
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
    """Turn a configuration into nested dictionaries for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Rebuild a configuration saved by `to_dict`.

    A field missing in `values` (of an older checkpoint) gets its default. An unknown one raises
    UserError, since dropping a setting silently would change what the run means.
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
            value = (value,)  # the checkpoint is from when the setting took a single value
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
    "max_epochs": (1, 10**6),
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
"""Smallest and largest allowed value of settings of the training stages, by field name."""


def check_ranges(config: Any) -> None:
    """Raise UserError for a number that is outside RANGES or not finite."""
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
    """List settings that differ from those a run began with: "--matrix-lr 0.02 -> 0.01".

    Settings that do not change the steps are left out: when to save, evaluate, log and resume.
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
    """Name, seed and device of the run."""

    tag: str = "default"
    """Name of this run: checkpoints/<stage>/<tag> and runs/<stage>-<tag>."""
    seed: int = 1337
    """Seed of the initial weights, the data order and sampling."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Activation dtype; auto: the fastest that the device trains in. Weights are always float32."""
    fp8: bool = False
    """Multiply the blocks' matrices in float8. Needs a GPU of compute capability 8.9 or newer and
    pip install -e '.[fp8]'. It has not been run on a GPU yet."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the loss with torch.compile; auto: on for CUDA, off elsewhere."""
    resume: bool = False
    """Continue from the newest checkpoint of this tag; if there is none, begin a new run."""
    wandb: str | None = None
    """Name of a wandb run to log to as well."""
    check_replicas: int = 0
    """Steps between comparisons of all parameters across ranks; 0 = never."""

    def compiles(self, device: torch.device) -> bool:
        """True if the loss is to be compiled on this device."""
        return self.compile == "on" or (self.compile == "auto" and device.type == "cuda")


@dataclass(frozen=True)
class Computing:
    """Device and dtype."""

    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Activation dtype; auto: the fastest that the device trains in."""


@dataclass(frozen=True)
class ChatSampling:
    """Sampling of a chat's answers."""

    temperature: float = 0.6
    """Sampling temperature; 0 always takes the most likely token."""
    top_k: int = 50
    """Sample among the k most likely tokens; 0 = all."""
    max_tokens: int = 512
    """Longest answer, in tokens."""


@dataclass(frozen=True)
class Decoding:
    """Settings of token generation."""

    quantize: Literal["none", "int8"] = "none"
    """int8 keeps weights in 8 bits: for large models on a CPU in bfloat16."""
    cuda_graphs: bool = False
    """Compile the decoding step, at each start and each growth of the cache. It has not been run on
    a GPU yet."""


@dataclass(frozen=True)
class Tools:
    """Tools that the model may call while it answers."""

    tools: bool = True
    """Let the model call the calculator."""
    python_tool: bool = False
    """Let the model run Python in the sandbox, instead of the calculator."""
    sandbox: Literal["strict", "best-effort"] = "strict"
    """strict refuses to run Python if a layer of the sandbox is missing on this machine."""


@dataclass(frozen=True)
class Batching:
    """Size of batches, and packing of documents into rows."""

    device_batch_size: Literal["auto"] | int = "auto"
    """Rows per rank and micro-batch; auto: the largest that fits and divides the total."""
    total_batch_size: Literal["auto"] | int = "auto"
    """Tokens per optimizer step over all ranks; auto: in base from the scaling rule, later
    as in the run that it starts from."""
    window: int | None = None
    """Documents per packing window, whose rows are filled together; default: at least 1,024, and
    enough to fill 256 rows. More documents leave less padding and are shuffled more widely."""
    recompute: bool = False
    """Recompute each block's activations in the backward pass: less memory, about 30 % slower."""


@dataclass(frozen=True)
class Duration:
    """End of training. If several of these are set, the first one in this order counts."""

    num_steps: int | None = None
    """Number of optimizer steps."""
    target_tokens: int | None = None
    """Number of training tokens."""
    target_flops: float | None = None
    """Number of training FLOPs, e.g. 1e18."""
    target_param_data_ratio: float | None = None
    """Training tokens per parameter of the block matrices and the head."""
    # The last one, since some stages set epochs by default, and a flag must win over it.
    epochs: int | None = None
    """Passes over all sources; an epoch covers every row exactly once."""
    max_epochs: int | None = None
    """Largest number of passes over all sources, whatever else is set: a small corpus then takes
    fewer steps. Text read four times teaches nearly as much as new text, and then less and less
    (arXiv 2305.16264). scripts.plan, which reads no data, does not count passes."""

    @property
    def counts_epochs(self) -> bool:
        """True if `epochs` decides when training stops."""
        others = (
            self.num_steps,
            self.target_tokens,
            self.target_flops,
            self.target_param_data_ratio,
        )
        return self.epochs is not None and all(other is None for other in others)


@dataclass(frozen=True)
class Learning:
    """Optimizer settings. Learning rates are for a width of 768 and 2^19 tokens per step; scaling
    rules adapt them."""

    matrix_optimizer: Literal["muon", "adamw", "lion"] = "muon"
    """Update rule of the block matrices. adamw and lion need a smaller --matrix-lr, about 0.003
    (lion: less in long runs). With lion, 0.0003 taught the matrices of a small model nothing in 80
    steps."""
    matrix_lr: float = 0.02
    """Learning rate of the block matrices."""
    embedding_lr: float = 0.3
    """AdamW's learning rate of the embeddings of tokens and bytes and of the value embeddings."""
    head_lr: float = 0.004
    """AdamW's learning rate of the output head."""
    scalar_lr: float = 0.5
    """AdamW's learning rate of the residual scalars (0.05 by default in mid-training and SFT)."""
    gate_lr: float = 0.01
    """AdamW's learning rate of the small gate projections."""
    weight_decay: float | Literal["auto"] = "auto"
    """Weight decay of the block matrices; auto: from the scaling rule."""
    lr_scale: float | Literal["auto"] = "auto"
    """Factor on every learning rate; auto: sqrt(B / 2^19) for B tokens per step, but at least 1."""
    adam_betas: tuple[float, float] = (0.8, 0.95)
    """AdamW's moment decay rates."""
    muon_momentum: tuple[float, float] = (0.85, 0.95)
    """Muon's momentum at the start, and after its warm-up."""
    warmup: float = 0.04
    """Fraction of the steps, at the start, with a rising learning rate."""
    warmdown: float = 0.5
    """Fraction of the steps, at the end, with a falling learning rate."""
    final_lr: float = 0.0
    """Learning rate at the end, as a fraction of its peak."""
    bf16_transfers: bool = False
    """Send gradients and weights of embeddings, value embeddings and head between ranks in
    bfloat16: half the bytes. It changes the losses by rounding: each rank's gradients are rounded
    before they are added (in float32), and tables are read rounded. Checkpoints keep float32."""


@dataclass(frozen=True)
class Evaluating:
    """Evaluation and samples during training."""

    eval_every: int = 250
    """Steps between evaluations; 0 = only at the start and at the end."""
    eval_tokens: int = 2**19
    """Held-out tokens per evaluation; at least one batch is used."""
    sample_every: int = 0
    """Steps between printed samples; 0 = only at the end."""


@dataclass(frozen=True)
class Saving:
    """Checkpoints, and the time limit."""

    save_every: int = 0
    """Steps between checkpoints; 0 = only at the end. The last step is always saved."""
    keep_last: int = 2
    """Number of checkpoints of this tag to keep; older ones are deleted. 0 keeps all."""
    max_hours: float = 0.0
    """Hours after which the run saves and stops; 0 = no limit."""


@dataclass(frozen=True)
class BaseConfig:
    """Pretraining on text."""

    run: Run = field(default_factory=Run)
    batching: Batching = field(default_factory=Batching)
    duration: Duration = field(default_factory=Duration)
    learning: Learning = field(default_factory=Learning)
    evaluating: Evaluating = field(default_factory=Evaluating)
    saving: Saving = field(default_factory=Saving)
    depth: int = 20
    """Number of layers. Width, heads, batch size, steps and learning rates follow from it."""
    aspect_ratio: int = 64
    """Channels per layer: the width is depth * aspect ratio, rounded up to whole heads."""
    head_dim: int = 128
    """Channels of an attention head."""
    kv_heads: int | None = None
    """Key/value heads (grouped-query attention); default: as many as query heads."""
    context_length: int = 2048
    """Tokens per row."""
    context_schedule: str | None = None
    """Train on short rows first: row lengths with their share of the steps, like 256:0.5,512:0.5.
    The tokens of a step stay the same. The last length is the context length, and each other length
    must divide it."""
    window_pattern: str = "SSSL"
    """Attention window of each layer, repeated over the depth: L sees the whole context, S half of
    it. The last layer is always L."""
    portable: bool = False
    """Leave out what transformers' own `nanochat` model type lacks, so that it loads the model."""
    corpus: str = "climbmix"
    """Corpus name or path, as given to scripts.tok_encode."""
    mix: tuple[str, ...] = ()
    """Several corpora with their shares of the tokens, in place of --corpus: climbmix:0.9
    ./mybooks:0.1."""
    tokenizer: str = "default"
    """Name that scripts.tok_train gave the tokenizer; later stages take the checkpoint's."""


@dataclass(frozen=True)
class MidConfig:
    """Mid-training: conversations, tasks and replayed pretraining text; all tokens are trained."""

    run: Run = field(default_factory=Run)
    batching: Batching = field(default_factory=Batching)
    duration: Duration = field(default_factory=lambda: Duration(epochs=1))
    learning: Learning = field(
        default_factory=lambda: Learning(scalar_lr=0.05, warmup=0.0, warmdown=0.2, weight_decay=0.0)
    )
    evaluating: Evaluating = field(default_factory=Evaluating)
    saving: Saving = field(default_factory=Saving)
    source: str = "base"
    """Checkpoint to start from: a stage, stage/tag, or a checkpoint folder."""
    corpus: tuple[str, ...] = ("climbmix",)
    """Pretraining corpus to replay and to measure bits per byte on; several with their shares:
    climbmix:0.9 ./mybooks:0.1."""
    mix: tuple[str, ...] = (
        "smoltalk",
        "mmlu",
        "gsm8k",
        "customjson:2",
        "simplespelling:0.5",
        "spellingbee:0.5",
    )
    """Tasks as NAME[:OPTION...][:WEIGHT], e.g. arc:easy, spellingbee:3000:0.5. The mixture weight
    is the number of passes over the task per epoch, 1 by default."""
    replay: float = 0.2
    """Share of the tokens that is replayed pretraining text."""
    prompt_weight: float = 1.0
    """Loss weight of tokens the assistant does not produce."""
    context_length: int | None = None
    """Extend the model to this many tokens per row; default: keep its context."""
    rope_scaling: Literal["abf", "none"] = "abf"
    """Rotary base of layers without a window when --context-length extends the model: raise it
    (abf, arXiv 2309.16039), or keep it (none), for comparison."""
    long_fraction: float = 0.34
    """Share of the tokens, with --context-length, that come from documents of --corpus of at least
    the new length."""
    long_conversations: Literal["truncate", "split", "drop"] = "split"
    """Conversations longer than a row: truncate keeps the beginning, split makes several rows (the
    later ones do not see the earlier ones), drop leaves them out."""
    system: Literal["tokens", "merge"] = "tokens"
    """System message in its own tokens, or merged into the user message after it."""
    bad_rows: BadRows = "error"
    """Stop at a conversation that does not fit the schema, or skip it."""


@dataclass(frozen=True)
class SftConfig(MidConfig):
    """Instruction tuning: conversations and tasks; only the assistant's tokens are trained."""

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
    """Sampling of answers. A rollout is the answers sampled at once to prompts_per_step prompts."""

    prompts_per_step: int = 16
    """Prompts per rollout over all ranks (dpo: pairs per step), in the order of the mixture."""
    group_size: int = 16
    """Answers per prompt; their mean reward is the baseline of each of them."""
    temperature: float = 1.0
    """Temperature of sampling and of the loss, which scores the samples; at least 0.5."""
    max_tokens: int = 256
    """Tokens of the longest answer. Longer ones are cut off and not trained on."""
    max_slots: int = 64
    """Answers that a rank decodes at once."""
    updates_per_rollout: int = 1
    """Optimizer steps per rollout; above 1, CISPO's clipped importance ratios are used."""
    max_importance: float = 2.0
    """Upper bound of the importance ratios."""
    format_bonus: float = 0.0
    """Bonus, in training, to the reward of an answer that the task can parse, right or wrong."""


@dataclass(frozen=True)
class Preferences:
    """Direct preference optimisation (--algo dpo)."""

    pairs: str = ""
    """File of pairs, .jsonl: {"messages": [...], "chosen": "...", "rejected": "..."} per line."""
    beta: float = 0.1
    """DPO's beta: how strongly the model is pulled to where it started."""
    length_normalised: bool = False
    """Compare log-probabilities per token; beta then has to be larger, such as 2."""
    bad_rows: BadRows = "error"
    """Stop at a line that is not a pair or is too long, or skip it."""


@dataclass(frozen=True)
class RlEvaluating(Evaluating):
    """Evaluation and samples during training."""

    eval_every: int = 20
    """Optimizer steps between evaluations; 0 = only at the start and at the end."""
    eval_tokens: tyro.conf.Suppress[int] = 0
    eval_problems: int = 128
    """Held-out problems (dpo: pairs) per evaluation, over all tasks."""
    eval_samples: int = 4
    """Answers sampled to each held-out problem, beside the greedy one."""
    sample_every: int = 20
    """Optimizer steps between rollouts that are printed and saved with their rewards; 0 = only the
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
    """Checkpoint to start from: a stage, stage/tag, or a checkpoint folder."""
    mix: tuple[str, ...] = ("gsm8k",)
    """Tasks with rewards as NAME[:OPTION...][:WEIGHT]; the mixture weight is passes per epoch."""
    num_steps: int | None = None
    """Number of optimizer steps; default: that of --epochs."""
    epochs: int = 1
    """Passes over the prompts (dpo: pairs)."""
    device_batch_size: Literal["auto"] | int = "auto"
    """Rows per rank and micro-batch; auto: the largest that fits."""
    recompute: bool = False
    """Recompute each block's activations in the backward pass: less memory, about 30 % slower."""
    system: Literal["auto", "tokens", "merge"] = "auto"
    """System message in its own tokens, or merged into the user message after it; auto: as the
    source was trained."""
