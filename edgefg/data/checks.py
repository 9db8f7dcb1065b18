"""Checks of a data set's images: readable, complete, and each picture or group in one split only."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgefg.data.index import DatasetIndex, count_by_suffix
from edgefg.data.split import SPLITS, Sample, relative_name
from edgefg.errors import DataError
from edgefg.image_io import IMAGE_SUFFIXES, decode_image
from edgefg.log import get_logger
from edgefg.progress import track

_log = get_logger(__name__)


def check_images(
    root: Path, paths: Sequence[Path], *, skip_corrupt: bool = False
) -> tuple[dict[Path, str], dict[Path, str]]:
    """Read and decode every image.

    Args:
        root: folder that messages name the images from.
        paths: the images.
        skip_corrupt: log unreadable images instead of raising.

    Returns:
        One line about each unreadable image, by path, and the SHA-256 of each readable one, by path.

    Raises:
        DataError: an image cannot be read.
    """

    def check(path: Path) -> tuple[str | None, str]:
        try:
            data = path.read_bytes()
            decode_image(data, relative_name(path, root), reduced=True)
        except OSError as exc:
            return f"{relative_name(path, root)}: {exc.strerror}", ""
        except DataError as exc:
            return str(exc), ""
        return None, hashlib.sha256(data).hexdigest()

    unreadable, digests = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = track(pool.map(check, paths), "checking images", len(paths))
        for path, (problem, digest) in zip(paths, results, strict=True):
            if problem is None:
                digests[path] = digest
            else:
                unreadable[path] = problem
    if unreadable and not skip_corrupt:
        raise DataError(f"{root}: {corrupt_message(list(unreadable.values()), len(paths))}")
    for problem in unreadable.values():
        _log.warning("left out: %s", problem)
    return unreadable, digests


def corrupt_message(problems: Sequence[str], total: int) -> str:
    """Return one line with the number of unusable images and the first three problems."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return (
        f"{len(problems)} of {total} images cannot be used: {'; '.join(problems[:3])}{more};"
        " repair or remove them, or leave them out with --skip-corrupt"
    )


def require_every_class(train: Sequence[Sample], index: DatasetIndex) -> None:
    """Raise `DataError` unless every class has a training image."""
    present = {sample.label for sample in train}
    if missing := [name for i, name in enumerate(index.labels) if i not in present]:
        raise DataError(
            f"{index.root}: {len(missing)} of {len(index.labels)} classes have no training image (first:"
            f" {missing[0]!r}); add images, or use fewer and smaller groups"
        )


def require_same_data(root: Path, fingerprint: str, trained_on: str, model: str, remedy: str) -> None:
    """Raise `DataError` unless data that edgefg splits are those that a model was trained on.

    Args:
        root: the data set's folder.
        fingerprint: fingerprint of the data now.
        trained_on: fingerprint of the training data.
        model: kind of model, for the message.
        remedy: advice, for the message.
    """
    if fingerprint != trained_on:
        raise DataError(
            f"{root} has changed since the {model} was trained (fingerprint {fingerprint[:12]}, not"
            f" {trained_on[:12]}). It has no fixed splits, so training images may now be test images; {remedy}"
        )


def warn_of_ignored_files(index: DatasetIndex) -> None:
    """Log how many files in the class folders are ignored."""
    if index.ignored_files:
        _log.warning(
            "%d files in the class folders of %s are ignored (%s); convert pictures among them to one of %s",
            sum(index.ignored_files.values()),
            index.root,
            count_by_suffix(index.ignored_files),
            ", ".join(sorted(IMAGE_SUFFIXES)),
        )


def warn_of_leaks(splits: Mapping[str, Sequence[Sample]], digests: Mapping[Path, str], root: Path) -> None:
    """Log how many images have an identical file in another split."""
    first_use: dict[str, tuple[str, Path]] = {}
    leaks = []
    for split in SPLITS:
        for path, _ in splits[split]:
            other_split, twin = first_use.setdefault(digests[path], (split, path))
            if other_split != split:
                leaks.append(f"{relative_name(path, root)} is {relative_name(twin, root)}")
    if leaks:
        _log.warning(
            "%d images are also in another split (first: %s), so its figures are too good; `edgefg data` lists them",
            len(leaks),
            leaks[0],
        )


def warn_of_divided_groups(groups: Mapping[str, Sequence[str]]) -> None:
    """Log how many groups have images in several splits; ``groups`` is from `groups_across_splits`."""
    if groups:
        group, splits = next(iter(groups.items()))
        _log.warning(
            "%d groups have images in several splits (first: %r in %s), so figures are too good. To keep groups whole,"
            " put all images in one folder, or in a CSV without the split column",
            len(groups),
            group,
            " and ".join(splits),
        )
