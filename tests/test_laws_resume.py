"""Law 4: a run that was killed and resumed is, bit for bit, the run that was not.

The real scripts run as processes of their own and are killed with SIGKILL: after a step, at every
point of a save, at random moments. A checkpoint that loads but is wrong would show in the losses,
the parameters, the optimizer state or the data position.
"""

import functools
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import processes
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import latest, list_steps, read_meta
from nanochat.stage import Stage

STAGES = ("base", "mid", "sft")
MODULES = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft"}
COMMON = "--device cpu --dtype float32 --total-batch-size 256 --device-batch-size 2 --window 16 "
COMMON += "--save-every 2 --keep-last 0 --eval-tokens 128"
ARGUMENTS = {
    "base": "--num-steps 9 --eval-every 4 --depth 2 --aspect-ratio 16 --head-dim 16 --kv-heads 1 "
    "--context-length 64 --window-pattern SL",
    "mid": "--num-steps 7 --eval-every 0 --mix arithmetic:60:1 customjson:0.1",
    # Two epochs of a small store: the position crosses windows and an epoch.
    "sft": "--epochs 2 --eval-every 0 --mix arithmetic:12:1 --long-conversations split",
}


def command(stage: str, folder: Path, *more: str) -> list[str]:
    corpus = ["--corpus", str(folder.parent / "encoded" / "text")]
    return [*COMMON.split(), *ARGUMENTS[stage].split(), *corpus, *more]


def script(stage: str, folder: Path, argv: list[str], prepare: Any = None) -> None:
    """`python -m scripts.<stage> ARGV`, without importing torch anew."""
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    sys.stdout = sys.stderr = (folder / "output.txt").open("a", buffering=1)
    if prepare is not None:
        prepare()
    sys.argv = [stage, *argv]
    runpy.run_module(f"scripts.{MODULES[stage]}", run_name="__main__", alter_sys=True)


