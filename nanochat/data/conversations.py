"""Token stores of conversations, rendered once with their loss masks and roles."""

import hashlib
import json
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from rich.console import Console

from nanochat import conversation, paths
from nanochat.data.store import VERSION, StoreView, StoreWriter, TokenStore, merge_stores
from nanochat.data.workers import cpus, in_processes
from nanochat.errors import BadRows, UserError
from nanochat.progress import progress_bar
from nanochat.tokenizer import SystemStyle, Tokenizer, pack_mask

_PARALLEL_FROM = 20_000
"""Number of rows from which worker processes save more time than it takes to start them."""
_SLICE_ROWS = 4_000


class ConversationTask(Protocol):
    """Interface that `conversations_store` needs of a task; `tasks.common.Task` has it."""

    name: str
    split: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def fingerprint(self) -> str: ...


LongConversations = Literal["truncate", "split", "drop"]


class _Settings(NamedTuple):
    """Settings of rendering, in a form that can be sent to worker processes."""

    system: SystemStyle
    bad_rows: BadRows


def conversations_store(
    task: ConversationTask,
    tokenizer: Tokenizer,
    *,
    system: SystemStyle = "tokens",
    bad_rows: BadRows = "error",
    num_workers: int | None = None,
    folder: Path | None = None,
) -> TokenStore:
    """Open the store of a task's rendered conversations; build it if it is missing or outdated.

    Each conversation is validated here, once. A bad one raises `UserError`, which names task,
    split, row and mistake. With `bad_rows="skip"` it is left out, counted in `meta["skipped"]` and
    reported on the console. Conversations of any length are stored; `fit_conversations` cuts them
    without another store.

    By default the folder is `stores_dir()/<task>-<split>-<digest>`. The digest covers tokenizer and
    content, so that runs with other settings do not overwrite each other's stores. Tasks of 20,000
    rows and more are rendered by `num_workers` processes (default: one per CPU); their number never
    changes the result. With several ranks, call this on one rank of each machine first, then, after
    a barrier, on the others.
    """
    where = f"{task.name}/{task.split}"
    if len(task) == 0:
        raise UserError(f"{where} has no rows; check the split's name and the task's files")
    content = json.dumps([task.fingerprint(), system, VERSION])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    if folder is None:
        digest = hashlib.sha256((tokenizer.hash + fingerprint).encode()).hexdigest()[:10]
        folder = paths.stores_dir() / f"{paths.safe_name(f'{task.name}-{task.split}')}-{digest}"
    settings = _Settings(system, bad_rows)
    made_from: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "fingerprint": fingerprint,
    }

    def current() -> TokenStore | None:
        store = TokenStore.open_if_current(folder, tokenizer.hash, fingerprint)
        return store if store and (bad_rows == "skip" or not store.meta.get("skipped")) else None

    store = current()
    if store is None:
        with paths.lock(folder, f"rendering {where}"):
            store = current() or _build(folder, task, tokenizer, settings, made_from, num_workers)
    return store


def _build(
    folder: Path,
    task: ConversationTask,
    tokenizer: Tokenizer,
    settings: _Settings,
    made_from: dict[str, Any],
    num_workers: int | None,
) -> TokenStore:
    where = f"{task.name}/{task.split}"
    workers = num_workers or cpus()
    if len(task) < _PARALLEL_FROM or workers == 1 or not _can_pickle(task):
        with StoreWriter(folder, with_mask=True, **made_from) as writer:
            skipped = _render_rows(writer, task, tokenizer, range(len(task)), settings, where)
            _note_skipped(writer.extra, skipped, where, writer.num_documents)
        return TokenStore.open(folder, tokenizer.hash)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent
    ) as parts:
        starts = range(0, len(task), _SLICE_ROWS)
        jobs = [
            (Path(parts) / f"{start:012d}", start, min(start + _SLICE_ROWS, len(task)))
            for start in starts
        ]
        skipped = []
        state = (task, tokenizer, settings, made_from)
        with progress_bar(where, len(jobs)) as bar:
            for reasons in in_processes(_render_slice, state, jobs, workers, "free some of it"):
                skipped += reasons
                bar.advance(1)
        extra: dict[str, Any] = {}
        _note_skipped(extra, skipped, where, len(task) - len(skipped))
        return merge_stores(folder, [job[0] for job in jobs], extra=extra, **made_from)


