"""Mid-train a base model on conversations and tasks: `python -m scripts.mid_train`.

Every token is trained (`--prompt-weight 1`), in conversation format, while a share of the
pretraining text is replayed (`--replay`): without it a small model forgets within minutes.
"""

from typing import Any

import torch

from nanochat.checkpoint_manager import check_tokenizer, find, load_weights, read_meta
from nanochat.config import MidConfig, from_dict
from nanochat.dataloader import Source
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.launch import launch
from nanochat.runtime import Runtime, seed_everything
from nanochat.stage import Stage, set_up
from nanochat.token_store import conversations_store
from nanochat.tokenizer import Tokenizer
from nanochat.train import due, take, train_step
from scripts.base_train import open_store
from tasks.registry import build_mixture


def build_sources(cfg: MidConfig, tokenizer: Tokenizer, split: str = "train") -> list[Source]:
    """The tasks of `--mix`, each with its weight, and the replayed share of pretraining text."""
    mixture = build_mixture(cfg.mix, split, seed=cfg.run.seed)
    sources = [
        Source(
            conversations_store(task, tokenizer, system=cfg.system, bad_rows=cfg.bad_rows),
            weight=weight,
            prompt_weight=cfg.prompt_weight,
            name=task.name,
        )
        for task, weight in zip(mixture.tasks, mixture.weights, strict=True)
    ]
    if not 0 <= cfg.replay < 1:
        raise UserError(f"--replay {cfg.replay} must be at least 0 and below 1")
    if cfg.replay:
        text = open_store(cfg.corpus, split, tokenizer)
        tokens = sum(float(source.weight) * source.store.num_tokens for source in sources)
        passes = tokens * cfg.replay / (1 - cfg.replay) / text.num_tokens
        sources.append(Source(text, weight=f"{max(passes, 1e-4):.4f}", name=cfg.corpus))
    return sources


def build_validation(cfg: MidConfig, tokenizer: Tokenizer) -> dict[str, list[Source]]:
    """Bits per byte of the pretraining corpus: what mid-training may cost."""
    return {"bpb": [Source(open_store(cfg.corpus, "val", tokenizer), name=cfg.corpus)]}


def load_source(
    cfg: MidConfig, runtime: Runtime, tokenizer: Tokenizer
) -> tuple[GPT, dict[str, Any]]:
    """The model of the stage before, ready to train, and its metadata."""
    folder = find(cfg.source)
    meta = read_meta(folder)
    check_tokenizer(meta, tokenizer, folder)
    config = from_dict(GPTConfig, meta["model_config"], str(folder))
    with torch.device("meta"):
        model = GPT(config, runtime.dtype)
    model.to_empty(device=runtime.device)
    load_weights(folder, model)
    runtime.print(f"starting from {folder}")
    return model, meta


def prepare(name: str, cfg: MidConfig, runtime: Runtime) -> Stage:
    """Everything before the loop, for mid-training and instruction tuning alike."""
    seed_everything(cfg.run.seed)
    tokenizer = Tokenizer.load()
    model, meta = load_source(cfg, runtime, tokenizer)
    # Rank 0 of each machine builds the stores, the others then find them.
    if runtime.local_rank == 0:
        build_sources(cfg, tokenizer)
    runtime.barrier()
    return set_up(
        name,
        cfg,
        runtime,
        model,
        tokenizer,
        build_sources(cfg, tokenizer),
        build_validation(cfg, tokenizer),
        {"source": {"stage": meta["stage"], "tag": meta["tag"], "step": meta["step"]}},
    )


def main(cfg: MidConfig, runtime: Runtime) -> Stage:
    stage = prepare("mid", cfg, runtime)
    if stage.finished:
        return stage
    plan, first = stage.plan, stage.state.step
    for step in range(first, plan.num_steps + 1):
        last = step == plan.num_steps
        if step == first or due(step, cfg.evaluating.eval_every, last):
            stage.evaluate()
        if step > first and (due(step, cfg.saving.save_every, last) or runtime.stop_requested):
            stage.save()
        if last or runtime.stop_requested:
            break
        batches, hypers = take(stage.loader, plan.micro_batches), plan.hypers(step)
        stage.record(
            train_step(stage.model, stage.optimizer, batches, hypers, runtime, stage.loss_scale)
        )
    stage.close()
    return stage


if __name__ == "__main__":
    launch(main, MidConfig, __doc__)
