"""Instruction-tune a mid-trained model.

The conversations may be those of mid-training. Only the assistant's tokens are trained
(`--prompt-weight 0`), and the learning rate falls to zero over the whole run.

Examples:
    python -m scripts.chat_sft --corpus bbe --mix customjson:2 arithmetic:1000
    torchrun --standalone --nproc_per_node 8 -m scripts.chat_sft
"""

from nanochat.cli import launch
from nanochat.config import SftConfig
from nanochat.data.loader import training_loader
from nanochat.data.sources import describe_mixture
from nanochat.eval.losses import evaluate_held_out
from nanochat.infer.samples import sample_answers
from nanochat.plan import make_plan
from nanochat.runtime import Runtime, seed_everything
from nanochat.stage import OpenRun, Stage, open_model, open_run
from nanochat.train import train_step
from tasks.sources import chat_sources


def main(cfg: SftConfig, runtime: Runtime) -> Stage | OpenRun:
    """Returns the stage, or the open run if nothing is left to do."""
    seed_everything(cfg.run.seed)
    with open_run("sft", cfg, runtime) as run:
        if run.finished:
            return run
        run, model, tokenizer = open_model(run)  # of the run, or of --source

        T = model.config.context_length
        sources, held_out = runtime.in_turns(lambda: chat_sources(cfg, tokenizer, T, runtime))
        loader = training_loader(sources, cfg, T, runtime)
        plan = make_plan(
            model.config,
            batching=run.batching(T),
            duration=cfg.duration,
            learning=cfg.learning,
            machine=runtime.machine(),
            rows_in_epochs=loader.num_rows,
        )
        if len(sources) > 1:
            runtime.print(describe_mixture(sources, plan.tokens))
        stage = Stage(run, model, tokenizer, plan)  # restored if it is resumed
        rows = plan.phase(0)
        loader.resume(rows, run.loader_state)

        for step in range(stage.first_step, plan.num_steps + 1):
            if stage.save_due(step, cfg.saving.save_every):
                stage.save(loader.state_dict(), loader.consumed)
            if runtime.stop_requested:
                break
            if stage.evaluation_due(step, cfg.evaluating.eval_every):
                metrics = evaluate_held_out(
                    model, tokenizer, held_out, cfg.evaluating.eval_tokens, rows, runtime
                )
                stage.log_evaluation(metrics)
            if stage.samples_due(step, cfg.evaluating.sample_every):
                stage.show(lambda: sample_answers(model, tokenizer, cfg.system, cfg.run.seed))
            if step == plan.num_steps:
                break
            batches = loader.step_batches(plan.rows_per_step, plan.micro_batches)
            stats = train_step(
                model, stage.optimizer, batches, plan.hypers(step), runtime, stage.loss_scale,
                step=step + 1, tokens=plan.total_batch_size,
            )  # fmt: skip
            stage.record(stats)
        stage.close(loader.consumed)
        return stage


if __name__ == "__main__":
    launch(main, SftConfig, __doc__)
