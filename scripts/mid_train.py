"""Mid-train a base model on conversations and tasks.

Every token is trained (`--prompt-weight 1`), in conversation format, while a share of the
pretraining text is replayed (`--replay`): without it a small model forgets within minutes.
`--context-length` extends the context, see `gpt.extend_context`.

Examples:
    python -m scripts.mid_train --corpus bbe --mix customjson:2 spellingbee:3000 arithmetic:3500
    torchrun --standalone --nproc_per_node 8 -m scripts.mid_train --context-length 8192
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import check_tokenizer, find, load_weights, read_meta
from nanochat.config import MidConfig, from_dict
from nanochat.conversation_store import conversations_store
from nanochat.dataloader import DataLoader, Source
from nanochat.dataset import open_corpus
from nanochat.engine import Engine, SamplingParams
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, extend_context
from nanochat.launch import launch
from nanochat.runtime import Runtime, seed_everything
from nanochat.stage import HeldOut, Stage, checkpoint_to_resume, set_up
from nanochat.token_store import LongDocuments
from nanochat.tokenizer import Tokenizer
from nanochat.train import due, take, train_step
from scripts.base_train import parse_shares, text_sources
from tasks.passkey import corpus_sentences
from tasks.registry import build_mixture
from tasks.spellingbee import words_path, write_words

QUESTIONS = ("Who are you?", "What is 17 + 25?", "Spell the word stone.")
"""What `--sample-every` lets the model answer."""


def task_sources(cfg: MidConfig, tokenizer: Tokenizer, split: str = "train") -> list[Source]:
    """The tasks of `--mix`, each with its weight; the split val is what is held out of them."""
    options: dict[str, Any] = {}
    if any(spec.split(":")[0] == "passkey" for spec in cfg.mix):
        sentences = corpus_sentences(replayed(cfg, tokenizer)[0].store, tokenizer)
        options = {"tokenizer": tokenizer, "sentences": sentences}
        if cfg.context_length is not None:
            options["length"] = cfg.context_length
    if not cfg.mix:
        return []
    mixture, held_out = build_mixture(cfg.mix, cfg.run.seed, **options)
    tasks = mixture.tasks if split == "train" else held_out
    sources = []
    for task, weight in zip(tasks, mixture.weights, strict=True):
        if task is None:
            continue
        try:
            store = conversations_store(task, tokenizer, system=cfg.system, bad_rows=cfg.bad_rows)
        except UserError:
            if split == "train" or cfg.bad_rows == "error":
                raise
            continue  # all of the few rows held out are bad
        sources.append(Source(store, weight, cfg.prompt_weight, task.name))
    return sources


def replayed(cfg: MidConfig, tokenizer: Tokenizer, split: str = "train") -> list[Source]:
    """The pretraining corpora of `--corpus`, in the proportion of their shares."""
    single = len(cfg.corpus) == 1
    shares = {cfg.corpus[0]: Fraction(1)} if single else parse_shares(cfg.corpus, "--corpus")
    return text_sources(shares, tokenizer, split)


def build_sources(cfg: MidConfig, tokenizer: Tokenizer, split: str = "train") -> list[Source]:
    """The tasks of `--mix`, and pretraining text as `--replay` of all targets.

    With `--context-length`, `--long-fraction` of all targets are of long documents alone.
    """
    sources = task_sources(cfg, tokenizer, split)
    if not 0 <= cfg.replay < 1:
        raise UserError(f"--replay {cfg.replay} must be at least 0 and below 1")
    replay = Fraction(str(cfg.replay))
    long = Fraction(str(cfg.long_fraction)) if cfg.context_length is not None else Fraction(0)
    if not 0 <= long < 1 - replay:
        raise UserError(
            f"--long-fraction {cfg.long_fraction} must be at least 0, and below 1 together with "
            f"--replay {cfg.replay}: the rest is for the tasks"
        )
    tasks = _targets(sources)
    for share, minimum in ((replay, 0), (long, cfg.context_length or 0)):
        if share and sources:
            texts = replayed(cfg, tokenizer, split)
            texts = long_documents(texts, minimum) if minimum else texts
            scale = share / (1 - replay - long) * tasks / _targets(texts)
            sources += [replace(text, weight=Fraction(text.weight) * scale) for text in texts]
    return sources


def long_documents(texts: Sequence[Source], minimum: int) -> list[Source]:
    """The texts' documents of at least `minimum` tokens; UserError where there are none at all."""
    views = [(text, LongDocuments(text.store, minimum)) for text in texts]
    found = [
        replace(text, store=view, name=f"{text.name} from {minimum} tokens")
        for text, view in views
        if len(view)
    ]
    if not found:
        longest = max(view.longest for _, view in views)
        raise UserError(
            f"no document of {', '.join(text.name for text in texts)} has {minimum} tokens, the "
            f"longest has {longest}; choose a --context-length up to that, a --corpus with longer "
            "documents, or --long-fraction 0"
        )
    return found


def _targets(sources: Sequence[Source]) -> Fraction:
    """Of an epoch."""
    return sum(
        (Fraction(str(s.weight)) * (s.store.num_tokens - len(s.store)) for s in sources),
        start=Fraction(0),
    )


