"""Pretrain a base model on text.

Needs the encoded corpus (scripts.tok_encode). scripts.plan shows with the same flags what a run
will do, and take.

Examples:
    python -m scripts.base_train --depth 4 --context-length 256 --corpus bbe --num-steps 400
    torchrun --standalone --nproc_per_node 8 -m scripts.base_train --depth 20
"""

from fractions import Fraction

from nanochat.cli import launch
from nanochat.config import BaseConfig
from nanochat.data.loader import DataLoader
from nanochat.data.sources import HeldOut, Source, parse_shares, text_sources
from nanochat.gpt import GPT
from nanochat.infer.engine import Engine, SamplingParams
from nanochat.plan import model_config
from nanochat.runtime import Runtime, seed_everything
from nanochat.stage import Stage, set_up
from nanochat.tokenizer import Tokenizer
from nanochat.train import due, take, train_step

PROMPTS = ("In the beginning", "The king said to his men,", "And it came about that", "")


def build_sources(cfg: BaseConfig, tokenizer: Tokenizer, split: str = "train") -> list[Source]:
    """The corpus, or the mixture of corpora."""
    shares = parse_shares(cfg.mix, "--mix") if cfg.mix else {cfg.corpus: Fraction(1)}
    return text_sources(shares, tokenizer, split)


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


def main(cfg: BaseConfig, runtime: Runtime) -> Stage[DataLoader]:
    seed_everything(cfg.run.seed)
    tokenizer = Tokenizer.named(cfg.tokenizer)
    config = model_config(cfg, tokenizer.vocab_size)
    model = GPT(config, runtime.dtype).init_weights(cfg.run.seed).to(runtime.device)
    stage = set_up(
        "base",
        cfg,
        runtime,
        model,
        tokenizer,
        build_sources(cfg, tokenizer),
        HeldOut(build_sources(cfg, tokenizer, "val")),
    )
    if stage.finished:
        return stage
    plan, first = stage.plan, stage.state.step
    for step in range(first, plan.num_steps + 1):
        last = step == plan.num_steps
        if step == 0 or due(step, cfg.evaluating.eval_every, last):
            stage.evaluate()
        if step > first and runtime.is_main and due(step, cfg.evaluating.sample_every, last):
            for prompt, text in sample_texts(model, tokenizer, 0.8, cfg.run.seed):
                stage.log.sample(step, prompt, text)
        if step > first and (due(step, cfg.saving.save_every, last) or runtime.stop_requested):
            stage.save()
        if last or runtime.stop_requested:
            break
        phase = plan.phase(step)
        stage.loader.set_rows(phase.sequence_length, phase.device_batch_size)
        batches, hypers = take(stage.loader, plan.micro_batches), plan.hypers(step)
        stats = train_step(
            stage.model, stage.optimizer, batches, hypers, runtime, stage.loss_scale, step=step + 1
        )
        stage.record(stats)
    stage.close()
    return stage


if __name__ == "__main__":
    launch(main, BaseConfig, __doc__)
