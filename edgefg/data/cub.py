"""CUB-200-2011 in its own files (``images.txt``, ``train_test_split.txt``, …), without torch.

Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", CNS-TR-2011-001. NABirds comes in the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgefg.data.index import Listing
from edgefg.data.split import Sample
from edgefg.errors import DataError

_IMAGES = "images.txt"
_SPLIT = "train_test_split.txt"
_FLAGS = {"1": "train", "0": "test"}


def is_cub(data: Path) -> bool:
    """Say whether a folder holds CUB's own files."""
    return (data / _IMAGES).is_file() and (data / _SPLIT).is_file()


def read_cub(root: Path) -> Listing:
    """Read the official list: training and test images, and the classes in their official order and spelling.

    Raises:
        DataError: a file is missing, or they do not speak of the same images and classes.
    """
    images = image_paths(root)
    labels_of, names = read_table(root / "image_class_labels.txt"), read_table(root / "classes.txt")
    flags = read_table(root / _SPLIT)
    for file, table in (("image_class_labels.txt", labels_of), (_SPLIT, flags)):
        if missing := [key for key in images if key not in table]:
            raise DataError(f"{root / file} lacks {len(missing)} images of {_IMAGES} (first: {missing[0]}); restore it")
    used = set(labels_of.values())
    if unknown := sorted(used - set(names)):
        raise DataError(f"{root / 'classes.txt'} lacks the class {unknown[0]} of image_class_labels.txt; restore it")
    if strange := sorted(set(flags.values()) - set(_FLAGS)):
        raise DataError(f"{root / _SPLIT} has the mark {strange[0]!r}; needed 1 (training) or 0 (test)")
    # NABirds' classes.txt has the coarser classes too, which no image is of.
    order = [key for key in names if key in used]
    labels = tuple(names[key] for key in order)
    if len(set(labels)) != len(labels):
        raise DataError(f"{root / 'classes.txt'} gives two classes one name; restore it")
    index = {key: i for i, key in enumerate(order)}
    found: dict[str, list[Sample]] = {"train": [], "test": []}
    for key, path in images.items():
        found[_FLAGS[flags[key]]].append(Sample(path, index[labels_of[key]]))
    return Listing(
        format="cub",
        root=root,
        labels=labels,
        found={part: tuple(sorted(samples)) for part, samples in found.items() if samples},
    )


def box_files(root: Path) -> list[Path]:
    """Name the files that the boxes of its parts come from, as far as they are there."""
    files = [root / "bounding_boxes.txt", root / "parts" / "parts.txt", root / "parts" / "part_locs.txt"]
    return [file for file in files if file.is_file()]


def image_paths(root: Path) -> Mapping[str, Path]:
    """Return the images' paths by their identifiers. Raises `DataError`."""
    return {key: root / "images" / name for key, name in read_table(root / _IMAGES).items()}


def read_table(path: Path) -> Mapping[str, str]:
    """Read lines of an identifier and the rest. Raises `DataError` where one is not so, or the file is missing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}, one of CUB's files, cannot be read: {exc}; restore it") from exc
    table: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not value or key in table:
            raise DataError(f"{path}, line {number}: {line!r} is not an identifier of its own and a value")
        table[key] = value.strip()
    return table
