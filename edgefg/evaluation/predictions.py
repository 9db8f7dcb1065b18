"""Accuracy of an artifact: every image of a split through `Classifier`, scored by `edgefg.metrics`.

Class folders are matched with the manifest's labels by name, never by position: a split may lack classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg import metrics
from edgefg.classifier import Classifier
from edgefg.data import load_split
from edgefg.data.checks import corrupt_message
from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.image_io import read_image
from edgefg.metrics import softmax
from edgefg.taxonomy import TaxonomyLevel

Progress = Callable[[int, int], None]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What an artifact is worth on a split."""

    data: str
    split: str
    """``train``, ``val``, ``test``, or ``all`` for data without split folders."""
    scores: metrics.Scores
    skipped: tuple[str, ...]
    """One line for each image that was left out as unreadable."""


class Predictions(NamedTuple):
    """What a model, artifact or checkpoint, says of labelled images."""

    model: str
    split: str
    """``train``, ``val``, ``test``, or ``all`` for data without split folders."""
    samples: tuple[Sample, ...]
    """The images with their class indices, as many as there are logits."""
    logits: npt.NDArray[np.float32]
    """``float32 [N, classes]``."""
    labels: tuple[str, ...]
    """The class names, in the order of the logits."""
    taxonomy: tuple[TaxonomyLevel, ...] = ()
    temperature: float = 1.0
    """Divides the logits before softmax."""
    skipped: tuple[str, ...] = ()
    """One line for each image that was left out as unreadable."""

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """The class indices of the images, ``int64 [N]``."""
        return np.array([sample.label for sample in self.samples], np.int64)

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """The most probable class of each image, ``int64 [N]``."""
        predicted: npt.NDArray[np.int64] = self.logits.argmax(axis=1)
        return predicted

    @property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """Softmax after temperature, ``float32 [N, classes]``."""
        return softmax(self.logits, self.temperature)


def evaluate(
    classifier: Classifier,
    data: Path,
    split: str | None = None,
    *,
    skip_corrupt: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Classify every image of a split and score the logits with the manifest's temperature.

    The arguments and errors are those of `predict_split`.
    """
    found = predict_split(classifier, data, split, skip_corrupt=skip_corrupt, progress=progress)
    scores = metrics.score(found.logits, found.targets, len(found.labels), found.temperature)
    return Evaluation(data=str(data), split=found.split, scores=scores, skipped=found.skipped)


def predict_split(
    classifier: Classifier,
    data: Path,
    split: str | None = None,
    *,
    skip_corrupt: bool = False,
    progress: Progress | None = None,
) -> Predictions:
    """Classify every image of a split.

    Args:
        classifier: what to measure.
        data: ``DATA/<split>/<class>/*.jpg``, or ``DATA/<class>/*.jpg``.
        split: None takes ``test`` if the data have it, else ``val``; data without split
            folders are split as training did (the manifest says how), or taken whole where it does not say.
        skip_corrupt: leave unreadable images out instead of raising; `Predictions.skipped` names those of the split.
        progress: called after each image with how many are done and how many there are.

    Raises:
        DataError: the split is missing, a class folder is not among the manifest's labels or holds no image, an image
            cannot be read, or data that are split here are not those that the artifact was trained on.
        InferenceError: the network gives logits that are not finite.
    """
    manifest = classifier.manifest
    origin = manifest.provenance
    name, images = load_split(
        data, split, classifier.labels, origin.split, trained_on=origin.dataset, skip_corrupt=skip_corrupt
    )
    logits, kept, problems = classify_files(classifier, [image.path for image in images], skip_corrupt, progress)
    return Predictions(
        model=str(classifier.path),
        split=name,
        samples=tuple(images[i] for i in kept),
        logits=logits,
        labels=classifier.labels,
        taxonomy=manifest.taxonomy,
        temperature=manifest.output.temperature,
        skipped=problems,
    )


def classify_files(
    classifier: Classifier, files: Sequence[Path], skip_corrupt: bool = False, progress: Progress | None = None
) -> tuple[npt.NDArray[np.float32], list[int], tuple[str, ...]]:
    """Classify image files one by one.

    Returns:
        The logits, ``float32 [N, classes]``, of the readable ones; their positions in ``files``; one line for each
        other.

    Raises:
        DataError: an image cannot be read and ``skip_corrupt`` is not set, or none can.
    """
    logits, kept, problems = [], [], []
    for position, file in enumerate(files):
        try:
            frame = read_image(file)
        except DataError as exc:
            problems.append(str(exc))
        else:
            logits.append(classifier.predict(frame).logits)
            kept.append(position)
        if progress is not None:
            progress(position + 1, len(files))
    if problems and not (skip_corrupt and kept):
        raise DataError(corrupt_message(problems, len(files)))
    return np.stack(logits), kept, tuple(problems)
