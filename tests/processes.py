"""Processes for tests: ranks of a job, and runs that get killed.

A fork server imports torch once; a child then starts in a fraction of a second and, unlike a fork
of the test process, has none of its threads or state.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat import runtime
from nanochat.runtime import Runtime

TIMEOUT = 120.0

if sys.platform == "win32":
    context: Any = multiprocessing.get_context("spawn")
else:
    context = multiprocessing.get_context("forkserver")
    # What a run imports, some of it only when it saves.
    context.set_forkserver_preload(
        [
            "scripts.base_train",
            "scripts.chat_sft",
            "scripts.chat_rl",
            "scripts.tok_train",
            "scripts.tok_encode",
            "torch.distributed.checkpoint.hf_storage",
            "torch.distributed.checkpoint.state_dict_saver",
            "torch.distributed.fsdp",
            "torch.distributed.tensor",
        ]
    )


def start(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a process of its own."""
    process = context.Process(target=_quiet, args=(function, args), daemon=True)
    process.start()
    return process


def finish(process: Any) -> int:
    """Wait for a process of `start`; its exit code, -9 where it was killed."""
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{process.name} still runs after {TIMEOUT} s")
    return int(process.exitcode)


def _quiet(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _like_conftest()
    function(*args)


def _like_conftest() -> None:
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """function(runtime, *args) on every rank of a gloo job; what each returned, or AssertionError.

    A rank that fails ends the others, as torchrun does.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank,
                args=(rank, world_size, Path(folder) / "store", theirs, function, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            return _collect(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + TIMEOUT
    while len(results) < len(pipes):
        for rank, pipe in enumerate(pipes):
            if rank in results or not pipe.poll(0.005):
                continue
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = value
        assert time.monotonic() < end, f"only ranks {sorted(results)} finished in {TIMEOUT} s"
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int,
    world_size: int,
    store: Path,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    _like_conftest()
    try:
        result = True, function(_join(rank, world_size, store), *args)
    except BaseException:
        result = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(result))
    if world_size > 1 and result[0]:
        dist.barrier()  # nobody leaves while others still talk to it
    os._exit(0)


def _join(rank: int, world_size: int, store: Path) -> Runtime:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world_size)):
        os.environ[name] = str(value)
    if world_size > 1:
        # A file instead of a port: tests never compete for one.
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
    return Runtime(torch.device("cpu"), torch.float32, rank, rank, world_size, runtime.Console())
