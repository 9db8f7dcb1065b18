"""Notices and progress bars of the command line."""

from __future__ import annotations

import io
import logging
import sys
import threading

import pytest

from edgefg.cli.terminal import notices_on_stderr
from edgefg.log import get_logger
from edgefg.progress import track

_log = get_logger("edgefg.tests")


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Tty:
    """Make standard error a terminal; in the test itself, because pytest replaces it after the fixtures."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Tty()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_in_a_pipe_notices_are_plain_lines_and_loops_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    line = "a long line [bold]" + 20 * " 100 % of it"
    with notices_on_stderr():
        _log.info(line)
        _log.warning("%d images are unreadable", 3)
        _log.debug("not shown")
        assert list(track([1, 2], "counting")) == [1, 2]
    assert capsys.readouterr() == ("", f"{line}\nwarning: 3 images are unreadable\n")


def test_outside_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(logging.getLogger("edgefg").handlers), logging.getLogger("edgefg").level
    with notices_on_stderr():
        pass
    _log.warning("not shown")
    assert (list(logging.getLogger("edgefg").handlers), logging.getLogger("edgefg").level) == before
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_bars_of_nested_loops_below_the_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = use_terminal(monkeypatch)
    monkeypatch.setattr("edgefg.cli.terminal._SECONDS_PER_FRAME", 0)
    threads = threading.active_count()  # pytest-xdist has one of its own
    with notices_on_stderr():
        for epoch in track(range(2), "training"):
            for _ in track(iter("abc"), "scoring", 3):
                pass
            _log.info("epoch %d [done]", epoch)
        assert threading.active_count() == threads
    text = tty.getvalue()
    for part in ("training", "scoring", "100%", "epoch 0 [done]", "epoch 1 [done]"):
        assert part in text


def test_a_loop_that_is_left_early_removes_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = use_terminal(monkeypatch)
    with notices_on_stderr():
        for _ in track([1, 2, 3], "searching"):
            break
        _log.warning("stopped")
    assert tty.getvalue().rstrip().endswith("warning: stopped\x1b[0m")
