"""Data sets as folders: ``DATA/{train,val,test}/<class>/*.jpg``, or ``DATA/<class>/*.jpg`` split here; all checked.

Every image is read once before training: what is missing, cut off or no image is counted and named, and the bytes'
SHA-256 sums make the data set's fingerprint.
"""

from __future__ import annotations

import csv
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from edgefg.errors import DataError
from edgefg.folders import class_folders, corrupt_message
from edgefg.manifest import TaxonomyLevel
from edgefg.sources import decode_image, image_files
from edgefg.split import SPLITS, Sample, SplitSpec, complete

TAXONOMY_FILE = "taxonomy.csv"


class TrainedOn(Protocol):
    """What a checkpoint's header says of its data."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in order."""

    @property
    def dataset(self) -> str:
        """Fingerprint."""


class FolderData(msgspec.Struct, frozen=True):
    """A checked data set."""

    root: Path
    labels: tuple[str, ...]
    """Class names; their positions are the class indices."""
    taxonomy: tuple[TaxonomyLevel, ...]
    splits: dict[str, tuple[Sample, ...]]
    """``train``, ``val`` and ``test`` (empty where there is none)."""
    fingerprint: str
    """SHA-256 over the splits, paths and contents."""
    skipped: tuple[str, ...]
    """One line for each image that was left out as unreadable."""
    parts: tuple[str, ...] = ()
    """Names of the boxed parts; ``object``, the whole thing, comes first where it is boxed."""
    boxes: dict[Path, npt.NDArray[np.float32]] | None = None
    """Image → ``float32 [parts, 4]``: x0, y0, x1, y1 in pixels of the file as decoded; NaN where absent."""


