"""CUB-200-2011 in its own files: images, the official split, and boxes of the bird, its head and its body.

Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", CNS-TR-2011-001. NABirds has the same file format.

Part R-CNN (Zhang et al. 2014, section 4.1) derives the parts head and body from CUB's 15 points without stating its
rule. Here, a part's box is the smallest one around its visible points, enlarged by `MARGIN` and clipped to the bird's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgefg.data.index import DatasetIndex
from edgefg.data.split import Sample
from edgefg.errors import DataError

_IMAGES = "images.txt"
_SPLIT = "train_test_split.txt"
_FLAGS = {"1": "train", "0": "test"}

HEAD = frozenset({"beak", "bill", "crown", "forehead", "left eye", "right eye", "nape", "throat"})
"""Points of the head; NABirds says bill. All other points belong to the body."""
MARGIN = 0.15
"""Enlargement of part boxes on every side, as a fraction of the longer side; the points are centres."""
PARTS = ("object", "head", "body")

Array = npt.NDArray[np.float32]


def is_cub(data: Path) -> bool:
    """Return whether a folder has CUB's own files."""
    return (data / _IMAGES).is_file() and (data / _SPLIT).is_file()


def read_cub(root: Path) -> DatasetIndex:
    """List the official training and test images, with the classes in official order and spelling.

    Raises:
        DataError: a file is missing, or the files disagree on images or classes.
    """
    images = _image_paths(root)
    labels_of, names = _read_table(root / "image_class_labels.txt"), _read_table(root / "classes.txt")
    flags = _read_table(root / _SPLIT)
    for file, table in (("image_class_labels.txt", labels_of), (_SPLIT, flags)):
        if missing := [key for key in images if key not in table]:
            raise DataError(f"{root / file} lacks {len(missing)} images of {_IMAGES} (first: {missing[0]}); restore it")
    used = set(labels_of.values())
    if unknown := sorted(used - set(names)):
        raise DataError(f"{root / 'classes.txt'} lacks class {unknown[0]} of image_class_labels.txt; restore it")
    if strange := sorted(set(flags.values()) - set(_FLAGS)):
        raise DataError(f"{root / _SPLIT} has the flag {strange[0]!r} instead of 1 (training) or 0 (test); restore it")
    # classes.txt of NABirds also has coarser classes, which no image belongs to.
    order = [key for key in names if key in used]
    labels = tuple(names[key] for key in order)
    if len(set(labels)) != len(labels):
        raise DataError(f"{root / 'classes.txt'} gives two classes the same name; restore it")
    index = {key: i for i, key in enumerate(order)}
    found: dict[str, list[Sample]] = {"train": [], "test": []}
    for key, path in images.items():
        found[_FLAGS[flags[key]]].append(Sample(path, index[labels_of[key]]))
    return DatasetIndex(
        format="cub",
        root=root,
        labels=labels,
        splits={split: tuple(sorted(samples)) for split, samples in found.items() if samples},
    )


def cub_box_files(root: Path) -> list[Path]:
    """Return the existing files that boxes of parts are derived from."""
    files = [root / "bounding_boxes.txt", root / "parts" / "parts.txt", root / "parts" / "part_locs.txt"]
    return [file for file in files if file.is_file()]


def _image_paths(root: Path) -> Mapping[str, Path]:
    """Return image paths by identifier. Raises `DataError`."""
    return {key: root / "images" / name for key, name in _read_table(root / _IMAGES).items()}


def _read_table(path: Path) -> Mapping[str, str]:
    """Read a file whose lines are an identifier and a value. Raises `DataError`."""
    table: dict[str, str] = {}
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not value or key in table:
            raise DataError(f"{path}, line {number}: {line!r} is not a unique identifier and a value; restore it")
        table[key] = value.strip()
    return table


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}, one of CUB's files, cannot be read: {exc}; restore it") from exc


def read_cub_boxes(root: Path, known: Collection[Path]) -> tuple[tuple[str, ...], dict[Path, Array]]:
    """Read the birds' boxes and derive those of head and body from the points.

    Args:
        root: CUB's folder.
        known: images to read the boxes of.

    Returns:
        The names of the parts: ``object`` and, if there are points, ``head`` and ``body``. The boxes of every image,
        ``float32 [parts, 4]``: x0, y0, x1, y1 in pixels, NaN for a part with fewer than two visible points. Both are
        empty if there is no ``bounding_boxes.txt``.

    Raises:
        DataError: a file is invalid, or an image has no box.
    """
    files = cub_box_files(root)
    if root / "bounding_boxes.txt" not in files:
        return (), {}
    wanted = set(known)
    images = {key: path for key, path in _image_paths(root).items() if path in wanted}
    boxes = _read_bird_boxes(root / "bounding_boxes.txt", images)
    if len(files) < 3:
        return PARTS[:1], {path: boxes[key][None] for key, path in images.items()}
    points = _read_points(root, images)
    absent = np.full((0, 2), np.nan, np.float32)
    found = {}
    for key, path in images.items():
        parts = [part_box(points.get((key, part), absent), boxes[key]) for part in PARTS[1:]]
        found[path] = np.stack([boxes[key], *parts])
    return PARTS, found


def part_box(points: Array, within: Array, margin: float = MARGIN) -> Array:
    """Return the box around the points of a part.

    Args:
        points: ``float32 [n, 2]``: x, y of the visible points.
        within: ``float32 [4]``: box to clip to.
        margin: enlargement on every side, as a fraction of the longer side.

    Returns:
        ``float32 [4]``: x0, y0, x1, y1; NaN for fewer than two points, or if the box lies outside ``within``.
    """
    absent = np.full(4, np.nan, np.float32)
    if len(points) < 2:
        return absent
    low, high = points.min(axis=0), points.max(axis=0)
    growth = margin * (high - low).max()
    box = np.concatenate([np.maximum(low - growth, within[:2]), np.minimum(high + growth, within[2:])])
    return box.astype(np.float32) if (box[:2] < box[2:]).all() else absent


def _read_bird_boxes(path: Path, images: Mapping[str, Path]) -> dict[str, Array]:
    """Read lines ``image x y width height``."""
    table = _read_table(path)
    boxes = {}
    for key in images:
        if key not in table:
            raise DataError(f"{path} has no box for image {key}; restore it")
        x, y, width, height = _numbers(table[key], 4, f"{path}, image {key}")
        if width <= 0 or height <= 0:
            raise DataError(f"{path}, image {key}: the box of {width:g}×{height:g} pixels is empty; restore it")
        boxes[key] = np.array([x, y, x + width, y + height], np.float32)
    return boxes


def _read_points(root: Path, images: Mapping[str, Path]) -> dict[tuple[str, str], Array]:
    """Read the visible points, ``image point x y visible``, by image and part."""
    names = _read_table(root / "parts" / "parts.txt")
    path = root / "parts" / "part_locs.txt"
    visible_points: dict[tuple[str, str], list[list[float]]] = {}
    for number, line in enumerate(_read_lines(path), start=1):
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
            visible_points.setdefault((key, part), []).append([x, y])
    return {place: np.array(points, np.float32) for place, points in visible_points.items()}


def _numbers(text: str, count: int, where: str) -> Sequence[float]:
    try:
        numbers = [float(field) for field in text.split()]
    except ValueError:
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise DataError(f"{where}: {text!r} is not {count} numbers; restore the file")
    return numbers
