"""Labelled images in class folders, without torch: what `verify`, `evaluate` and `bench` measure on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgefg.errors import DataError
from edgefg.sources import image_files
from edgefg.split import SPLITS, Sample, SplitSpec, complete


def read_split(
    data: Path,
    split: str | None,
    labels: Sequence[str],
    spec: SplitSpec | None,
    *,
    prefer: Sequence[str] = ("test", "val"),
) -> tuple[str, tuple[Sample, ...]]:
    """List the images of one split with their class indices; return the split's name and the samples.

    Args:
        data: ``DATA/{train,val,test}/<class>/*.jpg``, or ``DATA/<class>/*.jpg``.
        split: None takes the first of ``prefer`` that there is.
        labels: the artifact's class names in order; folders are matched by name.
        spec: how training split data without split folders, from the artifact's manifest. None takes such data whole,
            under the name ``all``.
        prefer: what ``split=None`` stands for.

    Raises:
        DataError: the split is missing or empty, or a class folder is not among the labels.
    """
    if not data.is_dir():
        raise DataError(f"{data} is not a folder; needed DATA/<split>/<class>/*.jpg or DATA/<class>/*.jpg")
    present = [name for name in SPLITS if (data / name).is_dir()]
    if not present and spec is None:
        if split is not None:
            raise DataError(f"{data} has no split folders; needed {split}/: leave --split out to take all of it")
        return "all", class_samples(data, labels)
    carved = bool(spec) and (not present or ("val" not in present and "train" in present))
    offered = [*SPLITS] if not present else [name for name in SPLITS if name in present or (name == "val" and carved)]
    name = split or next((name for name in prefer if name in offered), "")
    if name not in offered:
        wanted = f"needed {split}/" if split else f"needed {' or '.join(prefer)}; or say --split train"
        raise DataError(f"{data} has the splits {', '.join(offered)}; {wanted}")
    if (data / name).is_dir() and not (carved and name == "train"):
        return name, class_samples(data / name, labels)
    assert spec is not None  # carved
    parts = {part: class_samples(data / part, labels) for part in present} or {"all": class_samples(data, labels)}
    samples = complete(parts, data, spec)[name]
    if not samples:
        raise DataError(f"{data} is too small: its {name} split is empty; add images")
    return name, samples


def class_samples(folder: Path, labels: Sequence[str]) -> tuple[Sample, ...]:
    """List the images below the class folders of ``folder``, sorted by class folder and path. Raises `DataError`."""
    index = {name: i for i, name in enumerate(labels)}
    classes = class_folders(folder)
    if not classes:
        raise DataError(f"{folder} holds no class folder; needed one folder of images a class")
    if unknown := [entry.name for entry in classes if entry.name not in index]:
        raise DataError(
            f"{folder} has {len(unknown)} class folders that the artifact does not know (first: {unknown[0]!r};"
            f" its {len(labels)} labels begin with {labels[0]!r}); use the data set that it was made from"
        )
    return tuple(Sample(path, index[entry.name]) for entry in classes for path in image_files(entry))


def class_folders(folder: Path) -> list[Path]:
    """List the folders in ``folder``, sorted, hidden ones left out. Raises `DataError` where it cannot be read."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as exc:
        raise DataError(f"cannot look into {folder}: {exc.strerror}") from exc


def corrupt_message(problems: Sequence[str], total: int) -> str:
    """Say in one line how many images of how many cannot be read, and name the first three."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return (
        f"{len(problems)} of {total} images cannot be used: {'; '.join(problems[:3])}{more};"
        " repair or remove them, or leave them out with --skip-corrupt"
    )
