"""The command line, `edgefg VERB …`: parse and call.

This is the one composition root. Verbs import other packages inside their functions, so that `edgefg predict` runs on
a device without torch. Each panel of the help is a module.

Exit status: 0 done; 1 a check failed; 2 bad usage or input; 130 interrupted; 143 stopped by SIGTERM.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

from cyclopts import CycloptsError

from edgefg.cli import compress, data, device, export, measure, train
from edgefg.cli.app import app, usage_error
from edgefg.cli.terminal import notices_on_stderr
from edgefg.errors import EdgefgError, ParityError

__all__ = ["app", "compress", "data", "device", "export", "main", "measure", "train"]

_STOPPED = 143
"""Exit status after SIGTERM, as shells report it."""


def main() -> None:
    """Run the command line. Errors of edgefg become one line on standard error and an exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal may lack letters of the help, a label or a path.
        errors = "surrogateescape" if sys.stdout.encoding.lower() == "utf-8" else "replace"
        sys.stdout.reconfigure(errors=errors)
    # systemd stops a service with SIGTERM: unwind, so that temporary folders and child processes are removed.
    found = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))
    try:
        with notices_on_stderr():
            _run()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if found is None else found)


def _run() -> None:
    try:
        try:
            app(sys.argv[1:])
        finally:
            sys.stdout.flush()  # here, since an error at interpreter exit would be a traceback
    except CycloptsError as exc:
        _fail(usage_error(exc), 2)
    except ParityError as exc:
        _fail(str(exc), 1)
    except EdgefgError as exc:
        _fail(str(exc), 2)
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes what can be resumed", 130)
    except BrokenPipeError:  # `edgefg … | head`
        _drop_unwritable()
        sys.exit(0)
    except OSError as exc:  # for instance, standard output on a full disk
        _drop_unwritable()
        _fail(str(exc), 2)
    except RuntimeError as exc:
        # torch complains about data loaders that got the signal too.
        if _was_stopped(exc):
            sys.exit(_STOPPED)
        raise


def _drop_unwritable() -> None:
    """Drop output that cannot be written, which Python would complain about at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _was_stopped(error: BaseException | None) -> bool:
    """Return whether an exception was raised while SIGTERM was handled."""
    while error is not None and not isinstance(error, SystemExit):
        error = error.__context__
    return error is not None


def _fail(text: str, status: int) -> None:
    line = " ".join(text.split())
    print(f"edgefg: {line.replace(str(Path.cwd()) + os.sep, '')}", file=sys.stderr)
    sys.exit(status)
