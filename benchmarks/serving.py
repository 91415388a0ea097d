"""Test the chat server under load, with many streaming clients and some that misbehave.

python -m benchmarks.serving [--source sft] [--clients 64] [--seconds 60] [--json out.json]

The benchmark starts `scripts.chat_web` on a free port of 127.0.0.1, and ends it. With --source, a
trained model answers short questions, and answers have natural lengths. Without it, a random model
of --depth writes until --max-tokens.

- alone: one client asks one question after the other, before and after the load.
- load: --clients clients ask as fast as they are answered. Some read slowly (a kilobyte at a time),
  some leave in the middle of an answer, and some send malformed requests.

Every answer to a well-behaved client must be complete, and every malformed request must get a
status 4xx. The report has failures by class; tokens a second of the well-behaved clients, and their
ratio to alone; the time to the first token; the server's memory during the load; and memory and
requests that are left when all clients have gone. The exit status is 1 after any failure.
"""

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common import publish

QUESTIONS = [
    "Who are you?",
    "What is 12 + 34?",
    "How many r are in strawberry?",
    "Spell the word cat.",
    "Tell me about the sea and the people who sail on it, please.",
    "Write a sentence about a king who had a garden, a dog and three sons.",
    "Why is the sky blue?",
    "What is 7 times 8?",
]
MALFORMED = [
    b"{",
    b"[]",
    b"\xff\xfe\x00",
    b'{"messages": 5}',
    b'{"messages": []}',
    b'{"messages": [{"role": "robot", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": 10000}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}',
    b'{"messages": [{"role": "user", "content": "x"}], "model": "none"}',
    b'{"messages": ' + b"[" * 5000,
]
REQUEST_SECONDS = 60.0
"""Seconds after which a request counts as a failure."""


@dataclass
class Tally:
    """Results of one kind of client."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    first_token: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {"outcomes": dict(sorted(self.outcomes.items())), "tokens": self.tokens}


class Connection:
    """One HTTP/1.1 request, written by hand to use little of the processors the server needs."""

    def __init__(self, port: int):
        self.port = port

    async def __aenter__(self) -> "Connection":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def send(self, body: bytes, method: bytes = b"POST", path: bytes = b"") -> int:
        """Send the request; returns the status of the response, whose body can then be read."""
        head = (
            b"%s %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        self.writer.write(head % (method, path or b"/v1/chat/completions", len(body)) + body)
        await self.writer.drain()
        status = int((await self.reader.readline()).split()[1])
        while (await self.reader.readline()).strip():
            pass
        return status


def question(number: int, max_tokens: int, temperature: float) -> bytes:
    random = Random(number)
    content = {
        "messages": [{"role": "user", "content": random.choice(QUESTIONS)}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(content).encode()


async def ask(port: int, body: bytes, tally: Tally) -> None:
    """Act as a well-behaved client, which reads a whole answer as it comes."""
    start = time.monotonic()
    usage = first = None
    async with Connection(port) as connection:
        status = await connection.send(body)
        if status != 200:
            tally.outcomes[f"status {status}"] += 1
            return
        async for line in connection.reader:
            if not line.startswith(b"data: "):
                continue
            if first is None and b'"role"' not in line:
                first = time.monotonic() - start
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b'data: {"error"'):
                tally.outcomes["error in the stream"] += 1
                return
            if b'"choices": []' in line:
                usage = json.loads(line[6:])["usage"]
        else:
            tally.outcomes["stream cut off"] += 1
            return
    if usage is None or first is None:
        tally.outcomes["incomplete"] += 1
        return
    tally.outcomes["complete"] += 1
    tally.tokens += usage["completion_tokens"]
    tally.first_token.append(first)


async def read_slowly(port: int, body: bytes, tally: Tally) -> None:
    async with Connection(port) as connection:
        status = await connection.send(body)
        while await connection.reader.read(1024):
            await asyncio.sleep(0.5)
        tally.outcomes["complete" if status == 200 else f"status {status}"] += 1


async def leave(port: int, body: bytes, tally: Tally) -> None:
    async with Connection(port) as connection:
        status = await connection.send(body)
        for _ in range(6):  # the role, the first words
            await connection.reader.readline()
        tally.outcomes["left" if status == 200 else f"status {status}"] += 1
    await asyncio.sleep(0.1)


async def be_malformed(port: int, body: bytes, tally: Tally) -> None:
    async with Connection(port) as connection:
        status = await connection.send(body)
        tally.outcomes[f"status {status}"] += 1
    await asyncio.sleep(0.05)


async def repeat(
    client: Callable[[int, bytes, Tally], Awaitable[None]],
    port: int,
    bodies: Callable[[], bytes],
    tally: Tally,
    until: float,
) -> None:
    while time.monotonic() < until:
        try:
            await asyncio.wait_for(client(port, bodies(), tally), REQUEST_SECONDS)
        except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
            tally.outcomes[type(error).__name__] += 1
            await asyncio.sleep(0.1)  # not a million requests to a dead server
        except asyncio.TimeoutError:
            tally.outcomes[f"no answer within {REQUEST_SECONDS:g} s"] += 1


class Questions:
    """Questions, in the same order in every phase."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.number = arguments, 0

    def __call__(self) -> bytes:
        self.number += 1
        return question(self.number, self.arguments.max_tokens, self.arguments.temperature)


