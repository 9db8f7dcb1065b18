"""The alternate signal stack is restored."""

from __future__ import annotations

import ctypes
import sys

import pytest

from edgefg.signals import _Stack, kept_signal_stack
from tests.signal_stack import signal_stack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stack's layout is Linux's")


@pytest.mark.parametrize("fails", [False, True])
def test_the_stack_is_as_it_was(fails: bool) -> None:
    before = signal_stack()
    memory = ctypes.create_string_buffer(1 << 16)
    other = _Stack(ctypes.addressof(memory), 0, len(memory))

    def run() -> None:
        with kept_signal_stack():
            assert ctypes.CDLL(None).sigaltstack(ctypes.byref(other), None) == 0
            assert signal_stack() == (ctypes.addressof(memory), len(memory))
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert signal_stack() == before
