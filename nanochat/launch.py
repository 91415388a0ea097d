"""The frame around every script: parse, start, run, and one line for a user's mistake."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from nanochat import config, runtime
from nanochat.errors import UserError

C = TypeVar("C")


def launch(
    main: Callable[[C, runtime.Runtime], Any], config_class: type[C], description: str | None
) -> None:
    """Run `main(cfg, runtime)` from the command line.

    UserError and OSError (a full disk, a missing file) become one line on stderr and exit status 1;
    `NANOCHAT_TRACEBACK=1` shows where they came from. Every other exception is a bug and keeps its
    traceback. In a job of several ranks any of them ends the whole job (Alarm).
    """
    cfg = config.parse(config_class, description=description)
    run = getattr(cfg, "run", cfg)
    started = None
    try:
        started = runtime.start(getattr(run, "device", "auto"), getattr(run, "dtype", "auto"))
        main(cfg, started)
        started.close()
    except Exception as error:
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
