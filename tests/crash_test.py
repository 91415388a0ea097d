"""Kill every stage again and again: `python -m tests.crash_test --kills 30`.

The kills are shared out between the data commands (tok_train, tok_encode) and the training stages
(base, mid, sft, rl on rollouts, rl on pairs). Each is a SIGKILL: within a save, just after a step,
or at any moment from the start of the process, in turn. The same command then goes on.

A data command is killed, what it left must be whole or absent, and the next run must make exactly
what an uninterrupted one makes. Of a training stage, one tiny run is killed many times. After every
kill each checkpoint that was saved since must load and be, bit for bit, the one an uninterrupted
run saved at that step: parameters, optimizer state, position in the data. When the kills are done
the run goes through, and its end, its log and the token stores must be the uninterrupted run's.

Prints one JSON object; exit status 1 where anything differs.
"""

import argparse
import io
import json
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for python -m tests.crash_test

import processes
import tiny_runs
import torch
from safetensors.torch import load_file

from nanochat.checkpoint_manager import list_steps, read_meta

SAVE_EVERY = 3
STEPS_PER_KILL = 12
"""Steps of the whole run per kill: so that it is not over before the last kill."""
MOMENTS = ("save", "any", "step")
DOCUMENTS, FILES = 2000, 4
"""Documents of the corpus that the data commands read."""

COMMON = "--device cpu --dtype float32 --resume --tag crash --keep-last 0 --eval-every 0"
BATCHES = (
    f"{COMMON} --corpus TEXT --device-batch-size 2 --total-batch-size 256 --window 16 "
    "--eval-tokens 256"
)
CHAT = f"{BATCHES} --mix arithmetic:60:1 customjson:0.1"
TRAINING = {
    "base": f"base_train {BATCHES} --depth 2 --aspect-ratio 16 --head-dim 16 --kv-heads 1 "
    "--context-length 64 --window-pattern SL",
    "mid": f"mid_train {CHAT}",
    "sft": f"chat_sft {CHAT} --long-conversations split",
    "rl": f"chat_rl {COMMON} --mix arithmetic:60:level=0:1 --format-bonus 1 --prompts-per-step 2 "
    "--group-size 3 --max-tokens 12 --eval-problems 4 --eval-samples 1",
    "dpo": f"chat_rl {COMMON} --algo dpo --pairs PAIRS --eval-problems 8 --prompts-per-step 4",
}
"""Script and arguments; TEXT and PAIRS stand for the files."""
DATA = {
    "tok_train": "--corpus TEXT --vocab-size 400",
    "tok_encode": "--corpus TEXT --workers 1",
}


@dataclass
class Tally:
    """Outcomes of a stage's kills."""

    kills: int = 0
    in_a_save: int = 0
    """Kills that left a temporary folder."""
    verified: int = 0
    """Checkpoints, tokenizers and stores that were compared."""


def script(name: str, folder: Path, arguments: list[str]) -> None:
    """`python -m scripts.NAME`, in a process that has torch already."""
    torch.set_num_threads(1)
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    sys.stdout = sys.stderr = (folder / "output").open("a")
    sys.argv = [name, *arguments]
    runpy.run_module(f"scripts.{name}", run_name="__main__", alter_sys=True)


def start(name: str, folder: Path, arguments: list[str]) -> Any:
    process = processes.context.Process(target=script, args=(name, folder, arguments))
    process.start()
    return process


def finish(process: Any, folder: Path) -> None:
    """Wait for a process that is not killed."""
    if processes.finish(process):
        raise RuntimeError((folder / "output").read_text())


def kill(process: Any, seconds: float, beside: Path | None = None) -> bool:
    """Kill the process so long after a save began in `beside`, or after now; whether it ran."""
    while beside is not None and process.exitcode is None and not leftovers(beside):
        pass
    time.sleep(seconds)
    process.kill()
    return processes.finish(process) == -signal.SIGKILL


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


# The data commands


def contents(folder: Path) -> dict[str, bytes]:
    """Files by their path, without those of a build under way (temporary folders, shards).

    What says how long it took is left out.
    """
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): re.sub(rb'"seconds": [0-9.e-]+', b"", path.read_bytes())
        for name, path in sorted(files.items())
        if not any(part.startswith(".") or part.endswith(".shards") for part in name.parts)
    }


