"""Worker processes: the same function on many jobs, each process set up once."""

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
    """Raised in a worker: another one failed, or the program is ending."""


def in_processes(
    work: Callable[[State, Job], Result],
    state: State,
    jobs: Sequence[Job],
    workers: int,
    remedy: str,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """`work(state, job)` for every job in `workers` processes; the results in the jobs' order.

    `work` is a module's function. `state` is pickled once for each process. `tick` is called at
    least twice a second. A failing job ends the others at their next `check_stopped`, and its
    error is raised here. Raises UserError with the `remedy` if a process dies.
    """
    # spawn: forking a process in which torch has started its threads can deadlock.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    failed: list[Future[Result]] = []

    def note(future: Future[Result]) -> None:
        if not future.cancelled() and future.exception():
            failed.append(future)

    # Unlike multiprocessing.Pool, the executor notices a worker that dies.
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


_worker: tuple[Callable[[Any, Any], Any], Any, Any]
"""What this process works with: the function, its state and the stop event."""


def _start_worker(*everything: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    _worker = everything


def _work(job: Any) -> Any:
    work, state, _ = _worker
    return work(state, job)


def check_stopped() -> None:
    """Raise Stopped in a worker that is to end; does nothing in any other process."""
    if "_worker" in globals() and _worker[2].is_set():
        raise Stopped
