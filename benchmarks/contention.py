"""Training and decoding beside another process: how much of the speed is left.

    python -m benchmarks.contention --spin default 0 300 1000 10000

Each setting of `GOMP_SPINCOUNT` (how long a waiting OpenMP thread spins; `default`: the library's
own) is measured alone, beside one process that keeps one processor busy, and twice at once. Rounds
of all settings follow each other, so slow moments of the machine meet all of them. Printed are
medians and ranges of tokens per second of one process, for training (depth 4, 8 rows of 512) and
decoding (16 prompts). `one_thread` is what a program can expect that has lost one of two
processors.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import publish
from nanochat.cli import parse

BUSY = "while True: pass"
WORKER = """\
import sys
from benchmarks.contention import measure
measure(sys.argv[1], float(sys.argv[2]))
"""
"""Programs that are started: one that competes, and one that is measured."""
CASES = {"alone": (1, False), "busy": (1, True), "two": (2, False)}
"""Cases: the number of workers at once, and whether another process competes."""


@dataclass(frozen=True)
class Config:
    spin: tuple[str, ...] = ("default", "0", "300", "1000", "10000")
    """Values of GOMP_SPINCOUNT to compare; "default" leaves the library its own."""
    kinds: tuple[str, ...] = ("train", "decode")
    """Work to measure: train, decode."""
    rounds: int = 5
    """Times that everything is measured."""
    seconds: float = 4.0
    """Duration of one measurement, after a warm-up."""
    json: Path | None = None
    """Write the result there, too."""


def measure(kind: str, seconds: float) -> None:
    """Runs in the process that is measured: prints its tokens per second."""
    import torch

    from benchmarks import decode, train_step
    from nanochat.hardware import tune_cpu
    from nanochat.infer.engine import Engine
    from nanochat.runtime import best_dtype

    tune_cpu()
    dtype = best_dtype(torch.device("cpu"))
    if kind == "train":
        step, _ = train_step.ours(4, dtype, compiled=False)
        tokens = train_step.ROWS * train_step.T
    else:
        tokenizer = decode.made_up_tokenizer(4096)
        engine = Engine(decode.random_model(4, tokenizer, False, dtype), tokenizer, max_slots=16)
        requests = decode.cases(64, 64, 1.0)["batch16"]
        tokens = 16 * 64

        def step(seed: int) -> None:
            decode.run_engine(engine, requests)

    step(0)
    print("ready", flush=True)
    sys.stdin.readline()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step(steps)
        steps += 1
    print(json.dumps(tokens * steps / (time.perf_counter() - start)), flush=True)


def start(kind: str, seconds: float, settings: dict[str, str]) -> subprocess.Popen[str]:
    """A worker that has warmed up and waits for the word."""
    clean = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, kind, str(seconds)],
        env={**clean, **settings},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    worker.stdout.readline()
    return worker


def rates(kind: str, seconds: float, settings: dict[str, str], count: int, busy: bool) -> float:
    """Mean tokens per second of `count` workers at once, beside a busy process or not."""
    workers = [start(kind, seconds, settings) for _ in range(count)]
    competitor = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        return statistics.fmean(float(worker.communicate()[0]) for worker in workers)
    finally:
        if competitor is not None:
            competitor.kill()
            competitor.wait()


def main(cfg: Config) -> dict[str, dict[str, list[float]]]:
    """Returns kind and setting -> case -> tokens per second, round by round."""
    # The package sets a spin count unless there is one: "default" is the library's 100,000.
    settings = {
        f"spin {spin}": {"GOMP_SPINCOUNT": "100000" if spin == "default" else spin}
        for spin in cfg.spin
    }
    settings["one_thread"] = {"OMP_NUM_THREADS": "1"}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(cfg.rounds):
        for kind in cfg.kinds:
            for name, variables in settings.items():
                for case, (count, busy) in CASES.items():
                    rate = rates(kind, cfg.seconds, variables, count, busy)
                    found[f"{kind}, {name}"][case].append(rate)
    for name, cases in found.items():
        shown = (
            f"{case} {statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
            for case, values in cases.items()
        )
        print(f"{name}: {'; '.join(shown)}")
    publish(found, cfg.json, quiet=True)
    return found


if __name__ == "__main__":
    main(parse(Config))
