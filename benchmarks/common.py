"""Output of the benchmarks' results."""

import json
from pathlib import Path
from typing import Any


def publish(result: Any, path: Path | None, quiet: bool = False) -> None:
    """Print the result as JSON (quiet: it was printed line by line) and write it to a file."""
    text = json.dumps(result, indent=1, default=str)
    if not quiet:
        print(text)
    if path is not None:
        path.write_text(text + "\n")