async def alone(port: int, seconds: float, arguments: argparse.Namespace) -> tuple[Tally, float]:
    """Measure tokens a second of one client."""
    tally, start = Tally(), time.monotonic()
    await repeat(ask, port, Questions(arguments), tally, start + seconds)
    return tally, tally.tokens / (time.monotonic() - start)


async def load(
    port: int, process: int, arguments: argparse.Namespace
) -> tuple[dict[str, Tally], float, list[int]]:
    """Run the load; returns results by kind of client, tokens a second of the well-behaved ones,
    and memory."""
    tallies = {kind: Tally() for kind in ("well-behaved", "slow readers", "leaving", "malformed")}
    garbage = iter(range(10**9))
    questions = Questions(arguments)
    start = time.monotonic()
    until = start + arguments.seconds

    async def many(kind: str, count: int, client: Any, bodies: Callable[[], bytes]) -> None:
        tasks = [repeat(client, port, bodies, tallies[kind], until) for _ in range(count)]
        await asyncio.gather(*tasks)

    memory: list[int] = []

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(resident_bytes(process))
            await asyncio.sleep(1)

    async def measure() -> float:
        await many("well-behaved", arguments.clients, ask, questions)
        return tallies["well-behaved"].tokens / (time.monotonic() - start)

    speed, *_ = await asyncio.gather(
        measure(),
        many("slow readers", arguments.slow, read_slowly, Questions(arguments)),
        many("leaving", arguments.leaving, leave, Questions(arguments)),
        many(
            "malformed",
            arguments.malformed,
            be_malformed,
            lambda: MALFORMED[next(garbage) % len(MALFORMED)],
        ),
        watch(),
    )
    return tallies, speed, memory


def resident_bytes(process: int) -> int:
    """Memory of a process in bytes; 0 if the system does not tell."""
    with suppress(OSError):
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


