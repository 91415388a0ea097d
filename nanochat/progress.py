"""Progress bar with an ETA: drawn on a terminal, a line every 30 seconds elsewhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY = 30.0  # seconds between lines without a terminal


class Bar:
    """Counts up to `total`; safe to advance from several threads."""

    def __init__(self, label: str, total: float, console: Console, drawn: Progress | None):
        self.label = label
        self.total = total
        self.count = 0.0
        self._console = console
        self._drawn = drawn
        self._task: TaskID | None = drawn.add_task(label, total=total) if drawn else None
        self._lock = threading.Lock()
        self._start = self._last = time.monotonic()

    def advance(self, amount: float) -> None:
        """Add `amount`; a negative amount is work that has to be done again."""
        with self._lock:
            self.count += amount
            self._show()

    def set(self, count: float) -> None:
        with self._lock:
            self.count = count
            self._show()

    def resize(self, total: float) -> None:
        """Set a better estimate of the total."""
        with self._lock:
            self.total = total
            self._show()

    def relabel(self, label: str) -> None:
        """Name the next phase; the ETA starts anew."""
        with self._lock:
            if label == self.label:
                return
            self.label, self.count = label, 0.0
            self._start = time.monotonic()
            if self._drawn is not None and self._task is not None:
                self._drawn.reset(self._task, description=label, total=self.total)

    def _show(self) -> None:
        if self._drawn is not None and self._task is not None:
            self._drawn.update(self._task, completed=self.count, total=self.total)
            return
        now = time.monotonic()
        if now - self._last < _LINE_EVERY or self.total <= 0:
            return
        self._last = now
        done = min(1.0, self.count / self.total)
        # An ETA before the first percent would be a wild guess.
        left = f", {(now - self._start) * (1 - done) / done:.0f} s left" if done >= 0.01 else ""
        self._console.print(f"{self.label}: {100 * done:.0f} %{left}", highlight=False)


@contextmanager
def progress_bar(label: str, total: float, hidden: bool = False) -> Iterator[Bar]:
    """Show a bar on stderr during the `with` block, unless it is hidden."""
    console = Console(stderr=True, quiet=hidden)
    if hidden or not console.is_terminal:
        yield Bar(label, total, console, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as drawn:
        yield Bar(label, total, console, drawn)


def duration_text(seconds: float) -> str:
    """Format seconds: 75 -> 1:15; 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
