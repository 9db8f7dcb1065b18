"""Metrics of a classifier on NumPy arrays: accuracy, calibration, risk and coverage.

Training, verification and the benchmark all call `score`, so that a figure means the same wherever it stands. Labels
and predictions are class indices. Every function raises ValueError if there is nothing to measure, if lengths
differ, or if a class index is out of range.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
_Logits = npt.NDArray[np.floating[Any]]
_Indices = npt.NDArray[np.integer[Any]]


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `score`. Fractions lie in [0, 1]."""

    images: int
    """How many images were scored."""
    top1: float
    """Share of images whose most probable class is right."""
    top1_low: float
    """Lower end of the 95 % Wilson interval of `top1`."""
    top1_high: float
    """Upper end of the 95 % Wilson interval of `top1`."""
    top5: float
    """Share of images whose class is among the five most probable; 1 with five classes or fewer."""
    balanced: float
    """Mean recall of the classes that occur in the labels."""
    macro_f1: float
    """Mean F1 of the classes that occur in the labels or the predictions."""
    ece: float
    """Expected calibration error, 15 bins."""
    aurc: float
    """Area under the risk–coverage curve; lower is better."""
    coverage_at_5_risk: float
    """Greatest share of images that can be accepted with at most 5 % errors among them."""
    nll: float
    """Mean negative log-likelihood of the right class, in nats."""


class CalibrationBins(NamedTuple):
    """Images by confidence; the last bin is that of a confidence of exactly 1."""

    images: IntArray
    """How many each bin holds, ``int64 [bins + 1]``."""
    confidence: FloatArray
    """Their mean confidence, ``float64 [bins + 1]``; NaN for an empty bin."""
    accuracy: FloatArray
    """Share of them that is right, likewise."""


