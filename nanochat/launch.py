"""The frame around every script: parse, start, run, and one line for a user's mistake."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nanochat import config, runtime
from nanochat.errors import UserError
from nanochat.runtime import Runtime

C = TypeVar("C")


def launch(
    main: Callable[[C, Runtime], Any], config_class: type[C], description: str | None
) -> None:
    """Run `main(cfg, runtime)` from the command line.

    UserError and OSError (a full disk, a missing file) become one line on stderr and exit status 1,
    and so does memory that ran out, with advice what to set; `NANOCHAT_TRACEBACK=1` shows where
    they came from. Every other exception is a bug and keeps its traceback. In a job of several
    ranks any of them ends the whole job (Alarm).
    """
    cfg = config.parse(config_class, description=description)
    run = getattr(cfg, "run", cfg)
    started = None
    try:
        started = runtime.start(getattr(run, "device", "auto"), getattr(run, "dtype", "auto"))
        main(cfg, started)
        started.close()
    except Exception as failure:
        error = failure
        if is_out_of_memory(failure):
            advice = started.memory_advice if started else Runtime.memory_advice
            reason = str(failure).strip().partition("\n")[0] or type(failure).__name__
            error = UserError(f"out of memory: {advice} ({reason})")
        mistake = isinstance(error, (UserError, OSError))
        silent = mistake and not os.environ.get("NANOCHAT_TRACEBACK")
        if started and started.alarm:
            started.alarm.fail(error, "" if silent else traceback.format_exc())
        if not silent:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left: on CPUs torch says so in words only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
