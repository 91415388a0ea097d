"""Compare rollouts with the engine's own batch decoding, and updates of RL with those of SFT.

python -m benchmarks.rollout [--source sft] [--prompts 32] [--group-size 8] [--json out.json]

With --source, a trained model answers arithmetic problems, and answers have natural lengths.
Without it, a random model of --depth writes until --max-tokens. The measurements are taken in turn,
A B C A B C; the results are medians.

- full: tokens a second of the engine while all its rows are in use. No rollout can be faster.
- engine: `Engine.generate` on the prompts of a rollout, until its last answer has ended.
- rollout: a step of chat_rl without its update: render prompts, decode the same answers, judge them
  and pack them into rows.
- update and sft: tokens a second (without padding) of a training step on the rollout's rows, and on
  as many tokens in full rows of plain targets.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import publish
from benchmarks.decode import made_up_tokenizer
from nanochat.checkpoint_manager import load_model
from nanochat.config import Learning
from nanochat.gpt import GPT, config_from_depth
from nanochat.hardware import tune_cpu
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Completion
from nanochat.infer.sampling import SamplingParams
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.rl.rollouts import Prompt, Verdict, as_sample, roll_out, tally
from nanochat.rl.rows import pack_samples, policy_batches
from nanochat.runtime import DTYPES, Runtime, single
from nanochat.tokenizer import Tokenizer
from nanochat.train import Batch, train_step
from tasks.arithmetic import Arithmetic

ROWS = 16
"""Number of rows of a micro-batch."""


def open_model(source: str | None, depth: int, dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    if source is not None:
        model, tokenizer, _ = load_model(source, single(dtype=dtype))
        return model, tokenizer
    tokenizer = made_up_tokenizer(4096)
    config = config_from_depth(
        depth, tokenizer.vocab_size, head_dim=64, context_length=512, window_pattern="L"
    )
    return GPT(config, dtype).init_weights(0, tokenizer.ranks), tokenizer


def full_speed(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> float:
    """Measure tokens a second while every row is in use."""
    for index, prompt in enumerate(prompts * 4):
        engine.submit(prompt, params, 8, index)
    tokens, seconds = 0, 0.0
    while not engine.idle:
        # Only steps that neither begin nor end with a free row, and read no prompts.
        read, written, rows = engine.prompt_tokens, engine.completion_tokens, engine.num_rows
        start = time.perf_counter()
        engine.step()
        taken = time.perf_counter() - start
        if rows == engine.max_slots == engine.num_rows and engine.prompt_tokens == read:
            tokens, seconds = tokens + engine.completion_tokens - written, seconds + taken
        if seconds > 2:
            engine.reset()
    return tokens / seconds if seconds else float("nan")


def judged(task: Arithmetic, trained: bool) -> Any:
    def judge(prompt: Prompt, completion: Completion) -> Verdict:
        reward = task.reward(prompt.conversation, completion.text)
        if not trained:
            # A random model never ends an answer, so answers count as finished here.
            completion.finish_reason = "stop"
            reward = float(completion.ids[0] % 2)
        return Verdict(reward)

    return judge


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    runtime: Runtime = single(dtype=DTYPES[arguments.dtype])
    model, tokenizer = open_model(arguments.source, arguments.depth, runtime.dtype)
    T = model.config.context_length
    task = Arithmetic("train", size=arguments.prompts * (arguments.repeats + 1), level=2)
    params = SamplingParams(max_tokens=min(arguments.max_tokens, T // 2))
    engine = Engine(model, tokenizer, max_slots=arguments.max_slots)
    optimizer = Optimizer(
        model,
        parameter_rules(model, Learning(), width=model.config.n_embd),
        muon_dtype=runtime.dtype,
    )
    judge = judged(task, arguments.source is not None)

    def render(first: int) -> list[Prompt]:
        prompts = []
        for number in range(first, first + arguments.prompts):
            conversation = task[number]
            ids = tokenizer.render_for_completion(conversation)[-(T // 2) :]
            prompts.append(Prompt(number, 0, ids, conversation))
        return prompts

    def step(batches: list[Batch], divisor: int) -> float:
        start = time.perf_counter()
        # The learning rate is almost 0, so that the measured model stays the same.
        train_step(model, optimizer, batches, Hypers(1e-9), runtime, divisor=divisor)
        return time.perf_counter() - start

    speeds: dict[str, list[float]] = {}

    def note(name: str, tokens: float, seconds: float) -> None:
        speeds.setdefault(name, []).append(tokens / seconds)

    for repeat in range(arguments.repeats + 1):
        first = repeat * arguments.prompts
        prompts = render(first)
        start = time.perf_counter()
        answers = engine.generate(
            [prompt.ids for prompt in prompts],
            params,
            arguments.group_size,
            indices=[prompt.number for prompt in prompts],
        )
        seconds = time.perf_counter() - start
        written = sum(len(c.ids) for group in answers for c in group)
        full = full_speed(engine, [prompt.ids for prompt in prompts], params)

        start = time.perf_counter()
        groups = roll_out(engine, render(first), params, arguments.group_size, judge)
        kept = [
            (as_sample(group.prompt, completion), advantage)
            for group in groups
            for completion, advantage in zip(group.completions, group.advantages, strict=True)
            if advantage
        ]
        rows = pack_samples([sample for sample, _ in kept], T, ROWS, runtime.device)
        sums = tally(groups)
        rollout_seconds = time.perf_counter() - start
        assert sums["length"] == written, "the same answers"
        if repeat == 0:  # warms up
            continue
        note("engine", written, seconds)
        note("rollout", written, rollout_seconds)
        speeds.setdefault("full", []).append(full)
        if rows:
            advantages = torch.tensor([advantage for _, advantage in kept])
            batches, _ = policy_batches(model, rows, advantages, temperature=1.0)
            targets = int(sums["trainable_tokens"])
            note("update", sum(r.tokens for r in rows), step(batches, targets))
            plain = full_rows(model, sum(r.tokens for r in rows))
            note("sft", sum(batch.inputs.numel() for batch in plain), step(plain, targets))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "tokens_per_second": medians,
        "rollout_to_engine": medians["rollout"] / medians["engine"],
        "rollout_to_full": medians["rollout"] / medians["full"],
        "update_to_sft": medians["update"] / medians["sft"] if "update" in medians else None,
        "settings": {k: str(v) for k, v in vars(arguments).items()},
    }


def full_rows(model: GPT, tokens: int) -> list[Batch]:
    """Make about `tokens` tokens in full rows of plain targets, two documents in each."""
    T = model.config.context_length
    batches = []
    for left in range(max(1, round(tokens / T)), 0, -ROWS):
        ids = torch.randint(model.config.vocab_size, (min(left, ROWS), T + 1))
        documents = (torch.arange(T) >= T // 2).int().expand(len(ids), T)
        weights = torch.ones(len(ids), T)
        batches.append(Batch(ids[:, :-1], ids[:, 1:], weights, documents))
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="stage, stage/tag or folder; default: random weights")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-slots", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tune_cpu()
    result = measure(arguments)
    publish(result, arguments.json)


if __name__ == "__main__":
    main()
