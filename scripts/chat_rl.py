"""Reinforce a chat model on tasks with rewards.

Every step samples `--group-size` answers to each of `--prompts-per-step` prompts, calculator calls
included, and makes those likelier that got more reward than the others to the same prompt
(nanochat/rl/rollouts.py has the algorithm). What is held out of the tasks' train split is answered
on the way; the test split is for `scripts.chat_eval --source rl`.

With `--algo dpo` it learns from pairs of a better and a worse answer instead
(nanochat/rl/dpo.py).

Examples:
    python -m scripts.chat_rl --mix arithmetic --num-steps 50
    torchrun --standalone --nproc_per_node 8 -m scripts.chat_rl --mix gsm8k
    python -m scripts.chat_rl --algo dpo --pairs pairs.jsonl
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanochat.cli import launch
from nanochat.config import RlConfig
from nanochat.conversation import parts
from nanochat.data.order import MixtureOrder
from nanochat.errors import UserError
from nanochat.infer.engine import Completion, Engine, SamplingParams
from nanochat.rl.dpo import evaluate_pairs, learn_preferences, open_pairs, with_reference
from nanochat.rl.rollouts import (
    Group,
    Judge,
    Prompt,
    RowStream,
    Verdict,
    agree_to_stop,
    as_sample,
    check_sampling,
    checked_reward,
    describe_tally,
    roll_out,
    sum_over_ranks,
    tally,
)
from nanochat.rl.rows import Rows, mean_kl, pack_samples, policy_batches
from nanochat.rl.start import Start, check_config, is_compiled, load_start, model_of, open_stage
from nanochat.runtime import Runtime, seed_everything
from nanochat.stage import Stage
from nanochat.tokenizer import SystemStyle
from nanochat.train import StepStats, due, train_step
from tasks.common import Conversation, Task, pass_at_k
from tasks.registry import build_mixture
from tasks.views import TaskMixture, TaskSlice

EVALUATION_SEED = 2**32
"""Added to the run's seed: what is drawn to evaluate is drawn from streams of its own."""


def main(cfg: RlConfig, runtime: Runtime) -> Stage[RowStream]:
    check_config(cfg)
    seed_everything(cfg.run.seed)
    start = load_start(cfg, runtime)
    cfg = replace(cfg, system=start.system)
    return learn_pairs(cfg, runtime, start) if cfg.algo == "dpo" else reinforce(cfg, runtime, start)