def load_data(
    root: Path, split: SplitSpec | None = None, *, skip_corrupt: bool = False, like: TrainedOn | None = None
) -> FolderData:
    """Read a folder data set's structure and check every image.

    Args:
        root: the folder. ``taxonomy.csv`` in it (columns: class, then coarser levels) sets the order of the classes.
        split: how to split a folder without split folders, and how much of ``train`` becomes ``val`` where that is
            absent.
        skip_corrupt: leave unreadable images out instead of raising.
        like: a checkpoint's header; the data must have its classes in its order and, where they were split here, be the
            very same, since another image could move test images into training.

    Raises:
        DataError: the folder is missing or empty, a class has no image, splits disagree on the classes, the data are
            not those of ``like``, or an image cannot be read.
    """
    split = split or SplitSpec()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; needed DATA/train/<class>/*.jpg or DATA/<class>/*.jpg")
    if (root / "train").is_dir():
        folders = {name: class_folders(root / name) for name in SPLITS if (root / name).is_dir()}
        stray = [folder.name for folder in class_folders(root) if folder.name not in SPLITS]
        if {"valid", "validation"} & set(stray) and "val" not in folders:
            raise DataError(f"{root} has {stray[0]}/ where edgefg reads val/; rename it")
    else:
        folders = {"all": class_folders(root)}
    names, taxonomy = _labels(root, folders)
    if like is not None and like.labels != names:
        raise DataError(_label_difference(root, like.labels, names))
    index = {name: i for i, name in enumerate(names)}
    found = {
        part: tuple(Sample(path, index[folder.name]) for folder in members for path in _class_images(folder))
        for part, members in folders.items()
    }
    bad, digests = _check_images(root, [sample for members in found.values() for sample in members])
    if bad and not skip_corrupt:
        raise DataError(corrupt_message(list(bad.values()), len(digests) + len(bad)))
    for problem in bad.values():
        print(f"left out: {problem}", file=sys.stderr)
    found = {part: tuple(s for s in members if s.path in digests) for part, members in found.items()}
    splits = complete(found, root, split)
    _need_every_class(splits["train"], names, root)
    fingerprint = _fingerprint(splits, digests, root)
    if like is not None and "val" not in folders and like.dataset != fingerprint:
        raise DataError(
            f"{root} is split here, and not the data that the checkpoint was trained on (fingerprint"
            f" {fingerprint[:12]}, not {like.dataset[:12]}): its test images may have been trained on;"
            " restore it, or train again"
        )
    return FolderData(root, names, taxonomy, splits, fingerprint, tuple(bad.values()))


def _class_images(folder: Path) -> list[Path]:
    try:
        return image_files(folder)
    except DataError:
        raise DataError(f"the class folder {folder} holds no image; add some or remove the folder") from None


def _labels(root: Path, folders: dict[str, list[Path]]) -> tuple[tuple[str, ...], tuple[TaxonomyLevel, ...]]:
    """Take the classes from taxonomy.csv or the training folder, and compare the other splits with them."""
    first = "train" if "train" in folders else "all"
    present = [folder.name for folder in folders[first]]
    names: tuple[str, ...] = tuple(present)
    taxonomy: tuple[TaxonomyLevel, ...] = ()
    if (root / TAXONOMY_FILE).is_file():
        names, taxonomy = _read_taxonomy(root / TAXONOMY_FILE)
        if missing := sorted(set(names) - set(present)):
            raise DataError(f"{root / TAXONOMY_FILE} lists {missing[0]!r}, which {first}/ has no folder for")
    if len(names) < 2:
        raise DataError(f"{root} holds {len(names)} class folders; needed at least 2, one folder of images a class")
    for part, members in folders.items():
        if unknown := [folder.name for folder in members if folder.name not in names]:
            where = TAXONOMY_FILE if taxonomy else "train/"
            raise DataError(
                f"{part}/ has {len(unknown)} classes that {where} lacks (first: {unknown[0]!r});"
                " splits must share their class names"
            )
    return names, taxonomy


def _read_taxonomy(path: Path) -> tuple[tuple[str, ...], tuple[TaxonomyLevel, ...]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{path} cannot be read as UTF-8 text: {exc}") from exc
    if not rows or rows[0][0] != "class" or any(len(row) != len(rows[0]) for row in rows):
        raise DataError(f"{path} needs a header 'class,<coarser level>,…' and as many fields in every line")
    names = tuple(row[0] for row in rows[1:])
    if len(set(names)) != len(names):
        raise DataError(f"{path} lists a class twice")
    levels = tuple(
        TaxonomyLevel(name=level, groups=tuple(row[column] for row in rows[1:]))
        for column, level in enumerate(rows[0])
        if column > 0
    )
    return names, levels


def _label_difference(root: Path, expected: Sequence[str], found: Sequence[str]) -> str:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    detail = f"{len(missing)} missing, {len(extra)} unknown (first: {(missing + extra + ['order'])[0]!r})"
    return f"{root} has {len(found)} classes, the checkpoint {len(expected)}: {detail}; use the data it was trained on"


def _check_images(root: Path, samples: Iterable[Sample]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Read and decode every image; return what is wrong by path, and the SHA-256 of the good ones by path."""

    def check(path: Path) -> tuple[str | None, str]:
        try:
            data = path.read_bytes()
            decode_image(data, str(path.relative_to(root)), reduced=True)
        except OSError as exc:
            return f"{path.relative_to(root)}: {exc.strerror}", ""
        except DataError as exc:
            return str(exc), ""
        return None, hashlib.sha256(data).hexdigest()

    paths = [sample.path for sample in samples]
    bad, digests = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(check, paths)
        bar = tqdm(results, "checking images", len(paths), disable=None)
        for path, (problem, digest) in zip(paths, bar, strict=True):
            if problem is None:
                digests[path] = digest
            else:
                bad[path] = problem
    return bad, digests


def _need_every_class(train: Sequence[Sample], names: Sequence[str], root: Path) -> None:
    present = {sample.label for sample in train}
    if missing := [name for i, name in enumerate(names) if i not in present]:
        raise DataError(
            f"{root}: {len(missing)} classes have no training image (first: {missing[0]!r});"
            " add images, or fewer and smaller groups"
        )


def _fingerprint(splits: dict[str, tuple[Sample, ...]], digests: dict[Path, str], root: Path) -> str:
    digest = hashlib.sha256()
    for name in SPLITS:
        for path, label in splits[name]:
            digest.update(f"{name}\t{label}\t{path.relative_to(root).as_posix()}\t{digests[path]}\n".encode())
    return digest.hexdigest()
