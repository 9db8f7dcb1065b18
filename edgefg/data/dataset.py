"""Data sets: `load_dataset` for a whole, checked one; `load_split` for the images of one split.

Accepted are class folders (`edgefg.data.folders`), CSV manifests (`edgefg.data.csv_manifest`), CUB-200-2011
(`edgefg.data.cub`) and, with torchvision, ``NAME:ROOT`` for public data sets (`edgefg.data.public`).

Data without fixed splits are split here, in training as well as where artifacts are measured. One more image, or an
unreadable one, can move others to another split. Therefore both sides use the same code and compare fingerprints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg.data.boxes import read_boxes, write_boxes
from edgefg.data.checks import (
    check_images,
    require_every_class,
    require_same_data,
    warn_of_divided_groups,
    warn_of_ignored_files,
    warn_of_leaks,
)
from edgefg.data.csv_manifest import is_csv, read_csv, write_csv
from edgefg.data.cub import cub_box_files, is_cub, read_cub, read_cub_boxes
from edgefg.data.folders import read_folders, split_folders
from edgefg.data.index import BOXES_FILE, DatasetIndex, apply_taxonomy
from edgefg.data.public import public_root, read_public
from edgefg.data.split import SPLITS, Sample, complete_splits, groups_across_splits, relative_name
from edgefg.errors import DataError
from edgefg.settings.split import SplitSpec

_RESTORE = "restore it, or give images that are new to the artifact as DATA/test/<class>/*.jpg"


class DataRecord(Protocol):
    """Training data as recorded in a checkpoint's header."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in order."""

    @property
    def dataset(self) -> str:
        """Fingerprint."""

    @property
    def split(self) -> SplitSpec:
        """How data without fixed splits were split."""


class ImageDataset(DatasetIndex, frozen=True, kw_only=True):
    """Checked data set: every image is readable, and ``splits`` has ``train``, ``val`` and ``test``, some maybe empty.

    Not a `torch.utils.data.Dataset`: it holds paths and labels, not pixels.
    """

    fingerprint: str
    """SHA-256 over splits, paths, contents and boxes."""
    digests: dict[Path, str]
    """SHA-256 of each image, hexadecimal."""
    unreadable: tuple[str, ...] = ()
    """One line for each unreadable image that was left out."""
    parts: tuple[str, ...] = ()
    """Names of the parts with boxes; ``object``, the whole object, comes first if it has boxes."""
    boxes: dict[Path, npt.NDArray[np.float32]] | None = None
    """Image → ``float32 [parts, 4]``: x0, y0, x1, y1 in pixels of the decoded image; NaN for an absent part."""


def load_dataset(
    data: Path | ImageDataset,
    split: SplitSpec | None = None,
    *,
    expected: DataRecord | None = None,
    skip_corrupt: bool = False,
) -> ImageDataset:
    """Load a data set: read its structure, check every image and split it if necessary.

    Logs ignored files, and images or groups that are in several splits.

    Args:
        data: folder of class folders or of split folders, CSV manifest, CUB's folder, or ``NAME:ROOT``. A
            ``taxonomy.csv`` in the folder sets the class order and the coarser levels. A loaded data set is returned
            as it is.
        split: how to split data without fixed splits, and how much of ``train`` becomes ``val`` if there is none.
            Default: that of ``expected``.
        expected: header of a checkpoint. The data must have the same classes in the same order and, if edgefg splits
            them, the same fingerprint, since a changed image could move test images into training.
        skip_corrupt: leave unreadable images out instead of raising.

    Raises:
        DataError: the folder is missing or empty, a class has no training image, the data differ from ``expected``, or
            an image cannot be read.
    """
    if isinstance(data, ImageDataset):
        _require_labels(data, expected)
        return data
    split = split or (expected.split if expected else SplitSpec())
    index = apply_taxonomy(read_index(data))
    if len(index.labels) < 2:
        raise DataError(f"{data} has {len(index.labels)} classes, but training needs at least 2; add class folders")
    if not {"train", "all"} & set(index.splits):
        raise DataError(f"{data} has no training images; its splits are {', '.join(index.splits)}")
    _require_labels(index, expected)
    require_every_class(index.splits.get("train", index.splits.get("all", ())), index)
    unreadable, digests = check_images(index.root, _paths(index), skip_corrupt=skip_corrupt)
    splits, fingerprint = split_index(index, digests, split)
    require_every_class(splits["train"], index)
    if expected is not None and "val" not in index.splits:
        require_same_data(index.root, fingerprint, expected.dataset, "checkpoint", "restore it, or train again")
    warn_of_ignored_files(index)
    warn_of_leaks(splits, digests, index.root)
    warn_of_divided_groups(groups_across_splits(splits, index.root, split, index.groups))
    parts, boxes = _read_boxes(index, digests, unreadable)
    fields = msgspec.structs.asdict(index) | {"splits": splits, "parts": parts, "boxes": boxes or None}
    return ImageDataset(**fields, fingerprint=fingerprint, digests=digests, unreadable=tuple(unreadable.values()))


