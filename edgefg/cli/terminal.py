"""The terminal's side of `edgefg.log` and `edgefg.progress`: notices and progress bars on standard error.

rich is loaded on the first notice or bar, and only for a terminal; other files get plain lines and no bars.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from edgefg.log import get_logger
from edgefg.progress import progress_shown_by

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
_SECONDS_PER_FRAME = 0.1


class Terminal(logging.Handler):
    """Prints the package's log records, and a bar for each running loop below them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._progress: Progress | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record's message; those above INFO begin with their level."""
        try:
            line = record.getMessage()
            if record.levelno > logging.INFO:
                line = f"{record.levelname.lower()}: {line}"
            if sys.stderr.isatty():
                style = "yellow" if record.levelno > logging.INFO else None
                self._bars().console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, file=sys.stderr, flush=True)
        except OSError:
            self.handleError(record)

    def track(self, items: Iterable[T], description: str, total: int | None) -> Iterable[T]:
        """Yield items and show a bar; see `edgefg.progress.ProgressBar`."""
        if not sys.stderr.isatty():
            yield from items
            return
        bars = self._bars()
        bars.start()
        task, shown = bars.add_task(description, total=total), time.monotonic()
        try:
            for item in items:
                yield item
                bars.advance(task)
                if time.monotonic() - shown > _SECONDS_PER_FRAME:
                    bars.refresh()
                    shown = time.monotonic()
        finally:
            bars.remove_task(task)
            if not bars.tasks:
                bars.stop()

    def _bars(self) -> Progress:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import Progress

            # No thread that refreshes: data loaders fork.
            self._progress = Progress(console=Console(stderr=True), auto_refresh=False, transient=True)
        return self._progress


@contextlib.contextmanager
def notices_on_stderr() -> Iterator[None]:
    """Show log records and progress on standard error while in this context."""
    logger, terminal = get_logger("edgefg"), Terminal()
    level = logger.level
    logger.addHandler(terminal)
    logger.setLevel(logging.INFO)
    try:
        with progress_shown_by(terminal.track):
            yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(terminal)
