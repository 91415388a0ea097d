"""Measure a chat model on tasks.

In categorical tasks (multiple choice), the most likely option is the answer. In generative tasks,
the model decodes an answer and may call the calculator. Without --task, all tasks whose answers can
be checked are measured.

Results are written to report/eval_<stage>-<tag>.json under NANOCHAT_BASE_DIR, each with its
settings and as soon as its task is done: a quick look never replaces a whole test. Every problem
with its answers is a line of a file in report/problems. With --resume, a task that was measured on
this checkpoint with these settings is not measured again.

Examples:
    python -m scripts.chat_eval --source sft --task spellingbee --max-problems 100
    python -m scripts.chat_eval --source sft --task mmlu --shots 5 --against mid
    torchrun --standalone --nproc_per_node 8 -m scripts.chat_eval --source sft
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import tyro
from rich.table import Table

from nanochat.checkpoint_manager import find, load_model, read_meta, system_style, tokenizer_of
from nanochat.cli import launch
from nanochat.config import Computing
from nanochat.conversation import parts
from nanochat.errors import UserError
from nanochat.eval import record
from nanochat.eval.options import GPTScorer, crop, length_blocks
from nanochat.eval.results import clustered_interval, pass_at_k, task_result
from nanochat.gpt import GPT
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.infer.sampling import SamplingParams
from nanochat.progress import Bar, progress_bar
from nanochat.runtime import Runtime
from nanochat.tokenizer import SystemStyle, Tokenizer
from tasks.common import Conversation, Task
from tasks.registry import EVALUATED, build, corpus_options

MAX_EXCHANGES = 10
"""Number of conversations to record for a task whose rows have a kind."""


@dataclass(frozen=True)
class Answering:
    """Sampling of answers in generative tasks."""

    num_samples: int = 1
    """Answers sampled to each problem of a generative task; the accuracy is their mean."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely token."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 = all."""
    max_tokens: int = 512
    """Longest answer, in tokens."""
    seed: int = 1337
    """Seed of sampling."""
    pass_at: tuple[int, ...] = (1, 10, 100)
    """Values of k for which to estimate the probability that one of k answers is right, as far as
    --num-samples allows."""


@dataclass(frozen=True)
class Config:
    run: Computing = field(default_factory=Computing)
    answering: Answering = field(default_factory=Answering)
    source: str = "sft"
    """A stage (base, mid, sft, rl), stage/tag, or a checkpoint folder."""
    step: int | None = None
    """The checkpoint's step; default: the newest."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Task to measure, such as gsm8k or arc:easy; may be repeated. Default: all of them."""
    split: str = "test"
    """Split of the tasks."""
    max_problems: int | None = None
    """Largest number of problems per task, evenly spread over it; default: all."""
    shots: int = 0
    """Number of solved examples before each problem, e.g. 5 for mmlu or 8 for gsm8k."""
    batch_size: int = 32
    """Problems (categorical) or samples (generative) computed at once."""
    show: int = 0
    """Number of problems per task to print, with answers and verdicts."""
    against: str | None = None
    """Compare with this checkpoint by McNemar's test; it must have been measured before with the
    same settings."""
    resume: bool = False
    """Keep the results that an earlier run of this command has for this checkpoint."""