def load_split(
    data: Path,
    split: str | None,
    labels: Sequence[str],
    spec: SplitSpec | None,
    *,
    prefer: Sequence[str] = ("test", "val"),
    trained_on: str | None = None,
    skip_corrupt: bool = False,
) -> tuple[str, tuple[Sample, ...]]:
    """List the images of one split of the data that an artifact is measured on.

    Args:
        data: class folders, CSV manifest or CUB's folder.
        split: name of the split. None: the first of ``prefer`` that exists.
        labels: the artifact's class names in order; classes of the data are matched by name.
        spec: how training split data without fixed splits, from the artifact's manifest. None: such data are taken
            whole, as split ``all``.
        prefer: see ``split``.
        trained_on: fingerprint of the artifact's training data, from its manifest. If edgefg splits the data, they must
            have this fingerprint, since a changed image could move training images into the test split.
        skip_corrupt: if edgefg splits the data, leave unreadable images out instead of raising, as training did. The
            images of a fixed split are listed without being read.

    Returns:
        The name of the split, and its samples with class indices that refer to ``labels``.

    Raises:
        DataError: the split is missing or empty, or a class is not among the labels. If edgefg splits the data: an
            image cannot be read, or the data are not ``trained_on``.
    """
    if public := public_root(data):
        raise DataError(
            f"{data}: {public[0]} can only be read where edgefg[train] is installed; write a CSV manifest there"
            f" (edgefg data {data} --csv {public[0]}.csv) and give that"
        )
    index = None if data.is_dir() and not is_cub(data) else read_index(data)
    present = split_folders(data) if index is None else [name for name in SPLITS if name in index.splits]
    name, split_here = _choose_split(data, split, present, spec, prefer)
    needed = (present or ["all"]) if split_here else [name]
    index = index or read_folders(data, needed)
    index = msgspec.structs.replace(index, splits={part: index.splits[part] for part in needed})
    _require_known_classes(data, index, labels)
    index = index.with_labels(labels)
    samples = index.splits.get(name, ())
    if split_here and spec is not None:
        _, digests = check_images(index.root, _paths(index), skip_corrupt=skip_corrupt)
        splits, fingerprint = split_index(index, digests, spec)
        if trained_on is not None:
            require_same_data(data, fingerprint, trained_on, "artifact", _RESTORE)
        samples = splits[name]
    if not samples:
        raise DataError(f"{data} has no images for the split {name}; add some, one folder per class")
    return name, samples


def read_index(data: Path) -> DatasetIndex:
    """List the images of a data set in any format. Raises `DataError`."""
    if public := public_root(data):
        return read_public(*public)
    if is_csv(data):
        return read_csv(data)
    return read_cub(data) if is_cub(data) else read_folders(data)


