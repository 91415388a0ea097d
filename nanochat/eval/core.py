"""CORE metric, as nanochat's base_eval computes it: 22 few-shot tasks for base models.

The tasks, the number of examples and the centring are those of DataComp-LM (arXiv 2406.11794).
Scores can be compared with nanochat's own. They compare only roughly with the paper's, because of
these differences:
- Each item has a random generator of its own for drawing its examples, and items are shuffled, with
  the seeds below.
- A blank line always separates examples. `continuation_delimiter` of core.yaml separates question
  and answer; its other delimiters are ignored.
- An alternative is scored from the first token in which the alternatives differ. Tokens that all of
  them begin with do not count.

There are three kinds of task:
- multiple_choice: one question, several answers. The answer with the highest mean log-probability
  of its tokens wins.
- schema: several beginnings, one ending. The beginning after which the ending is the most likely
  wins.
- language_modeling: every token of the continuation must be the most likely one.

Each accuracy is centred: guessing is 0, all right is 1. CORE is the mean over the tasks.

A bundle is a folder with `core.yaml` (the tasks), `eval_meta_data.csv` (the random baselines) and
`eval_data/` (a .jsonl file per task).
"""

import csv
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from nanochat.data.files import parse_json
from nanochat.errors import UserError
from nanochat.eval.options import GPTScorer, Ids, Scored, Scorer, crop, length_blocks
from nanochat.eval.results import task_result, wilson_interval
from nanochat.gpt import GPT
from nanochat.progress import progress_bar
from nanochat.runtime import Runtime

BLOCK = 32
"""Number of items that a rank scores at once; they have similar lengths."""
SHUFFLE_SEED = 1337
SHOT_SEED = 1234
"""Seed of drawing examples. Both seeds are nanochat's, so that scores can be compared."""

_FIELDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


class TextEncoder(Protocol):
    """Interface of a tokenizer, as far as CORE needs it."""

    @property
    def bos(self) -> int: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class CoreTask:
    """A task of the bundle; `items` are all its items, shuffled."""

    label: str
    kind: str
    num_fewshot: int
    delimiter: str
    """Text between a question and its answer."""
    chance: float
    """Accuracy of guessing, from 0 to 1."""
    items: list[dict[str, Any]]

    def shots(self, index: int) -> list[dict[str, Any]]:
        """Draw the examples shown before item `index` from all other items."""
        others = [i for i in range(len(self.items)) if i != index]
        drawn = random.Random(SHOT_SEED + index).sample(others, self.num_fewshot)
        return [self.items[i] for i in drawn]

    def texts(self, index: int) -> list[str]:
        """Build the texts to encode for item `index`: one per alternative.

        For language modelling they are the prompt without and with the continuation.
        """
        item, between = self.items[index], self.delimiter
        shown = self.shots(index)
        if self.kind == "multiple_choice":
            head = (
                "".join(f"{s['query']}{between}{s['choices'][s['gold']]}\n\n" for s in shown)
                + f"{item['query']}{between}"
            )
            return [head + choice for choice in item["choices"]]
        if self.kind == "schema":
            head = "".join(
                f"{s['context_options'][s['gold']]}{between}{s['continuation']}\n\n" for s in shown
            )
            tail = f"{between}{item['continuation']}"
            return [head + context + tail for context in item["context_options"]]
        head = "".join(f"{s['context'].strip()}{between}{s['continuation']}\n\n" for s in shown)
        head += f"{item['context'].strip()}{between}"
        # The trailing blank is left out, since it belongs to the continuation's first token.
        return [head.strip(), head + item["continuation"]]

    def problems(self, rows: Sequence[Ids]) -> tuple[list[Ids], list[list[Ids]]]:
        """Split an item's encoded texts into prompts and the options to score after each."""
        if self.kind == "multiple_choice":
            # The prompt is what all texts begin with; at least one token of each text is scored.
            start = min(_common_prefix(rows), min(len(row) for row in rows) - 1)
            return [rows[0][:start]], [[row[start:] for row in rows]]
        if self.kind == "schema":
            shared = _common_prefix([row[::-1] for row in rows])
            length = max(1, min(shared, min(len(row) for row in rows) - 1))
            return [row[:-length] for row in rows], [[row[-length:]] for row in rows]
        start = min(_common_prefix(rows), len(rows[1]) - 1)
        return [rows[1][:start]], [[rows[1][start:]]]

    def is_correct(self, index: int, scored: Sequence[Sequence[Scored]]) -> bool:
        """True if the item is answered correctly, judged by the scores of its `problems`."""
        if self.kind == "language_modeling":
            return scored[0][0].greedy
        alternatives = [s for options in scored for s in options]
        means = [s.logprob / s.num_tokens for s in alternatives]
        return bool(means.index(max(means)) == self.items[index]["gold"])


