"""Measure a chat model on tasks.

Categorical tasks are answered by the most likely option, generative ones by decoding, with the
calculator. Without --task all tasks that have answers to check are measured.

Results go to report/eval_<stage>-<tag>.json under NANOCHAT_BASE_DIR, next to what is known of the
same checkpoint, each as soon as its task is done. With --resume a task that has been measured on
this checkpoint with these settings is not measured again.

Examples:
    python -m scripts.chat_eval --source sft --task spellingbee --max-problems 100
    torchrun --standalone --nproc_per_node 8 -m scripts.chat_eval --source sft
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import tyro
from rich.table import Table

from nanochat.checkpoint_manager import find, load_model, read_meta, system_style
from nanochat.cli import Group, launch
from nanochat.config import Computing
from nanochat.conversation import parts
from nanochat.errors import UserError
from nanochat.eval.options import GPTScorer, crop, length_blocks
from nanochat.eval.results import (
    evaluation_path,
    read_evaluation,
    record_evaluation,
    task_result,
    weights_digest,
)
from nanochat.gpt import GPT
from nanochat.infer.engine import Engine, Request, SamplingParams
from nanochat.progress import Bar, progress_bar
from nanochat.runtime import Runtime
from nanochat.tokenizer import SystemStyle, Tokenizer
from tasks.common import Conversation, Task, pass_at_k
from tasks.registry import build

ALL_TASKS = (
    "arc:easy",
    "arc:challenge",
    "mmlu",
    "gsm8k",
    "humaneval",
    "simplespelling",
    "spellingbee",
    "arithmetic",
)
MAX_EXCHANGES = 10
"""Conversations that are recorded of a task whose rows have a kind."""


@dataclass(frozen=True)
class Sampling(Group):
    """How the answers of generative tasks are drawn."""

    num_samples: int = 1
    """Answers drawn to each problem of a generative task; the accuracy is their mean."""
    temperature: float = 0.0
    """Of sampling; 0 takes the most likely token."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 = all."""
    max_tokens: int = 512
    """Longest answer, in tokens."""
    seed: int = 1337
    """Of sampling."""
    pass_at: tuple[int, ...] = (1, 10, 100)
    """Also estimate the chance that one of k answers is right, for each k up to --num-samples."""


@dataclass(frozen=True)
class Config(Sampling, Computing):
    source: str = "sft"
    """A stage (base, mid, sft, rl), stage/tag, or a checkpoint folder."""
    step: int | None = None
    """The checkpoint's step; default: the newest."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Task to measure, such as gsm8k or arc:easy; may be repeated. Default: all of them."""
    split: str = "test"
    """Split of the tasks."""
    max_problems: int | None = None
    """At most so many problems of each task, evenly spread over it; default: all."""
    batch_size: int = 32
    """Problems (categorical) or samples (generative) computed at once."""
    show: int = 0
    """Print so many problems of each task with the answers and the verdicts."""
    resume: bool = False
    """Keep what an earlier run of this command has measured on this checkpoint."""


@dataclass
class Answers:
    """What one rank found out about its problems of a task."""

    right: dict[int, int] = field(default_factory=dict)
    """Problem -> how many of its samples are right."""
    options: dict[int, int] = field(default_factory=dict)
    """Problem -> how many options it has, in a categorical task."""
    truncated: int = 0
    """Problems whose prompt did not fit the context; its beginning was cut off."""
    shown: list[str] = field(default_factory=list)
    exchanges: list[dict[str, Any]] = field(default_factory=list)
    """Of a task whose rows have a kind: some conversations with their answers, kinds in turn."""