def every_rounds(steps: int, updates: int) -> int:
    """`steps` optimizer steps in whole rollouts, at least one; 0 stays 0."""
    return -(-steps // updates)


# Policy gradient


def reinforce(cfg: RlConfig, runtime: Runtime, start: Start) -> Stage[RowStream]:
    mixture, held_out = open_tasks(cfg)
    stream = RowStream(mixture.order, [task.name for task in mixture.tasks])
    updates, prompts = cfg.rollouts.updates_per_rollout, cfg.rollouts.prompts_per_step
    available = sum(stream.order.epoch_length(epoch) for epoch in range(cfg.epochs))
    num_steps = cfg.num_steps or max(1, available // prompts) * updates
    size = cfg.rollouts.group_size
    what = f"{prompts} prompts x {size} answers" + (f" / {updates} updates" if updates > 1 else "")
    stage = open_stage(cfg, runtime, start, stream, num_steps, prompts * size, what)
    if stage.finished:
        return stage
    sampler = Sampler(cfg, stage, mixture.tasks, held_out, start)
    first, rounds = stage.state.step // updates, num_steps // updates
    for number in range(first, rounds + 1):
        last = number == rounds
        if number == first or due(number, every_rounds(cfg.evaluating.eval_every, updates), last):
            sampler.evaluate()
        save = due(number, every_rounds(cfg.saving.save_every, updates), last)
        if number > first and (save or runtime.stop_requested):
            stage.save()
        if last or runtime.stop_requested:
            break
        rollout = sampler.roll_out()
        every = every_rounds(cfg.evaluating.sample_every, updates)
        if due(number, every, number == rounds - 1):
            sampler.show(rollout)
        for update in range(updates):
            stage.record(*learn(cfg, stage, rollout, update))
    stage.close()
    return stage


def open_tasks(cfg: RlConfig) -> tuple[TaskMixture, list[Task]]:
    """What to train on, and what is held out of each task; all of it has rewards."""
    if not cfg.mix:
        raise UserError("--mix names no task")
    mixture, halves = build_mixture(cfg.mix, cfg.run.seed)
    held_out: list[Task] = []
    for train, held in zip(mixture.tasks, halves, strict=True):
        check_rewards(train)
        if held is None:
            raise UserError(f"{train.name} has only {len(train)} rows, too few to hold any out")
        count = max(1, cfg.evaluating.eval_problems // len(cfg.mix))
        if train.VAL_BY_CONTENT and isinstance(held, TaskSlice) and held.split == "val":
            held = held.task  # it can be had in any size
        count = min(count, len(held))
        step = len(held) // count
        held_out.append(TaskSlice(held, 0, step * count, step))
    return mixture, held_out


def check_rewards(task: Task) -> None:
    """UserError for a task without rewards, before anything is computed."""
    checked_reward(task.reward(task[0], ""), task.where(0))


@dataclass(frozen=True)
class Rollout:
    """What a step learns from: this rank's part, and facts about the whole."""

    groups: list[Group]
    rows: list[Rows]
    advantages: torch.Tensor
    """(S,) of the samples in `rows`."""
    targets: int
    """Sampled tokens with an advantage, over all ranks."""
    divisor: int
    """N: sampled tokens of all finished answers, over all ranks."""
    tokens: int
    """Input positions, over all ranks."""
    seconds: float
    metrics: dict[str, float]


class Sampler:
    """Draws answers from the model of a stage, for training and to evaluate it."""

    def __init__(
        self,
        cfg: RlConfig,
        stage: Stage[RowStream],
        tasks: Sequence[Task],
        held_out: Sequence[Task],
        start: Start,
    ):
        self.cfg, self.stage, self.tasks, self.start = cfg, stage, tasks, start
        self.runtime, self.model = stage.runtime, stage.model
        rollouts = cfg.rollouts
        self.engine = Engine(stage.model, stage.tokenizer, max_slots=rollouts.max_slots)
        self.params = SamplingParams(
            temperature=rollouts.temperature, max_tokens=rollouts.max_tokens, seed=cfg.run.seed
        )
        check_sampling(self.params)
        # As in chat_eval, a prompt must leave the answer a quarter of the context.
        context = stage.model.config.context_length
        self.longest_prompt = context - min(rollouts.max_tokens, max(1, context // 4))
        self.problems = self._problems(held_out)

    def _prompt(self, number: int, source: int, conversation: Conversation) -> Prompt | None:
        """None where it is too long."""
        system: SystemStyle = self.start.system
        ids = self.stage.tokenizer.render_for_completion(conversation, system)
        if len(ids) > self.longest_prompt:
            return None
        return Prompt(number, source, ids, conversation)

    def _problems(self, held_out: Sequence[Task]) -> list[Prompt]:
        """What is held out; each problem's number is its place."""
        problems: list[Prompt] = []
        for source, task in enumerate(held_out):
            for row in range(len(task)):
                prompt = self._prompt(len(problems), source, task[row])
                if prompt is not None:
                    problems.append(prompt)
        if not problems:
            raise UserError(
                f"no held-out prompt has at most {self.longest_prompt} tokens, which leave room "
                f"for an answer in the context of {self.model.config.context_length}; "
                "choose other tasks or a smaller --max-tokens"
            )
        return problems

    def _next_prompts(self) -> tuple[list[Prompt], int]:
        """The prompts of a step, the same on every rank, and how many were too long for it."""
        prompts: list[Prompt] = []
        too_long = 0
        while len(prompts) < self.cfg.rollouts.prompts_per_step:
            number, source, row = next(self.stage.loader)
            prompt = self._prompt(number, source, self.tasks[source][row])
            if prompt is not None:
                prompts.append(prompt)
                continue
            too_long += 1
            if too_long > sum(len(task) for task in self.tasks):
                raise UserError(
                    f"no prompt has at most {self.longest_prompt} tokens, which leave room for an "
                    "answer in the context; choose other tasks or a smaller --max-tokens"
                )
        return prompts, too_long

    def judge(self, bonus: float) -> Judge:
        def judge(prompt: Prompt, completion: Completion) -> Verdict:
            task, text = self.tasks[prompt.source], completion.text
            reward = task.reward(prompt.conversation, text)
            formed = bonus > 0 and task.well_formed(prompt.conversation, text)
            where = f"{task.name}/{task.split}, answer {text[:40]!r}"
            return Verdict(checked_reward(reward, where), bonus if formed else 0.0)

        return judge

    def roll_out(self) -> Rollout:
        """Sample the next step's groups, each rank its share, and prepare them for learning."""
        began = time.perf_counter()
        runtime, rollouts = self.runtime, self.cfg.rollouts
        prompts, too_long = self._next_prompts()
        mine = prompts[runtime.rank :: runtime.world_size]
        self.model.eval()
        groups = roll_out(
            self.engine, mine, self.params, rollouts.group_size, self.judge(rollouts.format_bonus)
        )
        self.model.train()
        kept = [
            (as_sample(group.prompt, completion), advantage)
            for group in groups
            for completion, advantage in zip(group.completions, group.advantages, strict=True)
            if advantage
        ]
        rows = pack_samples(
            [sample for sample, _ in kept],
            self.model.config.context_length,
            self.stage.plan.device_batch_size,
            runtime.device,
            fill_up=is_compiled(self.cfg, runtime),
        )
        sums = tally(groups)
        sums["targets"] = sum(sum(sample.mask) for sample, _ in kept)
        sums["tokens"] = sum(r.tokens for r in rows)
        for source in range(len(self.tasks)):
            sums[f"tokens of {source}"] = sum(
                sum(completion.mask)
                for group in groups
                if group.prompt.source == source
                for completion in group.completions
            )
        sums = sum_over_ranks(sums, runtime)
        for source in range(len(self.tasks)):
            documents = sum(prompt.source == source for prompt in prompts)
            self.stage.loader.count(source, documents, int(sums[f"tokens of {source}"]))
        runtime.synchronize()
        seconds = time.perf_counter() - began
        metrics = {
            **describe_tally(sums),
            "kept_groups": sums["kept_groups"] / sums["groups"],
            "rollout_tokens_per_second": sums["length"] / seconds,
            "rollout_seconds": seconds,
        }
        if too_long:
            metrics["prompts_too_long"] = too_long
        return Rollout(
            groups,
            rows,
            torch.tensor([advantage for _, advantage in kept], device=runtime.device),
            int(sums["targets"]),
            int(sums["trainable_tokens"]),
            int(sums["tokens"]),
            seconds,
            metrics,
        )

    def show(self, rollout: Rollout, num_prompts: int = 2, num_answers: int = 3) -> None:
        """Print and log a few answers with their rewards, of groups that teach if there are any."""

        def bonus(verdict: Verdict) -> str:
            return f"bonus {verdict.bonus:g}, " if self.cfg.rollouts.format_bonus else ""

        groups = sorted(rollout.groups, key=lambda group: not any(group.advantages))
        for group in groups[:num_prompts]:
            question = "".join(part["text"] for part in parts(last_question(group.prompt)))
            answers = [
                f"[reward {verdict.reward:g}, {bonus(verdict)}advantage {advantage:+.2f}, "
                f"{completion.finish_reason}] {completion.written}"
                for completion, verdict, advantage in zip(
                    group.completions, group.verdicts, group.advantages, strict=True
                )
            ]
            self.stage.log.sample(
                self.stage.state.step, question, "\n" + "\n".join(answers[:num_answers])
            )

    def evaluate(self) -> dict[str, float]:
        """Answer the held-out problems, greedily and by sampling; each rank its share."""
        runtime, samples = self.runtime, self.cfg.evaluating.eval_samples
        mine = self.problems[runtime.rank :: runtime.world_size]
        judge = self.judge(0.0)
        self.model.eval()
        greedy = self.engine.generate(
            [problem.ids for problem in mine],
            replace(self.params, temperature=0.0),
            indices=[problem.number for problem in mine],
        )
        params = replace(self.params, seed=self.cfg.run.seed + EVALUATION_SEED)
        groups = roll_out(self.engine, mine, params, samples, judge)
        ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
        sums = tally(groups)
        sums |= dict.fromkeys(("right", *(f"right of {k}" for k in ks)), 0.0)
        for source in range(len(self.tasks)):
            sums |= {f"problems of task {source}": 0.0, f"right of task {source}": 0.0}
        for problem, (answer,), group in zip(mine, greedy, groups, strict=True):
            right = float(judge(problem, answer).reward >= 1)
            sums["right"] += right
            sums[f"problems of task {problem.source}"] += 1
            sums[f"right of task {problem.source}"] += right
            correct = sum(verdict.reward >= 1 for verdict in group.verdicts)
            for k in ks:
                sums[f"right of {k}"] += pass_at_k(samples, correct, k)
        sums["kl"], sums["kl_tokens"] = self._kl(groups)
        self.model.train()
        sums = sum_over_ranks(sums, runtime)
        count = sums["groups"]
        metrics = {"pass@1_greedy": sums["right"] / count}
        metrics |= {f"pass@{k}": sums[f"right of {k}"] / count for k in ks}
        metrics |= describe_tally(sums)
        metrics["kl_to_start"] = sums["kl"] / max(sums["kl_tokens"], 1)
        if len(self.tasks) > 1:
            for source, task in enumerate(self.tasks):
                if sums[f"problems of task {source}"]:
                    metrics[f"pass@1_greedy_{task.name}"] = (
                        sums[f"right of task {source}"] / sums[f"problems of task {source}"]
                    )
        self.stage.state.metrics = metrics
        self.stage.log.eval(self.stage.state.step, metrics)
        return metrics

    def _kl(self, groups: Sequence[Group]) -> tuple[float, float]:
        """Of the samples' tokens, to the model training started from.

        That one is read anew each time: it would otherwise take the memory of a second model.
        """
        rows = pack_samples(
            [as_sample(group.prompt, c) for group in groups for c in group.completions],
            self.model.config.context_length,
            self.stage.plan.device_batch_size,
            self.runtime.device,
            fill_up=is_compiled(self.cfg, self.runtime),
        )
        reference = model_of(self.start.folder, self.start.meta, self.runtime)
        return mean_kl(self.model, reference, rows, self.params.temperature)


def last_question(prompt: Prompt) -> dict[str, Any]:
    """The message that is to be answered."""
    messages = [m for m in prompt.conversation["messages"] if m["role"] == "user"]
    return dict(messages[-1] if messages else prompt.conversation["messages"][0])


def learn(
    cfg: RlConfig, stage: Stage[RowStream], rollout: Rollout, update: int
) -> tuple[StepStats, dict[str, float]]:
    """One optimizer step on a rollout, and what to log beside it.

    A rollout without a single advantage is skipped and counted: momentum alone would move weights.
    """
    runtime = stage.runtime
    more = rollout.metrics if update == 0 else {}
    seconds = rollout.seconds if update == 0 else 0.0
    began = time.perf_counter()
    if rollout.targets == 0:
        agree_to_stop(runtime)
        seconds += time.perf_counter() - began
        return StepStats(0.0, 0, 0, seconds, skipped=True), more
    batches, clipped = policy_batches(
        stage.model,
        rollout.rows,
        rollout.advantages,
        temperature=cfg.rollouts.temperature,
        max_importance=cfg.rollouts.max_importance if update else None,
    )
    stats = train_step(
        stage.model,
        stage.optimizer,
        batches,
        stage.plan.hypers(stage.state.step),
        runtime,
        stage.loss_scale,
        temperature=cfg.rollouts.temperature,
        divisor=rollout.divisor,
        step=stage.state.step + 1,
    )
    if update:
        clipped = sum_over_ranks({"clipped": clipped}, runtime)["clipped"]
        more = {"clipped": clipped / rollout.targets}
    learning = time.perf_counter() - began
    more = {**more, "update_tokens_per_second": rollout.tokens / learning}
    return replace(stats, tokens=rollout.tokens, seconds=seconds + learning), more


# Preferences


def learn_pairs(cfg: RlConfig, runtime: Runtime, start: Start) -> Stage[RowStream]:
    """Direct preference optimisation."""
    model, count = start.model, cfg.rollouts.prompts_per_step
    store = runtime.in_turns(lambda: open_pairs(cfg, start))
    size = len(store) // 2
    held_out = range(size - max(1, min(cfg.evaluating.eval_problems, size // 10)), size)
    if len(held_out) == size:
        raise UserError(f"--pairs {cfg.preferences.pairs} holds one pair; give at least two")
    order = MixtureOrder([held_out.start], [1.0], cfg.run.seed)
    stream = RowStream(order, [Path(cfg.preferences.pairs).stem])
    num_steps = cfg.num_steps or max(1, cfg.epochs * held_out.start // count)
    name = f"{start.meta['digest'][:16]}-{str(runtime.dtype).removeprefix('torch.')}"
    model.eval()
    pairs = with_reference(store, model, name, 4, runtime)
    model.train()
    stage = open_stage(cfg, runtime, start, stream, num_steps, 2 * count, f"{count} pairs")
    if stage.finished:
        return stage
    first = stage.state.step
    for step in range(first, num_steps + 1):
        last = step == num_steps
        if step == 0 or due(step, cfg.evaluating.eval_every, last):
            evaluate_pairs(cfg, stage, pairs, held_out)
        if step > first and (due(step, cfg.saving.save_every, last) or runtime.stop_requested):
            stage.save()
        if last or runtime.stop_requested:
            break
        stage.record(*learn_preferences(cfg, stage, pairs))
    stage.close()
    return stage


if __name__ == "__main__":
    launch(main, RlConfig, __doc__)
