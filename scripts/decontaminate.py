"""Find training documents that share text with the evaluation tasks, and drop them.

Examples:
    python -m scripts.decontaminate --corpus climbmix --task mmlu gsm8k
    python -m scripts.decontaminate --corpus climbmix --drop

A document is contaminated if it has 13 consecutive words in common with a question or an answer
(as in arXiv 2005.14165); case and punctuation are ignored. Questions with options are searched for
in three forms: as the model is asked, as other texts list them, and as the data set's row has them.
A question of 8 to 12 words, options included, is searched for as a whole. The report's "covered"
counts the questions that have 8 words as the model is asked; a document with one of them is always
found. Memory holds the evaluation tasks' words only. The report is written to
report/decontamination-<store>.json under NANOCHAT_BASE_DIR.

The script reads the encoded corpus that training reads, and rewrites it with --drop. Run it after
scripts.tok_encode, and again after that has appended shards. To get the dropped documents back,
delete the store and encode the corpus again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from nanochat import paths
from nanochat.conversation import parts as message_parts
from nanochat.data.hub import open_corpus
from nanochat.data.overlap import Item, NgramIndex, drop_documents, look_through
from nanochat.data.store import TokenStore
from nanochat.data.workers import cpus
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from tasks.common import Conversation, HubTask, Task
from tasks.registry import build, corpus_options

if TYPE_CHECKING:  # the worker processes need no torch, which takes seconds to import
    from nanochat.eval.core import CoreTask
    from nanochat.runtime import Runtime


@dataclass(frozen=True)
class Tasks:
    """Evaluation tasks to search for."""

    task: tuple[str, ...] = ("arc:easy", "arc:challenge", "mmlu", "gsm8k", "humaneval")
    """Evaluation tasks; `--task` alone means none. Generated tasks cannot leak."""
    split: str = "test"
    """Split of the tasks."""
    bundle: Path | None = None
    """Folder of CORE's task files; default: NANOCHAT_BASE_DIR/eval_bundle, if it exists."""
    ngram: int = 13
    """Number of consecutive words that make a match."""


@dataclass(frozen=True)
class Config:
    tasks: Tasks = field(default_factory=Tasks)
    corpus: tuple[str, ...] = ("climbmix",)
    """Encoded corpora to search."""
    store: tuple[Path, ...] = ()
    """Token stores to search instead, of text or conversations."""
    drop: bool = False
    """Write the stores anew without the documents found."""
    workers: int = 0
    """Number of processes; 0: one per CPU."""


def main(cfg: Config, runtime: Runtime) -> dict[str, Any]:
    """Returns the reports by the store's name (nothing on ranks other than 0)."""
    if not runtime.is_main:
        return {}
    sought = cfg.tasks
    if sought.ngram < 1 or cfg.workers < 0:
        raise UserError(
            f"--ngram {sought.ngram} must be at least 1, --workers {cfg.workers} 0 or more"
        )
    folders = cfg.store or [open_corpus(corpus).store_folder("train") for corpus in cfg.corpus]
    stores = [TokenStore.open(folder) for folder in folders]
    options = corpus_options(sought.task, Tokenizer.find(stores[0].meta["tokenizer_hash"]))
    items = list(evaluation_items(sought, runtime, **options))
    if not items:
        raise UserError("there is no evaluation task to look for; name some with --task")
    index = NgramIndex(items, sought.ngram)
    reports = {}
    for store in stores:
        tokenizer = Tokenizer.find(store.meta["tokenizer_hash"])
        report = look_through(store, tokenizer, index, cfg.workers or cpus())
        runtime.console.print(make_table(report))
        share = report["contaminated"] / report["documents"]
        runtime.print(
            f"{store.name}: {report['contaminated']:,} of {report['documents']:,} documents "
            f"({share:.3%}) share {sought.ngram} words with an evaluation task"
        )
        if cfg.drop and report["contaminated"]:
            cleaned = drop_documents(store, tokenizer, report)
            runtime.print(f"{store.folder} has {len(cleaned):,} documents now")
        report["dropped"] = cfg.drop
        path = paths.report_dir() / f"decontamination-{store.name}.json"
        paths.atomic_write(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        runtime.print(f"written to {path}")
        reports[store.name] = report
    return reports


# The evaluation tasks


def evaluation_items(sought: Tasks, runtime: Runtime, **options: Any) -> Iterator[Item]:
    for spec in sought.task:
        yield from task_items(build(spec, sought.split, **options), spec)
    bundle = sought.bundle or paths.eval_bundle_dir()
    if sought.bundle is not None or bundle.is_dir():
        from nanochat.eval.core import load_bundle

        tasks, missing = load_bundle(bundle)
        if missing:
            runtime.print(f"not looked for, since {bundle} lacks them: {', '.join(missing)}")
        for task in tasks:
            yield from core_items(task)
    else:
        runtime.print(f"CORE is not looked for: {bundle} is missing")


def task_items(task: Task, label: str) -> Iterator[Item]:
    """Yield a task's problems: options in every form of `choice_forms`, else messages without tool
    calls, and the rows of a data set as JSON and field by field."""
    for i in range(len(task)):
        conversation = task[i]
        if "choices" in conversation:
            forms = choice_forms(conversation)
            parts = [forms[-1], *conversation["choices"]]
        else:
            parts = [
                "".join(part["text"] for part in message_parts(message) if part["type"] == "text")
                for message in conversation["messages"]
            ]
            forms = parts[:1]
        if isinstance(task, HubTask):
            row = task.rows[i]
            forms.append(json.dumps(row, ensure_ascii=False, default=str))
            parts += [value for value in row.values() if isinstance(value, str)]
        yield Item(label, task.where(i), forms, parts)


def choice_forms(conversation: Conversation) -> list[str]:
    """Write a question with its options as the model is asked, with letters, and without; also the
    question with its right answer."""
    question, letters = conversation["question"], conversation["letters"]
    options = list(zip(letters, conversation["choices"], strict=True))
    return [
        " ".join([question, *(f"{choice} {letter}" for letter, choice in options)]),
        " ".join([question, *(f"{letter}. {choice}" for letter, choice in options)]),
        " ".join([question, *conversation["choices"]]),
        f"{question} {dict(options)[conversation['answer']]}",
    ]


def core_items(task: CoreTask) -> Iterator[Item]:
    """Yield question and right answer as one text, and other answers alone."""
    for i, item in enumerate(task.items):
        if task.kind == "multiple_choice":
            choices = list(item["choices"])
            form, parts = f"{item['query']} {choices.pop(item['gold'])}", choices
        elif task.kind == "schema":
            form, parts = f"{item['context_options'][item['gold']]} {item['continuation']}", []
        else:
            form, parts = f"{item['context']} {item['continuation']}", []
        yield Item(f"CORE {task.label}", f"{task.label} item {i}", [form], [form, *parts])


# The documents


def make_table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{Path(report['store']).name}: {report['ngram']} words in common")
    table.add_column("evaluation task")
    for name in ("items", "covered", "found", "documents"):
        table.add_column(name, justify="right")
    for task, counts in report["tasks"].items():
        table.add_row(task, *(f"{value:,}" for value in counts.values()))
    return table


if __name__ == "__main__":
    from nanochat.cli import launch

    launch(main, Config, __doc__)