def fit_conversations(
    store: TokenStore, sequence_length: int, how: LongConversations
) -> tuple[TokenStore, str]:
    """Handle conversations longer than a row; returns the store to use and a note for the user.

    A row has sequence_length + 1 tokens. `truncate` keeps the beginning of a longer conversation.
    `drop` leaves it out, and raises UserError if none is left. `split` lets the packer cut it into
    pieces; the later pieces are trained on without the earlier ones. The note is empty if all
    conversations fit.
    """
    limit = sequence_length + 1
    lengths = store.lengths(np.arange(len(store)))
    longer = lengths[lengths > limit]
    if not len(longer):
        return store, ""
    lost = int((longer - (limit if how != "drop" else 0)).sum())
    share = f"{len(longer):,} of {len(lengths):,} conversations are longer than {limit:,} tokens"
    done = {
        "truncate": "cut off behind the row",
        "split": "trained on without the beginning of their conversation",
        "drop": "left out with them",
    }[how]
    note = (
        f"{share}: {lost:,} tokens ({lost / store.num_tokens:.1%}) are {done} "
        f"(--long-conversations {how})"
    )
    if how == "split":
        return store, note
    kept = np.flatnonzero(lengths <= limit) if how == "drop" else np.arange(len(lengths))
    fitted = StoreView(store, kept, limit)
    if not len(fitted):
        raise UserError(
            f"{store.name}: {share}, so none is left with --long-conversations drop; choose a "
            "longer context, truncate or split"
        )
    return fitted, note


def _render_rows(
    writer: StoreWriter,
    task: ConversationTask,
    tokenizer: Tokenizer,
    rows: range,
    settings: _Settings,
    label: str | None = None,
) -> list[str]:
    """Validate, render and write `rows`; show a progress bar if there is a label.

    Returns the errors of the skipped rows.
    """
    skipped = []
    for i in _with_bar(rows, label) if label else rows:
        where = f"{task.name}/{task.split} row {i}"
        try:
            row = task[i]
            conversation.validate(row, where)
            ids, mask, roles = tokenizer.render_roles(row, system=settings.system)
        except UserError as error:
            reason = str(error) if where in str(error) else f"{where}: {error}"
            if settings.bad_rows == "error":
                raise UserError(f"{reason} (or skip such rows with --bad-rows skip)") from error
            skipped.append(reason)
            continue
        writer.add(ids, pack_mask(mask, roles))
    return skipped


def _with_bar(rows: range, label: str) -> Iterator[int]:
    with progress_bar(label, len(rows)) as bar:
        for i in rows:
            yield i
            if i % 100 == 99:
                bar.advance(100)


def _note_skipped(extra: dict[str, Any], skipped: list[str], where: str, kept: int) -> None:
    if not skipped:
        return
    if kept == 0:
        raise UserError(f"{where}: all {len(skipped)} rows are bad; the first: {skipped[0]}")
    extra["skipped"] = len(skipped)
    extra["first_skipped"] = skipped[:5]
    Console(stderr=True).print(
        f"{where}: skipped {len(skipped)} of {kept + len(skipped)} rows; the first: {skipped[0]}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _can_pickle(task: object) -> bool:
    try:
        pickle.dumps(task)
    except Exception:  # pickling may raise anything; one process does the work then
        return False
    return True


_State = tuple[ConversationTask, Tokenizer, _Settings, dict[str, Any]]


def _render_slice(state: _State, job: tuple[Path, int, int]) -> list[str]:
    folder, start, stop = job
    task, tokenizer, settings, made_from = state
    with StoreWriter(folder, with_mask=True, **made_from) as writer:
        return _render_rows(writer, task, tokenizer, range(start, stop), settings)
