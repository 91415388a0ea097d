"""Output of the benchmarks' results, and words for their models."""

import json
from pathlib import Path
from typing import Any


def words(count: int) -> list[bytes]:
    """Make bytes for so many tokens, each as long as a token of a real vocabulary."""
    return [b"%06d" % i for i in range(count)]


def publish(result: Any, path: Path | None, quiet: bool = False) -> None:
    """Print the result as JSON (quiet: it was printed line by line) and write it to a file."""
    text = json.dumps(result, indent=1, default=str)
    if not quiet:
        print(text)
    if path is not None:
        path.write_text(text + "\n")
