"""A rank that fails ends the whole job, within seconds, with the reason of the first failure.

Whole ranks under `launch`, without a launcher that would end the others: here they must notice on
their own. Every rank claims to be the first of its machine, so that each says what it knows.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_runs
import torch
from torch.distributed.run import get_args_parser

from benchmarks.common import words
from nanochat import checkpoint_manager, runtime
from nanochat.checkpoint_manager import CheckpointManager, latest, read_meta
from nanochat.cli import launch
from nanochat.config import Learning
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.runtime import Runtime
from nanochat.train import Batch, check_replicas, train_step

MODEL = GPTConfig(
    vocab_size=60, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, head_dim=8, context_length=8
)
FOREVER = 300.0
FAILING_STEP = 2

# What goes wrong after step 2 on the rank it happens to, given model and runtime.
Accident = Callable[[GPT, Runtime], None]


def mistake(model: GPT, rank: Runtime) -> None:
    raise UserError("value 3, limit 2, remedy")


def bug(model: GPT, rank: Runtime) -> None:
    raise ZeroDivisionError("a bug")


def killed(model: GPT, rank: Runtime) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def not_a_number(model: GPT, rank: Runtime) -> None:
    with torch.no_grad():
        model.head.weight[3] = float("nan")


def drift(model: GPT, rank: Runtime) -> None:
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0, 0] += 1


@dataclass(frozen=True)
class Config:
    device: str = "cpu"


def job(rank: int, world_size: int, port: int, log: Path, main: Any, *args: Any) -> None:
    """One rank as a launcher starts it; what it says goes to `log`."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.environ.pop("NANOCHAT_TRACEBACK", None)
    sys.argv = ["job"]
    sys.stdout = sys.stderr = log.open("a")
    launch(lambda cfg, runtime: main(runtime, *args), Config, None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_job(folder: Path, world_size: int, main: Any, *args: Any) -> tuple[list[int], list[str]]:
    """Exit status and output of every rank."""
    port = free_port()
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    ranks = [
        processes.start(job, rank, world_size, port, logs[rank], main, *args)
        for rank in range(world_size)
    ]
    try:
        status = [processes.finish(process) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return status, [log.read_text() for log in logs]


def make(runtime: Runtime) -> tuple[GPT, Optimizer]:
    model = GPT(MODEL).init_weights(0, words(MODEL.vocab_size))
    rules = parameter_rules(model, Learning(), width=16)
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    return model, Optimizer(model, rules, **ranks, muon_dtype=torch.float32)  # type: ignore[arg-type]


def train(runtime: Runtime, accident: Accident, where: int) -> None:
    """More steps than any test waits for; the accident happens after the second."""
    model, optimizer = make(runtime)
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(runtime.rank))
    zeros = torch.zeros(2, 8, dtype=torch.int32)
    rows = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), zeros + 1.0, zeros)
    for step in range(1, 10**9):
        train_step(model, optimizer, [rows], Hypers(0.1), runtime)
        if step == FAILING_STEP and runtime.rank == where:
            accident(model, runtime)
        check_replicas(model, runtime)


# The failing rank, and what it says (None: no word). The others quote the last line of it.
CASES: dict[str, tuple[Accident, int, str | None]] = {
    "mistake": (mistake, 1, "value 3, limit 2, remedy"),
    "bug": (bug, 2, "ZeroDivisionError: a bug"),
    "bug where the store is": (bug, 0, "ZeroDivisionError: a bug"),
    "killed": (killed, 1, None),
    "killed where the store is": (killed, 0, None),
}


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_end_with_the_reason_of_the_first(case: str, tmp_path: Path) -> None:
    accident, where, reason = CASES[case]
    status, said = run_job(tmp_path, 3, train, accident, where)
    others = [rank for rank in range(3) if rank != where]
    assert [status[rank] for rank in others] == [1, 1]
    assert status[where] == (-signal.SIGKILL if accident is killed else 1)
    if reason is None:
        assert said[where] == ""
        for rank in others:
            assert "a collective failed, probably since another rank was killed" in said[rank]
            assert "Traceback" not in said[rank]
        return
    assert said[where].splitlines()[-1] == f"error: rank {where}: {reason}"
    assert ("Traceback" in said[where]) == (accident is bug), "a mistake is told in one line"
    for rank in others:
        assert said[rank] == f"error: rank {rank} stops, since rank {where} failed: {reason}\n"


@pytest.mark.parametrize(
    ("accident", "reason"),
    [
        (drift, r"parameter blocks.0.mlp.up.weight differs from rank 0 on ranks \[1\]"),
        (not_a_number, r"parameter head.weight differs"),
    ],
)
def test_drifting_ranks_stop_with_one_line(accident: Accident, reason: str, tmp_path: Path) -> None:
    """All ranks find it out; one tells in full."""
    status, said = run_job(tmp_path, 2, train, accident, 1)
    assert status == [1, 1]
    for text in said:
        assert len(text.splitlines()) == 1
    assert all(re.search(reason, text) for text in said)
    assert sorted("stops, since" in text for text in said) == [False, True]


