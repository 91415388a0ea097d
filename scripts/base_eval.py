"""Evaluate a model on text: bits per byte, samples, and the CORE metric.

Examples:
    python -m scripts.base_eval --source base
    python -m scripts.base_eval --source base --core yes
    python -m scripts.base_eval --source base --text wiki.test.txt
    python -m scripts.base_eval --hf PATH         the CORE metric of any Hugging Face causal LM

CORE (arXiv 2406.11794, in the variant of nanochat's base_eval) needs its task files in
NANOCHAT_BASE_DIR/eval_bundle or `--bundle`. With `--core yes` and with `--hf`, missing task files
are downloaded.

Results are written to report/eval_<stage>-<tag>.json under NANOCHAT_BASE_DIR, each with its
settings: a quick look never replaces a longer measurement.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanochat import paths
from nanochat.checkpoint_manager import find, load_model, read_meta, tokenizer_of
from nanochat.cli import launch
from nanochat.config import Computing
from nanochat.data.hub import BUNDLE_URL, fetch_bundle
from nanochat.data.sources import open_store
from nanochat.errors import UserError
from nanochat.eval import record
from nanochat.eval.core import describe_core, evaluate_core
from nanochat.eval.losses import bits_per_byte, text_loss
from nanochat.export.hf import load_hf
from nanochat.infer.samples import sample_texts
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Core:
    """The CORE metric."""

    core: Literal["auto", "yes", "no"] = "auto"
    """Measure CORE; auto: if its task files are there."""
    bundle: Path | None = None
    """Folder of CORE's task files; default: NANOCHAT_BASE_DIR/eval_bundle."""
    bundle_url: str = BUNDLE_URL
    """Address to download CORE's task files from."""
    max_per_task: int | None = None
    """Largest number of items per CORE task, for a quick look; default: all."""
    hf: str | None = None
    """Measure CORE of this Hugging Face model instead (a folder or a hub id)."""
    trust_remote_code: bool = False
    """Run the code in the folder of the --hf model; our own exports do not need it."""


@dataclass(frozen=True)
class Config:
    run: Computing = field(default_factory=Computing)
    metric: Core = field(default_factory=Core)
    source: str = "base"
    """A stage (base, mid, sft, rl), stage/tag, or a checkpoint folder."""
    step: int | None = None
    """The checkpoint's step; default: the newest."""
    corpus: str = "climbmix"
    """Corpus for bits per byte."""
    eval_tokens: int = 2**20
    """Tokens of each split to measure; at least one row is used."""
    text: Path | None = None
    """File of held-out text: measure its bits per byte and the perplexity of its words."""
    batch_size: int = 16
    """Rows computed at once."""
    resume: bool = False
    """Keep the results that an earlier run of this command has for this checkpoint."""