def split_index(
    index: DatasetIndex, digests: Mapping[Path, str], spec: SplitSpec
) -> tuple[dict[str, tuple[Sample, ...]], str]:
    """Split the readable images, those with a digest, into ``train``, ``val`` and ``test``.

    Returns:
        The splits, and the fingerprint: SHA-256 over splits, paths, contents and the files with boxes.

    Raises:
        DataError: see `edgefg.data.split.split_samples`.
    """
    readable = {name: tuple(s for s in samples if s.path in digests) for name, samples in index.splits.items()}
    splits = complete_splits(readable, index.root, spec, index.groups)
    digest = hashlib.sha256()
    for name in SPLITS:
        for path, label in splits[name]:
            digest.update(f"{name}\t{label}\t{relative_name(path, index.root)}\t{digests[path]}\n".encode())
    boxes = index.root / BOXES_FILE
    for file in [boxes] if boxes.is_file() else cub_box_files(index.root) if index.format == "cub" else []:
        digest.update(file.read_bytes())
    return splits, digest.hexdigest()


def write_manifests(
    manifests: Mapping[Path, Mapping[str, Sequence[Sample]]], data: ImageDataset, groups: Mapping[Path, str]
) -> None:
    """Write CSV manifests of the same images in one folder, each with its own splits, and the boxes beside them.

    Args:
        manifests: samples by split, by CSV file.
        data: the data set.
        groups: groups of the images.

    Raises:
        DataError: a file cannot be written.
    """
    for path, splits in manifests.items():
        write_csv(path, splits, data.labels, groups, data.taxonomy, data.conditions)
    first = next(iter(manifests))
    images = {sample.path for samples in manifests[first].values() for sample in samples}
    boxes = {image: found for image, found in (data.boxes or {}).items() if image in images}
    if boxes and not (first.parent.resolve() == data.root.resolve() and (data.root / BOXES_FILE).is_file()):
        write_boxes(first.parent, data.parts, boxes)


def _choose_split(
    data: Path, split: str | None, present: Sequence[str], spec: SplitSpec | None, prefer: Sequence[str]
) -> tuple[str, bool]:
    """Return the name of the split to list, and whether edgefg makes it rather than the data."""
    if not present and spec is None:
        if split is not None:
            raise DataError(f"{data} has no splits; leave --split out to take all of its images")
        return "all", False
    val_from_train = spec is not None and "train" in present and "val" not in present
    offered = [name for name in SPLITS if not present or name in present or (name == "val" and val_from_train)]
    name = split or next((name for name in prefer if name in offered), "")
    if name not in offered:
        wanted = f"not {split}" if split else f"neither of {', '.join(prefer)}; choose one with --split"
        raise DataError(f"{data} has the splits {', '.join(offered)}, {wanted}")
    return name, name not in present or (val_from_train and name == "train")


def _require_known_classes(data: Path, index: DatasetIndex, labels: Sequence[str]) -> None:
    known = set(labels)
    used = sorted({sample.label for samples in index.splits.values() for sample in samples})
    if unknown := [index.labels[label] for label in used if index.labels[label] not in known]:
        raise DataError(
            f"{data} has {len(unknown)} classes that are not among the artifact's {len(labels)} labels (first:"
            f" {unknown[0]!r}; the labels begin with {labels[0]!r}); use the data set that it was trained on"
        )


def _require_labels(index: DatasetIndex, expected: DataRecord | None) -> None:
    if expected is None or expected.labels == index.labels:
        return
    missing = sorted(set(expected.labels) - set(index.labels))
    extra = sorted(set(index.labels) - set(expected.labels))
    first = (missing + extra + ["order"])[0]
    raise DataError(
        f"{index.root} has {len(index.labels)} classes, the checkpoint {len(expected.labels)}: {len(missing)} missing,"
        f" {len(extra)} unknown (first: {first!r}); use the data that it was trained on"
    )


def _paths(index: DatasetIndex) -> list[Path]:
    return [sample.path for samples in index.splits.values() for sample in samples]


def _read_boxes(
    index: DatasetIndex, known: Collection[Path], left_out: Collection[Path]
) -> tuple[tuple[str, ...], dict[Path, npt.NDArray[np.float32]]]:
    if index.format == "cub" and not (index.root / BOXES_FILE).is_file():
        return read_cub_boxes(index.root, known)
    return read_boxes(index.root, known, left_out)
