"""Evaluate a model on text: bits per byte, samples, and the CORE metric where its bundle is.

Examples:
    python -m scripts.base_eval --source base
    python -m scripts.base_eval --source base --core yes
    python -m scripts.base_eval --hf PATH         the CORE metric of any Hugging Face causal LM

CORE (arXiv 2406.11794) needs its task files in NANOCHAT_BASE_DIR/eval_bundle or `--bundle`; with
`--core yes` and with `--hf` they are downloaded where they are missing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat import paths
from nanochat.checkpoint_manager import find, load_model, read_meta
from nanochat.cli import Group, launch
from nanochat.config import Computing
from nanochat.data.hub import BUNDLE_URL, fetch_bundle
from nanochat.data.sources import open_store
from nanochat.errors import UserError
from nanochat.eval.core import describe_core, evaluate_core
from nanochat.eval.losses import bits_per_byte
from nanochat.eval.results import read_evaluation, record_evaluation, weights_digest
from nanochat.export.load import load_hf
from nanochat.runtime import Runtime
from scripts.base_train import sample_texts


@dataclass(frozen=True)
class Core(Group):
    """The CORE metric."""

    core: Literal["auto", "yes", "no"] = "auto"
    """Whether to measure CORE; auto: where its task files are."""
    bundle: Path | None = None
    """CORE's task files; default: NANOCHAT_BASE_DIR/eval_bundle."""
    bundle_url: str = BUNDLE_URL
    """Where they are downloaded from."""
    max_per_task: int | None = None
    """A quick look at CORE: at most so many items of each task."""
    hf: str | None = None
    """Measure CORE of this Hugging Face model instead (a folder or a hub id)."""
    trust_remote_code: bool = False
    """Run the code that the model of --hf brings along; our own exports don't need it."""


@dataclass(frozen=True)
class Config(Core, Computing):
    source: str = "base"
    """A stage (base, mid, sft, rl), stage/tag, or a checkpoint folder."""
    step: int | None = None
    """The checkpoint's step; default: the newest."""
    corpus: str = "climbmix"
    """Corpus for bits per byte."""
    eval_tokens: int = 2**20
    """Tokens of each split that are measured, at least one row."""
    batch_size: int = 16
    """Rows computed at once."""
    resume: bool = False
    """Keep what an earlier run of this command has measured on this checkpoint."""


def main(cfg: Config, runtime: Runtime) -> dict[str, Any]:
    bundle = core_bundle(cfg, runtime)
    if cfg.hf:
        if bundle is None:
            raise UserError(f"--core {cfg.core} and --hf {cfg.hf}: nothing would be measured")
        scorer, encoder = load_hf(cfg.hf, runtime, cfg.trust_remote_code)
        result = evaluate_core(scorer, encoder, bundle, runtime, cfg.max_per_task)
        runtime.print(describe_core(result))
        return {"core": result}

    asked = questions(cfg, bundle, runtime)
    if bundle is None and cfg.core == "auto":
        runtime.print(
            f"CORE is not measured: {paths.eval_bundle_dir()} is missing (--core yes downloads it)"
        )
    known: dict[str, Any] = {}
    if cfg.resume:
        meta = read_meta(find(cfg.source, cfg.step), verify=False)
        weights = weights_digest(meta)
        known = read_evaluation(meta["stage"], meta["tag"], meta["step"], weights)
        known = runtime.broadcast_object(known)
    answered = known.get("asked", {})
    kept = [name for name, question in asked.items() if answered.get(name) == question]
    for name in kept:
        runtime.print(f"{name}: kept from an earlier run")
    if len(kept) == len(asked):
        return known

    model, tokenizer, meta = load_model(
        cfg.source, device=runtime.device, dtype=runtime.dtype, step=cfg.step
    )

    def record(name: str, **values: Any) -> None:
        """Each answer as soon as it is known."""
        answered[name] = asked[name]
        known.update(values, asked=answered)
        if runtime.is_main:
            weights = weights_digest(meta)
            stage, tag, step = meta["stage"], meta["tag"], meta["step"]
            record_evaluation(stage, tag, step, weights=weights, asked=answered, **values)

    if "bpb" not in kept:
        bpb = {}
        for split in ("train", "val"):
            bpb[split] = bits_per_byte(
                model,
                tokenizer,
                open_store(cfg.corpus, split, tokenizer),
                cfg.eval_tokens,
                sequence_length=model.config.context_length,
                batch_size=cfg.batch_size,
                runtime=runtime,
            )["bpb"]
            runtime.print(f"{cfg.source}: {bpb[split]:.4f} bits per byte on {split}")
        samples = []
        if runtime.is_main:
            samples = [
                {"prompt": prompt, "text": text}
                for prompt, text in sample_texts(model, tokenizer, temperature=0.0)
            ]
            for sample in samples:
                runtime.print(f"  {sample['prompt']} |{sample['text']}")
        record("bpb", bpb=bpb, samples=samples)
    if bundle is not None and "core" not in kept:
        core = evaluate_core(model, tokenizer, bundle, runtime, cfg.max_per_task)
        runtime.print(describe_core(core))
        key = "core" if "core" in core else "core_partial"
        record("core", **{key: core[key]}, core_tasks=core)
    return known


def core_bundle(cfg: Config, runtime: Runtime) -> Path | None:
    """The folder of CORE's task files; None where CORE is not to be measured."""
    if cfg.core == "no":
        return None
    if cfg.bundle is not None:
        if not cfg.bundle.is_dir():
            raise UserError(f"--bundle {cfg.bundle} is no folder; name one with CORE's task files")
        return cfg.bundle
    if cfg.core == "yes" or cfg.hf:
        if runtime.is_main:
            fetch_bundle(cfg.bundle_url)
        runtime.barrier()
    folder = paths.eval_bundle_dir()
    return folder if folder.is_dir() else None


def questions(cfg: Config, bundle: Path | None, runtime: Runtime) -> dict[str, dict[str, Any]]:
    """What is to be measured, and what its result depends on beside the model."""
    dtype = str(runtime.dtype)
    asked: dict[str, dict[str, Any]] = {
        "bpb": {"corpus": cfg.corpus, "eval_tokens": cfg.eval_tokens, "dtype": dtype}
    }
    if bundle is not None:
        files = [path.stat() for path in bundle.rglob("*") if path.is_file()]
        asked["core"] = {
            "max_per_task": cfg.max_per_task,
            "dtype": dtype,
            # A partial score is measured again when more task files are there.
            "bundle": [len(files), sum(file.st_size for file in files)],
        }
    return asked


if __name__ == "__main__":
    launch(main, Config, __doc__)
