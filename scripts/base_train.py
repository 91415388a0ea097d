"""Pretrain a base model on text: `python -m scripts.base_train --depth 4 --corpus bbe`.

Needs the encoded corpus (scripts.tok_encode). On several GPUs:
`torchrun --nproc_per_node 8 -m scripts.base_train --depth 20`.
"""

import math

from nanochat.config import BaseConfig
from nanochat.dataloader import Source
from nanochat.dataset import open_corpus
from nanochat.engine import Engine, SamplingParams
from nanochat.errors import UserError
from nanochat.gpt import GPT, config_from_depth
from nanochat.launch import launch
from nanochat.runtime import Runtime, seed_everything
from nanochat.stage import Stage, set_up
from nanochat.token_store import TokenStore
from nanochat.tokenizer import Tokenizer
from nanochat.train import due, take, train_step

PROMPTS = ("In the beginning", "The king said to his men,", "And it came about that", "")


def open_store(corpus: str, split: str, tokenizer: Tokenizer) -> TokenStore:
    """The encoded split of a corpus."""
    folder = open_corpus(corpus).store_folder(split)  # type: ignore[arg-type]
    if not folder.is_dir():
        raise UserError(
            f"{corpus} is not encoded: {folder} is missing; "
            f"run python -m scripts.tok_encode --corpus {corpus}"
        )
    return TokenStore.open(folder, tokenizer.hash)


def build_sources(cfg: BaseConfig, tokenizer: Tokenizer, split: str = "train") -> list[Source]:
    """The corpus, or a mixture of corpora by weight (tokens in those proportions)."""
    if not cfg.mix:
        return [Source(open_store(cfg.corpus, split, tokenizer), name=cfg.corpus)]
    names, shares = zip(*(parse_share(part) for part in cfg.mix), strict=True)
    stores = [open_store(name, split, tokenizer) for name in names]
    # Shares are of tokens; a source's weight is passes over it, the first source sets the scale.
    unit = stores[0].num_tokens / shares[0]
    return [
        Source(store, weight=round(share * unit / store.num_tokens, 6), name=name)
        for store, share, name in zip(stores, shares, names, strict=True)
    ]


def parse_share(part: str) -> tuple[str, float]:
    """`climbmix:0.9` -> ("climbmix", 0.9)."""
    name, _, share = part.rpartition(":")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not name or not 0 < value < math.inf:
        raise UserError(f"--mix {part}: write a corpus and its share above 0, like climbmix:0.9")
    return name, value


def sample_texts(
    model: GPT, tokenizer: Tokenizer, temperature: float, seed: int = 0
) -> list[tuple[str, str]]:
    """(beginning, continuation) of a few texts."""
    engine = Engine(model, tokenizer)
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in PROMPTS]
    room = model.config.context_length - max(len(prompt) for prompt in prompts)
    params = SamplingParams(
        temperature=temperature, top_k=50, max_tokens=max(1, min(48, room)), seed=seed
    )
    answers = engine.generate(prompts, params)
    return [(text, samples[0].text) for text, samples in zip(PROMPTS, answers, strict=True)]


def main(cfg: BaseConfig, runtime: Runtime) -> Stage:
    seed_everything(cfg.run.seed)
    tokenizer = Tokenizer.load()
    config = config_from_depth(
        cfg.depth,
        tokenizer.vocab_size,
        aspect_ratio=cfg.aspect_ratio,
        head_dim=cfg.head_dim,
        kv_heads=cfg.kv_heads,
        context_length=cfg.context_length,
        window_pattern=cfg.window_pattern,
        portable=cfg.portable,
    )
    model = GPT(config, runtime.dtype).init_weights(cfg.run.seed).to(runtime.device)
    stage = set_up(
        "base",
        cfg,
        runtime,
        model,
        tokenizer,
        build_sources(cfg, tokenizer),
        {"bpb": build_sources(cfg, tokenizer, "val")},
    )
    if stage.finished:
        return stage
    plan, first = stage.plan, stage.state.step
    for step in range(first, plan.num_steps + 1):
        last = step == plan.num_steps
        if step == first or due(step, cfg.evaluating.eval_every, last):
            stage.evaluate()
        if step > first and runtime.is_main and due(step, cfg.evaluating.sample_every, last):
            for prompt, text in sample_texts(model, tokenizer, 0.8, cfg.run.seed):
                stage.log.sample(step, prompt, text)
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
    launch(main, BaseConfig, __doc__)
