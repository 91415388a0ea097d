"""Command-line stages: each module is `main(cfg, runtime)` under a guard."""

import os
import signal
import sys

if not os.environ.get("NANOCHAT_TRACEBACK"):
    # Read when torch is imported. A rank that lost another one says so in a line of its own; torch
    # logs pages of C++ frames beside it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m scripts.NAME`: until `launch` has the say, Ctrl-C ends the program without a
    # traceback from within an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
