"""Kill a training again and again: `python -m tests.crash_test --kills 30`.

A tiny base_train is killed with SIGKILL at random moments, every other time within a save, and
resumed with the same command. After every kill each checkpoint that is there must load and be, bit
for bit, the one an uninterrupted run saved at that step: parameters, optimizer state, position in
the data. When the kills are done the run goes through, and its end must be the uninterrupted run's.

Prints one JSON object; exit status 1 where anything differs.
"""

import argparse
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for python -m tests.crash_test

import processes
import tiny_runs
import torch
from safetensors.torch import load_file

from nanochat.checkpoint_manager import check_digests, list_steps, read_meta

SAVE_EVERY = 3
STEPS_PER_KILL = 12
"""Steps of the whole run per kill: so that it is not over before the last kill."""
ARGUMENTS = (
    f"--save-every {SAVE_EVERY} --keep-last 0 --device cpu --dtype float32 --device-batch-size 2 "
    "--total-batch-size 256 --window 16 --eval-tokens 256 --eval-every 0 --depth 2 "
    "--aspect-ratio 16 --head-dim 16 --kv-heads 1 --context-length 64 --window-pattern SL --resume"
).split()


def script(folder: Path, corpus: Path, num_steps: int) -> None:
    """`python -m scripts.base_train`, in a process that has torch already."""
    torch.set_num_threads(1)
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    sys.stdout = sys.stderr = (folder / "output").open("a")
    sys.argv = ["base_train", *ARGUMENTS, "--corpus", str(corpus), "--num-steps", str(num_steps)]
    runpy.run_module("scripts.base_train", run_name="__main__", alter_sys=True)


def start(folder: Path, corpus: Path, num_steps: int) -> Any:
    process = processes.context.Process(target=script, args=(folder, corpus, num_steps))
    process.start()
    return process


def checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and position of a step folder, digests verified."""
    meta = read_meta(folder)
    check_digests(folder, meta, meta["files"])
    tensors = load_file(folder / "model.safetensors")
    for path in sorted((folder / "optim").glob("*.safetensors")):
        tensors |= {f"optim {name}": value for name, value in load_file(path).items()}
    state = {k: v for k, v in meta["train_state"].items() if "seconds" not in k}
    return tensors, {"state": state, "loader": meta["loader_state"], "step": meta["step"]}


def differences(folder: Path, whole: Path) -> list[str]:
    """What of a checkpoint is not as in the uninterrupted run's."""
    (tensors, position), (wanted, expected) = checkpoint(folder), checkpoint(whole)
    wrong = [k for k in expected if position[k] != expected[k]]
    wrong += sorted(tensors.keys() ^ wanted.keys())
    wrong += [k for k in tensors.keys() & wanted.keys() if not torch.equal(tensors[k], wanted[k])]
    return [f"{folder.name}: {what}" for what in wrong]


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def run(kills: int, seed: int, root: Path) -> dict[str, Any]:
    random = Random(seed)
    tiny_runs.encode_corpus(root / "encoded")
    corpus, num_steps = root / "encoded" / "text", kills * STEPS_PER_KILL
    whole, broken = root / "whole", root / "broken"
    for folder in (whole, broken):
        shutil.copytree(root / "encoded", folder)
    if processes.finish(start(whole, corpus, num_steps)):
        raise RuntimeError((whole / "output").read_text())

    run_of = {folder: folder / "checkpoints" / "base" / "default" for folder in (whole, broken)}
    log = broken / "runs" / "base-default" / "metrics.jsonl"
    result: dict[str, Any] = {"kills": 0, "in_a_save": 0, "verified": 0, "resumed_from": []}
    wrong: list[str] = []
    while result["kills"] < kills:
        in_a_save = result["kills"] % 2 == 0
        result["resumed_from"].append(max(list_steps(run_of[broken]), default=0))
        process = start(broken, corpus, num_steps)
        wanted = lines(log) + random.randint(1, STEPS_PER_KILL - 2)
        while process.exitcode is None and lines(log) < wanted:
            time.sleep(0.001)
        if in_a_save:
            while process.exitcode is None and not list(run_of[broken].glob(".*.tmp")):
                pass
            time.sleep(random.uniform(0, 0.015))
        else:
            time.sleep(random.uniform(0, 0.01))
        process.kill()
        if processes.finish(process) != -signal.SIGKILL:
            raise RuntimeError(
                "the run was over before it was killed:\n" + (broken / "output").read_text()
            )
        result["kills"] += 1
        result["in_a_save"] += bool(list(run_of[broken].glob(".*.tmp")))
        for step in list_steps(run_of[broken]):
            # A step folder is never written again but by a run that was resumed before it.
            if step >= result["resumed_from"][-1]:
                name = f"step_{step:06d}"
                wrong += differences(run_of[broken] / name, run_of[whole] / name)
                result["verified"] += 1
    if processes.finish(start(broken, corpus, num_steps)):
        raise RuntimeError((broken / "output").read_text())
    last = f"step_{num_steps:06d}"
    wrong += differences(run_of[broken] / last, run_of[whole] / last)
    if list_steps(run_of[broken]) != list_steps(run_of[whole]):
        wrong.append("other steps were saved")
    if tiny_runs.losses(broken, "base") != tiny_runs.losses(whole, "base"):
        wrong.append("other losses were logged")
    return {"num_steps": num_steps, **result, "wrong": wrong}


def main(kills: int, seed: int) -> dict[str, Any]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        result = run(kills, seed, Path(temporary))
    return {**result, "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcome = main(arguments.kills, arguments.seed)
    print(json.dumps(outcome))
    sys.exit(1 if outcome["wrong"] else 0)
