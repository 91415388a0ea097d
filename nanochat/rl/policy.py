"""Policy gradient: samples answers from the model, judges them, and trains on them.

The algorithm is REINFORCE with the mean of a group as its baseline; see `nanochat.rl.rollouts`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanochat.checkpoint_manager import loaded_model
from nanochat.config import RlConfig
from nanochat.conversation import parts
from nanochat.data.order import MixtureOrder
from nanochat.errors import UserError
from nanochat.eval.results import pass_at_k
from nanochat.gpt import GPTConfig
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Completion
from nanochat.infer.sampling import SamplingParams
from nanochat.memory import cache_memory, decoder_memory, parameter_counts
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
from nanochat.rl.start import Start
from nanochat.runtime import Runtime
from nanochat.stage import Stage
from nanochat.train import StepStats, due, train_step

EVALUATION_SEED = 2**32
"""Number added to the run's seed for evaluation, whose samples need other random streams."""


@dataclass(frozen=True)
class Rollout:
    """Samples that a step learns from: this rank's part, and counts over all ranks."""

    groups: list[Group]
    rows: list[Rows]
    advantages: torch.Tensor
    """Advantages (S,) of the samples in `rows`."""
    targets: int
    """Number of sampled tokens with an advantage, over all ranks."""
    divisor: int
    """N: number of sampled tokens of all finished answers, over all ranks."""
    tokens: int
    """Number of input positions, over all ranks."""
    seconds: float
    metrics: dict[str, float]


def sampling_memory(
    cfg: RlConfig, config: GPTConfig, dtype: torch.dtype
) -> dict[str, dict[str, int]]:
    """Estimate the largest memory of rollouts and evaluations beside the model, in bytes.

    Their caches and their copy of the weights are freed before an optimizer step. The model that
    training started from is loaded during an evaluation only. DPO needs neither.
    """
    if cfg.algo == "dpo":
        return {}
    return {
        "rollouts": {
            "decoder's weights": decoder_memory(config, dtype),
            "key/value cache": cfg.rollouts.max_slots * cache_memory(config, dtype),
        },
        "evaluation": {"KL's reference model": 4 * sum(parameter_counts(config).values())},
    }


