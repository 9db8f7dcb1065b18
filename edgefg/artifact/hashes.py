"""Sizes and SHA-256 hashes of an artifact's files, as its manifest records them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from edgefg.errors import IntegrityError

FileName = Annotated[str, msgspec.Meta(pattern=r"^[^/\\\x00]+$", max_length=255)]
"""A name without a folder."""


class FileInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of an artifact."""

    name: FileName
    """A plain file name in the manifest's own folder."""
    size: Annotated[int, msgspec.Meta(ge=0)]
    """Bytes."""
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_info(path: Path) -> FileInfo:
    """Describe a file by name, size and SHA-256."""
    return FileInfo(name=path.name, size=path.stat().st_size, sha256=sha256(path))


def check_files(files: Sequence[FileInfo], folder: Path, remedy: str) -> None:
    """Compare every file of an artifact with its recorded size and SHA-256.

    Args:
        files: what the manifest lists.
        folder: where the files lie.
        remedy: how to repair the artifact, for the message.

    Raises:
        IntegrityError: a file is missing, truncated or altered.
    """
    for expected in files:
        path = folder / expected.name
        try:
            found = file_info(path)
        except FileNotFoundError:
            raise IntegrityError(
                f"{path} is missing: the artifact consists of {', '.join(f.name for f in files)}"
                f" and its manifest; {remedy}"
            ) from None
        except OSError as exc:
            raise IntegrityError(f"cannot read {path}: {exc.strerror}") from exc
        if found.size != expected.size:
            raise IntegrityError(f"{path} has {found.size} bytes, its manifest says {expected.size}: {remedy}")
        if found.sha256 != expected.sha256:
            raise IntegrityError(
                f"{path} has SHA-256 {found.sha256[:12]}…, its manifest says {expected.sha256[:12]}…:"
                f" the file was altered; {remedy}"
            )
