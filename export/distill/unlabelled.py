"""Images without labels that join a student's training: it learns from them what its teachers say of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edgefg.data import ImageDataset
from edgefg.data.checks import check_images
from edgefg.data.split import UNLABELLED, Sample, relative_name
from edgefg.errors import DataError
from edgefg.image_io import image_files


class Extra(NamedTuple):
    """Checked images without labels."""

    samples: tuple[Sample, ...]
    """Sorted by path; labels are `UNLABELLED`."""
    fingerprint: str
    """SHA-256 over their paths and contents."""


def read_extra(folder: Path, data: ImageDataset, *, skip_corrupt: bool = False) -> Extra:
    """Read every image below a folder, whatever its subfolders are called.

    Args:
        folder: where they lie.
        data: the labelled data; none of its validation and test images may be among them.
        skip_corrupt: leave unreadable images out instead of raising.

    Raises:
        DataError: no folder, no image, an unreadable one, or one that is held out, byte by byte.
    """
    if not folder.is_dir():
        raise DataError(f"--extra {folder} is not a folder; needed a folder of images")
    paths = image_files(folder)
    _, digests = check_images(folder, paths, skip_corrupt=skip_corrupt)
    if not digests:
        raise DataError(f"--extra {folder}: none of its {len(paths)} images can be read")
    _refuse_held_out(folder, digests, data)
    digest = hashlib.sha256()
    for path, contents in digests.items():
        digest.update(f"{relative_name(path, folder)}\t{contents}\n".encode())
    return Extra(tuple(Sample(path, UNLABELLED) for path in digests), digest.hexdigest())


def _refuse_held_out(folder: Path, digests: Mapping[Path, str], data: ImageDataset) -> None:
    held = {data.digests[path]: f"{relative_name(path, data.root)} of {split}" for split, path in _held_out(data)}
    if slipped := [path for path, contents in digests.items() if contents in held]:
        first = f"{relative_name(slipped[0], folder)} is {held[digests[slipped[0]]]}"
        raise DataError(
            f"--extra {folder}: {len(slipped)} of its {len(digests)} images are validation or test images of"
            f" {data.root} (first: {first}), whose figures they would flatter; remove them"
        )


def _held_out(data: ImageDataset) -> Sequence[tuple[str, Path]]:
    return [(split, path) for split in ("val", "test") for path, _ in data.splits[split]]