@pytest.fixture(scope="module")
def workplace(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage run through without interruption, in `workplace/whole`."""
    root = tmp_path_factory.mktemp("resume")
    (root / "encoded").symlink_to(encoded)  # the text's path, links resolved, names its store
    shutil.copytree(encoded, root / "whole")
    for stage in STAGES:
        run(stage, root / "whole")
    return root


def run(stage: str, folder: Path, *more: str) -> None:
    """The stage to its end."""
    process = processes.start(script, stage, folder, command(stage, folder, *more))
    code = processes.finish(process)
    assert code == 0, (folder / "output.txt").read_text()[-3000:]


def before(stage: str, workplace: Path, folder: Path) -> Path:
    """A base folder in which the stages before `stage` are done."""
    shutil.copytree(workplace / "whole", folder)
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(folder / "checkpoints" / later)
        shutil.rmtree(folder / "runs" / f"{later}-default")
    return folder


def outcome(stage: str, folder: Path) -> dict[str, Any]:
    """Everything a run is judged by."""
    newest = latest(folder / "checkpoints" / stage / "default")
    assert newest is not None
    meta = read_meta(newest)
    tensors = load_file(newest / "model.safetensors")
    for path in sorted((newest / "optim").glob("*.safetensors")):
        tensors |= {f"optim {name}": value for name, value in load_file(path).items()}
    state = {k: v for k, v in meta["train_state"].items() if "seconds" not in k}
    return {
        "step": meta["step"],
        "losses": tiny_runs.losses(folder, stage),
        "tensors": tensors,
        "state": state,
        "loader": meta["loader_state"],
        "optimizer steps": meta["optimizer_steps"],
    }


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    tensors, wanted = got.pop("tensors"), expected.pop("tensors")
    assert got == expected
    assert tensors.keys() == wanted.keys()
    different = [name for name, value in wanted.items() if not torch.equal(tensors[name], value)]
    assert not different


# Killed at a chosen moment


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(owner: Any, name: str, call: int, half: Callable[..., None] | None) -> None:
    """SIGKILL at the so-manieth call of owner.name: after it, or in the middle (`half`)."""
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def replacement(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        # Of the files written as text only a checkpoint's metadata counts, not what stores note.
        if name == "write_text" and "checkpoints" not in arguments[0].parts:
            return original(*arguments, **keywords)
        calls += 1
        if calls == call and half is not None:
            half(*arguments, **keywords)
            die()
        result = original(*arguments, **keywords)
        if calls == call:
            die()
        return result

    setattr(owner, name, replacement)


def half_of_the_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(b"\x10" * 5000)


def half_of_the_meta(path: Path, text: str, **_: Any) -> None:
    path.write_bytes(text[: len(text) // 2].encode())


def nothing(*_: Any) -> None:
    """Die before."""


# Where, which call, what is done of it, which newest step may be left (0: none). Checkpoints are
# written while training goes on: after step 5 that of step 4 may be there or still under way.
MOMENTS: dict[str, tuple[Any, str, int, Callable[..., None] | None, tuple[int, ...]]] = {
    "after the first step": (Stage, "record", 1, None, (0,)),
    "after a step": (Stage, "record", 5, None, (2, 4)),
    "in the first save": (checkpoint_manager, "save_file", 1, half_of_the_weights, (0,)),
    "while weights are written": (checkpoint_manager, "save_file", 2, half_of_the_weights, (2,)),
    "after the optimizer state": (checkpoint_manager, "save_optimizer_state", 2, None, (2,)),
    "while the metadata is written": (Path, "write_text", 2, half_of_the_meta, (2,)),
    "before the rename": (os, "replace", 2, nothing, (2,)),
    "after the rename": (os, "replace", 2, None, (4,)),
}


def run_and_die(stage: str, folder: Path, argv: list[str], moment: str) -> None:
    owner, name, call, half, _ = MOMENTS[moment]
    script(stage, folder, argv, lambda: kill_at(owner, name, call, half))


def check_moment(stage: str, moment: str, workplace: Path, folder: Path) -> None:
    before(stage, workplace, folder)
    process = processes.start(run_and_die, stage, folder, command(stage, folder), moment)
    assert processes.finish(process) == -signal.SIGKILL
    steps = list_steps(folder / "checkpoints" / stage / "default")
    assert (steps[-1] if steps else 0) in MOMENTS[moment][4]
    run(stage, folder, "--resume")
    assert_same(outcome(stage, folder), outcome(stage, workplace / "whole"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_base_killed_at(moment: str, workplace: Path) -> None:
    check_moment("base", moment, workplace, workplace / moment)


@pytest.mark.parametrize("moment", ["after a step", "while weights are written"])
@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_later_stages_killed_at(stage: str, moment: str, workplace: Path) -> None:
    check_moment(stage, moment, workplace, workplace / f"{stage} {moment}")


# Killed at random moments


@pytest.mark.parametrize("stage", STAGES)
def test_killed_again_and_again(stage: str, workplace: Path) -> None:
    """The same command with --resume until it gets through."""
    random = Random(stage)
    folder = before(stage, workplace, workplace / f"{stage} again and again")
    log = folder / "runs" / f"{stage}-default" / "metrics.jsonl"
    kills = 0
    for _ in range(3):
        process = processes.start(script, stage, folder, command(stage, folder, "--resume"))
        size = log.stat().st_size if log.exists() else 0
        while process.exitcode is None and (log.stat().st_size if log.exists() else 0) <= size:
            time.sleep(0.001)  # until it trains
        time.sleep(random.uniform(0, 0.15))
        process.kill()
        kills += processes.finish(process) == -signal.SIGKILL
    assert kills >= 1
    run(stage, folder, "--resume")
    assert_same(outcome(stage, folder), outcome(stage, workplace / "whole"))


# Stopped in a friendlier way


def test_a_signal_saves_and_the_run_goes_on_from_there(workplace: Path) -> None:
    folder = before("base", workplace, workplace / "signal")
    process = processes.start(script, "base", folder, command("base", folder, "--save-every", "0"))
    log = folder / "runs" / "base-default" / "metrics.jsonl"
    while not (log.exists() and len(tiny_runs.losses(folder, "base")) >= 2):
        assert process.exitcode is None, (folder / "output.txt").read_text()[-3000:]
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    assert processes.finish(process) == 128 + signal.SIGTERM
    steps = list_steps(folder / "checkpoints" / "base" / "default")
    assert len(steps) == 1
    assert 2 <= steps[0] < 9, "saved where it was"
    run("base", folder, "--resume")
    assert_same(outcome("base", folder), outcome("base", workplace / "whole"))


def test_a_finished_run_is_left_alone(workplace: Path) -> None:
    whole = workplace / "whole"
    newest = latest(whole / "checkpoints" / "base" / "default")
    assert newest is not None
    log = whole / "runs" / "base-default" / "metrics.jsonl"
    stamp, text = (newest / "meta.json").stat().st_mtime_ns, log.read_text()
    run("base", whole, "--resume")
    assert (newest / "meta.json").stat().st_mtime_ns == stamp
    assert log.read_text() == text


def test_the_end_is_logged_even_if_the_kill_came_between(workplace: Path) -> None:
    folder = workplace / "end"
    shutil.copytree(workplace / "whole", folder)
    log = folder / "runs" / "base-default" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert '"kind": "end"' in lines[-1]
    log.write_text("".join(lines[:-1]))
    run("base", folder, "--resume")
    assert '"kind": "end"' in log.read_text().splitlines()[-1]
