"""Boxes of object parts: ``DATA/boxes.csv``, one row per box.

Columns: ``path`` (relative to DATA with slashes, or absolute), ``part``, and ``x0,y0,x1,y1`` in pixels of the decoded
image (EXIF orientation applied), with x1 and y1 exclusive. A part that is not visible has no row.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgefg.data.index import BOXES_FILE, listed_path
from edgefg.errors import DataError
from edgefg.files import atomic_file

OBJECT = "object"
"""Name of the part that is the whole object."""
_COLUMNS = ["path", "part", "x0", "y0", "x1", "y1"]

Array = npt.NDArray[np.float32]


def read_boxes(
    root: Path, known: Collection[Path], left_out: Collection[Path] = ()
) -> tuple[tuple[str, ...], dict[Path, Array]]:
    """Read ``root/boxes.csv``.

    Args:
        root: the data set's folder.
        known: its images.
        left_out: images that exist but are not used; their boxes are ignored.

    Returns:
        The names of the parts in the file's order, but `OBJECT` first. The boxes of every image that has any,
        ``float32 [parts, 4]``: x0, y0, x1, y1 in pixels, NaN for an absent part. Both are empty without a file.

    Raises:
        DataError: the file cannot be read, has other columns, names an unknown image, repeats a box, or has an empty
            or invalid one. The message names the line.
    """
    path = root / BOXES_FILE
    if not path.is_file():
        return (), {}
    images, ignored = set(known), set(left_out)
    found: dict[Path, dict[str, list[float]]] = {}
    parts: dict[str, None] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            if (header := next(reader, [])) != _COLUMNS:
                raise DataError(f"{path} has the columns {','.join(header) or 'none'}; it needs {','.join(_COLUMNS)}")
            for row in reader:
                if not row:
                    continue
                where = f"{path}, line {reader.line_num}"
                image, part, box = _parse(row, root, where)
                if image not in images and image not in ignored:
                    raise DataError(
                        f"{where}: {row[0]!r} is not an image of this data set; paths are relative to {root}"
                    )
                if part in found.setdefault(image, {}):
                    raise DataError(f"{where}: {row[0]!r} has a second box of {part!r}; remove one")
                found[image][part] = box
                parts[part] = None
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{path} cannot be read as UTF-8 text: {exc}") from exc
    names = tuple(sorted(parts, key=lambda part: part != OBJECT))
    absent = [math.nan] * 4
    return names, {
        image: np.array([own.get(part, absent) for part in names], np.float32)
        for image, own in found.items()
        if image in images
    }


def write_boxes(folder: Path, names: tuple[str, ...], boxes: Mapping[Path, Array]) -> None:
    """Write ``folder/boxes.csv`` for a CSV manifest in that folder, as `read_boxes` reads it.

    Raises:
        DataError: the file cannot be written, or exists with other boxes.
    """
    path = folder / BOXES_FILE
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for image, found in boxes.items():
        for part, box in zip(names, found, strict=True):
            if not np.isnan(box).any():
                writer.writerow([listed_path(folder.resolve(), image), part, *(f"{edge:.9g}" for edge in box)])
    try:
        if path.exists() and path.read_bytes() != text.getvalue().encode():
            raise DataError(f"{path} exists and has other boxes; write to another folder")
        with atomic_file(path) as temporary:
            temporary.write_bytes(text.getvalue().encode())
    except OSError as exc:
        raise DataError(f"cannot write {path}: {exc.strerror}") from exc


def choose_parts(names: tuple[str, ...], boxes: Mapping[Path, Array], wanted: tuple[str, ...]) -> dict[Path, Array]:
    """Return the boxes of the ``wanted`` parts, in that order. Raises `DataError` if one is not among ``names``."""
    if unknown := [part for part in wanted if part not in names]:
        raise DataError(f"{BOXES_FILE} has no boxes of the part {unknown[0]!r}; it has: {', '.join(names) or 'none'}")
    columns = [names.index(part) for part in wanted]
    return {image: found[columns] for image, found in boxes.items()}


def _parse(row: list[str], root: Path, where: str) -> tuple[Path, str, list[float]]:
    """Return the image, part and box of one row."""
    if len(row) != len(_COLUMNS):
        raise DataError(f"{where} has {len(row)} fields instead of {len(_COLUMNS)}: {','.join(_COLUMNS)}")
    try:
        box = [float(field) for field in row[2:]]
    except ValueError:
        raise DataError(f"{where}: {','.join(row[2:])} is not four numbers of pixels") from None
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)) or x1 <= x0 or y1 <= y0:
        raise DataError(
            f"{where}: the box x0={x0:g}, y0={y0:g}, x1={x1:g}, y1={y1:g} is empty; x0 < x1 and y0 < y1 is required. An"
            " invisible part has no row"
        )
    if not row[1]:
        raise DataError(f"{where}: the part has no name")
    return root / row[0], row[1], box
