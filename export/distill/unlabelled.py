"""Images without labels that join a student's training: it learns its teachers' predictions for them."""

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


class UnlabelledSamples(NamedTuple):
    """Checked images without labels."""

    samples: tuple[Sample, ...]
    """Sorted by path; labels are `UNLABELLED`."""
    fingerprint: str
    """SHA-256 over their paths and contents."""


def read_unlabelled(folder: Path, data: ImageDataset, *, skip_corrupt: bool = False) -> UnlabelledSamples:
    """Read all images below a folder, whatever its subfolders are called.

    Args:
        folder: the folder.
        data: the labelled data. None of its validation and test images may be among the images.
        skip_corrupt: leave unreadable images out instead of raising.

    Raises:
        DataError: there is no such folder or no image in it, an image is unreadable, or it is a validation or test
            image (equal bytes).
    """
    if not folder.is_dir():
        raise DataError(f"--unlabelled {folder} is not a folder. Give a folder of images")
    paths = image_files(folder)
    _, digests = check_images(folder, paths, skip_corrupt=skip_corrupt)
    if not digests:
        raise DataError(f"--unlabelled {folder}: none of its {len(paths)} images can be read")
    _refuse_held_out(folder, digests, data)
    digest = hashlib.sha256()
    for path, contents in digests.items():
        digest.update(f"{relative_name(path, folder)}\t{contents}\n".encode())
    return UnlabelledSamples(tuple(Sample(path, UNLABELLED) for path in digests), digest.hexdigest())


def _refuse_held_out(folder: Path, digests: Mapping[Path, str], data: ImageDataset) -> None:
    held_out = {data.digests[path]: f"{relative_name(path, data.root)} of {split}" for split, path in _held_out(data)}
    if found := [path for path, contents in digests.items() if contents in held_out]:
        first = f"{relative_name(found[0], folder)} is {held_out[digests[found[0]]]}"
        raise DataError(
            f"--unlabelled {folder}: {len(found)} of its {len(digests)} images are validation or test images of"
            f" {data.root} (first: {first}). Remove them: training on them would make the accuracy look better than it"
            " is"
        )


def _held_out(data: ImageDataset) -> Sequence[tuple[str, Path]]:
    return [(split, path) for split in ("val", "test") for path, _ in data.splits[split]]
