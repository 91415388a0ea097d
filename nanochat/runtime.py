"""Device, dtype, ranks, process group and seeds; the only reader of RANK, LOCAL_RANK, WORLD_SIZE.

`start()` is called once per process. A run under torchrun always gets a process group, on CPUs too
(gloo). Without one, the loader would split the data by rank while each optimizer worked alone, and
the replicas would drift apart without an error.
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
"""Time limit of a collective, and of waiting for all ranks to start."""
TIME_IS_UP = 75
"""Exit status of a run that `--max-hours` stopped. A run stopped by signal N has 128 + N."""
LAST_SAVE = 30.0
"""Seconds that a failing rank waits for a checkpoint that is being written."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Runtime:
    """Facts about this rank, and communication with the others."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    console: Console = field(default_factory=Console)
    stop_signal: bool = False
    """True after SIGTERM, SIGINT or the time limit, on this rank."""
    stop_requested: bool = False
    """True on all ranks after any rank's `stop_signal`; train_step sets it, and the run stops at
    the end of that step."""
    exit_code: int = 0
    """Exit status of the process after a run that was stopped."""
    alarm: "Alarm | None" = None
    """Link between the ranks of a job, set by `start`; None for one rank."""
    local_world_size: int = 1
    """Number of ranks on this machine."""
    memory_advice: str = "use a machine with more memory, or a smaller model"
    """Advice for an out-of-memory error; a training stage sets a more exact one."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *args: Any) -> None:
        """Print on rank 0 only, without interpreting the text as markup."""
        if self.is_main:
            # A closed pipe (`| head`) or a character that it cannot encode must not end a run.
            with suppress(OSError, ValueError, SystemExit):  # rich exits on a broken pipe
                self.console.print(*args, markup=False, highlight=False, soft_wrap=True)

    def stop(self, exit_code: int) -> None:
        """Make the run save and stop at the end of this step, with this exit status."""
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
        """Gather a tensor (...) of each rank as (world_size, ...) on every rank."""
        if self.world_size == 1:
            return tensor[None]
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action()` on rank 0; every rank gets its result, or raises its UserError."""
        found: Any = None
        if self.is_main:
            try:
                found = action()
            except UserError as error:
                found = error
        found = self.broadcast_object(found)
        if isinstance(found, UserError):
            raise found
        return found

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the list of all ranks' values, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def in_turns(self, build: Callable[[], T]) -> T:
        """Run `build()` on rank 0, then on the first rank of each other machine, then on the rest.

        A file that `build` writes if it does not find it is then written once per file system,
        whether machines share one or not.
        """
        result: list[T] = []
        for turn in (self.is_main, self.local_rank == 0, True):
            if turn and not result:
                result.append(build())
            self.barrier()
        return result[0]

    def machine(self) -> Machine:
        """Describe the machine for planning; every rank must call this."""
        return Machine(self.device.type, self.dtype, self.world_size, self.memory_limit())

    def memory_limit(self) -> int | None:
        """Bytes that a rank may plan with, or None if unknown; every rank must call this.

        A rank may use 90 % of its GPU's memory, or its share of 80 % of the machine's. The smallest
        value of any rank is taken, since ranks with different plans would wait for each other
        forever. Memory that is free at the moment does not matter: a resumed run must get the plan
        that the interrupted run had.
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
        """Wait until the device has finished its work, so that times can be measured."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def watch_signals(self) -> None:
        """Turn the first SIGTERM or SIGINT into `stop_signal`; a second SIGINT interrupts."""

        def handler(number: int, frame: Any) -> None:
            if self.alarm and self.alarm.leaving.locked():
                return  # this job has already failed, and torchrun is ending the other ranks
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
    """Save and stop this rank when the launcher that started it is gone.

    A killed launcher does not stop its ranks; they would go on training beside those of the next
    start. After `patience` more seconds the process is ended.
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
        _exit(0.0)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class Alarm:
    """Tells all ranks of a job the reason of its first failure, through the job's store.

    When a rank fails, the others are left in a collective. gloo then raises an error that does not
    name the reason, and NCCL waits for its timeout. So a thread of every rank watches the store for
    a reason and ends its process.
    """

    KEY = "nanochat/failure"
    POLL = 0.5
    LINGER = 1.0
    """Seconds that the failed rank stays alive, so that the others can read the reason (its process
    may host the store). They stay a little longer, so that a launcher sees the failed rank end
    first."""

    def __init__(self, rank: int, local_rank: int, world_size: int):
        self.rank, self.local_rank = rank, local_rank
        # A separate connection, since another thread may be waiting on the process group's.
        self.store = job_store(rank, world_size)
        self.leaving = threading.Lock()
        """Lock that the thread which ends the process holds."""
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="alarm", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop watching, after a job without a failure."""
        self.closed.set()
        self.thread.join()

    def fail(self, error: BaseException, details: str = "") -> NoReturn:
        """End this process because of `error`, with status 1 and without waiting for collectives.

        The first rank that fails prints its reason, after `details` (a traceback). Other ranks
        print that rank's reason.
        """
        self.leaving.acquire()
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if _is_lost_connection(error):
            # Other ranks may have ended for a reason that they are about to store.
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
        _exit(self.LINGER)

    def _watch(self) -> None:
        while not self.closed.wait(self.POLL):
            reason = self._reason()
            if reason is not None and self.leaving.acquire(blocking=False):
                self._leave(reason)

    def _reason(self, ours: str | None = None) -> dict[str, Any] | None:
        """Return the reason of the first rank that failed; store `ours` if there is none yet."""
        try:
            if ours is not None:
                return dict(json.loads(self.store.compare_set(self.KEY, "", ours)))
            return (
                dict(json.loads(self.store.get(self.KEY))) if self.store.check([self.KEY]) else None
            )
        except (RuntimeError, ValueError):  # the rank that hosted the store has ended
            return None

    def _leave(self, reason: dict[str, Any]) -> NoReturn:
        if self.local_rank == 0:  # once per machine
            print(
                f"error: rank {self.rank} stops, since rank {reason['rank']} failed: "
                f"{reason['text']}",
                file=sys.stderr,
                flush=True,
            )
        _exit(1.5 * self.LINGER)


def job_store(rank: int, world_size: int) -> Any:
    """Open a new connection to the store through which the job's ranks find each other."""
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store survives a restart of the workers. The prefix keeps this attempt from
        # reading what the ranks of the last attempt wrote, on which torch 2.13 hangs.
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        return dist.PrefixStore(f"attempt_{attempt}", store)  # type: ignore[attr-defined]
    return store


def _is_lost_connection(error: BaseException) -> bool:
    """True if a collective failed because another rank ended."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _exit(linger: float) -> NoReturn:
    """End the process after `linger` seconds, and after the threads that write a checkpoint."""
    began = time.monotonic()
    for thread in threading.enumerate():  # those of the other ranks still run too
        if (
            thread not in (threading.current_thread(), threading.main_thread())
            and not thread.daemon
        ):
            thread.join(max(0.0, began + LAST_SAVE - time.monotonic()))
    time.sleep(max(0.0, began + linger - time.monotonic()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def single(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Runtime:
    """Build a one-process runtime for tests and notebooks; reads no environment variables."""
    return Runtime(torch.device(device), dtype)


def start(device: str = "auto", dtype: str = "auto") -> Runtime:
    """Choose device and dtype, join the process group, size the thread pool.

    Raises UserError for a device that this machine does not have, and if other ranks do not come.
    """
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        # Batches of different lengths then leave no gaps. torch reads this variable at the first
        # allocation.
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
    """Choose a device by name; `auto` prefers CUDA, then Apple's MPS, then the CPU.

    Raises UserError for a device that is missing. `auto` also raises it for a GPU that torch cannot
    use, since training on the CPU instead would be a costly surprise.
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
    """Version of the NVIDIA driver, "of unknown version" if only a device file exists, else None.

    If CUDA_VISIBLE_DEVICES hides all GPUs, the result is None too: the user wants the CPU.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return None
    found = "of unknown version" if Path("/dev/nvidia0").exists() else None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # nvidia-smi is missing or hangs
        return found
    lines = said.stdout.split("\n") if said.returncode == 0 else []
    return lines[0].strip() if lines and lines[0].strip() else found


def _no_cuda(driver: str) -> str:
    """Error text for a machine with an NVIDIA driver on which torch sees no CUDA."""
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
    """Raise UserError if torch was built without code for this GPU."""
    numbers = [int(name[3:].rstrip("af")) for name in torch.cuda.get_arch_list() if "sm_" in name]
    major, minor = torch.cuda.get_device_capability(index)
    if numbers and 10 * major + minor < min(numbers):
        raise UserError(
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, torch "
            f"{torch.__version__} has code from {min(numbers) / 10:.1f} on: {OTHER_BUILD}"
        )


def best_dtype(device: torch.device) -> torch.dtype:
    """Choose the fastest activation dtype that the device computes natively.

    This is bfloat16 on CUDA from SM80 and on CPUs with AMX or AVX512-BF16 instructions, float16 on
    older CUDA devices (with a loss scale), and float32 elsewhere.
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
    """Seed the global generators; whatever must be reproducible uses its own generator."""
    random.seed(seed)
    torch.manual_seed(seed)
