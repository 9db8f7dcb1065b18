"""Keep a library from leaving the process without a valid stack for its signal handlers."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_DISABLED = 2  # SS_DISABLE of <signal.h>


class _Stack(ctypes.Structure):
    """``stack_t`` of <signal.h> on Linux."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Restore the thread's alternate signal stack when the block ends.

    OpenVINO's CPU plugin installs one of its own when a model is compiled. When the model is dropped, it frees that
    stack and sets the one before it, which may be that of another model and freed as well. The next signal that Python
    handles (SIGTERM from systemd, SIGCHLD from a finished child) then ends the process with a segmentation fault.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    sigaltstack = ctypes.CDLL(None).sigaltstack
    before = _Stack()
    known = sigaltstack(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            before.flags &= _DISABLED
            sigaltstack(ctypes.byref(before), None)
