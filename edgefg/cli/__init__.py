"""The command line, `edgefg …`: parse and call.

The one composition root: other rooms are imported inside the command that needs them, so that `edgefg predict` runs on
a device without torch. A command's help, its options' included, is its docstring.

Exit status: 0 done; 1 what was checked does not hold; 2 bad usage or input; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from edgefg.cli import build, check, compress, data, device, doctor, export, folds, insight, sign, students, workstation
from edgefg.cli.app import app, console
from edgefg.errors import EdgefgError, ParityError

__all__ = [
    "app",
    "build",
    "check",
    "compress",
    "data",
    "device",
    "doctor",
    "export",
    "folds",
    "insight",
    "main",
    "sign",
    "students",
    "workstation",
]

_STOPPED = 143
"""Exit status after SIGTERM, as shells have it."""


def main() -> None:
    """Run the command line; turn what edgefg raises into one line and an exit status."""
    # systemd's stop: unwind, so that temporary folders and child processes go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))
    try:
        with console():
            app()
    except ParityError as exc:
        _fail(exc, 1)
    except EdgefgError as exc:
        _fail(exc, 2)
    except BrokenPipeError:  # `edgefg … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as exc:  # standard output on a full disk, for instance
        _fail(exc, 2)
    except RuntimeError as exc:
        # What torch says of workers that got the signal too is no news.
        if _was_stopped(exc):
            sys.exit(_STOPPED)
        raise


def _was_stopped(error: BaseException | None) -> bool:
    """Whether an exception came while SIGTERM was being obeyed."""
    while error is not None and not isinstance(error, SystemExit):
        error = error.__context__
    return error is not None


def _fail(error: Exception, status: int) -> None:
    line = " ".join(str(error).split())
    print(f"edgefg: {line.replace(str(Path.cwd()) + os.sep, '')}", file=sys.stderr)
    sys.exit(status)
