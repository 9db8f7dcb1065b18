"""Cache of compiled models and engines, below ``EDGEFG_CACHE``.

Default ``$XDG_CACHE_HOME/edgefg`` or ``~/.cache/edgefg``; an empty ``EDGEFG_CACHE`` turns the cache off.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path | None:
    """Return the cache folder, created if necessary; None if it is turned off or cannot be written."""
    chosen = os.environ.get("EDGEFG_CACHE")
    if chosen is None:
        try:
            chosen = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgefg")
        except RuntimeError:  # no home folder
            return None
    if not chosen:
        return None
    folder = Path(chosen)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only device still classifies, only starts slower
        return None
    return folder if os.access(folder, os.W_OK) else None
