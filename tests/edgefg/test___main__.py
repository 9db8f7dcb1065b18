"""`python -m edgefg` is the command line."""

from __future__ import annotations

import subprocess
import sys

from edgefg import __version__


def test_it_runs_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "edgefg", "--version"], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout
