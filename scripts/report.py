"""Write the report card.

The script writes every stage's metrics and evaluations under NANOCHAT_BASE_DIR into
report/report.md and report/report.html, a page that needs no other file. It can be run at any time;
the report lists what is missing.

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
    """Price of the whole machine per hour, to compute the cost of training."""
    device: tyro.conf.Suppress[str] = "cpu"
    """Device that every script has; the report computes nothing."""


def main(cfg: Config, runtime: Runtime) -> tuple[Path, Path] | None:
    """Returns the paths of the two files (None on ranks other than 0)."""
    if not runtime.is_main:
        return None
    markdown, page = write_report(cfg.tag, cfg.price_per_hour)
    runtime.print(f"written: {markdown} and {page}")
    return markdown, page


if __name__ == "__main__":
    launch(main, Config, __doc__)