def kill_data(
    name: str, random: Random, kills: int, begin: Path, corpus: Path, wrong: list[str]
) -> Tally:
    """Kill a data command, each time from the beginning; compare what it left, and what came."""
    tally, target = Tally(), {"tok_train": "tokenizer", "tok_encode": "stores"}[name]
    root = begin.parent
    arguments = [str(corpus) if part == "TEXT" else part for part in DATA[name].split()]
    whole = Path(shutil.copytree(begin, root / f"{name}-whole"))
    began = time.monotonic()
    finish(start(name, whole, arguments), whole)
    seconds = time.monotonic() - began
    wanted = contents(whole / target)
    while tally.kills < kills:
        broken = Path(shutil.copytree(begin, root / f"{name}-broken"))
        beside = broken if name == "tok_train" else broken / target
        process = start(name, broken, arguments)
        if MOMENTS[tally.kills % 3] == "save":
            killed = kill(process, random.uniform(0, 0.02), beside)
        else:
            killed = kill(process, random.uniform(0, seconds))
        if killed:
            tally.kills += 1
            tally.in_a_save += bool(leftovers(beside))
            left = contents(broken / target)
            # A store or a tokenizer is there with all its files or not at all.
            there = {path.partition("/")[0] for path in left} if name == "tok_encode" else {""}
            expected = {k: v for k, v in wanted.items() if left and k.startswith(tuple(there))}
            wrong += [f"{name}: {path} after a kill" for path in differing(left, expected)]
            finish(start(name, broken, arguments), broken)
            wrong += [f"{name}: {path}" for path in differing(contents(broken / target), wanted)]
            wrong += [f"{name}: {path.name} stayed" for path in leftovers(beside)]
            tally.verified += 1
        shutil.rmtree(broken)
    return tally


def differing(found: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    return sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))


# Training


def checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and position of a step folder, digests verified."""
    meta = read_meta(folder)
    tensors = load_file(folder / "model.safetensors")
    for path in sorted((folder / "optim").glob("*.safetensors")):
        tensors |= {f"optim {name}": value for name, value in load_file(path).items()}
    state = {k: v for k, v in meta["train_state"].items() if "seconds" not in k}
    return tensors, {"state": state, "loader": meta["loader_state"], "step": meta["step"]}


def differences(folder: Path, whole: Path) -> list[str]:
    """List what a checkpoint has otherwise than the uninterrupted run's."""
    (tensors, position), (wanted, expected) = checkpoint(folder), checkpoint(whole)
    wrong = [k for k in expected if position[k] != expected[k]]
    wrong += sorted(tensors.keys() ^ wanted.keys())
    wrong += [k for k in tensors.keys() & wanted.keys() if not torch.equal(tensors[k], wanted[k])]
    return [f"{folder.parent.parent.name} {folder.name}: {what}" for what in wrong]