def main(cfg: Config, runtime: Runtime) -> dict[str, record.Measurement]:
    """Returns the measurement of each requested task, new or kept."""
    drawn = cfg.answering
    for name, value, least in (
        ("max-problems", cfg.max_problems, 1),
        ("num-samples", drawn.num_samples, 1),
        ("batch-size", cfg.batch_size, 1),
        ("shots", cfg.shots, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    if drawn.num_samples > 1 and drawn.temperature == 0:
        raise UserError(
            f"--num-samples {drawn.num_samples} at --temperature 0 gives equal samples; "
            "set a temperature such as 0.8"
        )
    folder = find(cfg.source, cfg.step)
    meta = read_meta(folder)
    tokenizer = tokenizer_of(meta, folder)
    specs = cfg.task or EVALUATED
    tasks, examples = runtime.in_turns(lambda: open_tasks(cfg, specs, tokenizer))
    system = system_style(meta)
    asked = {
        spec: Asked(task, examples[spec], tokenizer, system, cfg, runtime)
        for spec, task in tasks.items()
    }
    settings = {spec: one.settings() for spec, one in asked.items()}
    results: dict[str, record.Measurement] = {}
    if cfg.resume:
        known = runtime.broadcast_object(record.of_checkpoint(meta))
        for spec in tasks:
            kept = record.find(known, "task", spec, settings[spec])
            if kept and has_estimates(kept["result"], drawn):
                results[spec] = kept
                accuracy = kept["result"]["accuracy"]
                runtime.print(f"{spec}: {accuracy:.4f}, kept from an earlier run")
    todo = [spec for spec in tasks if spec not in results]
    if todo:
        model, _, meta = load_model(cfg.source, runtime, step=cfg.step, tokenizer=tokenizer)
    title = f"{meta['stage']}/{meta['tag']} step {meta['step']}"
    runtime.print(f"{title}: {', '.join(todo) or 'all tasks are measured'}")
    for spec in todo:
        result, problems = asked[spec].measure(model, label=spec)
        if runtime.is_main:
            results[spec] = record.record(meta, "task", spec, settings[spec], result, problems)
    results = runtime.broadcast_object({spec: results[spec] for spec in tasks if spec in results})
    if runtime.is_main:
        runtime.console.print(make_table(results, title))
        known = record.of_checkpoint(meta)
        for name, text in record.chat_core_texts(known).items():
            runtime.print(f"{name}: {text}")
        if cfg.against is not None:
            for line in compared(results, cfg.against):
                runtime.print(line)
        runtime.print(f"written to {record.evaluation_path(meta['stage'], meta['tag'])}")
    return results


def compared(results: Mapping[str, record.Measurement], source: str) -> list[str]:
    """Write a line per task that compares this checkpoint's answers with another's."""
    other = read_meta(find(source, None))
    known = record.of_checkpoint(other)
    name = f"{other['stage']}/{other['tag']} step {other['step']}"
    lines = []
    for spec, one in results.items():
        before = record.find(known, "task", spec, one["settings"])
        test = record.compare(before, one) if before else None
        if test is None:
            lines.append(f"{spec}: {name} was not measured with these settings, one answer each")
        else:
            lines.append(
                f"{spec}: against {name} {test['gained']} more problems are right and "
                f"{test['lost']} no longer; McNemar's p = {test['p']:.3g}"
            )
    return lines


def has_estimates(result: Mapping[str, Any], drawn: Answering) -> bool:
    """True if pass@k was recorded for each k that is requested now."""
    wanted = {str(k) for k in drawn.pass_at if k <= result.get("samples", 0)}
    return wanted <= set(result.get("pass_at", {}))


def open_tasks(
    cfg: Config, specs: Sequence[str], tokenizer: Tokenizer
) -> tuple[dict[str, Task], dict[str, list[Conversation]]]:
    """Open the tasks and the examples that each one shows, by spec; prepares their data sets."""
    options = corpus_options(specs, tokenizer)
    tasks = {spec: build(spec, cfg.split, **options) for spec in specs}
    for spec, task in tasks.items():
        check_task(task, spec)
    examples = {
        spec: load_examples(spec, task, cfg.shots, **options) for spec, task in tasks.items()
    }
    return tasks, examples


def load_examples(spec: str, task: Task, shots: int, **options: Any) -> list[Conversation]:
    """Load solved rows to show before a problem: the first ones, or the first of each subject."""
    if shots == 0:
        return []
    try:
        source = build(spec, task.SHOTS_FROM, **options)
    except UserError as error:
        raise UserError(f"--shots {shots}: {spec} has no examples to show ({error})") from error
    kept: dict[str, list[Conversation]] = defaultdict(list)
    for row in source:
        subject = row.get("subject", "")
        if len(kept[subject]) < shots:
            kept[subject].append(row)
        elif "subject" not in row:
            break
    for subject, rows in kept.items():
        if len(rows) < shots:
            raise UserError(
                f"--shots {shots}: {spec} has only {len(rows)} examples {subject}".rstrip()
            )
    return [row for rows in kept.values() for row in rows]


def check_task(task: Task, spec: str) -> None:
    """Raise UserError for a task that cannot be measured."""
    if len(task) == 0:
        raise UserError(f"{spec}: the split '{task.split}' is empty; choose another --split")
    if task.eval_type == "generative" and type(task).evaluate is Task.evaluate:
        raise UserError(f"{spec} has no answers to check; leave it out")


@dataclass(frozen=True)
class Asked:
    """A task whose problems a model is asked."""

    task: Task
    examples: Sequence[Conversation]
    """Solved rows, some of which are shown before each problem."""
    tokenizer: Tokenizer
    system: SystemStyle
    cfg: Config
    runtime: Runtime

    @property
    def chosen(self) -> list[int]:
        """Problems to ask, evenly spread over the task, since many tasks are sorted by subject."""
        count = min(len(self.task), self.cfg.max_problems or len(self.task))
        return [k * len(self.task) // count for k in range(count)]

    def settings(self) -> dict[str, Any]:
        """All that a result depends on beside the model."""
        chosen, task, drawn = self.chosen, self.task, self.cfg.answering
        digest = hashlib.sha256(type(task).__name__.encode())
        for conversation in (*self.examples, *(task[i] for i in chosen)):
            digest.update(json.dumps(conversation, sort_keys=True, default=str).encode())
        settings: dict[str, Any] = {
            "split": self.cfg.split,
            "problems": len(chosen),
            "of": len(task),
            "shots": self.cfg.shots,
            "digest": digest.hexdigest(),
            "dtype": str(self.runtime.dtype),
        }
        if task.eval_type == "generative":
            names = ["max_tokens", "temperature", "num_samples"]
            names += ["top_k", "seed"] if drawn.temperature > 0 else []
            settings |= {name: getattr(drawn, name) for name in names}
        return settings

    def shown_before(self, conversation: Conversation) -> list[Conversation]:
        subject = conversation.get("subject")
        return [example for example in self.examples if example.get("subject") == subject]

    def prompt(self, conversation: Conversation, limit: int) -> tuple[list[int], bool]:
        """Render the prompt with the last examples that fit into `limit` tokens.

        Also tells whether an example was left out. Without examples it may be longer than `limit`.
        """
        shown = self.shown_before(conversation)
        for left_out in range(len(shown) + 1):
            turns = [message for example in shown[left_out:] for message in example["messages"]]
            whole = {**conversation, "messages": [*turns, *conversation["messages"]]}
            prompt = self.tokenizer.render_for_completion(whole, self.system)
            if len(prompt) <= limit:
                break
        return prompt, left_out > 0

    def measure(self, model: GPT, label: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Ask all problems over all ranks; returns (result, the problems in order) on every rank.

        Problem i and its samples have random streams of their own. The result therefore depends
        neither on the batch size nor on the number of ranks (up to the rounding of matrix
        products). A problem has the keys "problem" (its number in the task), "right" (number of
        right samples), "truncated" (the prompt was cut or lost examples to fit the context),
        "answers", and more.
        """
        categorical = self.task.eval_type == "categorical"
        ask = self.choose_options if categorical else self.write_answers
        shown: list[str] = []
        with progress_bar(label, 1, hidden=not self.runtime.is_main) as bar:
            mine = ask(model, bar, shown)
        for text in shown:
            self.runtime.print(text)
        found = [one for part in self.runtime.gather_objects(mine) for one in part]
        problems = sorted(found, key=lambda one: int(one["problem"]))
        return self.result(problems), problems

    def result(self, problems: list[dict[str, Any]]) -> dict[str, Any]:
        """Compute the task's accuracy from the results of its problems."""
        task, categorical = self.task, self.task.eval_type == "categorical"
        samples = 1 if categorical else self.cfg.answering.num_samples
        count, hits = len(problems), [int(one["right"]) for one in problems]
        chance = math.fsum(1 / one["options"] for one in problems) / count if categorical else 0.0
        more: dict[str, Any] = {
            "truncated": sum(one["truncated"] for one in problems),
            "eval_type": task.eval_type,
        }
        by_subject: dict[str, list[int]] = defaultdict(list)
        for one in problems:
            if one.get("subject"):
                by_subject[one["subject"]].append(one["right"])
        if by_subject:
            more["by_subject"] = {
                subject: {"correct": sum(right) / samples, "total": len(right)}
                for subject, right in sorted(by_subject.items())
            }
        if task.BY_KIND:
            rows = [task[one["problem"]] for one in problems]
            kinds: dict[str, list[int]] = defaultdict(list)
            for row, right in zip(rows, hits, strict=True):
                kinds[row["kind"]].append(right)
            more["kinds"] = {
                kind: task_result(sum(right) / samples, len(right), 0.0)
                for kind, right in kinds.items()
            }
            places = _in_turn([row["kind"] for row in rows])[:MAX_EXCHANGES]
            more["exchanges"] = [_exchange(rows[place], problems[place]) for place in places]
        if samples == 1:
            return task_result(sum(hits), count, chance, **more)
        more["samples"] = samples
        more["pass_at"] = {
            str(k): math.fsum(pass_at_k(samples, n, k) for n in hits) / count
            for k in self.cfg.answering.pass_at
            if k <= samples
        }
        if "majority" in problems[0]:
            more["majority"] = sum(one["majority"] for one in problems) / count
        interval = list(clustered_interval(hits, samples))
        return task_result(sum(hits) / samples, count, chance, ci=interval, **more)

    def choose_options(self, model: GPT, bar: Bar, shown: list[str]) -> list[dict[str, Any]]:
        """Choose the most likely of the options of this rank's problems."""
        task, runtime, chosen = self.task, self.runtime, self.chosen
        problems: list[dict[str, Any]] = []
        scorer = GPTScorer(model)
        # This is known for all problems without encoding them.
        lengths = [
            sum(
                len(str(message["content"]))
                for one in (task[i], *self.shown_before(task[i]))
                for message in one["messages"]
            )
            for i in chosen
        ]
        blocks = length_blocks(lengths, self.cfg.batch_size)[runtime.rank :: runtime.world_size]
        bar.resize(sum(len(block) for block in blocks))
        for block in blocks:
            conversations = [task[chosen[k]] for k in block]
            prompts, options, cuts = [], [], []
            for conversation in conversations:
                encoded = encode_options(self.tokenizer, conversation["letters"])
                limit = scorer.context_length + 1 - max(len(option) for option in encoded)
                prompt, fewer = self.prompt(conversation, limit)
                prompt, encoded, cut = _crop_chat(prompt, encoded, scorer.context_length)
                prompts.append(prompt)
                options.append(encoded)
                cuts.append(fewer or cut)
            for k, conversation, scored, cut in zip(
                block, conversations, scorer.score(prompts, options), cuts, strict=True
            ):
                values = {
                    letter: option.logprob
                    for letter, option in zip(conversation["letters"], scored, strict=True)
                }
                answer = max(values, key=values.__getitem__)
                right = task.evaluate(conversation, answer)
                problems.append(
                    {
                        "problem": chosen[k],
                        "right": int(right),
                        "options": len(scored),
                        "truncated": cut,
                        "answers": [answer],
                        **_known(conversation),
                        "logprobs": values,
                    }
                )
                if len(shown) < self.cfg.show:
                    chances = ", ".join(f"{key} {math.exp(x):.3f}" for key, x in values.items())
                    verdict = "right" if right else f"wrong: {conversation.get('answer')}"
                    shown.append(
                        _shown(task, chosen[k], conversation, [f"{answer} ({verdict}; {chances})"])
                    )
            bar.set(len(problems))
        return problems

    def write_answers(self, model: GPT, bar: Bar, shown: list[str]) -> list[dict[str, Any]]:
        """Decode answers to this rank's problems; threads judge them, as that may run programs."""
        task, chosen, drawn = self.task, self.chosen, self.cfg.answering
        names = ("temperature", "top_k", "max_tokens", "seed")
        params = SamplingParams(**{name: getattr(drawn, name) for name in names})
        engine = Engine(model, self.tokenizer, max_slots=self.cfg.batch_size)
        mine = chosen[self.runtime.rank :: self.runtime.world_size]
        # A longer prompt is cut, so that the answer has a quarter of the context (or --max-tokens).
        room = min(drawn.max_tokens, max(1, engine.context_length // 4))
        limit = max(1, engine.context_length - room)
        conversations = {i: task[i] for i in mine}
        prompts: dict[int, list[int]] = {}
        truncated: dict[int, bool] = {}
        for i, conversation in conversations.items():
            prompt, fewer = self.prompt(conversation, limit)
            truncated[i] = fewer or len(prompt) > limit
            if len(prompt) > limit:
                end = prompt[len(prompt) - limit + 1 :]
                prompt = [prompt[0], *end] if limit > 1 else prompt[-1:]
            prompts[i] = prompt
        requests: dict[Request, int] = {}
        # The longest prompts come first, so that prompts read together have similar lengths.
        for i in sorted(mine, key=lambda i: (-len(prompts[i]), i)):
            requests[engine.submit(prompts[i], params, drawn.num_samples, index=i)] = i

        bar.resize(len(mine) * drawn.num_samples)
        verdicts: dict[int, dict[int, Future[bool]]] = {i: {} for i in mine}  # by sample
        with ThreadPoolExecutor(thread_name_prefix="judge") as pool:
            while not engine.idle:
                for event in engine.step():
                    if event.finished:
                        i = requests[event.request]
                        verdicts[i][event.sample] = pool.submit(
                            task.evaluate, conversations[i], event.completion.text
                        )
                        bar.advance(1)
        problems = []
        votes = drawn.num_samples > 1 and type(task).vote is not Task.vote
        completed = {i: request.completions for request, i in requests.items()}
        for i, conversation in conversations.items():
            right = [bool(verdicts[i][sample].result()) for sample in sorted(verdicts[i])]
            one: dict[str, Any] = {
                "problem": i,
                "right": sum(right),
                "truncated": truncated[i],
                "answers": [completion.written for completion in completed[i]],
                **_known(conversation),
            }
            if drawn.num_samples > 1:
                one["verdicts"] = right
            if votes:
                cast = [task.vote(conversation, completion.text) for completion in completed[i]]
                one["majority"] = majority(cast, right)
            problems.append(one)
            if len(shown) < self.cfg.show:
                texts = [
                    f"{written.written} ({'right' if verdict else 'wrong'}, "
                    f"{written.finish_reason})"
                    for written, verdict in zip(completed[i], right, strict=True)
                ]
                shown.append(_shown(task, i, conversation, texts))
        return problems


def _known(conversation: Conversation) -> dict[str, Any]:
    """Answer and subject of a problem, if it has them."""
    return {
        key: conversation[key] for key in ("answer", "subject", "kind") if conversation.get(key)
    }


def encode_options(tokenizer: Tokenizer, letters: Sequence[str]) -> list[list[int]]:
    """Encode the options as the assistant would write them.

    If an option has several tokens, all end with `<|assistant_end|>`. Whole answers are compared
    then, and a short one has no advantage over a longer one that begins with it.
    """
    options = [tokenizer.encode(letter) for letter in letters]
    if max(len(option) for option in options) > 1:
        end = tokenizer.special("<|assistant_end|>")
        options = [[*option, end] for option in options]
    return options


def _crop_chat(
    prompt: list[int], options: list[list[int]], context_length: int
) -> tuple[list[int], list[list[int]], bool]:
    """Crop as `crop` does, but keep `<|bos|>` if there is room, as in every trained row."""
    short, fitting, cut = crop(prompt, options, context_length)
    if cut and len(short) > 1:
        short = [prompt[0], *short[1:]]
    return list(short), [list(option) for option in fitting], cut


def majority(votes: Sequence[Any], right: Sequence[bool]) -> bool:
    """True if the answer that most samples gave is right; among equals, the first one counts.

    votes: answer of each sample, or None.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    return bool(counts) and right[votes.index(counts.most_common(1)[0][0])]


def _in_turn(kinds: Sequence[str]) -> list[int]:
    """Order places so that one of each kind comes first, then another of each.

    >>> _in_turn(["a", "a", "a", "b"])
    [0, 3, 1, 2]
    """
    seen: Counter[str] = Counter()
    rounds = []
    for place, kind in enumerate(kinds):
        rounds.append((seen[kind], place))
        seen[kind] += 1
    return [place for _, place in sorted(rounds)]


def _said(row: Conversation) -> list[list[str]]:
    """List [role, text] of each message before the answer."""
    messages = row["messages"]
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return [[m["role"], "".join(part["text"] for part in parts(m))] for m in messages]


def _exchange(row: Conversation, problem: dict[str, Any]) -> dict[str, Any]:
    """Make a record of a conversation without its reference, and of the first answer."""
    return {
        "kind": row["kind"],
        "messages": _said(row),
        "answer": problem["answers"][0],
        "right": bool(problem.get("verdicts", [problem["right"]])[0]),
    }


def _shown(task: Task, index: int, conversation: Conversation, answers: list[str]) -> str:
    """Format a problem for the console; under torchrun rank 0 shows its own problems."""
    lines = [f"{role}: {text}" for role, text in _said(conversation)]
    return "\n".join([f"--- {task.where(index)}", *lines, *(f"answer: {a}" for a in answers)])


def make_table(results: Mapping[str, record.Measurement], title: str) -> Table:
    table = Table(title=title)
    table.add_column("task", no_wrap=True)
    for name in ("accuracy", "95 %", "chance", "centred", "problems"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = {}
    for spec, measured in results.items():
        result = measured["result"]
        notes[spec] = [f"pass@{k} {value:.4f}" for k, value in result.get("pass_at", {}).items()]
        if "majority" in result:
            notes[spec].append(f"majority {result['majority']:.4f}")
        if result["truncated"]:
            notes[spec].append(f"{result['truncated']} truncated")
    if any(notes.values()):
        table.add_column("notes")
    lines = [
        (name, line, measured["settings"]["of"])
        for spec, measured in results.items()
        for name, line in [
            (spec, measured["result"]),
            *((f"  {kind}", one) for kind, one in measured["result"].get("kinds", {}).items()),
        ]
    ]
    for spec, result, whole in lines:
        low, high = result["ci"]
        table.add_row(
            spec,
            f"{result['accuracy']:.4f}",
            f"{low:.3f}-{high:.3f}",
            f"{result['chance']:.3f}",
            f"{result['centered']:.4f}",
            f"{result['total']:,}"
            + (f" of {whole:,}" if spec in results and result["total"] < whole else ""),
            *([", ".join(notes.get(spec, []))] if any(notes.values()) else []),
        )
    return table


if __name__ == "__main__":
    launch(main, Config, __doc__)