def main(cfg: Config, runtime: Runtime) -> dict[str, Any]:
    """Returns what is known of the checkpoint now: the content of its report file."""
    for name, value in (
        ("max-problems", cfg.max_problems),
        ("num-samples", cfg.num_samples),
        ("batch-size", cfg.batch_size),
    ):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if cfg.num_samples > 1 and cfg.temperature == 0:
        raise UserError(
            f"--num-samples {cfg.num_samples} at --temperature 0 gives equal samples; "
            "set a temperature such as 0.8"
        )
    tasks = {spec: build(spec, cfg.split) for spec in cfg.task or ALL_TASKS}
    for spec, task in tasks.items():
        check_task(task, spec)
    settings = {spec: settings_of(task, cfg, runtime) for spec, task in tasks.items()}
    results: dict[str, dict[str, Any]] = {}
    if cfg.resume:
        meta = read_meta(find(cfg.source, cfg.step), verify=False)
        results = runtime.broadcast_object(finished(meta, settings, cfg))
        for spec, result in results.items():
            runtime.print(f"{spec}: {result['accuracy']:.4f}, kept from an earlier run")
    todo = {spec: task for spec, task in tasks.items() if spec not in results}
    if todo:
        model, tokenizer, meta = load_model(
            cfg.source, step=cfg.step, device=runtime.device, dtype=runtime.dtype
        )
    stage, tag, step = meta["stage"], meta["tag"], int(meta["step"])
    weights = weights_digest(meta)
    runtime.print(f"{stage}/{tag} step {step}: {', '.join(todo) or 'all tasks are measured'}")
    system = system_style(meta)
    for spec, task in todo.items():
        result = evaluate_task(model, tokenizer, task, cfg, runtime, label=spec, system=system)
        results[spec] = {**result, **settings[spec]}
        if runtime.is_main:
            record_evaluation(stage, tag, step, {spec: results[spec]}, weights=weights)
    record: dict[str, Any] = {}
    if runtime.is_main:
        # Over all that is known of this checkpoint: tasks may be measured in several runs.
        known = read_evaluation(stage, tag, step, weights)["results"]
        chat_core = math.fsum(result["centered"] for result in known.values()) / len(known)
        record = record_evaluation(stage, tag, step, weights=weights, chat_core=chat_core)
        results = {spec: results[spec] for spec in tasks}
        runtime.console.print(make_table(results, f"{stage}/{tag} step {step}"))
        runtime.print(
            f"ChatCORE {chat_core:.4f}: mean centred accuracy of {', '.join(known)}\n"
            f"written to {evaluation_path(stage, tag)}"
        )
    return cast(dict[str, Any], runtime.broadcast_object(record))


def settings_of(task: Task, cfg: Config, runtime: Runtime) -> dict[str, Any]:
    """What a result depends on, beside the model."""
    return {
        "task": task.fingerprint(),
        "split": cfg.split,
        "max_problems": cfg.max_problems,
        "num_samples": cfg.num_samples,
        "temperature": cfg.temperature,
        "top_k": cfg.top_k,
        "max_tokens": cfg.max_tokens,
        "seed": cfg.seed,
        "dtype": str(runtime.dtype),
    }


def finished(
    meta: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]], cfg: Config
) -> dict[str, dict[str, Any]]:
    """The recorded results of this checkpoint that the same settings gave."""
    recorded = read_evaluation(meta["stage"], meta["tag"], int(meta["step"]), weights_digest(meta))
    kept = {}
    for spec, wanted in settings.items():
        result = recorded.get("results", {}).get(spec, {})
        same = all(key in result and result[key] == value for key, value in wanted.items())
        estimates = {str(k) for k in cfg.pass_at if k <= result.get("samples", 0)}
        if same and estimates <= set(result.get("pass_at", {})):
            kept[spec] = result
    return kept


def check_task(task: Task, spec: str) -> None:
    """A UserError for what cannot be measured."""
    if len(task) == 0:
        raise UserError(f"{spec}: the split '{task.split}' is empty; choose another --split")
    if task.eval_type == "generative" and type(task).evaluate is Task.evaluate:
        raise UserError(f"{spec} has no answers to check; leave it out")


def evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    cfg: Config,
    runtime: Runtime,
    *,
    label: str | None = None,
    system: SystemStyle = "tokens",
) -> dict[str, Any]:
    """The result of a task over all ranks, the same on every rank.

    Problem i and its samples have random streams of their own, so the result depends neither on
    the batch size nor on the number of ranks (up to the rounding of matrix products).
    """
    label = label or task.name
    check_task(task, label)
    count = min(len(task), cfg.max_problems or len(task))
    # Spread over the task: many are sorted by subject.
    chosen = [k * len(task) // count for k in range(count)]
    categorical = task.eval_type == "categorical"
    samples = 1 if categorical else cfg.num_samples
    measure = _answer_categorical if categorical else _answer_generative
    with progress_bar(label, 1) if runtime.is_main else nullcontext() as bar:
        answers = measure(model, tokenizer, task, chosen, cfg, runtime, system, bar)
    for text in answers.shown:
        runtime.print(text)

    right = torch.zeros(count, dtype=torch.int64)
    options = torch.zeros(count, dtype=torch.int64)
    for k in answers.right:
        right[k], options[k] = answers.right[k], answers.options.get(k, 0)
    truncated = torch.tensor([answers.truncated])
    # int64 sums are exact, in whatever order the ranks are added.
    hits, num_options, (num_truncated,) = (
        runtime.all_reduce_sum(counts.to(runtime.device)).tolist()
        for counts in (right, options, truncated)
    )
    chance = math.fsum(1 / n for n in num_options) / count if categorical else 0.0
    more: dict[str, Any] = {"truncated": num_truncated, "eval_type": task.eval_type}
    if samples > 1:
        more["samples"] = samples
        more["pass_at"] = {
            str(k): math.fsum(pass_at_k(samples, n, k) for n in hits) / count
            for k in cfg.pass_at
            if k <= samples
        }
    if task.BY_KIND:
        kinds: dict[str, list[int]] = {}
        for i, right_samples in zip(chosen, hits, strict=True):
            kinds.setdefault(task[i]["kind"], []).append(right_samples)
        more["kinds"] = {
            kind: task_result(sum(found) / samples, len(found), 0.0)
            for kind, found in kinds.items()
        }
        more["exchanges"] = answers.exchanges
    correct = sum(hits) if samples == 1 else sum(hits) / samples
    return task_result(correct, count, chance, **more)


def _answer_categorical(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    chosen: Sequence[int],
    cfg: Config,
    runtime: Runtime,
    system: SystemStyle,
    bar: Bar | None,
) -> Answers:
    """Choose the most likely of each problem's options."""
    answers = Answers()
    scorer = GPTScorer(model)
    # Cheap to know for all problems without encoding them.
    lengths = [sum(len(str(m["content"])) for m in task[i]["messages"]) for i in chosen]
    blocks = length_blocks(lengths, cfg.batch_size)[runtime.rank :: runtime.world_size]
    if bar is not None:
        bar.resize(sum(len(block) for block in blocks))
    for block in blocks:
        conversations = [task[chosen[k]] for k in block]
        prompts, options = [], []
        for conversation in conversations:
            prompt = tokenizer.render_for_completion(conversation, system)
            encoded = encode_options(tokenizer, conversation["letters"])
            prompt, encoded, cut = _crop_chat(prompt, encoded, scorer.context_length)
            answers.truncated += cut
            prompts.append(prompt)
            options.append(encoded)
        for k, conversation, scored in zip(
            block, conversations, scorer.score(prompts, options), strict=True
        ):
            values = [option.logprob for option in scored]
            answer = conversation["letters"][values.index(max(values))]
            answers.right[k] = int(task.evaluate(conversation, answer))
            answers.options[k] = len(scored)
            if len(answers.shown) < cfg.show:
                chances = ", ".join(
                    f"{letter} {math.exp(value):.3f}"
                    for letter, value in zip(conversation["letters"], values, strict=True)
                )
                verdict = "right" if answers.right[k] else f"wrong: {conversation.get('answer')}"
                answers.shown.append(
                    _shown(task, chosen[k], conversation, [f"{answer} ({verdict}; {chances})"])
                )
        if bar is not None:
            bar.set(len(answers.right))
    return answers


def encode_options(tokenizer: Tokenizer, letters: Sequence[str]) -> list[list[int]]:
    """The options as the assistant would write them.

    If one has several tokens, each ends with `<|assistant_end|>`: what is compared are then whole
    answers, and a short one is not favoured over a longer one that begins with it.
    """
    options = [tokenizer.encode(letter) for letter in letters]
    if max(len(option) for option in options) > 1:
        end = tokenizer.special("<|assistant_end|>")
        options = [[*option, end] for option in options]
    return options


def _crop_chat(
    prompt: list[int], options: list[list[int]], context_length: int
) -> tuple[list[int], list[list[int]], bool]:
    """`crop`, but `<|bos|>` stays where there is room: no conversation was ever seen without it."""
    short, fitting, cut = crop(prompt, options, context_length)
    if cut and len(short) > 1:
        short = [prompt[0], *short[1:]]
    return list(short), [list(option) for option in fitting], cut


def _answer_generative(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    chosen: Sequence[int],
    cfg: Config,
    runtime: Runtime,
    system: SystemStyle,
    bar: Bar | None,
) -> Answers:
    """Decode answers and judge them, in threads: judging may run programs."""
    answers = Answers()
    params = SamplingParams(
        temperature=cfg.temperature, top_k=cfg.top_k, max_tokens=cfg.max_tokens, seed=cfg.seed
    )
    engine = Engine(model, tokenizer, max_slots=cfg.batch_size)
    mine = range(len(chosen))[runtime.rank :: runtime.world_size]
    # A longer prompt is cut, to leave the answer a quarter of the context (or all it may have).
    room = min(cfg.max_tokens, max(1, engine.context_length // 4))
    conversations: dict[int, Conversation] = {}
    prompts: dict[int, list[int]] = {}
    for k in mine:
        conversations[k] = task[chosen[k]]
        prompt = tokenizer.render_for_completion(conversations[k], system)
        limit = max(1, engine.context_length - room)
        if len(prompt) > limit:
            answers.truncated += 1
            prompt = [prompt[0], *prompt[len(prompt) - limit + 1 :]] if limit > 1 else prompt[-1:]
        prompts[k] = prompt
    requests: dict[Request, int] = {}
    # The longest first: prompts that are read side by side are then of similar length.
    for k in sorted(mine, key=lambda k: (-len(prompts[k]), k)):
        requests[engine.submit(prompts[k], params, cfg.num_samples, index=chosen[k])] = k

    if bar is not None:
        bar.resize(len(mine) * cfg.num_samples)
    verdicts: dict[int, dict[int, Future[bool]]] = {k: {} for k in mine}  # by sample
    with ThreadPoolExecutor(thread_name_prefix="judge") as pool:
        while not engine.idle:
            for event in engine.step():
                if not event.finished:
                    continue
                k = requests[event.request]
                verdicts[k][event.sample] = pool.submit(
                    task.evaluate, conversations[k], event.completion.text
                )
                if bar is not None:
                    bar.advance(1)
        for k, futures in verdicts.items():
            answers.right[k] = sum(bool(future.result()) for future in futures.values())
    by_problem = {k: request for request, k in requests.items()}
    if task.BY_KIND:
        for k in _in_turn([conversations[k]["kind"] for k in mine])[:MAX_EXCHANGES]:
            k = mine[k]
            said = list(conversations[k]["messages"])
            if said[-1]["role"] == "assistant":
                said.pop()  # the reference
            answers.exchanges.append(
                {
                    "kind": conversations[k]["kind"],
                    "messages": [[m["role"], "".join(p["text"] for p in parts(m))] for m in said],
                    "answer": by_problem[k].completions[0].written,
                    "right": verdicts[k][0].result(),
                }
            )
    for k in list(mine)[: cfg.show]:
        texts = []
        for sample, completion in enumerate(by_problem[k].completions):
            verdict = "right" if verdicts[k][sample].result() else "wrong"
            texts.append(f"{completion.written} ({verdict}, {completion.finish_reason})")
        answers.shown.append(_shown(task, chosen[k], conversations[k], texts))
    return answers


def _in_turn(kinds: Sequence[str]) -> list[int]:
    """Places in an order that takes one of each kind, then another of each.

    >>> _in_turn(["a", "a", "a", "b"])
    [0, 3, 1, 2]
    """
    seen: Counter[str] = Counter()
    rounds = []
    for place, kind in enumerate(kinds):
        rounds.append((seen[kind], place))
        seen[kind] += 1
    return [place for _, place in sorted(rounds)]


def _shown(task: Task, index: int, conversation: Conversation, answers: list[str]) -> str:
    """A problem for the console; under torchrun rank 0 shows its own ones."""
    messages = list(conversation["messages"])
    if messages[-1]["role"] == "assistant":
        messages.pop()
    lines = [f"--- {task.where(index)}"]
    for message in messages:
        lines.append(f"{message['role']}: {''.join(part['text'] for part in parts(message))}")
    return "\n".join([*lines, *(f"answer: {answer}" for answer in answers)])


def make_table(results: dict[str, dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    table.add_column("task", no_wrap=True)
    for name in ("accuracy", "95 %", "chance", "centred", "problems"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = {}
    for spec, result in results.items():
        notes[spec] = [f"pass@{k} {value:.4f}" for k, value in result.get("pass_at", {}).items()]
        if result["truncated"]:
            notes[spec].append(f"{result['truncated']} truncated")
    if any(notes.values()):
        table.add_column("notes")
    lines = [
        (name, line)
        for spec, result in results.items()
        for name, line in [
            (spec, result),
            *((f"  {k}", r) for k, r in result.get("kinds", {}).items()),
        ]
    ]
    for spec, result in lines:
        low, high = result["ci"]
        table.add_row(
            spec,
            f"{result['accuracy']:.4f}",
            f"{low:.3f}-{high:.3f}",
            f"{result['chance']:.3f}",
            f"{result['centered']:.4f}",
            f"{result['total']:,}",
            *([", ".join(notes.get(spec, []))] if any(notes.values()) else []),
        )
    return table


if __name__ == "__main__":
    launch(main, Config, __doc__)