def evaluate_core(
    model: GPT | Scorer,
    tokenizer: TextEncoder,
    bundle: Path,
    runtime: Runtime,
    max_per_task: int | None = None,
) -> dict[str, Any]:
    """Score the model on every task whose file is in the bundle; every rank must call this.

    max_per_task: number of items per task, for a quick look; they are items of the full evaluation,
    with the same few-shot examples.

    Returns {"core": score}, or {"core_partial": score} if files are missing. Further keys are "ci"
    (95 % interval of the score), "tasks" {label: task_result and its settings}, "num_tasks" (done),
    "num_tasks_total", "missing" (labels), "max_per_task" and "seconds". The ranks share the items;
    every rank returns the same.
    """
    if max_per_task is not None and max_per_task < 1:
        raise UserError(f"--max-per-task {max_per_task} must be at least 1")
    began = time.monotonic()
    tasks, missing = load_bundle(Path(bundle))
    if missing:
        runtime.print(
            f"CORE: {len(missing)} of {len(missing) + len(tasks)} task files are missing in "
            f"{bundle}, so the score is partial: {', '.join(missing)}"
        )
    scorer = GPTScorer(model) if isinstance(model, GPT) else model

    plans = []  # (task, its blocks of items, characters read per item)
    for task in tasks:
        count = min(len(task.items), max_per_task or len(task.items))
        sizes = [sum(map(len, _strings(item))) for item in task.items]
        per_shot = sum(sizes) / len(sizes)
        costs = [size + task.num_fewshot * per_shot for size in sizes[:count]]
        plans.append((task, length_blocks([round(cost) for cost in costs], BLOCK), costs))
    work = sum(
        plan[2][i]
        for plan in plans
        for block in plan[1][runtime.rank :: runtime.world_size]
        for i in block
    )
    counts = torch.zeros(len(tasks), 2, dtype=torch.int64)  # correct, cropped
    with progress_bar("CORE", work, hidden=not runtime.is_main) as bar:
        for number, (task, blocks, costs) in enumerate(plans):
            for block in blocks[runtime.rank :: runtime.world_size]:
                correct, cropped = _score_block(task, block, scorer, tokenizer)
                counts[number] += torch.tensor([correct, cropped])
                bar.advance(sum(costs[i] for i in block))
    counts = runtime.all_reduce_sum(counts.to(runtime.device)).cpu()

    results = {}
    for (task, _, costs), (correct, cropped) in zip(plans, counts.tolist(), strict=True):
        results[task.label] = task_result(
            correct,
            len(costs),
            task.chance,
            kind=task.kind,
            num_fewshot=task.num_fewshot,
            cropped=cropped,
        )
    score = math.fsum(result["centered"] for result in results.values()) / len(results)
    # Tasks are independent, so the variances of the centred accuracies add up. They come from
    # Wilson's interval, which is not 0 for a task with all items right or all wrong.
    variance = 0.0
    for result in results.values():
        low, high = wilson_interval(result["correct"], result["total"])
        variance += ((high - low) / 2 / (1 - result["chance"])) ** 2
    half = math.sqrt(variance) / len(results)
    return {
        "core_partial" if missing else "core": score,
        "ci": [score - half, score + half],
        "tasks": results,
        "num_tasks": len(results),
        "num_tasks_total": len(results) + len(missing),
        "missing": missing,
        "max_per_task": max_per_task,
        "seconds": time.monotonic() - began,
    }


def describe_core(result: dict[str, Any]) -> str:
    """Format the result as a text table."""
    lines = [
        f"{'task':34} {'accuracy':>8}  {'95 % interval':15} {'chance':>6} {'centred':>8}  items"
    ]
    for label, task in result["tasks"].items():
        low, high = task["ci"]
        note = f", {task['cropped']} cropped" if task["cropped"] else ""
        lines.append(
            f"{label:34} {task['accuracy']:8.4f}  {low:.4f} - {high:.4f} {task['chance']:6.3f} "
            f"{task['centered']:8.4f}  {task['total']}{note}"
        )
    low, high = result["ci"]
    interval = f"95 % interval {low:.4f} to {high:.4f}"
    if "core" in result:
        lines.append(f"CORE {result['core']:.4f} ({interval})")
    else:
        lines.append(
            f"CORE, partial: {result['core_partial']:.4f} over {result['num_tasks']} of "
            f"{result['num_tasks_total']} tasks ({interval}); missing: "
            f"{', '.join(result['missing'])}"
        )
    if result["max_per_task"] is not None:
        lines.append(f"a quick look: at most {result['max_per_task']} items per task")
    return "\n".join(lines)


