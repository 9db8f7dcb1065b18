"""Data sets, checked: ``DATA/{train,val,test}/<class>/*.jpg``, ``DATA/<class>/*.jpg`` split here, lists, public ones.

A CSV manifest is described in `edgefg.data.index`, CUB's own files in `edgefg.data.cub`, and ``NAME:ROOT``, the public
data sets that torchvision reads, in `edgefg.data.public`. Every image is read once before training: what is missing,
cut off or no image is counted and named, and the bytes' SHA-256 sums make the data set's fingerprint.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from edgefg.data import dataset
from edgefg.data.boxes import read_boxes, write_boxes
from edgefg.data.cub_boxes import read_cub_boxes
from edgefg.data.dataset import Checks
from edgefg.data.folders import class_folders, public_root, read_images, read_listing, split_folders
from edgefg.data.index import BOXES_FILE, TAXONOMY_FILE, Listing, read_taxonomy, write_csv
from edgefg.data.split import SPLITS, Sample, name_of, parted
from edgefg.errors import DataError
from edgefg.image_io import IMAGE_SUFFIXES, image_files, unread_files
from edgefg.settings.split import SplitSpec
from edgefg.taxonomy import TaxonomyLevel


class TrainedOn(Protocol):
    """What a checkpoint's header says of its data."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in order."""

    @property
    def dataset(self) -> str:
        """Fingerprint."""

    @property
    def split(self) -> SplitSpec:
        """How they were split where they came without split folders."""


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
    groups: dict[Path, str] = {}
    """What must not part, by image, where the data set names it; see `edgefg.data.split.folds`."""
    conditions: dict[Path, str] = {}
    """Under what an image was taken (day, night infrared), where the data set says it."""
    format: str = "folders"
    """``folders``, ``csv``, ``cub``, or the name of a public data set."""
    digests: dict[Path, str] = {}
    """SHA-256 of every image in hexadecimal."""
    unread: dict[str, int] = {}
    """How many files in class folders have a suffix that is not read as an image, by suffix."""


def load_data(
    root: Path, split: SplitSpec | None = None, *, skip_corrupt: bool = False, like: TrainedOn | None = None
) -> FolderData:
    """Read a data set's structure and check every image.

    Says on standard error what is passed over, and where splits share images or groups.

    Args:
        root: a folder of class folders or of split folders, a CSV manifest, CUB's folder, or ``NAME:ROOT``.
            ``taxonomy.csv`` in the folder (columns: class, then coarser levels) sets the order of the classes.
        split: how to split data without splits of their own, and how much of ``train`` becomes ``val`` where that is
            absent.
        skip_corrupt: leave unreadable images out instead of raising.
        like: a checkpoint's header; the data must have its classes in its order and, where they were split here, be the
            very same, since another image could move test images into training.

    Raises:
        DataError: the folder is missing or empty, a class has no image, splits disagree on the classes, the data are
            not those of ``like``, or an image cannot be read.
    """
    split = split or SplitSpec()
    listing = _read_listing(root)
    names = listing.labels
    if len(names) < 2:
        raise DataError(f"{root} lists {len(names)} classes; needed at least 2")
    if like is not None and like.labels != names:
        raise DataError(_label_difference(root, like.labels, names))
    root = listing.root
    bad, digests = read_images(listing, skip_corrupt=skip_corrupt, watch=_bar)
    splits, fingerprint = dataset.deal(listing, digests, split)
    _need_every_class(splits["train"], names, root)
    if like is not None and "val" not in listing.found:
        dataset.need_same(root, fingerprint, like.dataset, "checkpoint", "restore it, or train again")
    _warn_of_unread(listing.unread, root)
    _warn_of_leaks(splits, digests, root)
    _warn_of_parted(parted(splits, root, split, listing.groups))
    parts, boxes = _read_boxes(listing, digests, bad)
    return FolderData(
        root, names, listing.taxonomy, splits, fingerprint, tuple(bad.values()), parts, boxes or None,
        groups=listing.groups, conditions=listing.conditions, format=listing.format, digests=digests,
        unread=listing.unread,
    )  # fmt: skip


def write_lists(
    lists: Mapping[Path, Mapping[str, Sequence[Sample]]], data: FolderData, groups: Mapping[Path, str]
) -> None:
    """Write a data set as CSV manifests, each with splits of its own, in one folder, and its boxes of parts beside.

    Args:
        lists: CSV file → its samples by split; all have the same images.
        data: the data set.
        groups: the images' groups.

    Raises:
        DataError: a file cannot be written.
    """
    for path, splits in lists.items():
        write_csv(path, splits, data.labels, groups, data.taxonomy, data.conditions)
    first = next(iter(lists))
    images = {sample.path for samples in lists[first].values() for sample in samples}
    boxes = {image: found for image, found in (data.boxes or {}).items() if image in images}
    if boxes and not (first.parent.resolve() == data.root.resolve() and (data.root / BOXES_FILE).is_file()):
        write_boxes(first.parent, data.parts, boxes)


