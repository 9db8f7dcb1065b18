"""Accuracy of an artifact: every image of a split through `Classifier`, scored by `edgefg.metrics`.

Class folders are matched with the manifest's labels by name, never by position: a split may lack classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from edgefg import metrics
from edgefg.classifier import Classifier
from edgefg.errors import DataError
from edgefg.folders import corrupt_message, read_split
from edgefg.sources import read_image

Progress = Callable[[int, int], None]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What an artifact is worth on a split."""

    data: str
    split: str
    """``train``, ``val``, ``test``, or ``all`` for data without split folders."""
    scores: metrics.Scores
    skipped: tuple[str, ...]
    """One line for each image that was left out as unreadable."""


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
        split: None takes ``test`` if the data have it, else ``val``; data without split
            folders are split as training did (the manifest says how), or taken whole where it does not say.
        skip_corrupt: leave unreadable images out instead of raising; `Evaluation.skipped` names them.
        progress: called after each image with how many are done and how many there are.

    Raises:
        DataError: the split is missing, a class folder is not among the manifest's labels or holds no image, or an
            image cannot be read.
        InferenceError: the network gives logits that are not finite.
    """
    name, images = read_split(data, split, classifier.labels, classifier.manifest.provenance.split)
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
        raise DataError(corrupt_message(problems, len(images)))
    scores = metrics.score(
        np.stack(logits), np.array(kept, np.int64), len(classifier.labels), classifier.manifest.output.temperature
    )
    return Evaluation(data=str(data), split=name, scores=scores, skipped=tuple(problems))