class PolicyGradient:
    """Learning from sampled answers of a stage's model, and evaluation of the model."""

    def __init__(
        self,
        cfg: RlConfig,
        start: Start,
        order: MixtureOrder,
        tasks: Sequence[Any],
        held_out: Sequence[Any],
        runtime: Runtime,
    ):
        """Prepare the prompts.

        tasks, held_out: sequences of conversations with `reward(conversation, answer)`. Prompts of
        `tasks` are trained on, in the order of `order`; those of `held_out` are for evaluation.
        """
        self.cfg, self.start, self.tasks, self.runtime = cfg, start, tasks, runtime
        self.model, self.tokenizer = start.model, start.tokenizer
        rollouts = cfg.rollouts
        self.stream = RowStream(order, [task.name for task in tasks])
        self.updates = rollouts.updates_per_rollout
        prompts, size = rollouts.prompts_per_step, rollouts.group_size
        available = sum(order.epoch_length(epoch) for epoch in range(cfg.epochs))
        self.num_steps = cfg.num_steps or max(1, available // prompts) * self.updates
        self.what = f"{prompts} prompts x {size} answers"
        self.what += f" / {self.updates} updates" if self.updates > 1 else ""
        self.engine = Engine(self.model, self.tokenizer, max_slots=rollouts.max_slots)
        self.params = SamplingParams(
            temperature=rollouts.temperature, max_tokens=rollouts.max_tokens, seed=cfg.run.seed
        )
        check_sampling(self.params)
        # A prompt must leave a quarter of the context to the answer, as in chat_eval.
        context = self.model.config.context_length
        self.longest_prompt = context - min(rollouts.max_tokens, max(1, context // 4))
        self.problems = self._problems(held_out)

    def learn(self, stage: Stage) -> Iterator[tuple[StepStats, dict[str, float]]]:
        """Take the optimizer steps on one rollout; yields their stats and further measurements."""
        rollout = self.roll_out(stage)
        step = stage.state.step
        every = self.cfg.evaluating.sample_every
        if due(step, in_rounds(every, self.updates), step + self.updates == stage.plan.num_steps):
            stage.show(lambda: self.shown(rollout))
        for update in range(self.updates):
            yield self.take_step(stage, rollout, update)

    def take_step(
        self, stage: Stage, rollout: Rollout, update: int
    ) -> tuple[StepStats, dict[str, float]]:
        """Take one optimizer step on a rollout; returns its stats and further measurements.

        A rollout without any advantage is skipped and counted, since a step would move the weights
        by momentum alone.
        """
        runtime, rollouts = self.runtime, self.cfg.rollouts
        more = rollout.metrics if update == 0 else {}
        seconds = rollout.seconds if update == 0 else 0.0
        began = time.perf_counter()
        if rollout.targets == 0:
            agree_to_stop(runtime)
            seconds += time.perf_counter() - began
            return StepStats(0.0, 0, 0, seconds, skipped=True), more
        batches, clipped = policy_batches(
            self.model,
            rollout.rows,
            rollout.advantages,
            temperature=rollouts.temperature,
            max_importance=rollouts.max_importance if update else None,
        )
        stats = train_step(
            self.model,
            stage.optimizer,
            batches,
            stage.plan.hypers(stage.state.step),
            runtime,
            stage.loss_scale,
            temperature=rollouts.temperature,
            divisor=rollout.divisor,
            step=stage.state.step + 1,
        )
        if update:
            clipped = sum_over_ranks({"clipped": clipped}, runtime)["clipped"]
            more = {"clipped": clipped / rollout.targets}
        learning = time.perf_counter() - began
        more = {**more, "update_tokens_per_second": rollout.tokens / learning}
        return replace(stats, tokens=rollout.tokens, seconds=seconds + learning), more

    def _prompt(self, number: int, source: int, conversation: dict[str, Any]) -> Prompt | None:
        """Make the prompt of a conversation; None if it is too long."""
        ids = self.tokenizer.render_for_completion(conversation, self.start.system)
        if len(ids) > self.longest_prompt:
            return None
        return Prompt(number, source, ids, conversation)

    def _problems(self, held_out: Sequence[Any]) -> list[Prompt]:
        """Make the prompts of the held-out problems; a prompt's number is its place."""
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
        """Take the prompts of a step, the same on every rank; also counts those left out as too
        long."""
        prompts: list[Prompt] = []
        too_long = 0
        while len(prompts) < self.cfg.rollouts.prompts_per_step:
            number, source, row = next(self.stream)
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

    def roll_out(self, stage: Stage) -> Rollout:
        """Sample the next step's groups, a share on each rank, and prepare them for training."""
        began = time.perf_counter()
        runtime, rollouts = self.runtime, self.cfg.rollouts
        prompts, too_long = self._next_prompts()
        mine = prompts[runtime.rank :: runtime.world_size]
        groups = roll_out(
            self.engine, mine, self.params, rollouts.group_size, self.judge(rollouts.format_bonus)
        )
        kept = [
            (as_sample(group.prompt, completion), advantage)
            for group in groups
            for completion, advantage in zip(group.completions, group.advantages, strict=True)
            if advantage
        ]
        rows = pack_samples(
            [sample for sample, _ in kept],
            self.model.config.context_length,
            stage.plan.device_batch_size,
            runtime.device,
            fill_up=self.cfg.run.compiles(runtime.device),
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
            self.stream.count(source, documents, int(sums[f"tokens of {source}"]))
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

    def shown(
        self, rollout: Rollout, num_prompts: int = 2, num_answers: int = 3
    ) -> list[tuple[str, str]]:
        """Pick a few answers with their rewards, from groups with advantages if there are any."""

        def bonus(verdict: Verdict) -> str:
            return f"bonus {verdict.bonus:g}, " if self.cfg.rollouts.format_bonus else ""

        groups = sorted(rollout.groups, key=lambda group: not any(group.advantages))
        found = []
        for group in groups[:num_prompts]:
            question = "".join(part["text"] for part in parts(last_question(group.prompt)))
            answers = [
                f"[reward {verdict.reward:g}, {bonus(verdict)}advantage {advantage:+.2f}, "
                f"{completion.finish_reason}] {completion.written}"
                for completion, verdict, advantage in zip(
                    group.completions, group.verdicts, group.advantages, strict=True
                )
            ]
            found.append((question, "\n" + "\n".join(answers[:num_answers])))
        return found

    def evaluate(self, stage: Stage) -> dict[str, float]:
        """Answer the held-out problems, greedily and by sampling, a share on each rank."""
        runtime, samples = self.runtime, self.cfg.evaluating.eval_samples
        mine = self.problems[runtime.rank :: runtime.world_size]
        judge = self.judge(0.0)
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
        sums["kl"], sums["kl_tokens"] = self._kl(groups, stage)
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
        return metrics

    def _kl(self, groups: Sequence[Group], stage: Stage) -> tuple[float, float]:
        """Estimate the KL divergence to the model that training started from, on sampled tokens.

        That model is read from its checkpoint each time, so that it takes no memory in between.
        """
        rows = pack_samples(
            [as_sample(group.prompt, c) for group in groups for c in group.completions],
            self.model.config.context_length,
            stage.plan.device_batch_size,
            self.runtime.device,
            fill_up=self.cfg.run.compiles(self.runtime.device),
        )
        start = self.start
        reference = loaded_model(start.model.config, start.folder, start.meta, self.runtime)
        return mean_kl(self.model, reference, rows, self.params.temperature)


def in_rounds(steps: int, updates: int) -> int:
    """Round optimizer steps up to whole rollouts of `updates` steps; 0 stays 0."""
    return -(-steps // updates) * updates


def last_question(prompt: Prompt) -> dict[str, Any]:
    """Message of a prompt that is to be answered."""
    messages = [m for m in prompt.conversation["messages"] if m["role"] == "user"]
    return dict(messages[-1] if messages else prompt.conversation["messages"][0])
