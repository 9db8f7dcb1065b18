"""Folders of artifacts: written beside their final place, synced and renamed.

So a folder is either complete or does not exist.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgefg.artifact.manifest import manifest_path
from edgefg.artifact.plan import PLAN
from edgefg.artifact.signature import signature_path
from edgefg.errors import EdgefgError, ExportError, GateError, one_line
from edgefg.files import sync
from edgefg.runtime import RUNTIMES, model_files

STEM = "model"
"""Stem of every exported artifact's files: ``model.json``, ``model.xml``…"""
GOLDEN = ".golden.npz"
"""Suffix of the golden set, after the stem."""


def copy_artifact(model: Path, out: Path) -> Path:
    """Copy the artifact of a model file to a folder atomically; return the copy's model file."""
    with folder_beside(out) as temporary:
        shutil.copytree(model.parent, temporary, dirs_exist_ok=True)
        sync_all(temporary)
        swap(temporary, out)
    return out / model.name


def sync_all(folder: Path) -> None:
    """Force the files of a folder, and its list of files, to the disk."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def move_in(model: Path, folder: Path) -> Path:
    """Move a staged artifact into a folder of other files, its manifest last; return where its model file is now.

    After a power cut between two files, the old manifest does not match the files, so the artifact is refused.

    Raises:
        ExportError: the disk is full or read-only.
    """
    manifest = manifest_path(model)
    with as_export_error(folder, f"{model.name} there may be of two builds, and is refused then: build again"):
        # A signature belongs to the manifest that it was made of.
        signature_path(folder / model.name).unlink(missing_ok=True)
        for file in sorted(model.parent.iterdir(), key=lambda file: file == manifest):
            file.replace(folder / file.name)
        sync(folder)
    return folder / model.name


@contextlib.contextmanager
def as_export_error(out: Path, after: str = "nothing was changed there") -> Iterator[None]:
    """Raise `ExportError` if the disk fails or the artifact fails a check while ``out`` is written."""
    try:
        yield
    except OSError as exc:
        raise ExportError(f"cannot write {out}: {exc.strerror or exc}; {after}") from exc
    except (ExportError, GateError):  # a gate that fails is not a failure of the export
        raise
    except EdgefgError as exc:
        raise ExportError(f"the written artifact does not hold: {one_line(exc)}; nothing was changed in {out}") from exc


def check_target(out: Path) -> None:
    """Raise `ExportError` unless ``out`` is absent, empty, or an earlier artifact that may be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ExportError(f"{out} is a file or a link; give the name of a folder for the artifact")
    try:
        names = {entry.name for entry in out.iterdir()} if out.exists() else set()
    except OSError as exc:
        raise ExportError(f"cannot look into {out}: {exc.strerror}") from exc
    known = _known_names()
    if names and not (f"{STEM}.json" in names and names <= known):
        stranger = min(names - known, default=min(names))
        raise ExportError(f"{out} is not an artifact (it holds {stranger}); name a new folder, or empty it")


def _known_names() -> set[str]:
    """List the names of all files of an exported artifact and of the engine built from it."""
    models = [Path(f"model{suffix}") for suffix in RUNTIMES]
    suffixes = {file.suffix for model in models for file in model_files(model)} | {".json", ".json.sig", GOLDEN}
    return {f"{stem}{suffix}" for stem in (STEM, Path(PLAN).stem) for suffix in suffixes}


@contextlib.contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside ``out``, so on the same disk; remove what is left of it afterwards."""
    out = out.absolute()
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        # A plain mkdir: mkdtemp's 0700 would keep a service from reading its own model.
        temporary.mkdir(parents=True)
    except OSError as exc:
        raise ExportError(f"cannot create a folder in {out.parent}: {exc.strerror}") from exc
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(out: Path) -> None:
    """Remove what `folder_beside` left of a killed process. The caller makes sure that no other process is at work."""
    for left in out.parent.glob(f".{out.name}.????????"):
        shutil.rmtree(left, ignore_errors=True)


def remove_stale_below(folder: Path) -> None:
    """Remove what `folder_beside` and `swap` left anywhere below a folder; see `remove_stale`."""
    for pattern in (".*.????????", ".*.????????.old"):
        for left in list(folder.rglob(pattern)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)


def swap(temporary: Path, out: Path) -> None:
    """Rename the finished folder to its final name, then delete an earlier artifact."""
    old = temporary.with_name(f"{temporary.name}.old")
    replaced = out.exists()
    if replaced:
        out.rename(old)
    try:
        temporary.rename(out)
    except BaseException:  # Ctrl-C between the two renames included
        if replaced and not out.exists():
            old.rename(out)
        raise
    sync(out.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)
