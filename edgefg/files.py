"""Atomic writes: write under a temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

# Read once, while no other thread can create a file in between.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on leaving, sync it and rename it to ``path``.

    The folder is created. If the body raises, the temporary file is removed and whatever ``path`` held stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp's 0600 would keep a service from reading its own model
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a struct atomically as indented UTF-8 JSON with a final newline; see `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


@contextlib.contextmanager
def locked(folder: Path, say_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock on a folder, across processes; no lock file is left behind.

    Args:
        folder: a folder that exists.
        say_waiting: called once before waiting, if another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have no locks: there it goes on without.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say_waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Force a file's or folder's bytes to the disk, so that a power cut cannot leave a renamed but empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
