"""The frame around every script: parse, start, run, and one line for a user's mistake."""

import os
import sys
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
    traceback.
    """
    cfg = config.parse(config_class, description=description)
    run = getattr(cfg, "run", cfg)
    started = None
    try:
        started = runtime.start(getattr(run, "device", "auto"), getattr(run, "dtype", "auto"))
        main(cfg, started)
        started.close()
    except (UserError, OSError) as error:
        if os.environ.get("NANOCHAT_TRACEBACK"):
            raise
        rank = f"rank {started.rank}: " if started and started.world_size > 1 else ""
        print(f"error: {rank}{error}", file=sys.stderr, flush=True)
        # A rank that fails must end the job: leave without waiting for the others' collectives.
        if started and started.world_size > 1:
            os._exit(1)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
