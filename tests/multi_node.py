"""A job on two nodes, one of which dies in mid-run: `python -m tests.multi_node` (Linux, root).

Two network namespaces joined by a pair of virtual interfaces stand for two machines: each has its
own addresses, and reaches the other only over that link. On each, torchrun starts one rank of a
tiny base_train; they share a folder, as machines share a file system. One run is left alone. In
another everything on the second node is killed with SIGKILL after some steps, the second node's
torchrun is started again, and the job goes on from its last checkpoint. Losses and final
parameters must be the same.

Prints one JSON object.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for python -m tests.multi_node

import tiny_runs

ROOT = Path(__file__).parent.parent
STEPS, SAVE_EVERY, KILL_AFTER = 60, 4, 6
ARGUMENTS = (
    f"--num-steps {STEPS} --save-every {SAVE_EVERY} --keep-last 0 --device cpu --dtype float32 "
    "--device-batch-size 2 --total-batch-size 512 --window 16 --eval-tokens 256 --eval-every 0 "
    "--depth 2 --aspect-ratio 16 --head-dim 16 --kv-heads 1 --context-length 64 --resume"
).split()
LIMIT = 300.0
"""Seconds any part may take."""


def reason_not_to() -> str | None:
    """Reason why this cannot run here; None where it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux only"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    name = f"nanochat-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Node:
    """One machine: a namespace with an address on the link."""

    def __init__(self, index: int):
        self.name = f"nanochat-{os.getpid()}-{index}"
        self.interface = f"nc{os.getpid() % 10**6}{'ab'[index]}"
        self.address = f"10.213.77.{index + 1}"

    def ip(self, command: str) -> None:
        subprocess.run(["ip", "-netns", self.name, *command.split()], check=True)

    def start(self, base_dir: Path, corpus: str, leader: str, log: Path) -> subprocess.Popen[bytes]:
        """torchrun with one rank; the command line that docs/multi_node.md gives."""
        environment = {
            **os.environ,
            "NANOCHAT_BASE_DIR": str(base_dir),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.interface,
            # Without it torch 2.13 waits for the address of the leader's store in vain when a node
            # comes back.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        torchrun += (
            f"--nnodes 2 --nproc-per-node 1 --max-restarts 3 --rdzv-id {base_dir.name} ".split()
        )
        torchrun += f"--rdzv-backend c10d --rdzv-endpoint {leader}:29500".split()
        # Both nodes have this machine's host name, by which torchrun would tell who is who.
        is_host = int(self.address == leader)
        torchrun += f"--rdzv-conf is_host={is_host} --local-addr {self.address}".split()
        train = ["-m", "scripts.base_train", *ARGUMENTS, "--corpus", corpus]
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *torchrun, *train],
                env=environment,
                stdout=output,
                stderr=output,
            )

    def kill(self) -> int:
        """SIGKILL to everything on this node; how many processes that were."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True
        )
        pids = [int(word) for word in listed.stdout.split()]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)


@contextmanager
def two_nodes() -> Iterator[list[Node]]:
    nodes = [Node(0), Node(1)]
    try:
        for node in nodes:
            subprocess.run(["ip", "netns", "add", node.name], check=True)
            node.ip("link set lo up")
        first, second = nodes
        first.ip(
            f"link add {first.interface} type veth peer name {second.interface} netns {second.name}"
        )
        for node in nodes:
            node.ip(f"address add {node.address}/24 dev {node.interface}")
            node.ip(f"link set {node.interface} up")
        yield nodes
    finally:
        for node in nodes:
            if Path("/run/netns", node.name).exists():
                node.kill()
                subprocess.run(["ip", "netns", "delete", node.name])


def losses(base_dir: Path) -> dict[int, float]:
    path = base_dir / "runs" / "base-default" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


def finish(processes: list[subprocess.Popen[bytes]], logs: Path) -> None:
    for process in processes:
        try:
            status: int | None = process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            status = None
        if status != 0:
            texts = [f"{log.name}:\n{log.read_text()}" for log in sorted(logs.glob("*.log"))]
            how = f"still runs after {LIMIT} s" if status is None else f"ended with {status}"
            raise RuntimeError("\n".join([f"torchrun {how}", *texts]))


def run(encoded: Path, folder: Path, kill: bool) -> dict[str, Any]:
    """Train in `folder`, with or without a death."""
    shutil.copytree(encoded, folder)
    corpus, logs = str(encoded / "text"), folder
    result: dict[str, Any] = {}
    with two_nodes() as nodes:
        leader = nodes[0].address

        def start(index: int) -> subprocess.Popen[bytes]:
            return nodes[index].start(folder, corpus, leader, logs / f"node{index}.log")

        running = [start(0), start(1)]
        if kill:
            end = time.monotonic() + LIMIT
            saved = folder / f"checkpoints/base/default/step_{SAVE_EVERY:06d}"
            # A kill while the first checkpoint is being written would leave nothing to resume from.
            while len(losses(folder)) < KILL_AFTER or not saved.exists():
                if time.monotonic() > end or any(p.poll() is not None for p in running):
                    finish(running, logs)
                    raise RuntimeError(f"no step {KILL_AFTER} in {LIMIT} s")
                time.sleep(0.01)
            result["killed_processes"] = nodes[1].kill()
            running[1].wait()
            result["killed_after_step"] = len(losses(folder))
            running[1] = start(1)
        finish(running, logs)
    result["losses"] = losses(folder)
    return result


def main() -> dict[str, Any]:
    from safetensors.torch import load_file

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        tiny_runs.encode_corpus(root / "encoded")
        whole = run(root / "encoded", root / "whole", kill=False)
        broken = run(root / "encoded", root / "broken", kill=True)
        ends = [
            load_file(
                root / name / f"checkpoints/base/default/step_{STEPS:06d}" / "model.safetensors"
            )
            for name in ("whole", "broken")
        ]
        resumed = (root / "broken" / "node0.log").read_text().count("resuming after step")
        return {
            "steps": STEPS,
            "killed_processes": broken["killed_processes"],
            "killed_after_step": broken["killed_after_step"],
            "resumed": resumed,
            "same_losses": whole["losses"] == broken["losses"] and len(whole["losses"]) == STEPS,
            "same_parameters": all((ends[0][n] == ends[1][n]).all() for n in ends[0]),
            "seconds": round(time.monotonic() - started, 1),
        }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if reason := reason_not_to():
        sys.exit(f"error: {reason}")
    outcome = main()
    print(json.dumps(outcome))
    same = outcome["same_losses"] and outcome["same_parameters"]
    sys.exit(0 if same and outcome["resumed"] == 1 else 1)
