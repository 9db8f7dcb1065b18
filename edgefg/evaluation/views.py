"""Further metrics: per class, per taxonomy level, for positive classes, and for images of no known class.

Inspection and pathology have positive and negative images and one score; ecology has images of no known class. As in
`edgefg.metrics`, labels and predictions are class indices in NumPy arrays. Every function raises ValueError if there is
nothing to measure or if lengths differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgefg.metrics import BoolArray, FloatArray, IntArray, confusion_matrix

_Values = npt.NDArray[np.floating[Any]]
_Indices = npt.NDArray[np.integer[Any]]


class ClassTable(NamedTuple):
    """Metrics of each class; every array is ``[classes]``, with NaN for undefined values."""

    images: IntArray
    """How many images have it as label."""
    recall: FloatArray
    """Share of them that is found."""
    precision: FloatArray
    """Share of the images predicted as it that are right."""
    f1: FloatArray
    """Harmonic mean of the two, 2·TP / (2·TP + FP + FN)."""


class Confusion(NamedTuple):
    """One class taken for another."""

    label: int
    predicted: int
    images: int


class Operating(NamedTuple):
    """A threshold and its effect: an image is called positive if its score reaches the threshold."""

    threshold: float
    """Infinite if no finite threshold satisfies the limit."""
    found: int
    """Positive images that reach the threshold."""
    positives: int
    """Positive images in all."""

    @property
    def recall(self) -> float:
        """Share of the positive images that is found (sensitivity)."""
        return self.found / self.positives


class Rejection(NamedTuple):
    """Known images kept and unknown images rejected by a threshold on confidence; below it images are rejected."""

    threshold: float
    kept: float
    """Share of the known images that reach the threshold."""
    rejected: int
    """Unknown images below the threshold."""
    unknown: int
    """Unknown images in all."""


def class_table(predicted: _Indices, labels: _Indices, classes: int) -> ClassTable:
    """Count images, recall, precision and F1 of each class; see `edgefg.metrics.confusion_matrix` for the arguments."""
    counts = confusion_matrix(predicted, labels, classes)
    right, of_label, of_answer = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    return ClassTable(
        of_label,
        _share(right, of_label),
        _share(right, of_answer),
        _share(2 * right, of_label + of_answer),
    )


def confusions(predicted: _Indices, labels: _Indices, classes: int) -> tuple[Confusion, ...]:
    """List which class was taken for which other and how often, the most frequent first; ties by class index."""
    counts = confusion_matrix(predicted, labels, classes)
    np.fill_diagonal(counts, 0)
    rows, columns = np.nonzero(counts)
    found = [Confusion(int(a), int(b), int(counts[a, b])) for a, b in zip(rows, columns, strict=True)]
    return tuple(sorted(found, key=lambda entry: -entry.images))


def group_predictions(probabilities: _Values, groups: Sequence[str]) -> tuple[IntArray, IntArray]:
    """Name the coarser group of each image: the one whose classes have the greatest summed probability.

    `edgefg.decision` uses the same rule for rejected predictions.

    Args:
        probabilities: ``[N, classes]``, rows that sum to 1.
        groups: for every class the name of its group.

    Returns:
        The predicted group of each image, ``int64 [N]``, and the group of each class, ``int64 [classes]``, as indices
        into the sorted distinct names.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] != len(groups):
        raise ValueError(f"probabilities have shape {list(probabilities.shape)}; expected [N, {len(groups)}]")
    names, of_class = np.unique(np.asarray(groups), return_inverse=True)
    member = (of_class[:, np.newaxis] == np.arange(len(names))).astype(np.float64)
    return (probabilities.astype(np.float64) @ member).argmax(axis=1), of_class.astype(np.int64)


def roc_auc(scores: _Values, positive: BoolArray) -> float:
    """Area under the ROC curve: how often a positive image scores higher than a negative one, ties counting half.

    Args:
        scores: ``[N]``, higher is more positive.
        positive: ``bool [N]``, of both kinds.
    """
    positives, negatives = _both_kinds(scores, positive)
    _, index = np.unique(scores, return_inverse=True)
    ups, downs = (np.bincount(index, weights=kind, minlength=index.max() + 1) for kind in (positive, ~positive))
    below = np.cumsum(downs) - downs
    return float((ups * (below + downs / 2)).sum() / (positives * negatives))


def recall_at_false_positives(scores: _Values, positive: BoolArray, rate: float) -> Operating:
    """Choose the threshold that finds most positive images while at most a share of the negative ones reaches it.

    ``rate`` is 1 - specificity, or the share of good pieces that an inspection may reject. The threshold is chosen on
    the same images that are counted.

    Args:
        scores: ``[N]``, higher is more positive.
        positive: ``bool [N]``, of both kinds.
        rate: greatest share of negative images called positive, in [0, 1].
    """
    positives, negatives = _both_kinds(scores, positive)
    if not 0 <= rate <= 1:
        raise ValueError(f"the rate is {rate}; it must be in [0, 1]")
    # In whole images, 1 - 0.95 being a little more than 0.05.
    allowed = math.floor(rate * negatives + 1e-9)
    thresholds, index = np.unique(scores, return_inverse=True)
    reached = [
        np.cumsum(np.bincount(index, weights=kind, minlength=len(thresholds))[::-1])[::-1]
        for kind in (positive, ~positive)
    ]
    fits = np.flatnonzero(reached[1] <= allowed)
    if not len(fits):
        return Operating(math.inf, 0, positives)
    return Operating(float(thresholds[fits[0]]), int(reached[0][fits[0]]), positives)


def reject_unknown(known: _Values, unknown: _Values, keep: float = 0.95) -> Rejection:
    """Reject by the greatest threshold that keeps a share of the known images.

    Args:
        known: confidences of images of known classes, ``[N]``.
        unknown: confidences of images of no known class, ``[M]``.
        keep: share of the known images to keep, in (0, 1].
    """
    if not len(known) or not len(unknown):
        raise ValueError(f"{len(known)} known and {len(unknown)} unknown images were given; give at least one of each")
    if not 0 < keep <= 1:
        raise ValueError(f"the share to keep is {keep}; it must be in (0, 1]")
    threshold = np.sort(known)[::-1][math.ceil(keep * len(known) - 1e-9) - 1]
    return Rejection(
        float(threshold), float((known >= threshold).mean()), int((unknown < threshold).sum()), len(unknown)
    )


def _share(part: IntArray, whole: IntArray) -> FloatArray:
    shares = np.full(len(whole), np.nan)
    np.divide(part, whole, out=shares, where=whole > 0)
    return shares


def _both_kinds(scores: _Values, positive: BoolArray) -> tuple[int, int]:
    _check_lengths(scores, positive)
    if np.isnan(scores).any():
        raise ValueError("a score is NaN")
    positives = int(positive.sum())
    if not 0 < positives < len(positive):
        raise ValueError(f"{positives} of {len(positive)} images are positive; give images of both kinds")
    return positives, len(positive) - positives


def _check_lengths(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> None:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} images were given; both must have one entry per image")
