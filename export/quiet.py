"""Keep vendors' progress prints, log lines and warnings away from the user while one of their functions runs."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed to stdout, warned, or logged up to WARNING; errors still raise.

    What an exporter or quantiser has to say to its developers is no help to a user, and would end up in the middle of
    ``--json`` output.
    """
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
