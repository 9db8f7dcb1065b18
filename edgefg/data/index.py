"""Index of a data set: its images, classes, splits and groups, before any image is read."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.files import atomic_file
from edgefg.taxonomy import TaxonomyLevel

TAXONOMY_FILE = "taxonomy.csv"
"""Class order and coarser levels; in the data set's folder or beside its CSV manifest."""
BOXES_FILE = "boxes.csv"
"""Boxes of the parts, in the same place; see `edgefg.data.boxes`."""


class DatasetIndex(msgspec.Struct, frozen=True, kw_only=True):
    """Images of a data set with their labels; files are listed, not read."""

    format: str
    """``folders``, ``csv``, ``cub``, or the name of a public data set."""
    root: Path
    """Folder that image names are relative to."""
    labels: tuple[str, ...]
    """Class names; a class's position is its index."""
    splits: dict[str, tuple[Sample, ...]]
    """Samples by split: some of ``train``, ``val`` and ``test``, or ``all`` if the data are not split."""
    groups: dict[Path, str] = {}
    """Group of an image (location, patient, lot); splits never divide a group. An image without one is its own."""
    conditions: dict[Path, str] = {}
    """Condition under which an image was taken (day, night infrared), if known."""
    taxonomy: tuple[TaxonomyLevel, ...] = ()
    ignored_files: dict[str, int] = {}
    """Number of files in class folders that are not images, by suffix."""

    def with_labels(self, labels: Sequence[str], taxonomy: tuple[TaxonomyLevel, ...] = ()) -> DatasetIndex:
        """Return the index with class indices that refer to ``labels``, which contain every class in use."""
        position = {name: i for i, name in enumerate(labels)}
        splits = {
            split: tuple(Sample(path, position[self.labels[label]]) for path, label in samples)
            for split, samples in self.splits.items()
        }
        return msgspec.structs.replace(self, labels=tuple(labels), splits=splits, taxonomy=taxonomy)


def apply_taxonomy(index: DatasetIndex) -> DatasetIndex:
    """Order the classes as ``taxonomy.csv`` does and add its levels; without that file, return the index as it is.

    Raises:
        DataError: the file cannot be read or lists other classes.
    """
    file = index.root / TAXONOMY_FILE
    if not file.is_file():
        return index
    labels, taxonomy = read_taxonomy(file)
    if different := sorted(set(labels) ^ set(index.labels)):
        raise DataError(
            f"{file} and the data have different classes (first: {different[0]!r}); correct the file or the data"
        )
    return index.with_labels(labels, taxonomy)


def read_taxonomy(path: Path) -> tuple[tuple[str, ...], tuple[TaxonomyLevel, ...]]:
    """Read ``class,<coarser level>,…``: the classes in order and the levels above them. Raises `DataError`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{path} cannot be read as UTF-8 text: {exc}") from exc
    if not rows or rows[0][0] != "class" or any(len(row) != len(rows[0]) for row in rows):
        raise DataError(f"{path} needs a header 'class,<coarser level>,…' and the same number of fields in every line")
    names = tuple(row[0] for row in rows[1:])
    if len(set(names)) != len(names):
        raise DataError(f"{path} lists a class twice; remove one of the lines")
    levels = tuple(
        TaxonomyLevel(name=level, groups=tuple(row[column] for row in rows[1:]))
        for column, level in enumerate(rows[0])
        if column > 0
    )
    return names, levels


def write_taxonomy(path: Path, labels: Sequence[str], taxonomy: Sequence[TaxonomyLevel]) -> None:
    """Write class order and coarser levels. A file with the same class order is kept.

    Raises:
        DataError: the file exists and lists other classes.
        OSError: the file cannot be written.
    """
    if path.is_file():
        if read_taxonomy(path)[0] != tuple(labels):
            raise DataError(f"{path} has other classes than the data; write to another folder")
        return
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", *(level.name for level in taxonomy)])
        writer.writerows([label, *(level.groups[i] for level in taxonomy)] for i, label in enumerate(labels))


def listed_path(folder: Path, image: Path) -> str:
    """Return an image's path for a list in ``folder`` (absolute): relative if the image is below it, else absolute."""
    place = image.parent.resolve() / image.name  # a link keeps its own name
    return (place.relative_to(folder) if place.is_relative_to(folder) else place).as_posix()


def count_by_suffix(ignored_files: Mapping[str, int]) -> str:
    """Format the number of files of each suffix, most frequent first."""
    counts = sorted(ignored_files.items(), key=lambda item: -item[1])
    return ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in counts)
