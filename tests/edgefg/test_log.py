"""The library is silent in an application that configures no logging."""

from __future__ import annotations

import subprocess
from collections.abc import Callable


def test_silent_without_a_handler(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = python("from edgefg.log import get_logger; get_logger('edgefg.x').warning('a warning')")
    assert (done.stdout, done.stderr) == ("", "")
    done = python(
        "import logging; from edgefg.log import get_logger; logging.basicConfig(); get_logger('edgefg.x').warning('ab')"
    )
    assert "ab" in done.stderr