def softmax(logits: npt.NDArray[np.float32], temperature: float = 1.0) -> npt.NDArray[np.float32]:
    """Divide logits by the temperature and normalise them along the last axis to probabilities (in float64)."""
    exponentials = scaled_exponentials(logits, logits.max(axis=-1, keepdims=True), temperature)
    probabilities: npt.NDArray[np.float32] = (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype(
        np.float32
    )
    return probabilities


def scaled_exponentials(
    logits: npt.NDArray[np.float32], greatest: float | npt.NDArray[np.float32], temperature: float
) -> npt.NDArray[np.float64]:
    """Return exp((logits - greatest) / temperature) in float64, which neither overflows nor divides by zero."""
    exponentials: npt.NDArray[np.float64] = np.exp(np.subtract(logits, greatest, dtype=np.float64) / temperature)
    return exponentials


def score(logits: npt.NDArray[np.float32], labels: IntArray, classes: int, temperature: float = 1.0) -> Scores:
    """Compute every metric of logits.

    Args:
        logits: ``float32 [N, classes]``, finite.
        labels: ``int64 [N]``, each in [0, classes).
        classes: number of classes.
        temperature: divides the logits before softmax (Guo et al. 2017); it moves `ece`, `nll` and the confidence that
            `aurc` and `coverage_at_5_risk` sort by.

    Raises:
        ValueError: nothing to score, shapes that do not fit, logits that are not finite, a temperature that is not
            positive.
    """
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise ValueError(f"logits have shape {list(logits.shape)}; expected [N, {classes}]")
    _check_temperature(temperature)
    _check_indices(labels, classes, len(logits))
    broken = int((~np.isfinite(logits)).any(axis=1).sum())
    if broken:
        raise ValueError(f"{broken} of {len(logits)} images have logits that are not finite; the network is broken")
    probabilities = softmax(logits, temperature)
    # argmax of the logits, not of the probabilities: float32 softmax rounds near ties together.
    predicted = logits.argmax(axis=1)
    correct = predicted == labels
    confidence = probabilities.max(axis=1)
    low, high = wilson_interval(int(correct.sum()), len(correct))
    return Scores(
        images=len(labels),
        top1=float(correct.mean()),
        top1_low=low,
        top1_high=high,
        top5=top_k_accuracy(logits, labels, k=5),
        balanced=balanced_accuracy(predicted, labels, classes),
        macro_f1=macro_f1(predicted, labels, classes),
        ece=_calibration_error(confidence, correct, bins=15),
        aurc=aurc(confidence, correct),
        coverage_at_5_risk=coverage_at_risk(confidence, correct, 0.05),
        nll=negative_log_likelihood(logits, labels, temperature),
    )


def top_k_accuracy(scores: _Logits, labels: _Indices, k: int = 1) -> float:
    """Share of images whose label is among the ``k`` best; ties go to the lower index, as in `edgefg.decision`.

    Args:
        scores: logits or probabilities, ``[N, classes]``.
        labels: ``[N]``.
        k: at least 1; more than there are classes gives 1.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {list(scores.shape)}; expected [N, classes]")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    _check_indices(labels, scores.shape[1], len(scores))
    own = scores[np.arange(len(labels)), labels][:, np.newaxis]
    earlier = np.arange(scores.shape[1]) < labels[:, np.newaxis]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    return float((rank < k).mean())


def confusion_matrix(predicted: _Indices, labels: _Indices, classes: int) -> IntArray:
    """Count images, ``int64 [classes, classes]``: row is the label, column the prediction."""
    _check_indices(labels, classes, len(predicted))
    _check_indices(predicted, classes, len(labels))
    pairs = labels.astype(np.int64) * classes + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).astype(np.int64).reshape(classes, classes)


def per_class_recall(predicted: _Indices, labels: _Indices, classes: int) -> FloatArray:
    """Share of each class's images that are predicted as it, ``float64 [classes]``; NaN for a class with no image."""
    counts = confusion_matrix(predicted, labels, classes)
    total = counts.sum(axis=1)
    recall = np.full(classes, np.nan)
    np.divide(counts.diagonal(), total, out=recall, where=total > 0)
    return recall


def balanced_accuracy(predicted: _Indices, labels: _Indices, classes: int) -> float:
    """Mean recall over the classes that occur in ``labels``; a class that was only predicted does not count."""
    return float(np.nanmean(per_class_recall(predicted, labels, classes)))


def macro_f1(predicted: _Indices, labels: _Indices, classes: int) -> float:
    """Mean F1 = 2·TP / (2·TP + FP + FN) over the classes that occur in ``labels`` or in ``predicted``.

    A class that occurs in neither is left out; one that was only predicted counts as 0. This is the rule of
    torchmetrics' ``MulticlassF1Score(average="macro")``.
    """
    counts = confusion_matrix(predicted, labels, classes)
    occurrences = counts.sum(axis=0) + counts.sum(axis=1)
    present = occurrences > 0
    return float((2.0 * counts.diagonal()[present] / occurrences[present]).mean())


def expected_calibration_error(probabilities: _Logits, labels: _Indices, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy, weighted by bin (Naeini et al. 2015; Guo et al. 2017, equation 3).

    Args:
        probabilities: ``[N, classes]``, rows that sum to 1. The greatest of a row is its confidence.
        labels: ``[N]``.
        bins: number of bins of equal width. A bin holds its lower edge; a confidence of exactly 1 has a bin of its own.
            This is the rule of torchmetrics' ``MulticlassCalibrationError(norm="l1")``.
    """
    if probabilities.ndim != 2:
        raise ValueError(f"probabilities have shape {list(probabilities.shape)}; expected [N, classes]")
    _check_indices(labels, probabilities.shape[1], len(probabilities))
    return _calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels, bins)


def negative_log_likelihood(logits: _Logits, labels: _Indices, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of the right class, in nats, of softmax(logits / temperature).

    Args:
        logits: ``[N, classes]``, finite.
        labels: ``[N]``.
        temperature: positive.
    """
    _check_temperature(temperature)
    _check_indices(labels, logits.shape[-1], len(logits))
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(scaled).sum(axis=1))
    return float((log_sum - scaled[np.arange(len(labels)), labels]).mean())


def calibration_bins(confidence: _Logits, correct: BoolArray, bins: int = 15) -> CalibrationBins:
    """Sort images into bins of equal width by confidence: what a reliability diagram shows.

    Args:
        confidence: ``[N]``, in [0, 1].
        correct: ``bool [N]``.
        bins: their number; see `expected_calibration_error` for which edge belongs to which.
    """
    _check_lengths(len(confidence), len(correct))
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    # Edges in the confidences' own precision, or a float32 1/5 would fall short of the float64 edge 3/15.
    edges = np.linspace(0, 1, bins + 1).astype(confidence.dtype)
    index = np.searchsorted(edges, confidence, side="right") - 1
    images = np.bincount(index, minlength=bins + 1).astype(np.int64)
    means = [np.full(bins + 1, np.nan) for _ in range(2)]
    for mean, values in zip(means, (confidence, correct), strict=True):
        total = np.bincount(index, weights=values.astype(np.float64), minlength=bins + 1)
        np.divide(total, images, out=mean, where=images > 0)
    return CalibrationBins(images, *means)


def risk_coverage(confidence: _Logits, correct: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Trace what accepting only the surest images costs (El-Yaniv & Wiener 2010).

    Images of equal confidence cannot be told apart by a threshold: the curve has one point for each distinct
    confidence, so it does not depend on the order of the images.

    Args:
        confidence: ``[N]``, higher is surer, no NaN.
        correct: ``bool [N]``.

    Returns:
        Coverage (share accepted, ascending, ends at 1) and risk (share of errors among the accepted), ``float64``.
    """
    _check_lengths(len(confidence), len(correct))
    if np.isnan(confidence).any():
        raise ValueError("a confidence is NaN")
    order = np.argsort(-confidence, kind="stable")
    last_of_tie = np.append(np.diff(confidence[order]) != 0, True)
    accepted = np.arange(1, len(order) + 1)[last_of_tie]
    errors = np.cumsum(~correct[order])[last_of_tie]
    return accepted / len(order), errors / accepted


def aurc(confidence: _Logits, correct: BoolArray) -> float:
    """Area under the risk–coverage curve, lower is better (Geifman & El-Yaniv 2017).

    Without ties this is the mean risk over the coverages 1/N, 2/N, … 1; images of equal confidence all count with the
    risk of accepting all of them.
    """
    coverage, risk = risk_coverage(confidence, correct)
    return float((risk * np.diff(coverage, prepend=0.0)).sum())


def coverage_at_risk(confidence: _Logits, correct: BoolArray, risk: float) -> float:
    """Greatest share of images that some threshold accepts with at most ``risk`` errors among them; 0 if none does."""
    if not 0 <= risk <= 1:
        raise ValueError(f"the risk is {risk}; it must be in [0, 1]")
    coverage, risks = risk_coverage(confidence, correct)
    return float(coverage[risks <= risk].max(initial=0.0))


def wilson_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927), good for few images and for shares near 0 and 1.

    Args:
        correct: successes, 0 to ``total``.
        total: trials, at least 1.
        level: coverage probability, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"{correct} of {total} is not a proportion; expected 0 ≤ correct ≤ total and total ≥ 1")
    if not 0 < level < 1:
        raise ValueError(f"the level is {level}; it must be between 0 and 1")
    from statistics import NormalDist  # as slow to import as all of this module, and needed for reports only

    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = correct / total
    centre = share + z * z / (2 * total)
    half = z * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    scale = 1 + z * z / total
    # The exact ends, which rounding would miss by 1e-17.
    low = 0.0 if correct == 0 else (centre - half) / scale
    high = 1.0 if correct == total else (centre + half) / scale
    return low, high


def mcnemar_p(correct_a: BoolArray, correct_b: BoolArray) -> float:
    """Return the two-sided p-value of the exact McNemar test that two classifiers are equally accurate.

    Args:
        correct_a: ``bool [N]``, which images the first classifier has right.
        correct_b: ``bool [N]``, the same images in the same order for the second one.

    Returns:
        Two-sided p of the binomial test on the images that exactly one of them has right; 1 if there are none.
    """
    _check_lengths(len(correct_a), len(correct_b))
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((~correct_a & correct_b).sum())
    total = only_a + only_b
    term = tail = 1  # binomial coefficients as whole numbers: no rounding, whatever the number of images
    for i in range(1, min(only_a, only_b) + 1):
        term = term * (total - i + 1) // i
        tail += term
    return min(1.0, float(2 * tail / 2**total))


def _calibration_error(confidence: _Logits, correct: BoolArray, bins: int) -> float:
    found = calibration_bins(confidence, correct, bins)
    filled = found.images > 0
    gap = found.images[filled] * np.abs(found.accuracy[filled] - found.confidence[filled])
    return float(gap.sum() / len(confidence))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}; it must be positive")


def _check_indices(indices: _Indices, classes: int, length: int) -> None:
    _check_lengths(length, len(indices))
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= classes:
        raise ValueError(f"class indices range from {low} to {high}; expected 0 to {classes - 1}")


def _check_lengths(first: int, second: int) -> None:
    if first != second:
        raise ValueError(f"{first} and {second} images were given; both must have one entry per image")
    if first == 0:
        raise ValueError("there is no image to score")
