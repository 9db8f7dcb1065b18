"""What a data set says of its own images; read from and written to a CSV manifest, without torch.

``DATA.csv`` has a header and one row an image. Columns, in any order, others being passed over:

- ``path``: relative to the CSV's folder, or absolute;
- ``label``: the class;
- ``split``: ``train``, ``val`` or ``test``; the column may be absent or empty, and the images are then split here;
- ``group``: what must not part: location, patient, lot; the column or single fields may be empty;
- ``condition``: under what it was taken: day, night infrared; likewise. Calibration images are balanced over it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgefg.data.split import SPLITS, Sample
from edgefg.errors import DataError
from edgefg.files import atomic_file
from edgefg.taxonomy import TaxonomyLevel

TAXONOMY_FILE = "taxonomy.csv"
"""Beside a CSV manifest or in a data set's folder: the order of the classes and the levels above them."""
BOXES_FILE = "boxes.csv"
"""In the same place: the boxes of the parts; see `edgefg.data.boxes`."""
_NEEDED = ("path", "label")
_OPTIONAL = ("split", "group", "condition")


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """The images of a data set as it lists them, unread."""

    format: str
    """``folders``, ``csv``, ``cub``, or the name of a public data set."""
    root: Path
    """The folder that the names of the images are relative to."""
    labels: tuple[str, ...]
    """Class names; their positions are the class indices."""
    found: dict[str, tuple[Sample, ...]]
    """Samples by split (some of ``train``, ``val``, ``test``), or all under ``all`` where it names no splits."""
    groups: dict[Path, str] = {}
    """What must not part, by image: location, patient, lot. An image that is absent is a group of its own."""
    conditions: dict[Path, str] = {}
    """Under what an image was taken (day, night infrared), where that is said."""
    taxonomy: tuple[TaxonomyLevel, ...] = ()
    unread: dict[str, int] = {}
    """How many files in class folders have a suffix that is not read as an image, by suffix."""


class _Row(NamedTuple):
    where: str
    path: Path
    label: str
    split: str
    group: str
    condition: str


def is_csv(data: Path) -> bool:
    """Say whether a data root means a CSV manifest."""
    return data.suffix.lower() == ".csv" and not data.is_dir()


def read_csv(path: Path) -> Listing:
    """Read a CSV manifest. The classes are in sorted order; whether the images are there is not looked at.

    Raises:
        DataError: the file cannot be read, lacks a column or a field, has an unknown split or an image twice, or a
            group lies in two splits, which would make the figures of one of them worthless.
    """
    rows = _read_rows(path)
    labels = tuple(sorted({row.label for row in rows}))
    index = {label: i for i, label in enumerate(labels)}
    named = [row for row in rows if row.split]
    if named and len(named) < len(rows):
        bare = next(row for row in rows if not row.split)
        raise DataError(f"{bare.where} has no split, others have; give every image one of {', '.join(SPLITS)}, or none")
    _check_groups(path, rows)
    found: dict[str, list[Sample]] = {}
    for row in rows:
        found.setdefault(row.split or "all", []).append(Sample(row.path, index[row.label]))
    return Listing(
        format="csv",
        root=path.parent,
        labels=labels,
        found={part: tuple(sorted(samples)) for part, samples in found.items()},
        groups={row.path: row.group for row in rows if row.group},
        conditions={row.path: row.condition for row in rows if row.condition},
    )


