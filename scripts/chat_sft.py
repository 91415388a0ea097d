"""Instruction-tune a mid-trained model.

The same conversations as in mid-training, or others, but only what the assistant says is trained
(`--prompt-weight 0`), and the learning rate falls to zero over the whole run.

Examples:
    python -m scripts.chat_sft --corpus bbe --mix customjson:2 arithmetic:1000
    torchrun --standalone --nproc_per_node 8 -m scripts.chat_sft
"""

from nanochat.cli import launch
from nanochat.config import SftConfig
from nanochat.data.loader import DataLoader
from nanochat.runtime import Runtime
from nanochat.stage import Stage
from nanochat.train import due, take, train_step
from scripts.mid_train import prepare, sample_answers


def main(cfg: SftConfig, runtime: Runtime) -> Stage[DataLoader]:
    stage = prepare("sft", cfg, runtime)
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
    launch(main, SftConfig, __doc__)