def diverge(runtime: Runtime) -> None:
    model, optimizer = make(runtime)
    ids = torch.zeros(2, 8, dtype=torch.long)
    weights = torch.full((2, 8), float("inf") if runtime.rank == 1 else 1.0)
    train_step(model, optimizer, [Batch(ids, ids, weights, ids.int())], Hypers(), runtime)


def test_a_non_finite_loss_stops_with_one_line(tmp_path: Path) -> None:
    status, said = run_job(tmp_path, 2, diverge)
    assert status == [1, 1]
    for text in said:
        assert len(text.splitlines()) == 1
        assert "step 1: the loss of rank 1 is inf; nothing was updated" in text


def sleep_elsewhere(runtime: Runtime) -> None:
    """Rank 0 waits for something that is no collective, as NCCL's look from Python."""
    runtime.barrier()
    if runtime.rank == 1:
        raise UserError("value 3")
    time.sleep(FOREVER)


def test_a_rank_that_waits_for_something_else_ends_too(tmp_path: Path) -> None:
    status, said = run_job(tmp_path, 2, sleep_elsewhere)
    assert status == [1, 1]
    assert said[0] == "error: rank 0 stops, since rank 1 failed: value 3\n"


def meet(runtime: Runtime, lost: int) -> None:
    runtime.barrier()  # a rank that still joins would tell of the rendezvous
    if runtime.rank == lost:
        killed(None, runtime)
    time.sleep(0.5)
    runtime.barrier()


