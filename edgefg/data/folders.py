"""Class folders: ``DATA/{train,val,test}/<class>/*.jpg``, or ``DATA/<class>/*.jpg`` without splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from edgefg.data.index import DatasetIndex
from edgefg.data.split import SPLITS, Sample
from edgefg.errors import DataError
from edgefg.image_io import list_images

_MEANT = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}


def read_folders(root: Path, splits: Sequence[str] | None = None) -> DatasetIndex:
    """List the images in class folders, with the classes in sorted order.

    Args:
        root: the data set's folder.
        splits: the splits to list, ``all`` for a folder without any. None: all there are.

    Raises:
        DataError: the folder cannot be read, or a class folder has no image.
    """
    splits = split_folders(root) if splits is None else splits
    classes = {split: class_folders(root if split == "all" else root / split) for split in splits or ["all"]}
    labels = sorted({folder.name for folders in classes.values() for folder in folders})
    position = {name: i for i, name in enumerate(labels)}
    samples: dict[str, tuple[Sample, ...]] = {}
    ignored: Counter[str] = Counter()
    for split, folders in classes.items():
        found = []
        for folder in folders:
            images, others = list_images(folder)
            if not images:
                raise DataError(f"class folder {folder} has no images; add some, or remove the folder")
            found += [Sample(image, position[folder.name]) for image in images]
            ignored.update(others)
        samples[split] = tuple(found)
    return DatasetIndex(
        format="folders", root=root, labels=tuple(labels), splits=samples, ignored_files=dict(ignored)
    )  # fmt: skip


def split_folders(data: Path) -> list[str]:
    """Return which of ``train``, ``val`` and ``test`` are folders in ``data``.

    Raises:
        DataError: ``data`` cannot be read, or has a folder such as ``Test`` or ``valid``, which would be mistaken for a
            class or ignored.
    """
    if not data.is_dir():
        raise DataError(
            f"{data} is not a folder; give DATA/<split>/<class>/*.jpg, DATA/<class>/*.jpg, a CSV manifest or CUB's"
            " folder"
        )
    names = [entry.name for entry in class_folders(data)]
    for name in names:
        if (meant := _MEANT.get(name.lower(), name)) != name:
            raise DataError(f"{data} has {name}/, but edgefg expects {meant}/; rename it, or move it elsewhere")
    return [name for name in SPLITS if name in names]


def class_folders(folder: Path) -> list[Path]:
    """List the folders in ``folder`` in sorted order, without hidden ones. Raises `DataError` if it cannot be read."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as exc:
        raise DataError(f"cannot read the folder {folder}: {exc.strerror}") from exc
