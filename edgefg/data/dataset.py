"""A data set's images, read, dealt to splits and fingerprinted: in training as where artifacts are measured.

An artifact's test images are those that training dealt to its test split. One image more, or an unreadable one that is
dealt too, moves others between the splits, so both sides read, deal and fingerprint here. No torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from edgefg.data.cub import box_files as cub_box_files
from edgefg.data.index import BOXES_FILE, Listing
from edgefg.data.split import SPLITS, Sample, complete, name_of
from edgefg.errors import DataError
from edgefg.image_io import decode_image
from edgefg.settings.split import SplitSpec

Checks = Iterable[tuple[str | None, str]]
"""Of every image what is wrong with it, or None, and its SHA-256."""
Watch = Callable[[Checks, int], Checks]


class Dealt(NamedTuple):
    """A data set's readable images, in its splits."""

    splits: dict[str, tuple[Sample, ...]]
    """``train``, ``val`` and ``test`` (empty where there is none)."""
    fingerprint: str
    """SHA-256 over the splits, paths and contents, and the files that boxes of parts come from."""


def unwatched(checks: Checks, total: int) -> Checks:
    """Show no progress."""
    return checks


def check_images(
    root: Path, paths: Sequence[Path], watch: Watch = unwatched
) -> tuple[dict[Path, str], dict[Path, str]]:
    """Read and decode every image; return what is wrong by path, and the SHA-256 of the good ones by path.

    Args:
        root: the folder that messages name them from.
        paths: the images.
        watch: takes the results as they come in and how many there will be, and gives them back: a progress bar.
    """

    def check(path: Path) -> tuple[str | None, str]:
        try:
            data = path.read_bytes()
            decode_image(data, name_of(path, root), reduced=True)
        except OSError as exc:
            return f"{name_of(path, root)}: {exc.strerror}", ""
        except DataError as exc:
            return str(exc), ""
        return None, hashlib.sha256(data).hexdigest()

    bad, digests = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, (problem, digest) in zip(paths, watch(pool.map(check, paths), len(paths)), strict=True):
            if problem is None:
                digests[path] = digest
            else:
                bad[path] = problem
    return bad, digests


def deal(listing: Listing, digests: Mapping[Path, str], spec: SplitSpec) -> Dealt:
    """Deal the images that have a digest, the readable ones, to ``train``, ``val`` and ``test``.

    Raises:
        DataError: see `edgefg.data.split.split_samples`.
    """
    found = {part: tuple(s for s in members if s.path in digests) for part, members in listing.found.items()}
    splits = complete(found, listing.root, spec, listing.groups)
    digest = hashlib.sha256()
    for name in SPLITS:
        for path, label in splits[name]:
            digest.update(f"{name}\t{label}\t{name_of(path, listing.root)}\t{digests[path]}\n".encode())
    for file in _box_files(listing):
        digest.update(file.read_bytes())
    return Dealt(splits, digest.hexdigest())


def need_same(root: Path, fingerprint: str, trained_on: str, model: str, remedy: str) -> None:
    """Raise `DataError` unless data that were split here are the very ones that a model was trained on.

    Args:
        root: the data set's folder.
        fingerprint: that of the data as they are now.
        trained_on: that of the data which the model was trained on.
        model: what to call it.
        remedy: what to do about it.
    """
    if fingerprint != trained_on:
        raise DataError(
            f"{root} is split here, and not the data that the {model} was trained on (fingerprint"
            f" {fingerprint[:12]}, not {trained_on[:12]}): its test images may have been trained on; {remedy}"
        )


def _box_files(listing: Listing) -> list[Path]:
    """Name the files that boxes of parts come from, where there are any."""
    if (listing.root / BOXES_FILE).is_file():
        return [listing.root / BOXES_FILE]
    return cub_box_files(listing.root) if listing.format == "cub" else []