def count_lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_training(
    stage: str, random: Random, kills: int, begin: Path, wrong: list[str], offset: int
) -> Tally:
    """Kill one run of a stage `kills` times, and let it go through in the end."""
    tally, num_steps = Tally(), kills * STEPS_PER_KILL
    files = {"TEXT": str(begin / "text"), "PAIRS": str(begin / "pairs.jsonl")}
    name, *arguments = [files.get(part, part) for part in TRAINING[stage].split()]
    arguments += ["--save-every", str(SAVE_EVERY), "--num-steps", str(num_steps)]
    whole, broken = (
        Path(shutil.copytree(begin, begin.parent / f"{stage}-{which}"))
        for which in ("whole", "broken")
    )
    began = time.monotonic()
    finish(start(name, whole, arguments), whole)
    seconds = time.monotonic() - began
    kind = "rl" if stage == "dpo" else stage
    run_of = {folder: folder / "checkpoints" / kind / "crash" for folder in (whole, broken)}
    log = broken / "runs" / f"{kind}-crash" / "metrics.jsonl"
    while tally.kills < kills:
        moment = MOMENTS[(tally.kills + offset) % len(MOMENTS)]
        first = max(list_steps(run_of[broken]), default=0)
        process = start(name, broken, arguments)
        wanted = count_lines(log) + random.randint(1, STEPS_PER_KILL - 2)
        if moment == "any":
            killed = kill(process, random.uniform(0, seconds / kills))
        else:
            while process.exitcode is None and count_lines(log) < wanted:
                time.sleep(0.001)
            if moment == "save":
                killed = kill(process, random.uniform(0, 0.015), run_of[broken])
            else:
                killed = kill(process, random.uniform(0, 0.01))
        if not killed:
            raise RuntimeError(
                f"{stage} was over before it was killed:\n" + (broken / "output").read_text()
            )
        tally.kills += 1
        tally.in_a_save += bool(leftovers(run_of[broken]))
        for step in list_steps(run_of[broken]):
            # A step folder is never written again but by a run that was resumed before it.
            if step >= first:
                folder = f"step_{step:06d}"
                wrong += differences(run_of[broken] / folder, run_of[whole] / folder)
                tally.verified += 1
    finish(start(name, broken, arguments), broken)
    last = f"step_{num_steps:06d}"
    wrong += differences(run_of[broken] / last, run_of[whole] / last)
    tally.verified += 1
    if list_steps(run_of[broken]) != list_steps(run_of[whole]):
        wrong.append(f"{stage}: other steps were saved")
    losses = [tiny_runs.losses(folder, kind, "crash") for folder in (broken, whole)]
    if losses[0] != losses[1]:
        wrong.append(f"{stage}: other losses were logged")
    stores = [
        {k: v for k, v in contents(folder / "stores").items() if not k.endswith(".json")}
        for folder in (broken, whole)
    ]
    wrong += [f"{stage}: {path}" for path in differing(*stores)]
    shutil.rmtree(whole)
    shutil.rmtree(broken)
    return tally


def prepare(root: Path) -> tuple[Path, Path]:
    """(folder with a short run of every stage to start from, folder with a corpus alone)."""
    begin = root / "begin"
    text = tiny_runs.corpus(begin)
    with redirect_stdout(io.StringIO()):
        tiny_runs.encode_corpus(begin)
        for stage in ("base", "mid", "sft"):
            tiny_runs.train(stage, begin, tiny_runs.CONFIGS[stage](text))
    pairs = [
        {
            "messages": [{"role": "user", "content": f"what of {place}"}],
            "chosen": "the king",
            "rejected": thing,
        }
        for place in tiny_runs.PLACES
        for thing in (*tiny_runs.THINGS, *tiny_runs.VERBS)
    ]
    (begin / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    corpus = root / "corpus"
    corpus.mkdir()
    for number in range(FILES):
        texts = tiny_runs.documents(DOCUMENTS // FILES, seed=number)
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (corpus / f"{number}.jsonl").write_text("".join(lines))
    return begin, corpus


def shares(kills: int) -> Iterator[tuple[str, int]]:
    stages = [*TRAINING, *DATA]
    for i, stage in enumerate(stages):
        yield stage, kills // len(stages) + (i < kills % len(stages))


def run(kills: int, seed: int, root: Path) -> dict[str, Any]:
    begin, corpus = prepare(root)
    empty = root / "empty"
    empty.mkdir()
    with_tokenizer = Path(shutil.copytree(empty, root / "with_tokenizer"))
    finish(
        start("tok_train", with_tokenizer, ["--corpus", str(corpus), "--vocab-size", "400"]),
        with_tokenizer,
    )
    wrong: list[str] = []
    tallies: dict[str, Tally] = {}
    for offset, (stage, count) in enumerate(shares(kills)):
        random = Random(f"{seed} {stage}")
        if count and stage in TRAINING:
            tallies[stage] = kill_training(stage, random, count, begin, wrong, offset)
        elif count:
            source = empty if stage == "tok_train" else with_tokenizer
            tallies[stage] = kill_data(stage, random, count, source, corpus, wrong)
    return {
        "seed": seed,
        **{
            name: sum(getattr(tally, name) for tally in tallies.values())
            for name in ("kills", "in_a_save", "verified")
        },
        "stages": {stage: asdict(tally) for stage, tally in tallies.items()},
        "wrong": wrong,
    }


def main(kills: int, seed: int) -> dict[str, Any]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        result = run(kills, seed, Path(temporary))
    return {**result, "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="1000 take hours")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcome = main(arguments.kills, arguments.seed)
    print(json.dumps(outcome))
    sys.exit(1 if outcome["wrong"] else 0)