def build_held_out(cfg: MidConfig, tokenizer: Tokenizer) -> HeldOut:
    """Pretraining text, for what it may cost, and conversations, for what is learned."""
    return HeldOut(replayed(cfg, tokenizer, "val"), task_sources(cfg, tokenizer, "val"))


def load_source(
    cfg: MidConfig, runtime: Runtime, tokenizer: Tokenizer
) -> tuple[GPT, dict[str, Any]]:
    """The model of the stage before, ready to train, and its metadata."""
    folder = find(cfg.source)
    meta = read_meta(folder)
    check_tokenizer(meta, tokenizer, folder)
    config = from_dict(GPTConfig, meta["model_config"], str(folder))
    if cfg.context_length is not None:
        config = extend_context(config, cfg.context_length, cfg.rope_scaling)
    with torch.device("meta"):
        model = GPT(config, runtime.dtype)
    model.to_empty(device=runtime.device)
    load_weights(folder, model)
    runtime.print(f"starting from {folder}")
    if meta["step"] < meta["num_steps"]:
        runtime.print(f"note: that run is not finished, it is to have {meta['num_steps']} steps")
    return model, meta


def resumed_model(
    cfg: MidConfig, runtime: Runtime, tokenizer: Tokenizer, folder: Path
) -> tuple[GPT, dict[str, Any]]:
    """The model of the run's own checkpoint, still without its weights, and its metadata.

    All that a run goes on from is in there: what it started from may be gone.
    """
    meta = read_meta(folder, verify=False)
    check_tokenizer(meta, tokenizer, folder)
    config = from_dict(GPTConfig, meta["model_config"], str(folder))
    if cfg.context_length not in (None, config.context_length):
        raise UserError(
            f"{folder} has a context of {config.context_length} tokens, --context-length is "
            f"{cfg.context_length}; resume with the same flags, or choose another --tag"
        )
    with torch.device("meta"):
        model = GPT(config, runtime.dtype)
    return model.to_empty(device=runtime.device), meta


def note_words(cfg: MidConfig) -> None:
    """Let the spelling tasks ask for words of the corpus, unless a word list is there already."""
    name = (
        next(iter(parse_shares(cfg.corpus, "--corpus"))) if len(cfg.corpus) > 1 else cfg.corpus[0]
    )
    if not words_path().is_file() and any("spelling" in spec for spec in cfg.mix):
        with suppress(UserError):  # too few words: those of the embedded corpus stand in
            write_words(open_corpus(name))


def prepare(name: str, cfg: MidConfig, runtime: Runtime) -> Stage[DataLoader]:
    """Everything before the loop, for mid-training and instruction tuning alike."""
    seed_everything(cfg.run.seed)
    tokenizer = Tokenizer.load()
    newest = checkpoint_to_resume(name, cfg)
    if newest:
        model, meta = resumed_model(cfg, runtime, tokenizer, newest)
        source = meta["source"]
    else:
        model, meta = load_source(cfg, runtime, tokenizer)
        source = {"stage": meta["stage"], "tag": meta["tag"], "step": meta["step"]}
    if runtime.is_main:
        note_words(cfg)
    sources, held_out = runtime.in_turns(
        lambda: (build_sources(cfg, tokenizer), build_held_out(cfg, tokenizer))
    )
    return set_up(
        name,
        cfg,
        runtime,
        model,
        tokenizer,
        sources,
        held_out,
        {"source": source},
    )


def sample_answers(cfg: MidConfig, stage: Stage[DataLoader]) -> None:
    """Print and log the beginnings of answers to `QUESTIONS`, where they fit into the context."""
    context, prompts = stage.model.config.context_length, {}
    for question in QUESTIONS:
        conversation = {"messages": [{"role": "user", "content": question}]}
        ids = stage.tokenizer.render_for_completion(conversation, cfg.system)
        if len(ids) < context:
            prompts[question] = ids
    if not prompts:
        return
    room = context - max(map(len, prompts.values()))
    params = SamplingParams(temperature=0.8, top_k=50, max_tokens=min(48, room), seed=cfg.run.seed)
    answers = Engine(stage.model, stage.tokenizer).generate(list(prompts.values()), params)
    for question, (answer,) in zip(prompts, answers, strict=True):
        stage.log.sample(stage.state.step, question, "\n" + answer.text)


def main(cfg: MidConfig, runtime: Runtime) -> Stage[DataLoader]:
    stage = prepare("mid", cfg, runtime)
    if stage.finished:
        return stage
    plan, first = stage.plan, stage.state.step
    for step in range(first, plan.num_steps + 1):
        last = step == plan.num_steps
        if step == 0 or due(step, cfg.evaluating.eval_every, last):
            stage.evaluate()
        if step > first and runtime.is_main and due(step, cfg.evaluating.sample_every, last):
            sample_answers(cfg, stage)
        if step > first and (due(step, cfg.saving.save_every, last) or runtime.stop_requested):
            stage.save()
        if last or runtime.stop_requested:
            break
        batches, hypers = take(stage.loader, plan.micro_batches), plan.hypers(step)
        stats = train_step(
            stage.model, stage.optimizer, batches, hypers, runtime, stage.loss_scale, step=step + 1
        )
        stage.record(stats)
    stage.close()
    return stage


if __name__ == "__main__":
    launch(main, MidConfig, __doc__)
