"""Progress of long loops: invisible in a library, bars on the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class ProgressBar(Protocol):
    """How progress is shown; `rich.progress.track` and `tqdm` are easily adapted to it."""

    def __call__(self, items: Iterable[T], description: str, total: int | None) -> Iterable[T]:
        """Return the same items, showing how many of ``total`` have been taken."""


def _invisible(items: Iterable[T], description: str, total: int | None) -> Iterable[T]:
    return items


_bar: ContextVar[ProgressBar] = ContextVar("progress bar", default=_invisible)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Iterate over items while the progress bar in force shows how far the loop is.

    Args:
        items: what to iterate over.
        description: what the loop does, a few words.
        total: how many items there are; taken from ``len(items)`` where that is known.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    return _bar.get()(items, description, total)


@contextlib.contextmanager
def progress_shown_by(bar: ProgressBar) -> Iterator[None]:
    """Show the progress of loops in this context with ``bar``."""
    token = _bar.set(bar)
    try:
        yield
    finally:
        _bar.reset(token)
