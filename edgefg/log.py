"""Loggers of the package: silent in an application that configures no handler.

Modules that log do so with ``_log = get_logger(__name__)``. What `import edgefg` loads does not log, since importing
`logging` would cost a device several milliseconds.
"""

from __future__ import annotations

import logging

_ROOT = logging.getLogger("edgefg")
_ROOT.addHandler(logging.NullHandler())  # without it, Python prints warnings to standard error


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; ``name`` is its ``__name__``."""
    return logging.getLogger(name)
