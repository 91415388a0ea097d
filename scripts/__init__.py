"""Command-line stages: each module is `main(cfg, runtime)` under a guard."""

import os
import signal
import sys

if not os.environ.get("NANOCHAT_TRACEBACK"):
    # torch reads this variable when it is imported. Without it, torch logs pages of C++ frames
    # beside the one line that reports a lost rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # With `python -m scripts.NAME`, Ctrl-C during imports ends the program without a traceback;
    # later `launch` handles it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
