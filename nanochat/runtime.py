"""Device, dtype, ranks, process group and seeds; the only reader of RANK, LOCAL_RANK, WORLD_SIZE.

`start()` is called once per process. A run under torchrun always gets a process group, on CPUs too
(gloo): a loader that shards by rank beside an optimizer that believes in one rank would let the
replicas drift apart without a word.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.rendezvous import rendezvous

from nanochat.attention import activate_flash_attention
from nanochat.errors import UserError
from nanochat.hardware import Machine, machine_memory, tune_cpu

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""For a collective to end, and for all ranks to come."""
TIME_IS_UP = 75
"""Exit status of a run that `--max-hours` stopped; a signal N gives 128 + N, as in a shell."""
LAST_SAVE = 30.0
"""Seconds a failing rank gives a checkpoint that is being written."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Runtime:
    """One rank's view of the job."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    console: Console = field(default_factory=Console)
    stop_signal: bool = False
    """SIGTERM or SIGINT came, or the time is up, on this rank."""
    stop_requested: bool = False
    """Some rank's `stop_signal`, agreed on by all in train_step: stop at the end of this step."""
    exit_code: int = 0
    """Status with which the process ends after a run that was stopped."""
    alarm: "Alarm | None" = None
    """Between the ranks of a job that `start` joined."""
    local_world_size: int = 1
    """Ranks that share this machine."""
    memory_advice: str = "use a machine with more memory, or a smaller model"
    """What to do when memory runs out; a training stage that is planned knows better."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *args: Any) -> None:
        """Print on rank 0 only, without interpreting the text as markup."""
        if self.is_main:
            # A reader that left (`| head`), or a character its encoding lacks, must not end a run.
            with suppress(OSError, ValueError, SystemExit):  # rich exits on a broken pipe
                self.console.print(*args, markup=False, highlight=False, soft_wrap=True)

    def stop(self, exit_code: int) -> None:
        """Save and stop at the end of this step, with that exit status."""
        self.stop_signal, self.exit_code = True, exit_code

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns the tensor."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(...) on each rank -> (world_size, ...) on every rank."""
        if self.world_size == 1:
            return tensor[None]
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Each rank's `value`, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def in_turns(self, build: Callable[[], T]) -> T:
        """`build()` on rank 0, then on the first rank of each other machine, then on the rest.

        So a file that the first one writes and the others then find is written once, be the file
        system shared between machines or not.
        """
        result: list[T] = []
        for turn in (self.is_main, self.local_rank == 0, True):
            if turn and not result:
                result.append(build())
            self.barrier()
        return result[0]

    def machine(self) -> Machine:
        """What plans are made for; all ranks call it."""
        return Machine(self.device.type, self.dtype, self.world_size, self.memory_limit())

    def memory_limit(self) -> int | None:
        """Bytes that every rank may plan with, None where that is not known; all ranks call it.

        The least of any rank's 90 % of a GPU, or share of 80 % of a machine: ranks that plan
        differently would wait for each other forever. Never what is free at the moment, with which
        a resumed run would not be the one that was interrupted.
        """
        if self.device.type == "cuda":
            limit = int(0.9 * torch.cuda.get_device_properties(self.device).total_memory)
        elif self.device.type == "cpu":
            limit = int(0.8 * (machine_memory() or 0)) // self.local_world_size
        else:
            limit = 0
        if self.world_size > 1:
            least = torch.tensor(limit, device=self.device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            limit = int(least.item())
        return limit or None

    def synchronize(self) -> None:
        """Wait for the device's queue, so that a clock read next is honest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def watch_signals(self) -> None:
        """Turn the first SIGTERM or SIGINT into `stop_signal`; a second SIGINT interrupts."""

        def handler(number: int, frame: Any) -> None:
            if self.alarm and self.alarm.leaving.locked():
                return  # torchrun ends the others once one has failed
            if self.stop_signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop(128 + number)
            self.print("stopping: saving at the end of this step (press Ctrl-C again to abort)")

        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, handler)

    def close(self) -> None:
        if self.alarm:
            self.alarm.close()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def watch_parent(runtime: Runtime, patience: float = 300.0, poll: float = 1.0) -> None:
    """End this rank when the launcher that started it is gone, as after SIGTERM: save, then stop.

    A launcher that is killed tells nobody, and its ranks would train on beside the next start.
    After `patience` more seconds the process is ended wherever it is.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(poll)
        print(
            f"error: rank {runtime.rank}: the launcher (process {launcher}) is gone; saving and "
            "stopping",
            file=sys.stderr,
            flush=True,
        )
        runtime.stop(128 + signal.SIGTERM)
        time.sleep(patience)
        _exit()

    threading.Thread(target=watch, name="parent", daemon=True).start()


class Alarm:
    """Tells the reason of a job's first failure to all of its ranks, through the job's store.

    A rank that failed would otherwise leave the others in a collective: gloo's break with an error
    that says nothing of the reason, NCCL's wait for a timeout. Therefore a thread of every rank
    looks for the reason and ends its process.
    """

    KEY = "nanochat/failure"
    POLL = 0.5
    LINGER = 1.0
    """Seconds the failed rank stays, so that the others learn the reason before it is gone (its
    process may host the store) and a launcher sees it leave first, though not much later."""

    def __init__(self, rank: int, local_rank: int, world_size: int):
        self.rank, self.local_rank = rank, local_rank
        # A connection of its own: another thread may be waiting on the process group's.
        self.store = job_store(rank, world_size)
        self.leaving = threading.Lock()
        """Held by the thread that ends the process."""
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="alarm", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """The job went well."""
        self.closed.set()
        self.thread.join()

    def fail(self, error: BaseException, details: str = "") -> NoReturn:
        """End this process because of `error`, with status 1 and without waiting for collectives.

        The first rank of the job that fails says why; `details` (a traceback) come before.
        """
        self.leaving.acquire()
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if _is_lost_connection(error):
            # The others may be gone because of a reason that is still to be read.
            end = time.monotonic() + 2 * self.LINGER
            while self._reason() is None and time.monotonic() < end:
                time.sleep(0.1)
            details += f"{text}\n"
            text = (
                "a collective failed, probably since another rank was killed: the last lines of "
                "its own output say why"
            )
            if not os.environ.get("NANOCHAT_TRACEBACK"):
                details = ""
        reason = self._reason(json.dumps({"rank": self.rank, "text": text[:2000]}))
        if reason is not None and reason["rank"] != self.rank:
            self._leave(reason)
        print(f"{details}error: rank {self.rank}: {text}", file=sys.stderr, flush=True)
        # torchrun quotes this file at the end of its own report.
        if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            message = {"message": f"rank {self.rank}: {text}", "timestamp": int(time.time())}
            Path(summary).write_text(json.dumps(message))
        end = time.monotonic() + self.LINGER
        _finish_threads()
        time.sleep(max(0.0, end - time.monotonic()))
        _exit()

    def _watch(self) -> None:
        while not self.closed.wait(self.POLL):
            reason = self._reason()
            if reason is not None and self.leaving.acquire(blocking=False):
                self._leave(reason)

    def _reason(self, ours: str | None = None) -> dict[str, Any] | None:
        """What the first rank said that failed; `ours` if nobody did before."""
        try:
            if ours is not None:
                return dict(json.loads(self.store.compare_set(self.KEY, "", ours)))
            return (
                dict(json.loads(self.store.get(self.KEY))) if self.store.check([self.KEY]) else None
            )
        except (RuntimeError, ValueError):  # the store went with the rank that hosted it
            return None

    def _leave(self, reason: dict[str, Any]) -> NoReturn:
        if self.local_rank == 0:  # once per machine
            print(
                f"error: rank {self.rank} stops, since rank {reason['rank']} failed: "
                f"{reason['text']}",
                file=sys.stderr,
                flush=True,
            )
        end = time.monotonic() + 1.5 * self.LINGER
        _finish_threads()
        time.sleep(max(0.0, end - time.monotonic()))
        _exit()


def job_store(rank: int, world_size: int) -> Any:
    """A new connection to the store through which the job's ranks find each other."""
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives a restart of the workers: what the ranks of the last attempt
        # wrote must not be read as this one's (torch 2.13 hangs in that case).
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        return dist.PrefixStore(f"attempt_{attempt}", store)  # type: ignore[attr-defined]
    return store


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another rank."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _finish_threads() -> None:
    """Let the checkpoint writer finish: the writers of all ranks still run."""
    end = time.monotonic() + LAST_SAVE
    for thread in threading.enumerate():
        if (
            thread not in (threading.current_thread(), threading.main_thread())
            and not thread.daemon
        ):
            thread.join(max(0.0, end - time.monotonic()))


def _exit() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def single(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Runtime:
    """A one-process runtime for tests and notebooks; reads no environment."""
    return Runtime(torch.device(device), dtype)


def start(device: str = "auto", dtype: str = "auto") -> Runtime:
    """Choose device and dtype, join the process group, size the thread pool.

    Raises UserError for a device this machine does not have.
    """
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        # Batches of other lengths then leave no gaps. Read when the allocator is first used.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    chosen = choose_device(device, local_rank)
    if chosen.type == "cpu":
        tune_cpu(local_world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
        activate_flash_attention(chosen)
    chosen_dtype = best_dtype(chosen) if dtype == "auto" else DTYPES[dtype]
    alarm = None
    if world_size > 1:
        try:
            if not dist.is_initialized():
                dist.init_process_group(
                    "nccl" if chosen.type == "cuda" else "gloo",
                    store=job_store(rank, world_size),
                    rank=rank,
                    world_size=world_size,
                    timeout=TIMEOUT,
                    device_id=chosen if chosen.type == "cuda" else None,
                )
            alarm = Alarm(rank, local_rank, world_size)
        except (dist.DistError, RuntimeError) as error:
            raise UserError(
                f"rank {rank} of {world_size} did not meet the others: one of them ended before, "
                f"or did not come within {TIMEOUT}; its own output says why. Start the job again "
                "(NANOCHAT_TRACEBACK=1 shows what torch said)"
            ) from error
    started = Runtime(
        chosen,
        chosen_dtype,
        rank,
        local_rank,
        world_size,
        alarm=alarm,
        local_world_size=local_world_size,
    )
    if world_size > 1:
        watch_parent(started)
    return started


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` prefers CUDA, then Apple's MPS, then the CPU.

    Raises UserError where the machine has a GPU that torch cannot use: training on the CPU instead
    would be a costly surprise.
    """
    has_mps = torch.backends.mps.is_available()
    if name in ("auto", "cuda") and not torch.cuda.is_available() and (driver := _gpu_driver()):
        raise UserError(_no_cuda(driver))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    if name == "mps" and not has_mps:
        raise UserError("--device mps: this machine has no MPS device; use --device cpu")
    if name not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: choose one of auto, cpu, cuda, mps")
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; "
                "start torchrun with --nproc_per_node set to the number of GPUs"
            )
        _check_architecture(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(name)


OTHER_BUILD = (
    "install torch's build for CUDA 12.6 (cu126 in its installation guide; drivers from 525, GPUs "
    "from the GTX 900 and V100 on) into .venv"
)


def _gpu_driver() -> str | None:
    """The NVIDIA driver's version, "of unknown version" where only a device is seen, else None.

    None too where CUDA_VISIBLE_DEVICES hides all GPUs: then the CPU is what was asked for.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return None
    found = "of unknown version" if Path("/dev/nvidia0").exists() else None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # not installed, or it hangs
        return found
    lines = said.stdout.split("\n") if said.returncode == 0 else []
    return lines[0].strip() if lines and lines[0].strip() else found


def _no_cuda(driver: str) -> str:
    """What to do where a driver is there and torch sees no CUDA."""
    cuda = torch.version.cuda
    has = f"this machine has an NVIDIA GPU (driver {driver}), which torch {torch.__version__} "
    if cuda is None:
        return (
            f"{has}cannot use: it is built without CUDA. Install a build with CUDA 13 (driver 580 "
            f"or later), or {OTHER_BUILD}. --device cpu trains on the CPU all the same"
        )
    needs = "580" if cuda.startswith("13") else "525"
    return (
        f"{has}cannot use: it is built for CUDA {cuda}, which needs driver {needs} or later. "
        f"Update the driver, or {OTHER_BUILD}. --device cpu trains on the CPU all the same"
    )


def _check_architecture(index: int) -> None:
    """Raise UserError where torch's build holds no code for the GPU."""
    numbers = [int(name[3:].rstrip("af")) for name in torch.cuda.get_arch_list() if "sm_" in name]
    major, minor = torch.cuda.get_device_capability(index)
    if numbers and 10 * major + minor < min(numbers):
        raise UserError(
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, torch "
            f"{torch.__version__} has code from {min(numbers) / 10:.1f} on: {OTHER_BUILD}"
        )


def best_dtype(device: torch.device) -> torch.dtype:
    """The fastest activation dtype the device computes natively.

    bfloat16 on CUDA from SM80 and on CPUs with AMX or AVX512-BF16 instructions, float16 on older
    CUDA (with a gradient scaler), float32 elsewhere.
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16
    if device.type == "cpu" and any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    ):
        return torch.bfloat16
    return torch.float32


def seed_everything(seed: int) -> None:
    """Seed the global generators (anything reproducible uses its own generator besides)."""
    random.seed(seed)
    torch.manual_seed(seed)
