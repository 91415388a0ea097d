"""Log of a run: progress lines on the console, metrics.jsonl, and wandb with `--wandb`.

metrics.jsonl holds one JSON object per line. "kind" is start, train, eval, sample or end. A resumed
run appends; if a step appears twice, the later line counts.
"""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanochat import paths
from nanochat.config import to_dict
from nanochat.errors import UserError
from nanochat.hardware import peak_flops, peak_memory_bytes, processor
from nanochat.plan import Plan
from nanochat.progress import duration_text
from nanochat.runtime import Runtime
from nanochat.train import StepStats, TrainState

CONSOLE_EVERY = 5.0
"""Seconds between progress lines."""


def commit() -> str | None:
    """Git commit of the checkout that this code runs from; None if it is not a checkout."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def describe_runtime(runtime: Runtime) -> dict[str, Any]:
    cuda = runtime.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(runtime.device) if cuda else str(runtime.device),
        "processor": processor(),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "world_size": runtime.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit(),
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl; lines cut off by a kill or a full disk are left out."""
    records = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            continue
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
    return records


def check_wandb() -> None:
    """Raise UserError if `--wandb` cannot work; called before anything is computed."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb; pip install wandb") from None
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if not offline and not wandb.api.api_key:
        raise UserError(
            "--wandb needs a login; run wandb login, set WANDB_API_KEY, or WANDB_MODE=offline"
        )


class RunLog:
    """Log of one run; every rank may call it, only rank 0 writes."""

    def __init__(
        self, stage: str, tag: str, runtime: Runtime, plan: Plan, wandb_run: str | None = None
    ):
        self.stage, self.tag, self.runtime, self.plan = stage, tag, runtime, plan
        self.path = paths.run_dir(stage, tag) / "metrics.jsonl"
        self.smooth = 0.0
        self.smooth_steps = 0
        self.last_print = 0.0
        self.wandb: Any = None
        if runtime.is_main and wandb_run:
            import wandb

            self.wandb = wandb.init(project="nanochat", name=f"{wandb_run}-{stage}")

    def _write(self, record: dict[str, Any]) -> None:
        if not self.runtime.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb is not None and record["kind"] in ("train", "eval", "end"):
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
            self.wandb.log({f"{record['kind']}/{k}": v for k, v in numbers.items()})

    def start(
        self,
        config: dict[str, Any],
        model: dict[str, Any],
        state: TrainState,
        tokenizer_hash: str,
    ) -> None:
        if self.runtime.is_main:
            self._begin(afresh=state.step == 0)
        self._write(
            {
                "kind": "start",
                "stage": self.stage,
                "tag": self.tag,
                "step": state.step,
                "time": time.time(),
                "config": config,
                "model": model,
                "tokenizer_hash": tokenizer_hash,
                "plan": to_dict(self.plan),
                "runtime": describe_runtime(self.runtime),
            }
        )
        self.runtime.print(f"{self.stage}/{self.tag}: {self.plan.describe()}")
        if state.step:
            self.runtime.print(f"resuming after step {state.step}")

    def _begin(self, afresh: bool) -> None:
        """Remove the log of a run that never saved; or, if resumed, an incomplete last line."""
        if afresh:
            self.path.unlink(missing_ok=True)
        elif self.path.is_file():
            data = self.path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                paths.atomic_write(self.path, whole)

    def train(
        self,
        state: TrainState,
        stats: StepStats,
        lr_multiplier: float,
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Record a finished step; `state` already counts it. `more` are further measurements.

        Tokens per second and MFU (share of the device's peak FLOPs) count the time inside steps
        only; `elapsed_seconds` counts all time.
        """
        speed = stats.tokens / stats.seconds
        record: dict[str, Any] = {
            "kind": "train",
            "step": state.step,
            # A step without targets has no loss: all answers of a rollout got the same reward.
            **({"loss": stats.loss} if stats.targets else {}),
            "lr": lr_multiplier,
            "targets": stats.targets,
            "tokens": state.tokens,
            "tokens_per_second": speed,
            "seconds": state.seconds,
            "elapsed_seconds": state.elapsed_seconds,
            "memory_bytes": peak_memory_bytes(self.runtime.device),
            **(more or {}),
        }
        peak = peak_flops(self.runtime.device)
        if peak is not None:
            per_token = self.plan.flops / self.plan.tokens
            record["mfu"] = per_token * speed / (peak * self.runtime.world_size)
        if stats.skipped:
            record["skipped"] = True
        self._write(record)
        # Debiased moving average over the steps of this process that had a loss.
        if stats.targets:
            self.smooth = 0.95 * self.smooth + 0.05 * stats.loss
            self.smooth_steps += 1
        now = time.monotonic()
        if now - self.last_print < CONSOLE_EVERY and state.step != self.plan.num_steps:
            return
        self.last_print = now
        loss = ""
        if self.smooth_steps:
            loss = f"loss {self.smooth / (1 - 0.95**self.smooth_steps):.4f} | "
        eta = (self.plan.num_steps - state.step) * state.elapsed_seconds / max(state.step, 1)
        mfu = f" | mfu {100 * record['mfu']:.0f} %" if "mfu" in record else ""
        measured = "".join(f" | {name} {value:.3g}" for name, value in (more or {}).items())
        self.runtime.print(
            f"step {state.step}/{self.plan.num_steps} | {loss}"
            f"lr x{lr_multiplier:.2f} | {speed:,.0f} tok/s{mfu}{measured} | "
            f"eta {duration_text(eta)}"
        )

    def eval(self, step: int, metrics: dict[str, float]) -> None:
        self._write({"kind": "eval", "step": step, **metrics})
        text = " | ".join(
            f"{name} {value:,.0f}"
            if float(value).is_integer() and math.fabs(value) >= 100
            else f"{name} {value:.4f}"
            for name, value in metrics.items()
        )
        self.runtime.print(f"step {step}/{self.plan.num_steps} | validation: {text}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._write({"kind": "sample", "step": step, "prompt": prompt, "text": text})
        self.runtime.print(f"sample: {prompt}\N{HORIZONTAL ELLIPSIS}{text}" if prompt else text)

    def end(self, state: TrainState, consumed: dict[str, Any]) -> None:
        self._write(
            {
                "kind": "end",
                "step": state.step,
                "seconds": state.seconds,
                "elapsed_seconds": state.elapsed_seconds,
                "tokens": state.tokens,
                "peak_memory_bytes": peak_memory_bytes(self.runtime.device),
                "consumed": consumed,
                **state.metrics,
            }
        )
        if self.wandb is not None:
            self.wandb.finish()
        self.runtime.print(
            f"{self.stage}/{self.tag}: {state.step} steps, {state.tokens:,} tokens in "
            f"{duration_text(state.seconds)} ({duration_text(state.elapsed_seconds)} with reading, "
            "evaluating and saving), peak memory "
            f"{peak_memory_bytes(self.runtime.device) / 2**30:.2f} GiB"
        )
