"""The alternate signal stack of this thread, as sigaltstack(2) tells it."""

from __future__ import annotations

import ctypes
import sys

from edgefg.signals import _Stack


def signal_stack() -> tuple[int | None, int]:
    """Address and size; ``(None, 0)`` on other systems than Linux."""
    if not sys.platform.startswith("linux"):
        return None, 0
    found = _Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.pointer, found.size