def _score_block(
    task: CoreTask, block: Sequence[int], scorer: Scorer, tokenizer: TextEncoder
) -> tuple[int, int]:
    """Score some items; returns (items right, items whose prompt was cut)."""
    texts = [task.texts(i) for i in block]
    encoded = iter(
        tokenizer.encode_batch([text for alternatives in texts for text in alternatives])
    )
    prompts: list[Ids] = []
    options: list[Sequence[Ids]] = []
    sizes, cropped = [], 0
    for alternatives in texts:
        rows = [[tokenizer.bos, *next(encoded)] for _ in alternatives]
        was_cut = False
        item_prompts, item_options = task.problems(rows)
        for prompt, choices in zip(item_prompts, item_options, strict=True):
            short_prompt, short_choices, cut = crop(prompt, choices, scorer.context_length)
            prompts.append(short_prompt)
            options.append(short_choices)
            was_cut |= cut
        sizes.append(len(item_prompts))
        cropped += was_cut
    scored = scorer.score(prompts, options)
    correct, position = 0, 0
    for i, size in zip(block, sizes, strict=True):
        correct += task.is_correct(i, scored[position : position + size])
        position += size
    return correct, cropped


def _common_prefix(rows: Sequence[Ids]) -> int:
    """Number of tokens that all rows begin with."""
    shortest = min(rows, key=len)
    for i, token in enumerate(shortest):
        if any(row[i] != token for row in rows):
            return i
    return len(shortest)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _strings(part)]


# The bundle


def load_bundle(bundle: Path) -> tuple[list[CoreTask], list[str]]:
    """Load the tasks whose files exist; also returns the labels of the others."""
    try:
        config = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))
        with (bundle / "eval_meta_data.csv").open(encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(file)}
        entries = config["icl_tasks"]
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is missing; a bundle folder holds core.yaml, eval_meta_data.csv "
            "and eval_data/"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{bundle}: cannot read the list of tasks ({error!r})") from error
    tasks, missing = [], []
    for entry in entries:
        label, kind = entry["label"], entry["icl_task_type"]
        if kind not in _FIELDS:
            raise UserError(
                f"{bundle}/core.yaml: {label} is of type '{kind}', not one of {', '.join(_FIELDS)}"
            )
        if label not in baselines:
            raise UserError(f"{bundle}/eval_meta_data.csv has no random baseline for {label}")
        try:
            chance = float(baselines[label]) / 100
        except (TypeError, ValueError):  # None, if the row is too short
            chance = math.nan
        if not 0 <= chance < 1:
            raise UserError(
                f"{bundle}/eval_meta_data.csv: the random baseline '{baselines[label]}' of {label} "
                "must be a percentage from 0 to below 100"
            )
        path = bundle / "eval_data" / entry["dataset_uri"]
        if not path.is_file():
            missing.append(label)
            continue
        items = _read_items(path, kind)
        num_fewshot = int(entry["num_fewshot"][0])
        if num_fewshot >= len(items):
            raise UserError(
                f"{path} has {len(items)} items, too few for {num_fewshot} examples before each"
            )
        random.Random(SHUFFLE_SEED).shuffle(items)
        tasks.append(
            CoreTask(
                label=label,
                kind=kind,
                num_fewshot=num_fewshot,
                delimiter=entry.get("continuation_delimiter", " "),
                chance=chance,
                items=items,
            )
        )
    if not tasks:
        raise UserError(f"{bundle}/eval_data has none of the {len(missing)} files in core.yaml")
    return tasks, missing


def _read_items(path: Path, kind: str) -> list[dict[str, Any]]:
    items = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                item = parse_json(line, first=number == 1)
            except UserError as error:
                raise UserError(f"{path} line {number}: {error}") from None
            for name, wanted in _FIELDS[kind].items():
                if not isinstance(item, dict) or not isinstance(item.get(name), wanted):
                    raise UserError(f"{path} line {number}: '{name}' must be a {wanted.__name__}")
            if kind != "language_modeling":
                alternatives = item.get("choices") or item.get("context_options") or []
                if not all(isinstance(text, str) for text in alternatives):
                    raise UserError(f"{path} line {number}: every alternative must be a str")
                if not 0 <= item["gold"] < len(alternatives):
                    raise UserError(
                        f"{path} line {number}: gold {item['gold']} is none of its "
                        f"{len(alternatives)} alternatives"
                    )
            items.append(item)
    if not items:
        raise UserError(f"{path} has no items")
    return items