def _read_listing(root: Path) -> Listing:
    """Read what images of which classes there are, whatever the format."""
    if public := public_root(root):
        from edgefg.data.public import read_public

        return read_public(*public)
    listing = read_listing(root)
    if listing is None:
        return _read_folders(root)
    if not {"train", "all"} & set(listing.found):
        raise DataError(f"{root} has no training images; its splits are {', '.join(listing.found)}")
    file = listing.root / TAXONOMY_FILE
    if not file.is_file():
        return listing
    names, taxonomy = read_taxonomy(file)
    if different := sorted(set(names) ^ set(listing.labels)):
        raise DataError(f"{file} and {root} do not have the same classes (first: {different[0]!r})")
    index = {name: i for i, name in enumerate(names)}
    found = {
        part: tuple(Sample(path, index[listing.labels[label]]) for path, label in members)
        for part, members in listing.found.items()
    }
    return msgspec.structs.replace(listing, labels=names, taxonomy=taxonomy, found=found)


def _read_folders(root: Path) -> Listing:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; needed DATA/train/<class>/*.jpg or DATA/<class>/*.jpg")
    present = split_folders(root)
    if present and "train" not in present:
        raise DataError(f"{root} has no training images: it has {'/, '.join(present)}/, but no train/; add it")
    folders = {name: class_folders(root / name) for name in present} or {"all": class_folders(root)}
    names, taxonomy = _labels(root, folders)
    index = {name: i for i, name in enumerate(names)}
    found = {
        part: tuple(Sample(path, index[folder.name]) for folder in members for path in _class_images(folder))
        for part, members in folders.items()
    }
    unread = sum((unread_files(folder) for members in folders.values() for folder in members), Counter[str]())
    return Listing(format="folders", root=root, labels=names, found=found, taxonomy=taxonomy, unread=dict(unread))


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
        names, taxonomy = read_taxonomy(root / TAXONOMY_FILE)
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


def data_of(data: Path | FolderData, like: TrainedOn, *, skip_corrupt: bool = False) -> FolderData:
    """Return the data that a checkpoint was trained on: read and checked, or as they are where that was done before.

    Raises `DataError` as `load_data` does, or where checked data have other classes.
    """
    if isinstance(data, Path):
        return load_data(data, like.split, skip_corrupt=skip_corrupt, like=like)
    if data.labels != like.labels:
        raise DataError(_label_difference(data.root, like.labels, data.labels))
    return data


def _label_difference(root: Path, expected: Sequence[str], found: Sequence[str]) -> str:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    detail = f"{len(missing)} missing, {len(extra)} unknown (first: {(missing + extra + ['order'])[0]!r})"
    return f"{root} has {len(found)} classes, the checkpoint {len(expected)}: {detail}; use the data it was trained on"


def check_images(root: Path, paths: Sequence[Path]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Check images as `edgefg.data.dataset.check_images` does, with a progress bar."""
    return dataset.check_images(root, paths, _bar)


def _bar(checks: Checks, total: int) -> Checks:
    return tqdm(checks, "checking images", total, disable=None)


def _need_every_class(train: Sequence[Sample], names: Sequence[str], root: Path) -> None:
    present = {sample.label for sample in train}
    if missing := [name for i, name in enumerate(names) if i not in present]:
        raise DataError(
            f"{root}: {len(missing)} classes have no training image (first: {missing[0]!r});"
            " add images, or fewer and smaller groups"
        )


def _read_boxes(
    listing: Listing, known: Collection[Path], left_out: Collection[Path]
) -> tuple[tuple[str, ...], dict[Path, npt.NDArray[np.float32]]]:
    if listing.format == "cub" and not (listing.root / BOXES_FILE).is_file():
        return read_cub_boxes(listing.root, known)
    return read_boxes(listing.root, known, left_out)


def kinds_of(unread: Mapping[str, int]) -> str:
    """Write how many files there are of each suffix, most first."""
    return ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in Counter(unread).most_common())


def _warn_of_unread(unread: Mapping[str, int], root: Path) -> None:
    """Say in one line on standard error how many files in the class folders are passed over."""
    if unread:
        print(
            f"warning: {sum(unread.values())} files in the class folders of {root} are not read ({kinds_of(unread)});"
            f" convert those that are pictures to one of {', '.join(sorted(IMAGE_SUFFIXES))}",
            file=sys.stderr,
        )


def _warn_of_leaks(splits: dict[str, tuple[Sample, ...]], digests: dict[Path, str], root: Path) -> None:
    """Say in one line on standard error where the very same file lies in two splits."""
    homes: dict[str, tuple[str, Path]] = {}
    leaks = []
    for name in SPLITS:
        for path, _ in splits[name]:
            home, twin = homes.setdefault(digests[path], (name, path))
            if home != name:
                leaks.append(f"{name_of(path, root)} is {name_of(twin, root)}")
    if leaks:
        print(
            f"warning: {len(leaks)} images lie in a second split too (first: {leaks[0]}), which flatters its figures;"
            " `edgefg data` lists them",
            file=sys.stderr,
        )


def _warn_of_parted(groups: dict[str, list[str]]) -> None:
    """Say in one line on standard error where the data's own splits part a group."""
    for group, names in groups.items():
        print(
            f"warning: {len(groups)} groups lie in several splits (first: {group!r} in {' and '.join(names)}), which"
            " flatters figures: the data come split like that; give all images in one folder, or in a CSV without the"
            " column split, to keep groups whole",
            file=sys.stderr,
        )
        return
