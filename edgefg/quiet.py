"""Keep vendors' prints, log lines, warnings and telemetry away while one of their functions runs."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

from edgefg.runtime import without_telemetry
from edgefg.signals import kept_signal_stack


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed to stdout, warned, or logged up to WARNING; errors still raise.

    What an exporter or quantiser has to say to its developers is no help to a user, and would end up in the middle of
    ``--json`` output.
    """
    before = logging.root.manager.disable
    os.environ.setdefault("NNCF_CI", "1")  # NNCF's own switch for its telemetry
    silent = contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(), silent, without_telemetry(), kept_signal_stack():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
