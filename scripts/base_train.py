"""Pretrain a base model on text.

The corpus must be encoded first (scripts.tok_encode). scripts.plan takes the same flags and shows
the steps, the memory and the time of a run.

Examples:
    python -m scripts.base_train --depth 4 --context-length 256 --corpus bbe --num-steps 400
    torchrun --standalone --nproc_per_node 8 -m scripts.base_train --depth 20
"""

from dataclasses import replace

from nanochat.checkpoint_manager import saved_config
from nanochat.cli import launch
from nanochat.config import BaseConfig
from nanochat.data.loader import training_loader
from nanochat.data.sources import HeldOut, describe_mixture, pretraining_sources
from nanochat.eval.losses import evaluate_held_out
from nanochat.gpt import GPT
from nanochat.infer.samples import sample_texts
from nanochat.plan import context_schedule, make_plan, model_config
from nanochat.runtime import Runtime, seed_everything
from nanochat.stage import OpenRun, Stage, open_run
from nanochat.tokenizer import Tokenizer
from nanochat.train import train_step


def main(cfg: BaseConfig, runtime: Runtime) -> Stage | OpenRun:
    """Returns the stage, or the open run if nothing is left to do."""
    seed_everything(cfg.run.seed)
    with open_run("base", cfg, runtime) as run:
        if run.finished:
            return run
        tokenizer = Tokenizer.named(cfg.tokenizer)
        config = model_config(cfg, tokenizer.vocab_size)
        if run.meta is not None:  # a run of an older version goes on without what it lacked
            saved = saved_config(run.meta, "meta.json")
            config = replace(
                config, token_shift=saved.token_shift, spelling_bytes=saved.spelling_bytes
            )
        model = GPT(config, runtime.dtype).init_weights(cfg.run.seed, tokenizer.ranks)
        model.to(runtime.device)

        sources = pretraining_sources(cfg, tokenizer)
        held_out = HeldOut(pretraining_sources(cfg, tokenizer, "val"))
        loader = training_loader(sources, cfg, config.context_length, runtime)
        plan = make_plan(
            config,
            batching=run.batching(config.context_length),
            duration=cfg.duration,
            learning=cfg.learning,
            machine=runtime.machine(),
            rows_in_epochs=loader.num_rows,
            schedule=context_schedule(cfg),
        )
        if len(sources) > 1:
            runtime.print(describe_mixture(sources, plan.tokens))
        stage = Stage(run, model, tokenizer, plan)  # restored from the newest checkpoint, if any
        loader.resume(plan.phase(max(0, stage.first_step - 1)), run.loader_state)

        for step in range(stage.first_step, plan.num_steps + 1):
            phase = plan.phase(max(0, step - 1))  # rows as in the step before
            if stage.save_due(step, cfg.saving.save_every):
                stage.save(loader.state_dict(), loader.consumed)
            if runtime.stop_requested:
                break
            if stage.evaluation_due(step, cfg.evaluating.eval_every):
                metrics = evaluate_held_out(
                    model, tokenizer, held_out, cfg.evaluating.eval_tokens, phase, runtime
                )
                stage.log_evaluation(metrics)
            if stage.samples_due(step, cfg.evaluating.sample_every):
                stage.show(lambda: sample_texts(model, tokenizer, seed=cfg.run.seed))
            if step == plan.num_steps:
                break
            phase = plan.phase(step)
            loader.set_rows(phase.sequence_length, phase.device_batch_size)
            batches = loader.step_batches(plan.rows_at(step), plan.micro_batches)
            stats = train_step(
                model, stage.optimizer, batches, plan.hypers(step), runtime, stage.loss_scale,
                step=step + 1, tokens=plan.total_batch_size,
            )  # fmt: skip
            stage.record(stats)
        stage.close(loader.consumed)
        return stage


if __name__ == "__main__":
    launch(main, BaseConfig, __doc__)
