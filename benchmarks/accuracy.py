"""Accuracy of an artifact: every image of a split through `Classifier`, scored by `edgefg.metrics`.

Class folders are matched with the manifest's labels by name, never by position: a split may lack classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from edgefg import metrics
from edgefg.classifier import Classifier
from edgefg.errors import DataError
from edgefg.sources import image_files, read_image

SPLITS = ("train", "val", "test")
Progress = Callable[[int, int], None]


class LabelledImage(NamedTuple):
    """An image file with the index of its class in the manifest's labels."""

    path: Path
    label: int


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What an artifact is worth on a split."""

    data: str
    split: str
    """``train``, ``val``, ``test``, or ``all`` for data without split folders."""
    scores: metrics.Scores
    skipped: tuple[str, ...]
    """One line for each image that was left out as unreadable."""


def evaluate_artifact(
    path: Path,
    data: Path,
    *,
    split: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    skip_corrupt: bool = False,
    progress: Progress | None = None,
) -> metrics.Scores:
    """Open an artifact and score it on a split; see `evaluate`, which also tells what was skipped."""
    with Classifier(path, threads=threads, device=device) as classifier:
        return evaluate(classifier, data, split, skip_corrupt=skip_corrupt, progress=progress).scores


def evaluate(
    classifier: Classifier,
    data: Path,
    split: str | None = None,
    *,
    skip_corrupt: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Classify every image of a split and score the logits with the manifest's temperature.

    Args:
        classifier: what to measure.
        data: ``DATA/<split>/<class>/*.jpg``, or ``DATA/<class>/*.jpg``.
        split: None takes ``test`` if the data have it, else ``val``; data without split folders are taken whole.
        skip_corrupt: leave unreadable images out instead of raising; `Evaluation.skipped` names them.
        progress: called after each image with how many are done and how many there are.

    Raises:
        DataError: the split is missing, a class folder is not among the manifest's labels or holds no image, or an
            image cannot be read.
        InferenceError: the network gives logits that are not finite.
    """
    folder, name = split_folder(data, split)
    images = labelled_images(folder, classifier.labels)
    logits, kept, problems = [], [], []
    for done, image in enumerate(images, start=1):
        try:
            frame = read_image(image.path)
        except DataError as exc:
            problems.append(str(exc))
        else:
            logits.append(classifier.predict(frame).logits)
            kept.append(image.label)
        if progress is not None:
            progress(done, len(images))
    if problems and not (skip_corrupt and kept):
        raise DataError(_corrupt_message(problems, len(images)))
    scores = metrics.score(
        np.stack(logits), np.array(kept, np.int64), len(classifier.labels), classifier.manifest.output.temperature
    )
    return Evaluation(data=str(data), split=name, scores=scores, skipped=tuple(problems))


def split_folder(data: Path, split: str | None = None) -> tuple[Path, str]:
    """Find the folder of class folders to measure on, and its name; `evaluate` says which. Raises `DataError`."""
    if not data.is_dir():
        raise DataError(f"{data} is not a folder; needed DATA/<split>/<class>/*.jpg or DATA/<class>/*.jpg")
    present = [name for name in SPLITS if (data / name).is_dir()]
    if split is None:
        if not present:
            return data, "all"
        split = next((name for name in ("test", "val") if name in present), None)
        if split is None:
            raise DataError(f"{data} has no split to measure on but train/; add test/ or val/, or say --split train")
    if not (data / split).is_dir():
        found = "the splits " + ", ".join(present) if present else "no split folders"
        raise DataError(f"{data} has {found}; needed {split}/: name one that is there, or leave --split out")
    return data / split, split


def labelled_images(folder: Path, labels: Sequence[str]) -> list[LabelledImage]:
    """List the images below the class folders of ``folder``, sorted by class folder and path. Raises `DataError`."""
    index = {name: i for i, name in enumerate(labels)}
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{folder} holds no class folder; needed one folder of images a class")
    if unknown := [entry.name for entry in classes if entry.name not in index]:
        raise DataError(
            f"{folder} has {len(unknown)} class folders that the artifact does not know (first: {unknown[0]!r};"
            f" its {len(labels)} labels begin with {labels[0]!r}); use the data set that it was made from"
        )
    return [LabelledImage(path, index[entry.name]) for entry in classes for path in image_files(entry)]


def _corrupt_message(problems: Sequence[str], total: int) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return (
        f"{len(problems)} of {total} images cannot be used: {'; '.join(problems[:3])}{more};"
        " repair or remove them, or leave them out with --skip-corrupt"
    )