def write_csv(
    path: Path,
    splits: Mapping[str, Sequence[Sample]],
    labels: Sequence[str],
    groups: Mapping[Path, str],
    taxonomy: Sequence[TaxonomyLevel] = (),
    conditions: Mapping[Path, str] | None = None,
) -> None:
    """Write a CSV manifest of split data; paths are relative where the images lie below its folder, else absolute.

    Where the classes have levels above them or another order than the sorted one, ``taxonomy.csv`` beside it says so.

    Args:
        path: the file to write.
        splits: samples by split.
        labels: class names by class index.
        groups: the images' groups; the column is left out where there are none.
        taxonomy: levels above the classes.
        conditions: what the images were taken under; likewise.

    Raises:
        DataError: it cannot be written, or another data set's ``taxonomy.csv`` lies there.
    """
    folder = path.parent.resolve()
    extra = {name: column for name, column in (("group", groups), ("condition", conditions)) if column}
    try:
        if taxonomy or list(labels) != sorted(labels) or (folder / TAXONOMY_FILE).is_file():
            _write_taxonomy(folder / TAXONOMY_FILE, labels, taxonomy)
        with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "label", "split", *extra])
            for split, samples in splits.items():
                for image, label in samples:
                    more = (column.get(image, "") for column in extra.values())
                    writer.writerow([name_from(folder, image), labels[label], split, *more])
    except OSError as exc:
        raise DataError(f"cannot write {path}: {exc.strerror}") from exc


def name_from(folder: Path, image: Path) -> str:
    """Return an image's name in a list in ``folder``, an absolute path: relative where it lies below, else absolute."""
    place = image.parent.resolve() / image.name  # a linked image keeps its own name
    return (place.relative_to(folder) if place.is_relative_to(folder) else place).as_posix()


def read_taxonomy(path: Path) -> tuple[tuple[str, ...], tuple[TaxonomyLevel, ...]]:
    """Read ``class,<coarser level>,…``: the classes in order and the levels above them. Raises `DataError`."""
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


def _write_taxonomy(path: Path, labels: Sequence[str], taxonomy: Sequence[TaxonomyLevel]) -> None:
    """Write the order of the classes and the levels above them, unless a file that says the same order is there."""
    if path.is_file():
        if read_taxonomy(path)[0] != tuple(labels):
            raise DataError(f"{path} has other classes than the data; write into another folder")
        return
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", *(level.name for level in taxonomy)])
        writer.writerows([label, *(level.groups[i] for level in taxonomy)] for i, label in enumerate(labels))


def _read_rows(path: Path) -> list[_Row]:
    if not path.is_file():
        raise DataError(f"{path} is not there; needed a CSV file with the columns path and label")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_parse(path, csv.reader(file)))
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{path} cannot be read as UTF-8 text: {exc}") from exc
    if not rows:
        raise DataError(f"{path} lists no image; needed one row an image below the header")
    seen: set[Path] = set()
    for row in rows:
        if row.path in seen:
            raise DataError(f"{row.where} lists {row.path} a second time; needed one row an image")
        seen.add(row.path)
    return rows


def _parse(path: Path, reader: Iterator[list[str]]) -> Iterator[_Row]:
    header = [name.strip() for name in next(reader, [])]
    if any(header.count(name) != 1 for name in _NEEDED) or any(header.count(name) > 1 for name in _OPTIONAL):
        raise DataError(
            f"{path} has the columns {', '.join(header) or 'none'}; needed path and label, and it may have split,"
            " group and condition, each once"
        )
    for number, fields in enumerate(reader, start=2):
        if not fields:
            continue
        where = f"{path}, row {number}"
        if len(fields) != len(header):
            raise DataError(f"{where} has {len(fields)} fields, the header {len(header)}; quote fields with commas")
        values = dict(zip(header, (field.strip() for field in fields), strict=True))
        if empty := [name for name in _NEEDED if not values[name]]:
            raise DataError(f"{where} has no {empty[0]}; needed one for every image")
        split = values.get("split", "")
        if split and split not in SPLITS:
            raise DataError(f"{where} has the split {split!r}; needed one of {', '.join(SPLITS)}")
        extra = (values.get(name, "") for name in _OPTIONAL)
        yield _Row(where, path.parent / values["path"], values["label"], *extra)


def _check_groups(path: Path, rows: Sequence[_Row]) -> None:
    homes: dict[str, str] = {}
    for row in rows:
        home = homes.setdefault(row.group, row.split) if row.group else row.split
        if home != row.split:
            raise DataError(
                f"{path}: the group {row.group!r} lies in {home} and in {row.split}, which makes their figures"
                " worthless; put all of its images in one split, or leave the split column empty to split them here"
            )
