"""Write the report card.

Gathers every stage's metrics and evaluations under NANOCHAT_BASE_DIR into report/report.md and a
self-contained report/report.html. It can be run at any time; what is not there yet is named.

Example:
    python -m scripts.report

With --tag NAME the two files are about the runs of that name, and lie in report/NAME.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from nanochat.cli import launch
from nanochat.report.sections import write_report
from nanochat.runtime import Runtime


@dataclass(frozen=True)
class Config:
    tag: str | None = None
    """Name of the runs to report; default: the newest run of each stage."""
    price_per_hour: float | None = None
    """What the whole machine costs an hour, to work out what the training cost."""
    device: tyro.conf.Suppress[str] = "cpu"
    """Nothing is computed."""


def main(cfg: Config, runtime: Runtime) -> tuple[Path, Path] | None:
    """Returns the paths of the two files (None on ranks other than 0)."""
    if not runtime.is_main:
        return None
    markdown, page = write_report(cfg.tag, cfg.price_per_hour)
    runtime.print(f"written: {markdown} and {page}")
    return markdown, page


if __name__ == "__main__":
    launch(main, Config, __doc__)
