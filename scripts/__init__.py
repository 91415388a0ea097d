"""Command-line stages: each module is `main(cfg, runtime)` under a guard."""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m scripts.NAME`: until `launch` has the say, Ctrl-C ends the program without a
    # traceback from within an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
