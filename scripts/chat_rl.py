"""Reinforce a chat model on tasks with rewards.

Every step samples `--group-size` answers to each of `--prompts-per-step` prompts; the model may
call the calculator. Answers with more reward than the others to the same prompt become more likely
(nanochat/rl/rollouts.py has the algorithm). Problems held out from the tasks' train split are
answered from time to time; the test split is for `scripts.chat_eval --source rl`.

With `--algo dpo` the model learns from pairs of a better and a worse answer instead
(nanochat/rl/dpo.py).

Examples:
    python -m scripts.chat_rl --mix arithmetic --num-steps 50
    torchrun --standalone --nproc_per_node 8 -m scripts.chat_rl --mix gsm8k
    python -m scripts.chat_rl --algo dpo --pairs pairs.jsonl
"""

from dataclasses import replace
from functools import partial

from nanochat.cli import launch
from nanochat.config import RlConfig
from nanochat.errors import UserError
from nanochat.rl.dpo import PreferencePairs
from nanochat.rl.policy import PolicyGradient, in_rounds
from nanochat.rl.rollouts import checked_reward
from nanochat.rl.start import check_config, load_start, plan_rollouts
from nanochat.runtime import Runtime, seed_everything
from nanochat.stage import OpenRun, Stage, open_run
from nanochat.tokenizer import Tokenizer
from tasks.common import Task
from tasks.registry import build_mixture, corpus_options
from tasks.views import TaskMixture, TaskSlice


def main(cfg: RlConfig, runtime: Runtime) -> Stage | OpenRun:
    """Returns the stage, or the open run if nothing is left to do."""
    seed_everything(cfg.run.seed)
    with open_run("rl", cfg, runtime) as run:
        check_config(cfg)
        if run.finished:
            return run
        start = load_start(run, cfg)  # the model that training starts from
        cfg = replace(cfg, system=start.system)
        run = replace(run, cfg=cfg, source=start.meta)
        method: PolicyGradient | PreferencePairs
        if cfg.algo == "dpo":
            method = PreferencePairs(cfg, start, runtime)
        else:
            mixture, held_out = runtime.in_turns(partial(open_tasks, cfg, start.tokenizer))
            method = PolicyGradient(cfg, start, mixture.order, mixture.tasks, held_out, runtime)
        model, stream, updates = start.model, method.stream, method.updates
        plan = plan_rollouts(cfg, model.config, method.num_steps, method.what, runtime)
        stage = Stage(run, model, start.tokenizer, plan)
        if run.loader_state:
            stream.load_state_dict(run.loader_state)

        for step in range(stage.first_step, plan.num_steps + 1, updates):
            if stage.save_due(step, in_rounds(cfg.saving.save_every, updates)):
                stage.save(stream.state_dict(), stream.consumed)
            if runtime.stop_requested:
                break
            if stage.evaluation_due(step, in_rounds(cfg.evaluating.eval_every, updates)):
                stage.log_evaluation(method.evaluate(stage))
            if step == plan.num_steps:
                break
            for stats, more in method.learn(stage):  # a rollout has one optimizer step or several
                stage.record(stats, more)
        stage.close(stream.consumed)
        return stage


def open_tasks(cfg: RlConfig, tokenizer: Tokenizer) -> tuple[TaskMixture, list[Task]]:
    """Open the tasks to train on, and the held-out part of each; all must have rewards."""
    if not cfg.mix:
        raise UserError("--mix names no task")
    mixture, halves = build_mixture(cfg.mix, cfg.run.seed, **corpus_options(cfg.mix, tokenizer))
    held_out: list[Task] = []
    for train, held in zip(mixture.tasks, halves, strict=True):
        checked_reward(train.reward(train[0], ""), train.where(0))  # a task may have no rewards
        if held is None:
            raise UserError(f"{train.name} has only {len(train)} rows, too few to hold any out")
        count = max(1, cfg.evaluating.eval_problems // len(cfg.mix))
        if train.VAL_BY_CONTENT and isinstance(held, TaskSlice) and held.split == "val":
            held = held.task  # a generated task has any size
        count = min(count, len(held))
        step = len(held) // count
        held_out.append(TaskSlice(held, 0, step * count, step))
    return mixture, held_out


if __name__ == "__main__":
    launch(main, RlConfig, __doc__)
