"""Seconds from a command to its first token, or to its first optimizer step.

    python -m benchmarks.startup

Each command runs in a process of its own, in turn with a bare `import torch`, which none of them
can be faster than. A tiny model is trained first, in a temporary folder. Printed are medians and
ranges; the rest of the table are the imports that cost most, by `-X importtime`.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import publish
from nanochat.cli import parse

TRAIN = (
    *("scripts.base_train", "--depth", "1", "--context-length", "64", "--total-batch-size", "512"),
    *("--corpus", "bbe", "--num-steps", "1", "--eval-every", "0", "--eval-tokens", "1024"),
    *("--sample-every", "0"),
)
CHAT = (
    "scripts.chat_cli",
    "--source",
    "base/default",
    "-p",
    "In the beginning",
    "--max-tokens",
    "1",
)
COMMANDS = {
    "import torch": ("-c", "import torch"),
    "chat_cli": ("-m", *CHAT),
    "base_train": ("-m", *TRAIN),
}


@dataclass(frozen=True)
class Config:
    rounds: int = 5
    """Times that every command is started."""
    imports: int = 8
    """Imports to list, the most expensive first."""
    json: Path | None = None
    """Write the result there, too."""


def seconds(command: tuple[str, ...]) -> float:
    """Until the command has ended, which it does right after its first token or step."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - start


def imports(module: str, count: int) -> dict[str, float]:
    """The packages whose import takes longest, in milliseconds, what they import included."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        capture_output=True,
        text=True,
    )
    found = re.findall(r"\| +(\d+) \| +([\w]+)$", done.stderr, re.M)
    longest = sorted(((int(micros) / 1000, name) for micros, name in found), reverse=True)
    return {name: ms for ms, name in longest[:count]}


def main(cfg: Config) -> dict[str, dict[str, object]]:
    """Returns command -> seconds, round by round; and imports."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        for stage in ("tok_train", "tok_encode"):
            size = ("--vocab-size", "512") if stage == "tok_train" else ()
            seconds(("-m", f"scripts.{stage}", "--corpus", "bbe", *size))
        seconds(COMMANDS["base_train"])
        found: dict[str, list[float]] = defaultdict(list)
        for round_ in range(cfg.rounds):
            for name, command in COMMANDS.items():
                tag = ("--tag", f"round{round_}") if name == "base_train" else ()
                found[name].append(seconds((*command, *tag)))
    for name, times in found.items():
        print(f"{name}: {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")
    costs = imports("scripts.chat_cli", cfg.imports)
    print("imports of chat_cli, ms:", ", ".join(f"{name} {ms:.0f}" for name, ms in costs.items()))
    result: dict[str, dict[str, object]] = {"seconds": dict(found), "imports_ms": dict(costs)}
    publish(result, cfg.json, quiet=True)
    return result


if __name__ == "__main__":
    main(parse(Config))