def main(cfg: Config, runtime: Runtime) -> list[record.Measurement]:
    """Returns the requested measurements, new and kept ones."""
    bundle = core_bundle(cfg.metric, runtime)
    if cfg.metric.hf:
        if bundle is None:
            raise UserError(
                f"--core {cfg.metric.core} and --hf {cfg.metric.hf}: nothing would be measured"
            )
        scorer, encoder = load_hf(cfg.metric.hf, runtime, cfg.metric.trust_remote_code)
        result = evaluate_core(scorer, encoder, bundle, runtime, cfg.metric.max_per_task)
        runtime.print(describe_core(result))
        return []

    folder = find(cfg.source, cfg.step)
    meta = read_meta(folder)
    asked = questions(cfg, bundle, tokenizer_of(meta, folder), meta, runtime)
    if bundle is None and cfg.metric.core == "auto":
        runtime.print(
            f"CORE is not measured: {paths.eval_bundle_dir()} is missing (--core yes downloads it)"
        )
    answers: dict[tuple[str, str], record.Measurement] = {}
    if cfg.resume:
        known = runtime.broadcast_object(record.of_checkpoint(meta))
        for (kind, name), settings in asked.items():
            if kept := record.find(known, kind, name, settings):
                answers[kind, name] = kept
                runtime.print(f"{record.labels([kept])[0]}: kept from an earlier run")
    if len(answers) == len(asked):
        return list(answers.values())

    model, tokenizer, meta = load_model(cfg.source, runtime, step=cfg.step)
    shape: dict[str, Any] = {
        "sequence_length": model.config.context_length,
        "batch_size": cfg.batch_size,
        "runtime": runtime,
    }
    for (kind, name), settings in asked.items():
        if (kind, name) in answers:
            continue
        if kind == "bpb":
            store = open_store(cfg.corpus, name, tokenizer)
            result = bits_per_byte(model, tokenizer, store, cfg.eval_tokens, **shape)
            runtime.print(
                f"{cfg.source}: {with_interval(result)} bits per byte on {name}, "
                f"{result['tokens']:,} tokens, {result['bytes']:,} bytes"
            )
        elif kind == "text":
            assert cfg.text is not None
            result = text_loss(model, tokenizer, read_text(cfg.text), **shape)
            runtime.print(
                f"{cfg.source}: {with_interval(result)} bits per byte of {name}, "
                f"{result['word_perplexity']:,.2f} perplexity of its {result['words']:,} words"
            )
        elif kind == "samples":
            result = {"samples": []}
            if runtime.is_main:
                for prompt, text in sample_texts(model, tokenizer, temperature=0.0):
                    runtime.print(f"  {prompt} |{text}")
                    result["samples"].append({"prompt": prompt, "text": text})
        else:
            assert bundle is not None
            result = evaluate_core(model, tokenizer, bundle, runtime, cfg.metric.max_per_task)
            runtime.print(describe_core(result))
        if runtime.is_main:  # each result is written as soon as it is known
            answers[kind, name] = record.record(meta, kind, name, settings, result)
    return list(runtime.broadcast_object(answers).values())


def with_interval(result: dict[str, Any]) -> str:
    """Format bits per byte with their interval, if there is one."""
    interval = "" if result["ci"] is None else " ({:.4f} to {:.4f})".format(*result["ci"])
    return f"{result['bpb']:.4f}{interval}"


def core_bundle(cfg: Core, runtime: Runtime) -> Path | None:
    """Folder of CORE's task files; None if CORE is not to be measured."""
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


def questions(
    cfg: Config, bundle: Path | None, tokenizer: Tokenizer, meta: dict[str, Any], runtime: Runtime
) -> dict[tuple[str, str], dict[str, Any]]:
    """Settings of each measurement to make, by (kind, name): all that its result depends on beside
    the model."""
    dtype = str(runtime.dtype)
    shape = {"context_length": meta["model_config"]["context_length"], "dtype": dtype}
    asked: dict[tuple[str, str], dict[str, Any]] = {}
    for split in ("train", "val"):
        store = open_store(cfg.corpus, split, tokenizer)
        asked["bpb", split] = {
            "corpus": cfg.corpus,
            "split": split,
            "eval_tokens": cfg.eval_tokens,
            "digest": store.meta["fingerprint"],
            **shape,
        }
    asked["samples", "samples"] = {"dtype": dtype}
    if cfg.text is not None:
        digest = hashlib.sha256(read_text(cfg.text).encode()).hexdigest()
        asked["text", cfg.text.name] = {"digest": digest, **shape}
    if bundle is not None:
        asked["core", "CORE"] = {
            "max_per_task": cfg.metric.max_per_task,
            "dtype": dtype,
            "files": folder_digest(bundle),
        }
    return asked


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"--text {path} is not UTF-8 text ({error})") from error
    if not text.split():
        raise UserError(f"--text {path} has no words; name a file of text")
    return text


def folder_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all files in a folder."""
    sha = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        sha.update(f"{path.relative_to(folder)} {content}\n".encode())
    return sha.hexdigest()


if __name__ == "__main__":
    launch(main, Config, __doc__)
