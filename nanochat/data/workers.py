"""Worker processes that run one function on many jobs."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

from nanochat.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
State = TypeVar("State")


class Stopped(Exception):
    """Raised in a worker when another one failed or the program is ending."""


def in_processes(
    work: Callable[[State, Job], Result],
    state: State,
    jobs: Sequence[Job],
    workers: int,
    remedy: str,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Run `work(state, job)` for every job in `workers` processes; yields results in job order.

    `work` must be a function of a module. `state` is pickled once per process. `tick` is called at
    least twice a second. If a job fails, the others end at their next `check_stopped`, and its
    error is raised here. If a process dies, UserError is raised with the `remedy`.
    """
    # Processes are spawned: forking one in which torch has started threads can deadlock.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    failed: list[Future[Result]] = []

    def note(future: Future[Result]) -> None:
        if not future.cancelled() and future.exception():
            failed.append(future)

    # The executor notices a worker that dies; multiprocessing.Pool does not.
    with ProcessPoolExecutor(
        min(workers, len(jobs)), context, _start_worker, (work, state, stop)
    ) as pool:
        pending = deque(pool.submit(_work, job) for job in jobs)
        for future in pending:
            future.add_done_callback(note)
        try:
            while pending:
                if failed:
                    failed[0].result()
                if wait([pending[0]], timeout=0.5).done:
                    yield pending.popleft().result()
                tick()
        except BrokenExecutor as error:
            raise UserError(f"a process died, most likely for want of memory; {remedy}") from error
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def cpus() -> int:
    """Number of processors that this process may use, as `hardware.cpus` counts them."""
    from nanochat import hardware  # not above: worker processes need no torch

    return hardware.cpus()


_worker: tuple[Callable[[Any, Any], Any], Any, Any]
"""Function, state and stop event of this worker process."""


def _start_worker(*everything: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    _worker = everything


def _work(job: Any) -> Any:
    work, state, _ = _worker
    return work(state, job)


def check_stopped() -> None:
    """Raise Stopped in a worker that should end; do nothing in any other process."""
    if "_worker" in globals() and _worker[2].is_set():
        raise Stopped
