"""Mid-train a base model on conversations and tasks.

Every token is trained (`--prompt-weight 1`), in conversation format, while a share of the
pretraining text is replayed (`--replay`): without it a small model forgets within minutes.
`--context-length` extends the context, see `gpt.extend_context`.

Examples:
    python -m scripts.mid_train --corpus bbe --mix customjson:2 spellingbee:3000 arithmetic:3500
    torchrun --standalone --nproc_per_node 8 -m scripts.mid_train --context-length 8192
"""

from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import check_tokenizer, find, load_weights, read_meta, tokenizer_of
from nanochat.cli import launch
from nanochat.config import MidConfig, from_dict
from nanochat.data.loader import DataLoader
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, extend_context
from nanochat.infer.engine import Engine, SamplingParams
from nanochat.runtime import Runtime, seed_everything
from nanochat.stage import Stage, checkpoint_to_resume, set_up
from nanochat.tokenizer import Tokenizer
from nanochat.train import due, take, train_step
from tasks.sources import build_held_out, build_sources, note_words

QUESTIONS = ("Who are you?", "What is 17 + 25?", "Spell the word stone.")
"""What `--sample-every` lets the model answer."""


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


def prepare(name: str, cfg: MidConfig, runtime: Runtime) -> Stage[DataLoader]:
    """Everything before the loop, for mid-training and instruction tuning alike."""
    seed_everything(cfg.run.seed)
    newest = checkpoint_to_resume(name, cfg)
    origin = newest or find(cfg.source)
    tokenizer = tokenizer_of(read_meta(origin, verify=False), origin)
    if newest:
        model, meta = resumed_model(cfg, runtime, tokenizer, newest)
        source = meta["source"]
    else:
        model, meta = load_source(cfg, runtime, tokenizer)
        source = {"stage": meta["stage"], "tag": meta["tag"], "step": meta["step"]}
    if runtime.is_main:
        note_words(cfg)
    T = model.config.context_length
    sources, held_out = runtime.in_turns(
        lambda: (build_sources(cfg, tokenizer, T), build_held_out(cfg, tokenizer, T))
    )
    for note in (source.note for source in sources if source.note):
        runtime.print(note)
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