def die(*names: str, **settings: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lose(when: str, lost: int, rank: int, *args: Any) -> None:
    """`job` where rank `lost` is killed at that moment of the rendezvous."""
    if rank != lost:
        descriptor = os.open(args[-1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 2)  # torch's own log too
    runtime.TIMEOUT = timedelta(seconds=2)
    if rank == lost and when == "before it joins":
        die()
    if rank == lost and when == "in the store only":
        runtime.dist.init_process_group = die
    job(rank, *args, meet, lost)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("when", ["before it joins", "in the store only", "after joining"])
def test_a_rank_lost_in_the_rendezvous_is_told_in_words(
    when: str, lost: int, tmp_path: Path
) -> None:
    started = time.monotonic()
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    port = free_port()
    ranks = [processes.start(lose, when, lost, rank, 2, port, logs[rank]) for rank in range(2)]
    status = [processes.finish(process) for process in ranks]
    assert time.monotonic() - started < 20
    assert status[lost] == -signal.SIGKILL
    assert status[1 - lost] == 1
    said = logs[1 - lost].read_text()
    assert len(said.splitlines()) == 1, said
    if when == "after joining":
        assert "a collective failed, probably since another rank was killed" in said
    else:
        assert f"rank {1 - lost} of 2 did not meet the others: one of them ended before" in said


def fail_while_saving(runtime: Runtime, folder: Path) -> None:
    write = checkpoint_manager.save_file

    def slowly(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
        time.sleep(1.0)
        return write(tensors, path)

    checkpoint_manager.save_file = slowly
    model, optimizer = make(runtime)
    CheckpointManager(folder, runtime).save(5, model, optimizer, {"tokenizer_hash": ""})
    if runtime.rank == 1:
        raise UserError("value 3")
    runtime.barrier()


def test_a_checkpoint_under_way_is_finished_first(tmp_path: Path) -> None:
    status, _ = run_job(tmp_path, 2, fail_while_saving, tmp_path / "run")
    assert status == [1, 1]
    newest = latest(tmp_path / "run")
    assert newest is not None
    assert read_meta(newest)["step"] == 5


def succeed(runtime: Runtime) -> None:
    runtime.barrier()
    runtime.print("done")


def test_a_job_that_goes_well_ends_well(tmp_path: Path) -> None:
    status, said = run_job(tmp_path, 2, succeed)
    assert status == [0, 0]
    assert said == ["done\n", ""]


def build_once(runtime: Runtime, folder: Path, machines: bool) -> None:
    """Two machines of two ranks; with `machines` each has its own folder."""
    runtime.local_rank = runtime.rank % 2
    folder = folder / str(runtime.rank // 2) if machines else folder

    def build() -> bool:
        found = folder.exists()
        folder.mkdir(exist_ok=True)
        return found

    print(runtime.in_turns(build))


@pytest.mark.parametrize(
    ("machines", "found"),
    [(False, [False, True, True, True]), (True, [False, True, False, True])],
)
def test_files_are_built_once_and_then_found(
    machines: bool, found: list[bool], tmp_path: Path
) -> None:
    folder = tmp_path / "built"
    if machines:
        folder.mkdir()
    status, said = run_job(tmp_path, 4, build_once, folder, machines)
    assert status == [0] * 4
    assert [text.strip() for text in said] == [str(value) for value in found]


def build_nothing(runtime: Runtime) -> None:
    def build() -> None:
        raise UserError("the data set is gone")

    runtime.in_turns(build)


def test_ranks_that_wait_for_their_turn_hear_of_a_failure(tmp_path: Path) -> None:
    status, said = run_job(tmp_path, 2, build_nothing)
    assert status == [1, 1]
    assert "the data set is gone" in said[0]


TORCHRUN_JOB = """
import os
from nanochat.errors import UserError
from nanochat.cli import launch
from test_failures import Config

def main(cfg, runtime):
    runtime.barrier()
    if runtime.rank == 1:
        raise UserError(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']} failed")
    runtime.barrier()

launch(main, Config, None)
"""


def test_torchrun_restarts_the_job_and_quotes_the_reason(tmp_path: Path) -> None:
    """The store outlives the first attempt: the second must read nothing of it."""
    script = tmp_path / "job.py"
    script.write_text(TORCHRUN_JOB)
    root = Path(__file__).parent.parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "--max-restarts", "1", str(script)],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=processes.TIMEOUT,
    )
    assert result.returncode == 1
    for attempt in (0, 1):
        assert f"error: rank 1: attempt {attempt} failed\n" in result.stderr
        reason = f"error: rank 0 stops, since rank 1 failed: attempt {attempt} failed\n"
        assert reason in result.stderr
    cause = result.stderr.split("Root Cause")[1]
    assert "rank 1: attempt 1 failed" in cause


STOPPED_JOB = """
import sys, time
from pathlib import Path
from nanochat import checkpoint_manager
from nanochat.cli import launch
from scripts import base_train
from tiny_runs import base_config

text, folder = sys.argv.pop(), Path(sys.argv.pop())
write = checkpoint_manager.save_file

def slowly(tensors, path):
    (folder / "saving").touch()
    time.sleep(3.0)
    return write(tensors, path)

checkpoint_manager.save_file = slowly
config = base_config(text, duration=dict(num_steps=10**6), evaluating=dict(eval_every=0))
launch(lambda _, runtime: base_train.main(config, runtime), type(config), None)
"""


@pytest.mark.skipif(
    not hasattr(get_args_parser().parse_args(["x"]), "shutdown_timeout"),
    reason="this torchrun has no --shutdown-timeout",
)
@pytest.mark.parametrize(("patience", "saved"), [(60, True), (1, False)])
def test_a_slow_save_is_finished_under_torchrun(
    patience: int, saved: bool, encoded: Path, tmp_path: Path
) -> None:
    """SIGTERM while a save is under way; torchrun is told to be patient as README says."""
    base = tmp_path / "base"
    shutil.copytree(encoded, base)
    script = tmp_path / "job.py"
    script.write_text(STOPPED_JOB)
    root = Path(__file__).parent.parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--shutdown-timeout", str(patience)]
    paths = f"{root}{os.pathsep}{root / 'tests'}"
    job = subprocess.Popen(
        [*torchrun, str(script), str(base), tiny_runs.corpus(encoded)],
        env={**os.environ, "PYTHONPATH": paths, "NANOCHAT_BASE_DIR": str(base)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        end = time.monotonic() + processes.TIMEOUT
        while not (base / "saving").exists():
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        said = job.communicate(timeout=processes.TIMEOUT)[0]
    finally:
        job.kill()
    assert job.returncode != 0
    newest = latest(base / "checkpoints" / "base" / "default")
    assert (newest is not None) == saved, said
    if newest is not None:
        assert f"stopped after step {read_meta(newest)['step']} of" in said


def pids_of_ranks(launcher: int) -> list[int]:
    """The processes that torchrun started, on Linux."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_save_and_end_when_torchrun_is_killed(tmp_path: Path) -> None:
    tiny_runs.encode_corpus(tmp_path / "base")
    flags = (
        "--nproc-per-node 2 -m scripts.base_train --num-steps 100000 --save-every 100000 "
        "--device cpu --dtype float32 --eval-tokens 256 --eval-every 0 --device-batch-size 2 "
        "--total-batch-size 512 --window 16 --depth 2 --aspect-ratio 16 --head-dim 16 "
        "--kv-heads 1 --context-length 64"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*torchrun, *flags.split(), "--corpus", tiny_runs.corpus(tmp_path / "base")],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "base"), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    metrics = tmp_path / "base" / "runs" / "base-default" / "metrics.jsonl"
    ranks: list[int] = []
    try:
        wait_for(lambda: metrics.is_file() and metrics.read_text().count('"train"') > 2, launcher)
        ranks = pids_of_ranks(launcher.pid)
        assert len(ranks) == 2
        launcher.kill()
        launcher.wait()
        wait_for(lambda: not any(map(is_running, ranks)))
    finally:
        launcher.kill()
        for rank in filter(is_running, ranks):
            os.kill(rank, signal.SIGKILL)
    newest = latest(tmp_path / "base" / "checkpoints" / "base" / "default")
    said = (tmp_path / "log").read_text()
    assert newest is not None, said
    assert read_meta(newest)["step"] > 2
    assert f"the launcher (process {launcher.pid}) is gone; saving and stopping" in said


def is_running(process: int) -> bool:
    """True if there is such a process, other than a dead one that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(ready: Callable[[], bool], alive: Any = None) -> None:
    end = time.monotonic() + processes.TIMEOUT
    while not ready():
        assert time.monotonic() < end
        assert alive is None or alive.poll() is None
        time.sleep(0.05)