async def metrics(port: int) -> dict[str, float]:
    async with Connection(port) as connection:
        await connection.send(b"", b"GET", b"/metrics")
        text = (await connection.reader.read()).decode()
    found = re.findall(r"^(\w+)(?:\{model=[^}]*\})? ([\d.e+-]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


async def left_over(port: int) -> dict[str, float]:
    """Read what the server still holds when its clients have gone, within ten seconds."""
    names = ("rows", "waiting_requests", "samples_in_flight", "cache_bytes")
    for _ in range(100):
        known = await metrics(port)
        held = {name: known[f"nanochat_{name}"] for name in names}
        if not any(held.values()):
            break
        await asyncio.sleep(0.1)
    return held


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


async def measure(port: int, process: int, arguments: argparse.Namespace) -> dict[str, Any]:
    await alone(port, min(3, arguments.alone), arguments)  # warms up
    before, speed_before = await alone(port, arguments.alone, arguments)
    tallies, together, memory = await load(port, process, arguments)
    held = await left_over(port)
    memory_after = resident_bytes(process)
    after, speed_after = await alone(port, arguments.alone, arguments)

    good = tallies["well-behaved"]
    fine = {
        "well-behaved": {"complete"},
        "slow readers": {"complete"},
        "leaving": {"left"},
        "malformed": {f"status {status}" for status in range(400, 500)},
    }
    errors = Counter(
        {
            f"{kind}: {outcome}": count
            for kind, tally in (*tallies.items(), ("well-behaved", before), ("well-behaved", after))
            for outcome, count in tally.outcomes.items()
            if outcome not in fine[kind]
        }
    )
    speed_alone = statistics.mean((speed_before, speed_after))
    settled = memory[len(memory) // 4 :]  # once caches and pools have reached their size
    return {
        "errors": dict(errors),
        "left_over": held,
        "clients": {kind: tally.summary() for kind, tally in tallies.items()},
        "tokens_per_second": {"alone": [speed_before, speed_after], "together": together},
        "ratio": together / speed_alone if speed_alone else 0.0,
        "answers_per_second": good.outcomes["complete"] / arguments.seconds,
        "seconds_to_first_token": {
            "alone_median": percentile(before.first_token + after.first_token, 0.5),
            **{f"p{share}": percentile(good.first_token, share / 100) for share in (50, 95, 99)},
        },
        "memory_mib": {
            "first_quarter": max(memory[: len(memory) // 4] or [0]) / 2**20,
            "second_quarter": max(memory[len(memory) // 4 : len(memory) // 2] or [0]) / 2**20,
            "last_quarter": max(memory[len(memory) * 3 // 4 :] or [0]) / 2**20,
            "after": memory_after / 2**20,
            "growth_after_first_quarter": (settled[-1] - settled[0]) / 2**20 if settled else 0.0,
        },
        "settings": {key: str(value) for key, value in vars(arguments).items()},
    }


def serve(arguments: argparse.Namespace) -> None:
    """Run the server, in its process."""
    from benchmarks.decode import made_up_tokenizer, random_model
    from nanochat import runtime
    from nanochat.infer.decoder import Decoder
    from nanochat.infer.engine import Engine
    from nanochat.serve.service import Served
    from scripts import chat_web

    cfg = chat_web.Config(
        access=chat_web.Access(port=0),
        load=chat_web.Load(max_slots=arguments.max_slots),
        source=(arguments.source or "random",),
    )
    started = runtime.start("cpu", arguments.dtype)
    listener = chat_web.listen(cfg.access.host, cfg.access.port)
    if arguments.source:
        models = chat_web.load(cfg, started)
    else:
        tokenizer = made_up_tokenizer(4096)
        model = random_model(arguments.depth, tokenizer, False, started.dtype)
        engine = Engine(Decoder(model), tokenizer, max_slots=cfg.load.max_slots)
        models = [Served("random", engine)]
    chat_web.serve(cfg, started, models, listener)


def start_server(log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start this file as a server with the same arguments; returns its port once it answers."""
    command = [sys.executable, "-m", "benchmarks.serving", "--serve", *sys.argv[1:]]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"http://127.0.0.1:(\d+)", log.read_text(errors="replace")):
            port = int(found[1])
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return process, port
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="stage, stage/tag or folder; default: random weights")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slow", type=int, default=4)
    parser.add_argument("--leaving", type=int, default=2)
    parser.add_argument("--malformed", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--alone", type=float, default=15, help="seconds, before and after")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max-slots", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        process, port = start_server(log)
        limit = arguments.seconds + 2 * arguments.alone + 2 * REQUEST_SECONDS + 30
        try:
            result = asyncio.run(asyncio.wait_for(measure(port, process.pid, arguments), limit))
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            complaints = [line for line in log.read_text(errors="replace").splitlines()[1:] if line]
    result["server_log"] = complaints[-20:]
    publish(result, arguments.json)
    if result["errors"] or any(result["left_over"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
