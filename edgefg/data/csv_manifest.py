"""CSV manifests: a data set as a table with one row per image.

``DATA.csv`` has a header with these columns, in any order; other columns are ignored:

- ``path``: relative to the CSV's folder, or absolute;
- ``label``: the class;
- ``split``: ``train``, ``val`` or ``test``. Without this column, or if it is empty, edgefg splits the images;
- ``group``: location, patient or lot; splits never divide a group. Optional, for each image;
- ``condition``: for instance day or night infrared; calibration images are balanced over it. Optional likewise.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edgefg.data.index import TAXONOMY_FILE, DatasetIndex, listed_path, write_taxonomy
from edgefg.data.split import SPLITS, Sample
from edgefg.errors import DataError
from edgefg.files import atomic_file
from edgefg.taxonomy import TaxonomyLevel

_REQUIRED = ("path", "label")
_OPTIONAL = ("split", "group", "condition")


class _Row(NamedTuple):
    where: str
    path: Path
    label: str
    split: str
    group: str
    condition: str


def is_csv(data: Path) -> bool:
    """Return whether a path names a CSV manifest."""
    return data.suffix.lower() == ".csv" and not data.is_dir()


def read_csv(path: Path) -> DatasetIndex:
    """Read a CSV manifest, with the classes in sorted order. Does not check that the images exist.

    Raises:
        DataError: the file cannot be read, lacks a column or a field, names an unknown split, lists an image twice, or
            has a group in two splits.
    """
    rows = _read_rows(path)
    labels = tuple(sorted({row.label for row in rows}))
    position = {label: i for i, label in enumerate(labels)}
    unsplit = [row for row in rows if not row.split]
    if 0 < len(unsplit) < len(rows):
        raise DataError(
            f"{unsplit[0].where} has no split, but other rows have; give all images one of {', '.join(SPLITS)}, or none"
        )
    _check_groups(path, rows)
    splits: dict[str, list[Sample]] = {}
    for row in rows:
        splits.setdefault(row.split or "all", []).append(Sample(row.path, position[row.label]))
    return DatasetIndex(
        format="csv",
        root=path.parent,
        labels=labels,
        splits={split: tuple(sorted(samples)) for split, samples in splits.items()},
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
    """Write a CSV manifest of split data. Paths below its folder are relative, others absolute.

    If the classes have coarser levels or are not in sorted order, ``taxonomy.csv`` is written beside it.

    Args:
        path: the file to write.
        splits: samples by split.
        labels: class names by class index.
        groups: groups of the images; without any, the column is omitted.
        taxonomy: levels above the classes.
        conditions: conditions of the images; without any, the column is omitted.

    Raises:
        DataError: the file cannot be written, or the folder has the ``taxonomy.csv`` of another data set.
    """
    folder = path.parent.resolve()
    extra = {name: column for name, column in (("group", groups), ("condition", conditions)) if column}
    try:
        if taxonomy or list(labels) != sorted(labels) or (folder / TAXONOMY_FILE).is_file():
            write_taxonomy(folder / TAXONOMY_FILE, labels, taxonomy)
        with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "label", "split", *extra])
            for split, samples in splits.items():
                for image, label in samples:
                    more = (column.get(image, "") for column in extra.values())
                    writer.writerow([listed_path(folder, image), labels[label], split, *more])
    except OSError as exc:
        raise DataError(f"cannot write {path}: {exc.strerror}") from exc


def _read_rows(path: Path) -> list[_Row]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a CSV file with the columns path and label")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_parse(path, csv.reader(file)))
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{path} cannot be read as UTF-8 text: {exc}") from exc
    if not rows:
        raise DataError(f"{path} lists no images; add one row per image below the header")
    seen: set[Path] = set()
    for row in rows:
        if row.path in seen:
            raise DataError(f"{row.where} lists {row.path} a second time; remove one of the rows")
        seen.add(row.path)
    return rows


def _parse(path: Path, reader: Iterator[list[str]]) -> Iterator[_Row]:
    header = [name.strip() for name in next(reader, [])]
    if any(header.count(name) != 1 for name in _REQUIRED) or any(header.count(name) > 1 for name in _OPTIONAL):
        raise DataError(
            f"{path} has the columns {', '.join(header) or 'none'}; it needs path and label, may have split, group and"
            " condition, and each of them once"
        )
    for number, fields in enumerate(reader, start=2):
        if not fields:
            continue
        where = f"{path}, row {number}"
        if len(fields) != len(header):
            raise DataError(f"{where} has {len(fields)} fields, the header {len(header)}; quote fields with commas")
        values = dict(zip(header, (field.strip() for field in fields), strict=True))
        if empty := [name for name in _REQUIRED if not values[name]]:
            raise DataError(f"{where} has no {empty[0]}; every image needs one")
        split = values.get("split", "")
        if split and split not in SPLITS:
            raise DataError(f"{where} has the unknown split {split!r}; use one of {', '.join(SPLITS)}")
        extra = (values.get(name, "") for name in _OPTIONAL)
        yield _Row(where, path.parent / values["path"], values["label"], *extra)


def _check_groups(path: Path, rows: Sequence[_Row]) -> None:
    split_of: dict[str, str] = {}
    for row in rows:
        first = split_of.setdefault(row.group, row.split) if row.group else row.split
        if first != row.split:
            raise DataError(
                f"{path}: group {row.group!r} is in {first} and in {row.split}, so their figures are not independent;"
                " put all of its images in one split, or leave the split column empty to let edgefg split them"
            )
