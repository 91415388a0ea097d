"""Rollouts of reinforcement learning: order of prompts, groups of answers, advantages.

A group is the answers sampled to one prompt. The objective is that of all stages, sum(w nll) / N
over all ranks. The loss weight w of a sampled token is its sample's advantage; prompts, tool
outputs and padding are not trained on. The algorithm is REINFORCE with these choices:
- The baseline is the mean reward of the group (arXiv 2402.14740).
- Nothing is divided by the group's standard deviation or by a sample's length (Dr. GRPO, arXiv
  2503.20783).
- All tokens of the step have one denominator, N (DAPO, arXiv 2503.14476).
- If a rollout is used for several steps, CISPO's clipped importance ratios are used (arXiv
  2506.13585).

`nanochat.rl.rows` makes the rows that carry the advantages.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat.data.order import MixtureOrder
from nanochat.errors import UserError
from nanochat.eval.losses import summed
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Completion
from nanochat.infer.sampling import SamplingParams
from nanochat.rl.rows import Sample
from nanochat.runtime import Runtime


class RowStream:
    """Endless stream of rows of several sources, in the order of `MixtureOrder`.

    Every rank reads the whole stream and works on its part. The order therefore does not depend on
    the number of ranks. A position is a few integers.
    """

    def __init__(self, order: MixtureOrder, names: Sequence[str]):
        self.order = order
        self.names = list(names)
        self.number = self._epoch = self._index = 0
        self._consumed = [[0, 0] for _ in names]

    def __next__(self) -> tuple[int, int, int]:
        """Return (number of rows before it, source, row)."""
        while self._index >= self.order.epoch_length(self._epoch):
            self._epoch, self._index = self._epoch + 1, 0
        source, row = self.order.locate(self._epoch, self._index)
        self._index += 1
        self.number += 1
        return self.number - 1, source, row

    def count(self, source: int, documents: int, tokens: int) -> None:
        """Count documents and tokens of a source that were trained on."""
        self._consumed[source][0] += documents
        self._consumed[source][1] += tokens

    @property
    def consumed(self) -> dict[str, dict[str, int]]:
        """Count prompts (or pairs) trained on, and their tokens, by source."""
        return {
            name: {"documents": documents, "tokens": tokens}
            for name, (documents, tokens) in zip(self.names, self._consumed, strict=True)
        }

    def _identity(self) -> dict[str, Any]:
        """Settings that the meaning of a position depends on."""
        return {
            "seed": self.order.seed,
            "sources": [
                [name, size, str(weight)]
                for name, size, weight in zip(
                    self.names, self.order.sizes, self.order.weights, strict=True
                )
            ],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position for JSON; it is the same on all ranks."""
        return {
            "epoch": self._epoch,
            "index": self._index,
            "number": self.number,
            "consumed": [list(pair) for pair in self._consumed],
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; UserError if it was saved with other tasks or in another order."""
        for key, here in self._identity().items():
            if state.get(key) != here:
                raise UserError(
                    f"the checkpoint's position is for {key} = {state.get(key)}, this run has "
                    f"{here}; resume with the same --mix, --pairs and --seed, or start a new --tag"
                )
        self._epoch, self._index = state["epoch"], state["index"]
        self.number = state["number"]
        self._consumed = [list(pair) for pair in state["consumed"]]


# Rollouts


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model answers."""

    number: int
    """Place in the stream of all prompts; it gives the random streams of the samples."""
    source: int
    ids: list[int]
    conversation: dict[str, Any]
    """Conversation that the prompt is from, for the judge."""


@dataclass(frozen=True)
class Verdict:
    """Judgement of one answer."""

    reward: float
    """Reward that the task gives."""
    bonus: float = 0.0
    """Bonus that is added to the reward in training only (--format-bonus)."""


Judge = Callable[[Prompt, Completion], Verdict]


@dataclass(frozen=True)
class Group:
    """The samples of one prompt."""

    prompt: Prompt
    completions: list[Completion]
    verdicts: list[Verdict]

    @property
    def advantages(self) -> list[float]:
        """List one advantage per sample; all 0 if the rewards are equal."""
        return group_advantages(
            [verdict.reward + verdict.bonus for verdict in self.verdicts],
            [completion.finish_reason == "stop" for completion in self.completions],
        )


def group_advantages(rewards: Sequence[float], finished: Sequence[bool]) -> list[float]:
    """Compute each sample's advantage: its reward minus the mean of the others in its group.

    This equals (reward - group mean) n / (n - 1). The factor makes the gradient unbiased although
    the sample itself is part of the mean. Samples that were cut off get 0 and are not part of the
    mean, since their reward is not known. Training therefore maximises the mean reward of finished
    answers. All advantages are 0 if fewer than two samples finished or their rewards are equal.

    >>> group_advantages([1, 0, 0, 1], [True, True, True, False])
    [1.0, -0.5, -0.5, 0.0]
    """
    known = [reward for reward, ends in zip(rewards, finished, strict=True) if ends]
    n = len(known)
    if n < 2 or min(known) == max(known):
        return [0.0] * len(rewards)
    mean = math.fsum(known) / n
    return [
        (reward - mean) * n / (n - 1) if ends else 0.0
        for reward, ends in zip(rewards, finished, strict=True)
    ]


def check_sampling(params: SamplingParams) -> None:
    """Raise UserError for sampling settings whose distribution the loss cannot score."""
    for name, neutral in (
        ("top_k", 0),
        ("top_p", 1.0),
        ("min_p", 0.0),
        ("repetition_penalty", 1.0),
        ("stop", ()),
    ):
        if getattr(params, name) != neutral:
            raise UserError(
                f"{name} {getattr(params, name)} changes the distribution that samples are drawn "
                f"from, and the loss scores them under the plain softmax; leave it at {neutral!r}"
            )
    if params.temperature == 0:
        raise UserError("temperature 0 draws equal samples, nothing is learned; use 1.0")


def roll_out(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, group_size: int, judge: Judge
) -> list[Group]:
    """Sample and judge `group_size` answers to each prompt.

    An answer depends only on the seed, its prompt's number and its own number in the group.
    """
    check_sampling(params)
    answers = engine.generate(
        [prompt.ids for prompt in prompts],
        params,
        group_size,
        indices=[prompt.number for prompt in prompts],
    )
    return [
        Group(prompt, completions, [judge(prompt, completion) for completion in completions])
        for prompt, completions in zip(prompts, answers, strict=True)
    ]


def checked_reward(reward: object, where: str) -> float:
    """Return the reward as a float; UserError unless it is a finite number."""
    number = isinstance(reward, int | float | np.number | np.bool_)
    if not number or not math.isfinite(reward):  # type: ignore[arg-type]
        raise UserError(
            f"{where}: the reward is {reward!r}; Task.reward must return a finite number"
        )
    return float(reward)  # type: ignore[arg-type]


def tally(groups: Iterable[Group]) -> dict[str, float]:
    """Sum measurements over samples; ranks add up the sums and give them to `describe_tally`."""
    sums = dict.fromkeys(
        (
            "groups",
            "kept_groups",
            "samples",
            "reward",
            "bonus",
            "length",
            "truncated",
            "sampled_tokens",
            "trainable_tokens",
            "entropy",
            "tool_calls",
            "tool_successes",
        ),
        0.0,
    )
    for group in groups:
        sums["groups"] += 1
        sums["kept_groups"] += any(group.advantages)
        for completion, verdict in zip(group.completions, group.verdicts, strict=True):
            sampled = sum(completion.mask)
            sums["samples"] += 1
            sums["reward"] += verdict.reward
            sums["bonus"] += verdict.bonus
            sums["length"] += len(completion.ids)
            sums["truncated"] += completion.finish_reason != "stop"
            sums["sampled_tokens"] += sampled
            sums["trainable_tokens"] += sampled if completion.finish_reason == "stop" else 0
            # The mean of -log p over samples from p is the entropy of p.
            sums["entropy"] -= math.fsum(completion.logprobs)
            outputs = tool_outputs(completion)
            sums["tool_calls"] += len(outputs)
            sums["tool_successes"] += sum(not output.startswith("error:") for output in outputs)
    return sums


def describe_tally(sums: dict[str, float]) -> dict[str, float]:
    """Compute means per sample, per group and per sampled token from the sums of `tally`."""
    samples = sums["samples"]
    means = {
        "reward": sums["reward"] / samples,
        "length": sums["length"] / samples,
        "truncated": sums["truncated"] / samples,
        "entropy": sums["entropy"] / max(sums["sampled_tokens"], 1),
        "tool_calls": sums["tool_calls"] / samples,
    }
    if sums["bonus"]:
        means["bonus"] = sums["bonus"] / samples
    if sums["tool_calls"]:
        means["tool_success"] = sums["tool_successes"] / sums["tool_calls"]
    return means


def tool_outputs(completion: Completion) -> list[str]:
    """List the outputs of a completion's tool calls; a call cut off at the end has none."""
    return [part["text"] for part in completion.parts if part["type"] == "python_output"]


def as_sample(prompt: Prompt, completion: Completion) -> Sample:
    """Make a sample; its targets are the sampled tokens, tool calls and end token included."""
    before = len(prompt.ids)
    return Sample(
        [*prompt.ids, *completion.ids],
        [*([0] * before), *completion.mask],
        [*([0.0] * before), *completion.logprobs],
    )


def sum_over_ranks(sums: dict[str, float], runtime: Runtime) -> dict[str, float]:
    """Add up every value over the ranks, all of which must have the same keys."""
    values = torch.tensor(list(sums.values()), dtype=torch.float64)
    return dict(zip(sums, summed(values, runtime).tolist(), strict=True))


def agree_to_stop(runtime: Runtime) -> None:
    """Agree on `stop_requested` in a skipped step; `train_step` does so in other steps."""
    stop = torch.tensor(int(runtime.stop_signal), device=runtime.device)
    runtime.stop_requested = bool(runtime.all_reduce_sum(stop).item() > 0)
