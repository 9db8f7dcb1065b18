"""Suppress the prints, log lines, warnings and telemetry of vendors' packages."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from edgefg.signals import kept_signal_stack


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Hide Intel's telemetry package while OpenVINO is imported: the import would send an event over the network.

    OpenVINO takes its own stub if the package is missing. A device in the field must not call home unasked.
    """
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to make an import fail
    try:
        yield
    finally:
        sys.modules.pop(name, None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed to stdout, warned, or logged up to WARNING; errors still raise.

    The messages of exporters and quantisers are for their developers, and would spoil ``--json`` output.
    """
    before = logging.root.manager.disable
    os.environ.setdefault("NNCF_CI", "1")  # NNCF's own switch for its telemetry
    silent = contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(), silent, without_telemetry(), kept_signal_stack(), _kept_root_logger():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@contextlib.contextmanager
def _kept_root_logger() -> Iterator[None]:
    """Restore the root logger: a conversion that fails in OpenVINO leaves it at ERROR, with a filter and a handler."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters.copy(), root.handlers.copy()
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers
