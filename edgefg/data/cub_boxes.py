"""Boxes of CUB-200-2011: the bird from ``bounding_boxes.txt``, head and body from the points of ``parts/``.

Part R-CNN (Zhang et al. 2014, section 4.1) takes the parts head and body from CUB's 15 points. It does not print its
rule; here a part's box is the smallest one around its visible points, grown by `MARGIN`, within the bird's own box.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgefg.data.cub import box_files, image_paths, read_table
from edgefg.errors import DataError

HEAD = frozenset({"beak", "bill", "crown", "forehead", "left eye", "right eye", "nape", "throat"})
"""CUB's points of the head; NABirds says bill. Every other point is the body's."""
MARGIN = 0.15
"""A point lies in the middle of what it names, so boxes grow by this share of their longer side on every side."""
PARTS = ("object", "head", "body")

Array = npt.NDArray[np.float32]


def read_cub_boxes(root: Path, known: Collection[Path]) -> tuple[tuple[str, ...], dict[Path, Array]]:
    """Read CUB's boxes and points.

    Args:
        root: CUB's folder.
        known: the images whose boxes are wanted.

    Returns:
        The parts, ``object`` and, where there are points, ``head`` and ``body``; and for every image ``float32
        [parts, 4]``: x0, y0, x1, y1 in pixels, NaN where fewer than two points of a part are visible. Both are empty
        where there is no ``bounding_boxes.txt``.

    Raises:
        DataError: a file is broken, or has no box of an image.
    """
    files = box_files(root)
    if root / "bounding_boxes.txt" not in files:
        return (), {}
    wanted = set(known)
    images = {key: path for key, path in image_paths(root).items() if path in wanted}
    boxes = _objects(root / "bounding_boxes.txt", images)
    if len(files) < 3:
        return PARTS[:1], {path: boxes[key][None] for key, path in images.items()}
    points = _points(root, images)
    absent = np.full((0, 2), np.nan, np.float32)
    found = {}
    for key, path in images.items():
        parts = [around(points.get((key, part), absent), boxes[key]) for part in PARTS[1:]]
        found[path] = np.stack([boxes[key], *parts])
    return PARTS, found


def around(points: Array, within: Array, margin: float = MARGIN) -> Array:
    """Return the box around a part's points.

    Args:
        points: ``float32 [n, 2]``: x, y of the visible points.
        within: ``float32 [4]``: the box that it stays in.
        margin: by which share of its longer side it grows on every side.

    Returns:
        ``float32 [4]``: x0, y0, x1, y1; NaN where there are fewer than two points, or nothing of it lies in ``within``.
    """
    nothing = np.full(4, np.nan, np.float32)
    if len(points) < 2:
        return nothing
    low, high = points.min(axis=0), points.max(axis=0)
    grown = margin * (high - low).max()
    box = np.concatenate([np.maximum(low - grown, within[:2]), np.minimum(high + grown, within[2:])])
    return box.astype(np.float32) if (box[:2] < box[2:]).all() else nothing


def _objects(path: Path, images: Mapping[str, Path]) -> dict[str, Array]:
    """Read ``image x y width height``."""
    table = read_table(path)
    boxes = {}
    for key in images:
        if key not in table:
            raise DataError(f"{path} has no box of image {key}; restore it")
        x, y, width, height = _numbers(table[key], 4, f"{path}, image {key}")
        if width <= 0 or height <= 0:
            raise DataError(f"{path}, image {key}: the box of {width:g}×{height:g} pixels is empty; restore it")
        boxes[key] = np.array([x, y, x + width, y + height], np.float32)
    return boxes


def _points(root: Path, images: Mapping[str, Path]) -> dict[tuple[str, str], Array]:
    """Read the visible points, ``image point x y visible``, by image and part."""
    names = read_table(root / "parts" / "parts.txt")
    path = root / "parts" / "part_locs.txt"
    gathered: dict[tuple[str, str], list[list[float]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}, one of CUB's files, cannot be read: {exc}; restore it") from exc
    for number, line in enumerate(lines, start=1):
        key, _, rest = line.strip().partition(" ")
        if key not in images:
            continue
        where = f"{path}, line {number}"
        point, _, numbers = rest.partition(" ")
        if point not in names:
            raise DataError(f"{where}: parts.txt has no point {point!r}; restore both")
        x, y, visible = _numbers(numbers, 3, where)
        if visible:
            part = "head" if names[point] in HEAD else "body"
            gathered.setdefault((key, part), []).append([x, y])
    return {place: np.array(points, np.float32) for place, points in gathered.items()}


def _numbers(text: str, count: int, where: str) -> Sequence[float]:
    try:
        numbers = [float(field) for field in text.split()]
    except ValueError:
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise DataError(f"{where}: {text!r} are not {count} numbers; restore the file")
    return numbers
